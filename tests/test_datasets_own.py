"""One's own data in other people's formats: COCO boxes, and Hugging Face data sets on disk."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import miniatures
from samething.catalog import BOX_COLUMNS, Catalog
from samething.datasets import Dropped, catalog
from samething.errors import ArtefactError, InputError
from samething.images import decode

# ---- COCO


@pytest.fixture
def boxes(tmp_path):
    """A COCO file beside its folder of images."""
    folder = tmp_path / "café"
    miniatures.jsonl(folder / "annotations.json", miniatures.coco())
    for name in ("005", "006"):
        miniatures.image(folder / "images" / f"{name}.jpg", int(name))
    return folder / "annotations.json"


def test_a_coco_file(boxes, tmp_path):
    report = catalog(boxes, domain="dishes", margin=2.0, output=tmp_path / "c.parquet")
    table = Catalog.read(report.path).table
    assert table["image"].to_pylist() == ["005.jpg", "005.jpg", "006.jpg"]
    assert table["label"].to_pylist() == ["espresso", "salad", "espresso"]
    assert {*table["domain"].to_pylist()} == {"dishes"} and {*table["dataset"].to_pylist()} == {"annotations"}
    assert [[row[name] for name in BOX_COLUMNS] for row in table.to_pylist()] == [
        [9, 10, 60, 36], [0, 0, 10, 10], [5, 5, 26, 15],
    ]  # fmt: skip
    assert table["width"].to_pylist() == [60, 60, 60]
    assert not any("listed twice" in line or "same image" in line for line in report.warnings)
    assert all(path.is_file() for path in Catalog.read(report.path).paths)


def test_cocos_images_may_be_elsewhere(boxes, tmp_path):
    (boxes.parent / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="none of the first 2 images") as caught:
        catalog(boxes, output=tmp_path / "c.parquet")
    assert "--root" in caught.value.next_step
    assert len(catalog(boxes, root=tmp_path / "elsewhere", output=tmp_path / "c.parquet").catalog) == 3


def test_the_same_box_twice_is_odd(boxes, tmp_path):
    content = miniatures.coco()
    content["annotations"].append(content["annotations"][0] | {"id": 9})
    boxes.write_text(json.dumps(content))
    report = catalog(boxes, output=tmp_path / "c.parquet")
    assert any("005.jpg is listed twice" in line for line in report.warnings)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "has no list images"),
        ('{"images": [], "annotations": []}', "lists no images"),
        ('{"images": [4], "annotations": []}', "entry 0 of images is 4"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1}], "annotations": []}',
            "entry 0 of categories",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "category_id": 7,'
            ' "bbox": [0, 0, 1, 1]}]}',
            "annotation 0 cannot be used (KeyError: 7)",
        ),
    ],
)
def test_a_json_file_that_is_no_coco(boxes, tmp_path, content, words):
    boxes.write_text(content)
    with pytest.raises(InputError) as caught:
        catalog(boxes, output=tmp_path / "c.parquet")
    assert words in caught.value.given


@pytest.mark.parametrize("margin", [-1.0, 101.0])
def test_a_margin_is_a_percentage(boxes, tmp_path, margin):
    with pytest.raises(InputError, match="--margin"):
        catalog(boxes, margin=margin, output=tmp_path / "c.parquet")
    with pytest.raises(InputError, match="for boxes in a COCO file"):
        catalog(boxes.parent, margin=2.0, output=tmp_path / "c.parquet")


# ---- Hugging Face


def table_of(names, labels, **columns):
    """A data set with images as files, whose bytes are embedded when it is saved."""
    features = {"photo": datasets.Image(), "thing": datasets.ClassLabel(names=["chair", "table", "lamp"])}
    content = {"photo": [str(name) for name in names], "thing": labels, **columns}
    kinds = features | {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(content, features=datasets.Features(kinds))


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / "photos" / f"{number}.{'png' if number % 2 else 'jpg'}" for number in range(6)]
    for number, path in enumerate(paths):
        miniatures.image(path, number)
    return paths


def embedded(data: datasets.Dataset) -> datasets.Dataset:
    """The same with the files' bytes inside, as on the hub."""
    plain = data.cast_column("photo", datasets.Image(decode=False))
    inside = plain.map(
        lambda row: {"photo": {"bytes": Path(row["photo"]["path"]).read_bytes(), "path": None}}
    )
    return inside.cast_column("photo", datasets.Image())


def test_embedded_images_stay_where_they_are(photos, tmp_path):
    embedded(table_of(photos, [0, 0, 1, 1, 2, 2])).save_to_disk(tmp_path / "hub", num_shards=2)
    before = sorted((tmp_path / "hub").rglob("*"))
    report = catalog(tmp_path / "hub", domain="furniture", output=tmp_path / "out" / "c.parquet")
    read = Catalog.read(report.path)
    assert list(read.strings("label")) == ["chair", "chair", "table", "table", "lamp", "lamp"]
    assert {*read.strings("domain")} == {"furniture"} and {*read.strings("dataset")} == {"hub"}
    assert read.table["image"][3].as_py() == "arrow://photo/0::data-00001-of-00002.arrow"
    assert read.table["width"].to_pylist() == [60] * 6
    for source, original in zip(read.sources, photos, strict=True):
        assert source.read() == original.read_bytes()
        assert np.array_equal(np.asarray(decode(source)), np.asarray(Image.open(original).convert("RGB")))
    assert sorted((tmp_path / "hub").rglob("*")) == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"c.parquet"}


def test_splits_are_roles_and_files_stay_where_they_are(photos, tmp_path):
    splits = {
        "train": table_of(photos[:2], [0, 0], domain=["seats", "seats"]),
        "validation": table_of(photos[2:4], [1, 1], domain=["tables", "tables"]),
        "test": table_of(photos[4:], [2, -1], domain=["lamps", "lamps"]),
    }
    folder = tmp_path / "hub"
    for name, split in splits.items():
        # a data set that refers to files by their paths alone
        split.cast_column("photo", datasets.Image(decode=False)).save_to_disk(folder / name)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    report = catalog(folder, output=tmp_path / "c.parquet")
    assert [(row["domain"], row["role"]) for row in report.catalog.table.to_pylist()] == [
        ("seats", "train"), ("seats", "train"), ("tables", "val"), ("tables", "val"),
        ("lamps", "query+index"),
    ]  # fmt: skip
    assert report.dropped[0].reason == "row 1 of test has no label"
    assert report.exit_status == 3


def test_a_data_set_without_labels_can_be_indexed(photos, tmp_path):
    table_of(photos, [0] * 6).remove_columns("thing").save_to_disk(tmp_path / "hub")
    with pytest.raises(InputError, match="none of labels") as caught:
        catalog(tmp_path / "hub", output=tmp_path / "c.parquet")
    assert "--labels none" in caught.value.next_step
    report = catalog(tmp_path / "hub", labels="none", output=tmp_path / "c.parquet")
    assert {*report.catalog.strings("role")} == {"index"} and len(report.catalog) == 6


def test_a_data_set_without_images(tmp_path):
    datasets.Dataset.from_dict({"label": ["a"], "text": ["b"]}).save_to_disk(tmp_path / "hub")
    with pytest.raises(InputError, match="has the columns label, text, none of images"):
        catalog(tmp_path / "hub", output=tmp_path / "c.parquet")


def test_several_labels_a_image_are_none(photos, tmp_path):
    plain = table_of(photos, [0] * 6).remove_columns("thing")
    plain.add_column("labels", [["a", "b"]] * 6).save_to_disk(tmp_path / "hub")
    with pytest.raises(InputError, match="its labels are list"):
        catalog(tmp_path / "hub", output=tmp_path / "c.parquet")


@pytest.mark.parametrize("kind", ["binary", "string"])
def test_images_as_plain_bytes_or_plain_paths(photos, tmp_path, kind):
    """As the first versions of the library wrote them."""
    images = [str(path) if kind == "string" else path.read_bytes() for path in photos]
    features = datasets.Features({"image": datasets.Value(kind), "label": datasets.Value("string")})
    content = {"image": images, "label": list("aabbcc")}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "hub")
    info = tmp_path / "hub/dataset_info.json"
    said = json.loads(info.read_text())
    said["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(said))
    report = catalog(tmp_path / "hub", output=tmp_path / "c.parquet")
    sources = Catalog.read(report.path).sources
    assert [source.read() for source in sources] == [path.read_bytes() for path in photos]


def test_an_unfinished_data_set(photos, tmp_path):
    table_of(photos, [0, 0, 1, 1, 2, 2]).save_to_disk(tmp_path / "hub")
    next((tmp_path / "hub").glob("*.arrow")).unlink()
    with pytest.raises(ArtefactError, match="cannot be read as a Hugging Face data set"):
        catalog(tmp_path / "hub", output=tmp_path / "c.parquet")


def test_a_selection_must_be_written_whole(photos, tmp_path):
    table_of(photos, [0, 0, 1, 1, 2, 2]).save_to_disk(tmp_path / "hub")
    state = json.loads((tmp_path / "hub/state.json").read_text())
    (tmp_path / "hub/state.json").write_text(
        json.dumps(state | {"_indices_files": [{"filename": "i.arrow"}]})
    )
    with pytest.raises(ArtefactError, match="a selection of the rows"):
        catalog(tmp_path / "hub", output=tmp_path / "c.parquet")


def test_a_row_without_a_image_is_left_out(photos, tmp_path):
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    content = {"image": [{"path": str(photos[0]), "bytes": None}, None], "label": ["a", "b"]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "hub")
    report = catalog(tmp_path / "hub", output=tmp_path / "c.parquet")
    assert report.dropped == (Dropped("", f"row 1 of {tmp_path / 'hub'} has no image"),)
