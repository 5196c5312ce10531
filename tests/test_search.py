"""Embedder and index together: growing an index, killing it, asking it."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rich.console
from PIL import Image

from line import ENVIRONMENT
from samething.catalog import Catalog
from samething.embedder import Embedder
from samething.errors import ArtefactError, ImageError, InputError
from samething.search import Match, Matches, Searcher, find, index
from scenes import write_things


@pytest.fixture
def pictures(tmp_path):
    return write_things(tmp_path / "pictures ä", num_things=3)


@pytest.fixture
def made(line, pictures, tmp_path):
    return index(pictures, model=line / "model", output=tmp_path / "index")


def test_only_what_is_new_is_embedded(line, pictures, made, tmp_path):
    assert (made.num_added, made.num_kept, made.index.count()) == (12, 0, 12)
    target = pictures / "thing 00 é" / "view 0.jpg"
    shutil.copy(target, pictures / "thing 00 é" / "one more.jpg")
    again = index(pictures, model=line / "model", output=tmp_path / "index")
    assert (again.num_added, again.num_kept, again.index.count()) == (1, 12, 13)
    Image.open(pictures / "thing 02 é" / "view 0.jpg").transpose(Image.Transpose.ROTATE_90).save(target)
    changed = index(pictures, model=line / "model", output=tmp_path / "index")
    assert (changed.num_added, changed.num_kept, changed.index.count()) == (1, 12, 13)
    assert find(target, index=tmp_path / "index", k=1).matches[0].score == pytest.approx(1, abs=1e-4)


def test_stored_vectors_are_the_models(line, made):
    ids = [row["id"] for batch in made.index.items() for row in batch.to_pylist()]
    expected = Embedder.load(line / "model").embed(ids)
    np.testing.assert_allclose(made.index.vectors(ids), expected, atol=1e-5)
    row = made.index.rows(ids[:1], ["label", "width", "height", "thumbnail"]).to_pylist()[0]
    assert (row["width"], row["height"]) == (96, 96) and row["label"].startswith("thing")
    assert row["thumbnail"][:2] == b"\xff\xd8"


def test_a_filter_by_domain(line, pictures, tmp_path):
    cars = Catalog.from_rows(
        [{"image": "thing 00 é/view 0.jpg", "label": "a", "domain": "cars"}], root=pictures
    ).write(tmp_path / "cars.parquet")
    index(pictures, model=line / "model", output=tmp_path / "index", domain="things")
    shutil.copytree(pictures, tmp_path / "others")
    moved = Catalog.read(cars, root=tmp_path / "others").write(tmp_path / "moved.parquet")
    index(moved, model=line / "model", output=tmp_path / "index", root=tmp_path / "others")
    query = pictures / "thing 00 é" / "view 1.jpg"
    both = find(query, index=tmp_path / "index", k=13).matches
    assert {match.domain for match in both} == {"cars", "things"} and len(both) == 13
    only = find(query, index=tmp_path / "index", k=5, domain="cars").matches
    assert [(match.label, match.domain, match.rank) for match in only] == [("a", "cars", 1)]
    assert find(query, index=tmp_path / "index", domain="no such domain").matches == ()


def test_matches_come_best_first_with_scores_in_range(made, pictures):
    found = made.find(pictures / "thing 01 é" / "view 2.jpg", k=100)
    scores = [match.score for match in found.matches]
    assert [match.rank for match in found.matches] == list(range(1, 13))
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1, abs=1e-4)
    assert max(scores) <= 1 + 1e-6 and min(scores) >= -1 - 1e-6
    image = Image.open(pictures / "thing 01 é" / "view 2.jpg")
    ways = [np.asarray(image), image, (pictures / "thing 01 é" / "view 2.jpg").read_bytes()]
    assert all(
        [m.path for m in made.find(way, k=3).matches] == [m.path for m in found.matches[:3]] for way in ways
    )


@pytest.mark.parametrize("k", [0, -1])
def test_a_k_below_one_is_refused(made, pictures, k):
    with pytest.raises(InputError, match=str(k)):
        made.find(pictures / "thing 01 é" / "view 2.jpg", k=k)


def test_a_query_that_cannot_be_read(made, tmp_path):
    (tmp_path / "no.jpg").write_text("text")
    for picture in (tmp_path / "no.jpg", tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(ImageError, match=picture.name):
            made.find(picture)


def test_an_index_that_is_not_there(line, tmp_path, pictures):
    with pytest.raises(ArtefactError, match="does not exist"):
        Searcher.open(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="nowhere"):
        find(pictures / "thing 01 é" / "view 2.jpg", index=tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="model folder"):
        find(pictures / "thing 01 é" / "view 2.jpg", index=line / "model")


def test_markup_in_labels_and_paths_is_text():
    """A folder called [red] or [/] must neither colour nor break the table."""
    match = Match(1, 0.5, "/p/[bold]x[/bold].jpg", "[/] [red]label", "[dim]d")
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(Matches("[link]q.jpg", (match,)))
    text = console.export_text()
    for part in (match.path, match.label, match.domain, "[link]q.jpg", "0.500"):
        assert part in text


def test_markup_in_unreadable_paths_is_text(line, made, pictures):
    (pictures / "thing 00 é" / "[bold]bad[red].jpg").write_bytes(b"\xff\xd8\xff")
    again = index(pictures, model=line / "model", output=Path(made.index.location))
    assert again.exit_status == 3 and len(again.unreadable) == 1
    console = rich.console.Console(width=400, record=True, file=io.StringIO())
    console.print(again)
    assert "[bold]bad[red].jpg" in console.export_text()


KILLED = """
import sys, samething.search
samething.search._ROWS_A_WRITE = 2
from samething.cli import main
main(sys.argv[1:])
"""


def test_kill_and_resume_lose_nothing(line, tmp_path):
    pictures, target = write_things(tmp_path / "p", num_things=10, num_views=8), tmp_path / "index"
    command = [
        sys.executable, "-c", KILLED,
        "index", str(pictures), "--model", str(line / "model"), "-o", str(target),
    ]  # fmt: skip
    kills = counted = 0
    for delay in (0.0, 0.3, 0.7):
        process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT
        )
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and stored(target) <= counted:
            time.sleep(0.02)
        time.sleep(delay / 2)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        counted = stored(target)
    kept = Searcher.open(target).index.count()
    done = index(pictures, model=line / "model", output=target)
    assert kills > 0 and 0 < kept < 80
    assert (done.num_kept, done.num_added, done.index.count()) == (kept, 80 - kept, 80)
    whole = index(pictures, model=line / "model", output=tmp_path / "whole")
    ids = sorted(str(path.resolve()) for path in pictures.rglob("*.jpg"))
    np.testing.assert_allclose(done.index.vectors(ids), whole.index.vectors(ids), atol=1e-5)
    assert not done.index.verify().problems


def stored(folder: Path) -> int:
    """Data files of the index so far, without opening it."""
    return len(list(folder.rglob("*.lance")))
