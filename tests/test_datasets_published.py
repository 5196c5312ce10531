"""The real thing, where it is on this disk: what is read has the published numbers.

pytest tests/test_datasets_published.py --data-root FOLDER, or SAMETHING_DATA_ROOT=FOLDER.
"""

from pathlib import Path

import pytest

from samething.datasets import DATASETS
from samething.datasets.official import OfficialFiles
from samething.errors import ArtefactError


@pytest.fixture(scope="module")
def data_root(request) -> Path:
    given = request.config.getoption("--data-root")
    if not given:
        pytest.skip(
            "no data root: give --data-root FOLDER or set SAMETHING_DATA_ROOT to check real data sets"
        )
    return Path(given)


@pytest.mark.parametrize("key", [key for key, dataset in DATASETS.items() if dataset.published])
def test_what_is_read_has_the_published_numbers(data_root, key):
    dataset = DATASETS[key]
    try:
        table = dataset.reader(OfficialFiles(dataset=dataset, data_root=data_root))
    except ArtefactError as error:
        pytest.skip(error.given)
    for published in dataset.published:
        assert not published.differs(table), f"{published.describe()}, found {published.count(table)}"
