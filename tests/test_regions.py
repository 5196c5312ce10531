"""Regions: things inside bigger images are found, and where; the index follows every change of its images."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from line import ENVIRONMENT
from samething.embedder import Embedder
from samething.errors import ArtefactError, InputError
from samething.images.parts import WINDOWS, cut_out, standing_out
from samething.search import Searcher, backup, compact, find, index, rebuild, region_choice, sync, verify
from samething.search.region_choice import chooser
from samething.web import Limits
from samething.web.service import Service
from scenes import overlap, photographs


def write_photographs(folder: Path) -> Path:
    """Five photographs of 240 pixels, without loss."""
    folder.mkdir()
    for number, image in enumerate(photographs()[:5]):
        image.resize((240, 240)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return write_photographs(tmp_path / "images")


def part_of(path: Path, place) -> Image.Image:
    return cut_out(Image.open(path), [place])[0]


# ---- which parts


def test_what_stands_out_is_among_the_proposals():
    """A bright thing of any place and size on a photograph; nothing on one colour."""
    rng = np.random.default_rng(0)
    ground, hits = photographs()[1].resize((320, 240)), []
    for _ in range(20):
        width, height = rng.uniform(0.2, 0.5, 2)
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        box = (left, top, left + width, top + height)
        made = ground.copy()
        pixels = (round(320 * left), round(240 * top), round(320 * box[2]), round(240 * box[3]))
        made.paste((20, 90, 250), pixels)
        places = standing_out(made)
        assert 1 <= len(places) <= 8 and places == standing_out(made)
        assert all(0 <= place[0] < place[2] <= 1 and 0 <= place[1] < place[3] <= 1 for place in places)
        hits.append(max(overlap(place, box) for place in places) >= 0.4)
    assert np.mean(hits) >= 0.9
    assert standing_out(Image.new("RGB", (50, 40), "teal")) == []


def test_a_part_has_at_least_a_pixel():
    assert [part.size for part in cut_out(Image.new("RGB", (3, 300)), [(0.5, 0.1, 0.6, 0.101)])] == [(1, 1)]


# ---- an index with regions


@pytest.mark.parametrize("regions", [pytest.param("grid", marks=pytest.mark.slow), "proposals"])
def test_the_best_of_an_images_parts_decides(line, images, tmp_path, regions):
    """Against cosines of every part, embedded one by one; the place is that of the best, if it is a part."""
    made = index(images, model=line / "model", output=tmp_path / "index", regions=regions)
    embedder = Embedder.load(line / "model")
    coder, expected, places = embedder.coder, {}, {}
    for path in sorted(images.iterdir()):
        image = Image.open(path)
        parts = [None, *chooser(regions)(image, [])]
        whole = [image, *cut_out(image, parts[1:])]
        vectors = np.concatenate([embedder.embed([each]) for each in whole])
        expected[str(path)] = vectors if coder is None else coder.decode(coder.encode(vectors))
        places[str(path)] = parts
    asked = cut_out(Image.open(images / "2.png"), [places[str(images / "2.png")][3]])[0]
    query = embedder.embed([asked])[0]
    found = made.find(asked, k=5)
    best = {path: vectors @ query for path, vectors in expected.items()}
    order = sorted(best, key=lambda path: -best[path].max())
    assert [match.path for match in found.matches] == order
    for match in found.matches:
        cosines = best[match.path]
        assert match.score == pytest.approx(cosines.max(), abs=2e-3)
        assert (
            match.place == places[match.path][cosines.argmax()] or np.sort(cosines)[-2] > cosines.max() - 1e-4
        )
    first = found.matches[0]
    assert first.path == str(images / "2.png") and first.place == places[first.path][3]
    assert len(made.index) == 5 and not made.index.verify().problems
    whole = made.find(images / "4.png", k=1).matches[0]
    assert (whole.path, whole.place, whole.where) == (str(images / "4.png"), None, "")


def test_the_answer_says_where_in_every_form(line, images, tmp_path, capsys):
    index(images, model=line / "model", output=tmp_path / "index", regions="proposals")
    assert "9.0 vectors and" in capsys.readouterr().err
    place = standing_out(Image.open(images / "1.png"))[2]
    part_of(images / "1.png", place).save(tmp_path / "part.png")
    for suffix in ("json", "csv", "html"):
        found = find(tmp_path / "part.png", index=tmp_path / "index", output=tmp_path / f"found.{suffix}")
    best = found.matches[0]
    assert best.place == place and Path(best.path).name == "1.png"
    written = json.loads((tmp_path / "found.json").read_text())["matches"][0]
    assert written["place"] == list(place)
    [row, *_] = csv.DictReader((tmp_path / "found.csv").read_text().splitlines())
    assert json.loads(row["place"]) == pytest.approx(place, abs=1e-4)
    left, _, right, _ = (round(100 * share) for share in place)
    assert f"at {left}–{right} % of the width" in best.where
    html = (tmp_path / "found.html").read_text()
    assert f'<rect x="{place[0] * 240}"' in html and best.where in html


@pytest.mark.slow
def test_regions_follow_every_change_of_their_images(line, images, tmp_path):
    """Renamed, changed and deleted images; then compacted, copied, tuned to another way and back to none."""
    place = tmp_path / "index"
    index(images, model=line / "model", output=place, regions="grid")
    gone, old = part_of(images / "0.png", WINDOWS[3]), part_of(images / "1.png", WINDOWS[3])
    new = part_of(images / "3.png", WINDOWS[3])
    (images / "0.png").unlink()
    Image.open(images / "3.png").transpose(Image.Transpose.ROTATE_180).save(images / "1.png")
    (images / "2.png").rename(images / "renamed.png")
    turned = part_of(images / "1.png", WINDOWS[8])
    done = sync(place, drop=True)
    assert (done.changes.num_added, done.changes.num_moved, done.changes.num_dropped) == (1, 1, 2)

    def check():
        with Searcher.open(place).index as opened:
            ids = [row["id"] for batch in opened.items([]) for row in batch.to_pylist()]
            assert [len(own.places) for own in opened.regions(ids)] == [25] * 4
            assert not opened.verify().problems
        assert all(find_one(image).score < 0.98 or find_one(image).place is None for image in (gone, old))
        best = find_one(turned)
        assert (Path(best.path).name, best.place) == ("1.png", WINDOWS[8])
        assert find_one(new).place == WINDOWS[3]

    def find_one(image):
        return Searcher.open(place).find(image, k=1).matches[0]

    check()
    before = sum(path.stat().st_size for path in place.glob("vectors-*"))
    compact(place)
    assert sum(path.stat().st_size for path in place.glob("vectors-*")) == before * 4 // 6
    check()
    backup(place, tmp_path / "copy")
    assert not verify(tmp_path / "copy").problems
    assert Searcher.open(tmp_path / "copy").find(turned, k=1).matches[0].place == WINDOWS[8]
    assert sync(place).changes.num_kept == 4
    with pytest.raises(InputError, match="whose regions are grid"):
        index(images, model=line / "model", output=place, regions="proposals")
    assert rebuild(place, model=line / "model", regions="none").num_added == 4
    assert Searcher.open(place).index.description.regions is None and find_one(turned).place is None
    assert rebuild(place, model=line / "model", regions="proposals").num_added == 4
    assert Searcher.open(place).index.description.regions == "proposals"
    assert rebuild(place, model=line / "model").index.description.regions == "proposals"


def test_boxes_of_a_catalog_are_regions_of_their_images(line, images, tmp_path):
    """An image is a row with the labels of all its boxes; a box that comes or goes is embedded again."""
    boxes = [("0.png", "cup", 10, 20, 110, 140), ("0.png", "spoon", 120, 20, 230, 230),
             ("1.png", "cat", 0, 0, 120, 120), ("2.png", "all", "", "", "", "")]  # fmt: skip
    heading = "image,label,box_left,box_top,box_right,box_bottom"
    catalog = images / "catalog.csv"

    def write(rows):
        catalog.write_text("\n".join([heading, *(",".join(map(str, row)) for row in rows)]) + "\n")

    write(boxes)
    place = tmp_path / "index"
    made = index(catalog, model=line / "model", output=place, regions="boxes")
    assert made.index.count() == 3
    spoon = Image.open(images / "0.png").crop((120, 20, 230, 230))
    best = made.find(spoon, k=1).matches[0]
    assert best.place == (120 / 240, 20 / 240, 230 / 240, 230 / 240) and best.label == "spoon"
    assert {match.label for match in made.find(spoon, where={"labels": "cup"}).matches} == {"spoon"}
    assert made.find(images / "2.png", k=1).matches[0].place is None
    assert sync(place).changes.num_kept == 4
    write(boxes[:1] + boxes[2:])
    assert sync(place).changes.num_added == 1
    best = Searcher.open(place).find(spoon, k=1).matches[0]
    assert best.place != (120 / 240, 20 / 240, 230 / 240, 230 / 240)
    rows = Searcher.open(place).index.items(["labels"])
    assert sorted(label for batch in rows for row in batch.to_pylist() for label in row["labels"]) == [
        "all", "cat", "cup",
    ]  # fmt: skip
    whole = rebuild(place, model=line / "model", source=[catalog], regions="none")
    assert whole.index.count() == 3 and not whole.index.verify().problems
    with pytest.raises(InputError, match="images without boxes"):
        index(images / "..", model=line / "model", output=tmp_path / "other", regions="boxes")
    assert not (tmp_path / "other").exists()


def test_a_detector_of_ones_own(line, images, tmp_path):
    """Boxes in pixels of its input; one that is gone or changed is named, not passed over."""
    onnx = pytest.importorskip("onnx")
    values = np.array([[8, 16, 40, 48, 0.9, 1], [0, 0, 64, 64, 0.05, 1]], np.float32)[None]

    def graph(rows, path):
        helper = onnx.helper
        given = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 64, 64])
        made = helper.make_tensor_value_info("found", onnx.TensorProto.FLOAT, list(rows.shape))
        kept = onnx.numpy_helper.from_array(rows, "rows")
        nodes = [
            helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
            helper.make_node("Sub", ["mean", "mean"], ["zero"]),
            helper.make_node("Add", ["rows", "zero"], ["found"]),
        ]
        model = helper.make_model(
            helper.make_graph(nodes, "detector", [given], [made], [kept]),
            opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
        )  # fmt: skip
        onnx.save(model, path)

    graph(values, tmp_path / "detector.onnx")
    place = tmp_path / "index"
    made = index(images, model=line / "model", output=place, regions=str(tmp_path / "detector.onnx"))
    ids = [row["id"] for batch in made.index.items([]) for row in batch.to_pylist()]
    expected = (8 / 64, 16 / 64, 40 / 64, 48 / 64)
    assert [own.places for own in made.index.regions(ids)] == [[expected]] * 5
    assert made.find(part_of(images / "2.png", expected), k=1).matches[0].place == expected
    graph(values / 2, tmp_path / "detector.onnx")
    region_choice._detector.cache_clear()  # as in another process
    Image.new("RGB", (64, 64), "red").save(images / "new.png")
    with pytest.raises(ArtefactError, match="detector"):
        sync(place)
    graph(np.zeros((1, 3), np.float32), tmp_path / "wrong.onnx")
    with pytest.raises(InputError, match="has the outputs found"):
        index(images, model=line / "model", output=tmp_path / "w", regions=str(tmp_path / "wrong.onnx"))
    for wrong in ("squares", str(tmp_path / "none.onnx")):
        with pytest.raises(InputError):
            index(images, model=line / "model", output=tmp_path / "w2", regions=wrong)


def test_an_upload_gets_regions(line, images, tmp_path):
    """Also where fewer images may wait than it has parts: they are sent a few at a time."""
    made = index(images, model=line / "model", output=tmp_path / "index", regions="proposals")
    turned = Image.open(images / "0.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png")
    content = (tmp_path / "turned.png").read_bytes()
    service = Service(made, limits=Limits(max_waiting=2))
    try:
        row_id = service.add(content, label="new", domain="things")
        [own] = made.index.regions([row_id])
        assert own.places == standing_out(turned) and len(own.places) > 2
        best = made.find(cut_out(turned, own.places[1:2])[0], k=1).matches[0]
        assert (best.id, best.place, best.label) == (row_id, own.places[1], "new")
        box = service.standing_out(content)[0]
        assert np.array(box) / 240 == pytest.approx(np.array(own.places[0]), abs=0.01)
        assert sync(tmp_path / "index").changes.num_kept == 6
    finally:
        service.close()


def test_a_second_look_at_regions_is_refused_where_the_search_has_them(line, images, tmp_path):
    """The best region would count twice."""
    made = index(images, model=line / "model", output=tmp_path / "index", regions="proposals")
    with pytest.raises(InputError, match="compares the regions already"):
        made.find(images / "0.png", rerank="regions")


@pytest.mark.slow
@pytest.mark.parametrize("location", ["index", "milvus-lite://{}/lite.db/things"])
def test_regions_survive_kills(line, images, tmp_path, location):
    """A process is killed (SIGKILL) within and between the writes; the next one ends with the same index."""
    location = location.format(tmp_path) if "{" in location else str(tmp_path / location)
    code = """
import os, signal, sys
from samething.search import storing
storing._WITH_REGIONS = 2
from samething.index import open_index
import samething.index.row_changes, samething.index.milvus
calls, at = 0, int(sys.argv[1])
def killing(function):
    def wrapped(*arguments, **options):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped
samething.index.row_changes.Generation.bury = killing(samething.index.row_changes.Generation.bury)
samething.index.row_changes.Generation.append = killing(samething.index.row_changes.Generation.append)
samething.index.milvus.entities = killing(samething.index.milvus.entities)
from samething.search import index
index(sys.argv[2], model=sys.argv[3], output=sys.argv[4], regions="proposals")
""".replace("index(sys.argv[2]", "from pathlib import Path\nindex(Path(sys.argv[2])")
    for moment in (1, 2, 4) if "lite" not in location else (2,):
        done = subprocess.run(
            [sys.executable, "-c", code, str(moment), str(images), str(line / "model"), location],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    made = index(images, model=line / "model", output=location, regions="proposals")
    whole = index(images, model=line / "model", output=tmp_path / "whole", regions="proposals")
    ids = sorted(row["id"] for batch in whole.index.items([]) for row in batch.to_pylist())
    assert 0 < made.num_kept < 5 and made.index.count() == 5
    assert [own.places for own in made.index.regions(ids)] == [own.places for own in whole.index.regions(ids)]
    asked = part_of(
        images / "2.png", whole.index.regions([made.find(images / "2.png").matches[0].id])[0].places[0]
    )
    ours, theirs = (each.find(asked, k=5).matches for each in (made, whole))
    assert (ours[0].id, ours[0].place) == (theirs[0].id, theirs[0].place) and ours[0].place is not None
    assert not made.index.verify().problems
