"""M4D-35k: the paper's training set, put together from four others."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles

# First folder of a path → data set and domain.
_PARTS: Final = {
    "products-10k": ("products_10k", "packaged goods"),
    "google_landmark_recognition_2021": ("gldv2", "landmarks"),
    "deepfashion": ("deep_fashion", "apparel"),
    "stanford_cars": ("stanford_cars", "cars"),
}


def read_m4d_35k(source: OfficialFiles) -> pa.Table:
    """``m4d-35k_train.csv`` (img_path, label); the data set of a row is the first folder of its path."""
    where = "m4d-35k_train.csv"
    table = source.csv(where, ("img_path", "label"))
    folder = pc.list_element(pc.split_pattern(table["img_path"], "/", max_splits=1), 0)
    place = pc.index_in(folder, value_set=pa.array(list(_PARTS)))
    wrong = pc.index(pc.is_null(place), True).as_py()
    if wrong >= 0:
        raise source.malformed(
            where,
            f"row {wrong} has the path {table['img_path'][wrong].as_py()!r}",
            expected=f"paths that begin with {', '.join(_PARTS)}",
        )
    dataset, domain = (
        pa.array([part[side] for part in _PARTS.values()]).take(place.combine_chunks()) for side in (0, 1)
    )
    return source.rows(where, image=table["img_path"], label=table["label"], domain=domain, dataset=dataset)


M4D_35K = Dataset(
    key="m4d_35k",
    title="M4D-35k",
    domain="several",
    classes=34_800,
    images=328_400,
    licence="that of its four parts: research only",
    source="https://github.com/morrisfl/UniFEx",
    get="save data/m4d-35k_train.csv of the source in the data root; the images are those of products_10k, "
    "gldv2, deep_fashion and stanford_cars, in the same data root",
    files=("m4d-35k_train.csv", *(f"{name}/" for name in _PARTS)),
    layout="README and src/datasets/m4d35k.py of the source",
    reader=read_m4d_35k,
    has_roles=True,  # all of it is for training, as published
    published=(
        Published(where={"dataset": "products_10k"}, classes=9_500, images=141_500, rounded_to=100),
        Published(where={"dataset": "gldv2"}, classes=10_000, images=79_200, rounded_to=100),
        Published(where={"dataset": "deep_fashion"}, classes=14_300, images=100_400, rounded_to=100),
        Published(where={"dataset": "stanford_cars"}, classes=1_000, images=7_300, rounded_to=100),
        Published(classes=34_800, images=328_400, rounded_to=100),
    ),
    note="published numbers are rounded to 100",
)
