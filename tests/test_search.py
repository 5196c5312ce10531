"""Embedder and index together: growing an index, killing it, asking it."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rich.console
import scipy.sparse.csgraph
from PIL import Image, ImageGrab

from line import ENVIRONMENT, samething
from samething.calibration import Calibration
from samething.catalog import Catalog
from samething.cli import main
from samething.embedder import Embedder
from samething.errors import ArtefactError, FingerprintError, ImageError, InputError
from samething.files import file_sha256
from samething.images import Box, decode, decoding, thumbnail
from samething.index import create_index
from samething.search import (
    Changes,
    Match,
    Matches,
    Searcher,
    compact,
    duplicates,
    find,
    index,
    prepare,
    rebuild,
    searcher,
    sync,
    verify,
)
from samething.search.collection import THUMBNAIL_SIDE
from samething.search.feature_vectors import KnownVectors
from samething.search.matches import with_thumbnails
from scenes import photographs, write_things


@pytest.fixture
def images(tmp_path):
    return write_things(tmp_path / "images ä", num_things=3)


@pytest.fixture
def made(line, images, tmp_path):
    return index(images, model=line / "model", output=tmp_path / "index")


def test_only_what_is_new_is_embedded(line, images, made, tmp_path):
    assert (made.num_added, made.num_kept, made.index.count()) == (12, 0, 12)
    target = images / "thing 00 é" / "view 0.jpg"
    shutil.copy(target, images / "thing 00 é" / "one more.jpg")
    again = index(images, model=line / "model", output=tmp_path / "index")
    assert (again.num_added, again.num_kept, again.index.count()) == (0, 12, 12)  # a copy, stored once
    assert again.changes.num_moved == 1
    copies = find(images / "thing 00 é" / "view 0.jpg", index=tmp_path / "index", k=1).matches[0].copies
    assert [Path(path).name for path in copies] == ["view 0.jpg"]
    Image.open(images / "thing 02 é" / "view 0.jpg").transpose(Image.Transpose.ROTATE_90).save(target)
    changed = index(images, model=line / "model", output=tmp_path / "index")
    assert (changed.num_added, changed.num_kept, changed.index.count()) == (1, 12, 13)
    assert find(target, index=tmp_path / "index", k=1).matches[0].score == pytest.approx(1, abs=0.02)


def test_a_new_image_is_decoded_once(line, images, tmp_path, monkeypatch):
    decoded = []
    plain = decoding._to_rgb
    monkeypatch.setattr(decoding, "_to_rgb", lambda *given: decoded.append(given) or plain(*given))
    made = index(images, model=line / "model", output=tmp_path / "index")
    assert len(decoded) == made.num_added == 12
    row = next(iter(made.index.items(columns=["path", "width", "height", "thumbnail"]))).to_pylist()[0]
    upright = decode(row["path"])
    assert (row["width"], row["height"]) == upright.size
    assert row["thumbnail"] == thumbnail(upright, longer_side=THUMBNAIL_SIDE)


def test_a_query_opens_the_index_once(made, images, tmp_path, monkeypatch):
    opened = []
    plain = searcher.open_index
    monkeypatch.setattr(
        searcher, "open_index", lambda *given, **named: opened.append(given) or plain(*given, **named)
    )
    find(images / "thing 00 é" / "view 0.jpg", index=tmp_path / "index")
    assert len(opened) == 1


def test_stored_vectors_are_the_models(line, made):
    rows = [row for batch in made.index.items() for row in batch.to_pylist()]
    ids = [row["id"] for row in rows]
    embedder = Embedder.load(line / "model")  # which keeps vectors in codes
    expected = embedder.decode(embedder.encode(embedder.embed([row["path"] for row in rows])))
    np.testing.assert_allclose(made.index.vectors(ids), expected, atol=1e-5)
    row = made.index.rows(ids[:1], ["label", "width", "height", "thumbnail"]).to_pylist()[0]
    assert (row["width"], row["height"]) == (96, 96) and row["label"].startswith("thing")
    assert row["thumbnail"][:2] == b"\xff\xd8"


def test_a_filter_by_domain(line, images, tmp_path):
    cars = Catalog.from_rows(
        [{"image": "thing 00 é/view 0.jpg", "label": "a", "domain": "cars"}], root=images
    ).write(tmp_path / "cars.parquet")
    index(images, model=line / "model", output=tmp_path / "index", domain="things")
    shutil.copytree(images, tmp_path / "others")
    moved = Catalog.read(cars, root=tmp_path / "others").write(tmp_path / "moved.parquet")
    index(moved, model=line / "model", output=tmp_path / "index", root=tmp_path / "others")
    query = images / "thing 00 é" / "view 1.jpg"
    both = find(query, index=tmp_path / "index", k=13).matches
    assert len(both) == 12  # the image of both domains is stored once, and found in both
    only = find(query, index=tmp_path / "index", k=5, domain=["cars"]).matches
    assert [len(match.copies) for match in only] == [1]
    things = find(query, index=tmp_path / "index", k=20, domain=["things"]).matches
    assert only[0].id in {match.id for match in things} and len(things) == 12
    assert find(query, index=tmp_path / "index", domain=["no such domain"]).matches == ()
    folder = images / "thing 01 é"
    assert len(find(query, index=tmp_path / "index", k=20, folder=folder).matches) == 4
    assert len(find(query, index=tmp_path / "index", k=20, with_label=["a"]).matches) == 1
    for conditions, number in ((["width=96..96", "height=..96"], 12), (["width=97.."], 0)):
        assert len(find(query, index=tmp_path / "index", k=20, where=conditions).matches) == number
    with pytest.raises(InputError, match="colour"):
        find(query, index=tmp_path / "index", where=["colour=red"])


def test_matches_come_best_first_with_scores_in_range(made, images):
    found = made.find(images / "thing 01 é" / "view 2.jpg", k=100)
    scores = [match.score for match in found.matches]
    assert [match.rank for match in found.matches] == list(range(1, 13))
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1, abs=0.02)
    assert max(scores) <= 1 + 1e-6 and min(scores) >= -1 - 1e-6
    image = Image.open(images / "thing 01 é" / "view 2.jpg")
    ways = [np.asarray(image), image, (images / "thing 01 é" / "view 2.jpg").read_bytes()]
    assert all(
        [m.path for m in made.find(way, k=3).matches] == [m.path for m in found.matches[:3]] for way in ways
    )


@pytest.mark.parametrize("k", [0, -1])
def test_a_k_below_one_is_refused(made, images, k):
    with pytest.raises(InputError, match=str(k)):
        made.find(images / "thing 01 é" / "view 2.jpg", k=k)


def test_a_query_that_cannot_be_read(made, tmp_path):
    (tmp_path / "no.jpg").write_text("text")
    for image in (tmp_path / "no.jpg", tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(ImageError, match=image.name):
            made.find(image)


def test_an_index_that_is_not_there(line, tmp_path, images):
    with pytest.raises(ArtefactError, match="does not exist"):
        Searcher.open(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="nowhere"):
        find(images / "thing 01 é" / "view 2.jpg", index=tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="model folder"):
        find(images / "thing 01 é" / "view 2.jpg", index=line / "model")


def test_markup_in_labels_and_paths_is_text():
    """A folder called [red] or [/] must neither colour nor break the table."""
    match = Match(1, 0.5, "/p/[bold]x[/bold].jpg", "[/] [red]label", "[dim]d")
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(Matches("[link]q.jpg", (match,)))
    text = console.export_text()
    for part in (match.path, match.label, match.domain, "[link]q.jpg", "0.500"):
        assert part in text


def test_markup_in_unreadable_paths_is_text(line, made, images):
    (images / "thing 00 é" / "[bold]bad[red].jpg").write_bytes(b"\xff\xd8\xff")
    again = index(images, model=line / "model", output=Path(made.index.location))
    assert again.exit_status == 3 and len(again.unreadable) == 1
    console = rich.console.Console(width=400, record=True, file=io.StringIO())
    console.print(again)
    assert "[bold]bad[red].jpg" in console.export_text()


def test_images_of_one_colour_are_named(line, made, images):
    """They were indexed without a word, and all found each other with a score of 1."""
    assert made.changes.blank == ()
    colours = {"white.png": "white", "black.jpg": "black", "red.webp": (200, 10, 30)}
    for name, colour in colours.items():
        Image.new("RGB", (300, 200), colour).save(images / name)
    again = index(images, model=line / "model", output=Path(made.index.location))
    assert {Path(path).name for path in again.changes.blank} == set(colours)
    assert again.exit_status == 0
    console = rich.console.Console(width=400, record=True, file=io.StringIO())
    console.print(again)
    text = console.export_text()
    assert "3 images are of one colour, and so all alike:" in text and "red.webp" in text


READY = """
import sys, samething.embedder, samething.search.searcher
samething.search.storing._ROWS_A_WRITE = 2
import onnxruntime
from samething.cli import main
print("ready", flush=True)
main(sys.argv[1:])
"""
KILLED = """
import sys, samething.search.searcher
samething.search.storing._ROWS_A_WRITE = 2
from samething.cli import main
main(sys.argv[1:])
"""


def test_kill_and_resume_lose_nothing(line, tmp_path):
    images, target = write_things(tmp_path / "p", num_things=10, num_views=8), tmp_path / "index"
    command = [
        sys.executable, "-c", KILLED,
        "index", str(images), "--model", str(line / "model"), "-o", str(target),
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
    done = index(images, model=line / "model", output=target)
    assert kills > 0 and 0 < kept < 80
    assert (done.num_kept, done.num_added, done.index.count()) == (kept, 80 - kept, 80)
    whole = index(images, model=line / "model", output=tmp_path / "whole")
    ids = sorted(row["id"] for batch in whole.index.items([]) for row in batch.to_pylist())
    np.testing.assert_allclose(done.index.vectors(ids), whole.index.vectors(ids), atol=1e-5)
    assert not done.index.verify().problems


def stored(folder: Path) -> int:
    """Bytes of vectors of the index so far, without opening it."""
    return sum(path.stat().st_size for path in folder.glob("vectors-*"))


# ---- keeping current


def test_sync_follows_every_kind_of_change(line, images, made, tmp_path):
    """Renamed and moved files keep their vectors; changed ones are embedded; deleted ones go."""
    place = tmp_path / "index"
    before = {row["path"]: row["id"] for batch in made.index.items() for row in batch.to_pylist()}
    quiet = sync(place)
    assert quiet.changes == Changes(num_kept=12)
    first, second, third = (images / f"thing 0{number} é" / "view 0.jpg" for number in range(3))
    (images / "elsewhere").mkdir()
    first.rename(images / "elsewhere" / "renamed.jpg")
    second.unlink()
    Image.open(third).transpose(Image.Transpose.ROTATE_90).save(third)
    shutil.copy(third, images / "new.jpg")
    done = sync(place).changes
    assert (done.num_added, done.num_kept, done.num_moved, done.num_dropped) == (1, 9, 1, 2)
    assert done.num_read == 3  # what did not change is not read
    rows = {row["id"]: row for batch in made.index.items() for row in batch.to_pylist()}
    assert len(rows) == 11
    moved = rows[before[str(first)]]
    assert (Path(moved["path"]).name, moved["label"]) == ("renamed.jpg", "elsewhere")
    assert before[str(second)] not in rows and before[str(third)] not in rows
    assert find(images / "new.jpg", index=place, k=1).matches[0].score == pytest.approx(1, abs=0.02)
    assert sync(place).changes == Changes(num_kept=12)
    assert not made.index.verify().problems


def test_an_index_that_follows_nothing(made, tmp_path):
    made.index.set_notes("collections", dict.fromkeys(made.index.notes("collections")))
    with pytest.raises(InputError, match="does not say which folders"):
        sync(tmp_path / "index")


def test_an_unreadable_file_is_listed_and_its_old_row_goes(images, made, tmp_path):
    """Content that was replaced by something unreadable must not be found any more."""
    broken = images / "thing 00 é" / "view 0.jpg"
    broken.write_bytes(b"\xff\xd8\xff no image")
    done = sync(tmp_path / "index")
    assert done.exit_status == 3 and [path for path, _ in done.unreadable] == [str(broken)]
    assert done.index.count() == 11


def test_two_folders_and_a_moved_index(line, made, images, tmp_path):
    others = write_things(tmp_path / "others", num_things=4)
    shutil.copy(images / "thing 00 é" / "view 0.jpg", others / "copy.jpg")
    grown = index(others, model=line / "model", output=tmp_path / "index")
    assert grown.index.count() == len({row["id"] for b in grown.index.items([]) for row in b.to_pylist()})
    names = {path.name for path in tmp_path.iterdir()}
    assert {"index", "others"} <= names
    assert sync(tmp_path / "index").changes.num_added == 0
    shutil.rmtree(others)
    assert sync(tmp_path / "index").exit_status == 3
    assert sync(tmp_path / "index", forget=[others]).index.count() == 12


def test_several_images_a_crop_a_label_and_a_row(made, images):
    views = [images / "thing 01 é" / f"view {number}.jpg" for number in range(3)]
    mean, most = (made.find(*views, k=4, combine=how) for how in ("mean", "max"))
    for found in (mean, most):
        assert {match.label for match in found.matches[:3]} == {"thing 01 é"}
    assert most.matches[2].score == pytest.approx(1, abs=0.02)
    assert most.matches[2].score > mean.matches[2].score
    whole = made.find(views[0], k=3, crop=Box(0, 0, 96, 96))
    assert [match.id for match in whole.matches] == [match.id for match in made.find(views[0], k=3).matches]
    part = made.find(views[0], k=3, crop=Box(0, 0, 40, 40))
    assert part.matches[0].score < 0.9999
    with pytest.raises(InputError, match="crop"):
        made.find(*views, crop=Box(0, 0, 9, 9))
    by_label = made.find_label("thing 01 é", k=20)
    assert len(by_label.matches) == 8 and "thing 01 é" not in {match.label for match in by_label.matches}
    with pytest.raises(InputError, match="no such thing"):
        made.find_label("no such thing")
    row = mean.matches[0].id
    assert row not in {match.id for match in made.find_row(row, k=20).matches}


def test_a_second_look_brings_up_what_shows_the_same_places(line, tmp_path):
    """A thing seen in perspective is found by its places, which are told; what was not looked at stays."""
    folder, photos = tmp_path / "images", photographs()
    folder.mkdir()
    for number, photo in enumerate(photos):
        photo.resize((400, 300)).save(folder / f"{number}.png")
        photo.resize((400, 300)).rotate(180).save(folder / f"{number} upside down.png")
    searcher = index(folder, model=line / "model", output=tmp_path / "index")
    # a part of one photograph inside a grey image: for the model it is like others as well
    query = Image.new("RGB", (400, 300), "grey")
    query.paste(photos[1].resize((400, 300)).crop((100, 50, 260, 210)).resize((110, 110)), (30, 150))
    first = searcher.find(query, k=12)
    found = searcher.find(query, k=12, rerank="geometry")
    assert Path(found.matches[0].path).name in ("1.png", "1 upside down.png")
    best = found.matches[0]
    assert best.evidence["by"] == "geometry" and best.evidence["agreeing"] > 8 and best.evidence["added"] > 0
    assert best.verified.endswith(f"{best.evidence['agreeing']} points agree")
    for x, y, *_ in best.evidence["points"]:
        assert 30 / 400 <= x <= 140 / 400 and 150 / 300 <= y <= 260 / 300
    # the scores stay cosines, and what nothing speaks for keeps its order and its probability
    assert {match.id: match.score for match in found.matches} == {m.id: m.score for m in first.matches}
    silent = [match for match in found.matches if not match.evidence["added"]]
    assert len(silent) > 4
    kept = {match.id: match for match in first.matches}
    assert [m.id for m in silent] == [m.id for m in first.matches if m.id in {s.id for s in silent}]
    assert [m.probability for m in silent] == [kept[m.id].probability for m in silent]
    raised = [match for match in found.matches if match.evidence["added"]]
    if best.probability is not None:
        assert all(match.probability >= kept[match.id].probability for match in raised)
    assert (tmp_path / "index" / "second-look.sqlite").is_file()
    value = json.loads(found.write(tmp_path / "m.json").read_text())
    assert value["matches"][0]["evidence"]["agreeing"] == best.evidence["agreeing"]
    # the page shows the lines between the places, inside itself
    page = found.write(tmp_path / "m.html", query_image=query).read_text()
    num_shown = sum(bool(match.evidence["points"]) for match in found.matches)
    assert page.count("places that agree") == num_shown > 0 and "https://" not in page
    assert f"{best.evidence['agreeing']} points agree" in page
    # of the index's own images and of a label
    row = searcher.find_row(best.id, k=3, rerank="geometry")
    assert best.id not in {match.id for match in row.matches}
    assert Path(row.matches[0].path).name.split()[0].split(".")[0] == "1"
    tiny = searcher.second_look("geometry", budget_ms=1e-6)
    late = searcher.find(query, k=12, rerank=tiny)
    assert [match.id for match in late.matches] == [match.id for match in first.matches]
    assert all(match.evidence is None for match in late.matches)
    with pytest.raises(InputError, match="geometry"):
        searcher.find(query, rerank="nonsense")
    with pytest.raises(InputError, match="budget"):
        searcher.second_look("geometry", budget_ms=0.0)


def test_an_index_is_prepared_for_a_second_look_and_learns_what_it_is_worth(line, images, made, tmp_path):
    """From labels and from views; what an image that left the index needed is forgotten."""
    done = prepare(tmp_path / "index")
    assert (done.num_kept, done.unreadable, done.exit_status) == (12, (), 0)
    assert done.trust.taught_by == "views" and done.trust.num_pairs > 12
    assert made.second_look("geometry").trust == done.trust
    own = np.array(made.second_look("geometry").reranker.weights)
    assert all((np.array(weights) <= 2 * own).all() for weights in done.trust.weights.values())
    (images / "thing 00 é" / "view 0.jpg").unlink()
    (images / "thing 01 é" / "view 0.jpg").write_bytes(b"damaged")
    sync(tmp_path / "index", drop=True)
    labelled = prepare(tmp_path / "index", labels=True)
    assert labelled.trust.taught_by == "labels"
    with sqlite3.connect(tmp_path / "index" / "second-look.sqlite") as db:
        keys = {key for (key,) in db.execute("SELECT key FROM kept")}
    assert len(keys) == labelled.num_kept == made.index.count() < 12
    assert made.second_look("geometry").trust == labelled.trust


def test_matches_are_written_as_asked(made, images, tmp_path):
    found = made.find(images / "thing 01 é" / "view 0.jpg", k=3)
    value = json.loads(found.write(tmp_path / "m.json").read_text())
    assert [match["path"] for match in value["matches"]] == [match.path for match in found.matches]
    rows = list(csv.DictReader(io.StringIO(found.write(tmp_path / "m.csv").read_text())))
    assert [float(row["score"]) for row in rows] == pytest.approx([m.score for m in found.matches], abs=1e-6)
    page = found.write(tmp_path / "m.html", query_image=images / "thing 01 é" / "view 0.jpg").read_text()
    assert page.count("data:image/jpeg") == 4 and "https://" not in page
    with pytest.raises(InputError, match=r"\.json, \.csv or \.html"):
        found.write(tmp_path / "m.txt")


def steep(scores: np.ndarray, middle: float) -> Calibration:
    """A calibration that is sure of the best score and sure that the others are wrong."""
    fitted = Calibration.fit(scores, scores >= middle)
    slope = 8 / (float(scores[0]) - middle)
    return dataclasses.replace(fitted, slope=slope, intercept=-slope * middle)


def test_a_calibrated_model_gives_probabilities_and_no_match(made, images):
    query = images / "thing 01 é" / "view 0.jpg"
    made = dataclasses.replace(
        made,
        embedder=dataclasses.replace(made.embedder, config={**made.embedder.config, "calibration": None}),
    )
    plain = made.find(query, k=12)
    assert plain.calibrated_by is None and not plain.is_no_match and plain.matches[0].probability is None
    assert plain.advice == "" and [band for band, _ in plain.sections()] == [None]
    scores = np.array([match.score for match in plain.matches])
    middle = float(scores[:2].mean())
    fitted = steep(scores, middle)
    config = {**made.embedder.config, "calibration": json.loads(json.dumps(fitted.to_json()))}
    calibrated = dataclasses.replace(made, embedder=dataclasses.replace(made.embedder, config=config))
    found = calibrated.find(query, k=12)
    assert [match.score for match in found.matches] == [match.score for match in plain.matches]
    odds = np.exp(fitted.slope * scores + fitted.intercept)
    assert [match.probability for match in found.matches] == pytest.approx(list(odds / (1 + odds)), rel=1e-9)
    bands = [match.band for match in found.matches]
    chances = [match.probability for match in found.matches]
    expected = ["the same" if p >= 0.7 else "perhaps" if p >= 0.1 else "no match" for p in chances]
    assert bands == expected and len(set(bands)) > 1 and found.calibrated_by == "labels"
    assert not found.is_no_match and found.band == bands[0]
    assert sum(len(matches) for _, matches in found.sections()) == 12  # a search hides nothing
    # the same thing left out, the best that remains is no match
    best = found.matches[0].id
    vectors = made.embedder.embed([query])
    rest = calibrated.find_vectors(vectors, name="rest", k=3, leave_out=[best])
    assert rest.is_no_match and rest.to_json()["no_match"]
    shown = io.StringIO()
    rich.console.Console(file=shown, width=200).print(rest)
    assert "no match" in shown.getvalue() and "%" in shown.getvalue() and rest.advice in shown.getvalue()
    assert all(Path(match.path).name in shown.getvalue() for match in rest.matches)
    # a model that is never sure of half of its answers said "no match" to each, at whatever probability
    config["calibration"]["threshold"] = None
    never = dataclasses.replace(made, embedder=dataclasses.replace(made.embedder, config=config)).find(query)
    assert never.band == bands[0] and not never.is_no_match


def test_paths_are_whole_and_links_and_the_index_is_found_from_inside(made, images, tmp_path, monkeypatch):
    """A table broke long paths over its lines, so that none could be copied."""
    query = images / "thing 01 é" / "view 0.jpg"
    deep = images / ("a rather long name " * 6) / "and another [folder]" / "x.png"
    deep.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64), "purple").save(deep)
    sync(made.index.location)
    for place in (tmp_path, Path(made.index.location), tmp_path / "images ä" / "thing 01 é"):
        monkeypatch.chdir(place)
        found = find(deep, k=2)  # ./index, the folder itself, or beside one above
        assert found.matches[0].path == str(deep)
    shown = io.StringIO()
    rich.console.Console(file=shown, width=40).print(found, crop=False)
    assert str(deep) in shown.getvalue().splitlines()[2]
    linked = io.StringIO()
    rich.console.Console(file=linked, width=40, force_terminal=True).print(found, crop=False)
    assert f";{deep.as_uri()}\x1b\\" in linked.getvalue() and "\x1b]8;" not in shown.getvalue()
    # --open runs the program that shows images
    program, note = tmp_path / "bin" / "xdg-open", tmp_path / "opened"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf %s "$1" > "{note}.part"; mv "{note}.part" "{note}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "linux")
    find(query, k=1, open=True)
    deadline = time.monotonic() + 60
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert note.read_text() == str(query)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="cannot be opened here"):
        find(query, k=1, open=True)


def test_the_command_gives_probabilities_and_no_match(line, made, images, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "COLUMNS", "40")  # paths are whole in a narrow terminal too
    query, folder = images / "thing 01 é" / "view 0.jpg", tmp_path / "calibrated"
    shutil.copytree(line / "model", folder)
    scores = np.array([match.score for match in made.find(query, k=12).matches])
    fitted = steep(scores, float(scores[:2].mean()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "calibration": fitted.to_json()}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["content"]["sha256"]["config.json"] = file_sha256(folder / "config.json")
    manifest["content"]["bytes"]["config.json"] = (folder / "config.json").stat().st_size
    del manifest["content_fingerprint"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    command = [
        "find",
        "--index",
        made.index.location,
        "--model",
        folder,
        "--k",
        "3",
        "-o",
        tmp_path / "m.json",
    ]
    done = samething(*command, query)
    assert done.returncode == 0 and "%" in done.stdout, done.stderr
    found = json.loads((tmp_path / "m.json").read_text())
    assert not found["no_match"] and found["calibrated_by"] == "labels" and found["advice"]
    assert found["matches"][0]["path"] in done.stdout
    assert found["band"] == found["matches"][0]["band"] and found["band"] in done.stdout
    probabilities = [match["probability"] for match in found["matches"]]
    assert probabilities == pytest.approx(fitted.probability(scores)[:3], abs=1e-6)
    Image.new("RGB", (96, 96), "orange").save(tmp_path / "orange.png")
    done = samething(*command, tmp_path / "orange.png")
    assert done.returncode == 0 and "no match" in done.stdout, done.stderr
    assert json.loads((tmp_path / "m.json").read_text())["no_match"]


def test_a_feature_folder_skips_the_backbone(line, tmp_path, monkeypatch):
    usual = index(line / "things.parquet", model=line / "model", output=tmp_path / "usual")
    sent = []
    embed_stream = Embedder.embed_stream

    def counted(self, images, **options):
        sent.extend(images)
        return embed_stream(self, images, **options)

    monkeypatch.setattr(Embedder, "embed_stream", counted)
    quick = index(line / "features", model=line / "model", output=tmp_path / "quick")
    assert len(sent) <= 4 < quick.num_added == usual.num_added  # a few are compared with the whole model
    ids = sorted(row["id"] for batch in usual.index.items([]) for row in batch.to_pylist())
    ours, theirs = quick.index.vectors(ids), usual.index.vectors(ids)
    assert np.einsum("nd,nd->n", ours, theirs).min() > 0.999
    # the files also say which folder or catalog brought them
    columns = [name for name in usual.index.description.columns if name not in ("id", "files")]
    assert quick.index.rows(ids, columns).to_pylist() == usual.index.rows(ids, columns).to_pylist()
    assert sync(tmp_path / "quick").changes == Changes(num_kept=quick.changes.num_added)


def test_features_of_another_backbone_or_of_other_weights_are_refused(line, line_copy):
    embedder = Embedder.load(line / "model")
    backbone = {**embedder.config["backbone"], "weights": "0" * 16}
    other = dataclasses.replace(embedder, config={**embedder.config, "backbone": backbone})
    with pytest.raises(FingerprintError, match="weights"):
        KnownVectors(other, line / "features")
    pooled = dataclasses.replace(
        embedder, config={**embedder.config, "head": {**embedder.config["head"], "kind": "mlp"}}
    )
    with pytest.raises(InputError, match="linear head"):
        KnownVectors(pooled, line / "features")
    array = next((line_copy / "features").glob("data-*/features.npy"))
    np.save(array, np.load(array)[::-1])
    with pytest.raises(ArtefactError, match="was changed"):
        KnownVectors(embedder, line_copy / "features")


def test_compaction_frees_the_disk_and_keeps_what_is_found(made, images, tmp_path):
    query = images / "thing 01 é" / "view 0.jpg"
    before = [match.id for match in made.find(query, k=8).matches]
    done = compact(tmp_path / "index")
    assert done.startswith("12 rows in ")
    again = Searcher.open(tmp_path / "index")
    assert [match.id for match in again.find(query, k=8).matches] == before
    assert sync(tmp_path / "index").changes == Changes(num_kept=12)
    create_index(f"milvus-lite://{tmp_path}/lite.db/a", dim=2, model_fingerprint="f", model_name="n").close()
    with pytest.raises(InputError, match="not an index folder"):
        compact(f"milvus-lite://{tmp_path}/lite.db/a")


def test_a_name_that_is_not_utf8_costs_only_its_image_and_what_is_passed_over_is_said(line, tmp_path, capsys):
    """Before, one such name stopped the whole index after everything had been embedded."""
    folder = write_things(tmp_path / "images", num_things=2)
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/Schr\xe4nke"))
    shutil.copytree(folder / "thing 00 é", odd)
    for name in ("@eaDir", "old"):
        shutil.copytree(folder / "thing 01 é", folder / name)
    (folder / "notes.txt").write_text("x")
    (folder / "link").symlink_to(folder / "thing 01 é")
    command = ["index", str(folder), "--model", str(line / "model"), "-o", str(tmp_path / "index")]
    for arguments in ([*command, "--exclude", "old"], ["index", "sync", str(tmp_path / "index")]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        shown = capsys.readouterr().out
        assert done.value.code == 3 and "Schr\\xe4nke" in shown and "not UTF-8" in shown
        assert "passed over: 1 .txt, 1 excluded, 1 folder of the system, 1 link to a folder" in shown
    with Searcher.open(tmp_path / "index").index as opened:
        assert {row["label"] for batch in opened.items() for row in batch.to_pylist()} == {
            "thing 00 é", "thing 01 é",
        }  # fmt: skip


def test_numbers_of_a_csv_filter_and_an_empty_filter_says_so(line, images, tmp_path):
    """Before, price=1.. met no row, since prices were texts, and the answer was "no match"."""
    listed = [images / f"thing 0{number} é" / "view 0.jpg" for number in range(3)]
    lines = ["Image,label,Price", *(f"{path},{place},{place * 10}" for place, path in enumerate(listed))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    made = index(tmp_path / "t.csv", model=line / "model", output=tmp_path / "priced")
    assert made.index.description.extra_columns["price"] == "integer"
    found = find(listed[0], index=tmp_path / "priced", model=line / "model", where=["price=10.."])
    assert sorted(match.label for match in found.matches) == ["1", "2"]
    empty = find(listed[0], index=tmp_path / "priced", model=line / "model", where=["price=1000.."])
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(empty)
    assert (
        "no image meets the filter" in console.file.getvalue()
        and "Probably not" not in console.file.getvalue()
    )


def test_verify_names_what_is_damaged(made, tmp_path):
    whole = verify(tmp_path / "index")
    assert whole.exit_status == 0 and "12 rows and" in whole.__rich__()
    made.index.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "index" / "rows-1.sqlite")) as db, db:
        db.execute("UPDATE rows SET label = 'cat [red]' WHERE slot = 3")
    damaged = verify(tmp_path / "index")
    assert damaged.exit_status == 1 and "rows-1.sqlite: the row of" in damaged.__rich__()


def test_verify_of_an_index_reads_its_model(line, images, tmp_path):
    """An index that cannot be asked any more was said to be whole."""
    model = shutil.copytree(line / "model", tmp_path / "model")
    index(images, model=model, output=tmp_path / "ix")
    with (model / "README.md").open("a") as stream:
        stream.write("!")
    found = verify(tmp_path / "ix")
    assert found.exit_status == 1 and [problem for problem in found.problems if "README.md" in problem]


def test_a_sync_leaves_what_was_uploaded_and_what_another_command_indexed(line, made, images, tmp_path):
    """A row may go only when no folder that the index follows now, and no upload, has its image."""
    others = write_things(tmp_path / "others", num_things=4)
    index(others, model=line / "model", output=tmp_path / "index")
    kept = others / "thing 03 é" / "view 0.jpg"
    elsewhere = tmp_path / "index" / "uploads" / "a.jpg"
    elsewhere.parent.mkdir()
    shutil.copy(kept, elsewhere)
    made.index.set_notes("uploads", {"uploads/a.jpg": {"label": "cat", "domain": "pets"}})
    kept.unlink()
    assert sync(tmp_path / "index").changes.num_dropped == 0
    assert made.index.count() == 16
    rows = [row for batch in made.index.items(["labels"]) for row in batch.to_pylist()]
    assert [row["labels"] for row in rows if "cat" in row["labels"]] == [["cat"]]


def test_the_clipboard_as_a_query(made, images, monkeypatch):
    query = images / "thing 01 é" / "view 0.jpg"
    for content in (Image.open(query), [str(query)]):
        monkeypatch.setattr(ImageGrab, "grabclipboard", lambda content=content: content)
        assert made.find("clipboard", k=1).matches[0].path == str(query)
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: None)
    with pytest.raises(ImageError, match="holds no image"):
        made.find("clipboard")

    def no_desktop():
        raise NotImplementedError("wl-paste or xclip is required for ImageGrab.grabclipboard() on Linux")

    monkeypatch.setattr(ImageGrab, "grabclipboard", no_desktop)
    with pytest.raises(ImageError, match="clipboard cannot be read") as error:
        made.find("clipboard")
    assert "give its path" in error.value.next_step


@pytest.mark.filterwarnings("ignore:Image.Image.getdata is deprecated")  # in textual-image
def test_thumbnails_in_the_terminal(made, images, monkeypatch):
    from textual_image.renderable import HalfcellImage

    monkeypatch.setattr("textual_image.renderable.Image", HalfcellImage)
    found = made.find(images / "thing 01 é" / "view 0.jpg", k=2)
    shown = io.StringIO()
    console = rich.console.Console(file=shown, width=200, force_terminal=True, color_system="truecolor")
    console.print(with_thumbnails(found))
    assert "▀" in shown.getvalue() or "▄" in shown.getvalue()
    assert all(match.label in shown.getvalue() for match in found.matches)


def test_near_duplicates_are_grouped(line, images, tmp_path):
    original = images / "thing 00 é" / "view 0.jpg"
    Image.open(original).save(images / "again.jpg", quality=60)
    shutil.copy(images / "thing 02 é" / "view 1.jpg", images / "copy.jpg")
    made = index(images, model=line / "model", output=tmp_path / "index")
    rows = {row["id"]: row for batch in made.index.items() for row in batch.to_pylist()}
    vectors = made.index.vectors(list(rows))
    found = duplicates(tmp_path / "index", min_score=0.99, output=tmp_path / "d.json")
    num_groups, group_of = scipy.sparse.csgraph.connected_components(vectors @ vectors.T >= 0.99)
    expected = [
        {name for name, own in zip(rows, group_of, strict=True) if own == group}
        for group in range(num_groups)
    ]
    copied = next(name for name, row in rows.items() if len(row["paths"]) > 1)
    expected = [group for group in expected if len(group) > 1 or copied in group]
    groups = [{item["id"] for item in group.items} for group in found.groups]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, expected))
    assert json.loads((tmp_path / "d.json").read_text())["num_images"] == made.index.count() == 13
    with pytest.raises(InputError, match="similarity"):
        duplicates(tmp_path / "index", min_score=0.0)


def test_rebuild_takes_the_place_in_one_step(line, images, made, tmp_path):
    """With the same model here: what matters is that nothing is lost, and the old index serves meanwhile."""
    place = tmp_path / "index"
    (images / "thing 00 é" / "view 0.jpg").unlink()
    before = {row["id"] for batch in made.index.items([]) for row in batch.to_pylist()}
    done = rebuild(place, model=line / "model")
    assert (done.num_added, done.exit_status, done.index.count()) == (11, 3, 11)
    assert {row["id"] for batch in done.index.items([]) for row in batch.to_pylist()} < before
    again = Searcher.open(place)
    assert again.index.verify().problems == () and sync(place).changes == Changes(num_kept=11)
    shutil.move(images, tmp_path / "moved")
    with pytest.raises(InputError, match="none of the 11 images"):
        rebuild(place, model=line / "model")
    assert Searcher.open(place).index.count() == 11
    assert rebuild(place, model=line / "model", source=[tmp_path / "moved"]).index.count() == 11


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sync", "rebuild", "compact"])
def test_killed_changes_lose_nothing_acknowledged(line, tmp_path, what):
    """Killed at growing delays until one run comes through; at every moment the index opens and is whole."""
    images, place = write_things(tmp_path / "p", num_things=8, num_views=6), tmp_path / "index"
    index(images, model=line / "model", output=place)
    kept = set(images.rglob("*.jpg"))
    if what == "sync":
        for number, path in enumerate(sorted(kept)):
            if number % 4 == 0:
                path.unlink()
            elif number % 4 == 1:
                path.rename(path.with_name(f"renamed {number}.jpg"))
            elif number % 4 == 2:
                Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    command = {
        "sync": ["index", "sync", str(place)],
        "rebuild": ["index", "rebuild", str(place), "--model", str(line / "model")],
        "compact": ["index", "compact", str(place)],
    }[what]
    kills, delay = 0, 0.0
    while True:
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([sys.executable, "-c", READY, *command], env=ENVIRONMENT, **quiet) as process:
            assert process.stdout.readline() == b"ready\n"  # delays are those of the work, not of imports
            try:
                process.communicate(timeout=delay)
                assert process.returncode == 0
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
        opened = Searcher.open(place)
        assert opened.index.verify().problems == () and opened.index.count() >= 36
        for path in images.rglob("renamed*.jpg"):  # a moved image is findable at every moment
            assert opened.find(path, k=1).matches[0].metadata["sha256"] == file_sha256(path)
        delay = 1.3 * delay + 0.05
    assert kills  # the first comes at once
    final = Searcher.open(place).index
    paths = {path for batch in final.items() for row in batch.to_pylist() for path in row["paths"]}
    assert paths == {str(path) for path in images.rglob("*.jpg")}
