"""``samething curate`` from catalogs to a catalog, its lists and its page."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import miniatures
from line import samething
from samething.catalog import Catalog
from samething.curate import CurateConfig, curate
from samething.curate.sources import joined_catalogs, sources_of
from samething.errors import InputError, SamethingError
from samething.features import FeatureSet
from scenes import feature_folder, photographs, write_things
from test_report import Page

PHOTOGRAPHS = photographs()[:5]


def numbers(folder: Path, sizes: dict[str, int], **columns: str) -> Catalog:
    """A catalog without images: so many rows of each label."""
    rows = [
        {"image": f"{label}/{number}.jpg", "label": label, **columns}
        for label, size in sizes.items()
        for number in range(size)
    ]
    return Catalog.from_rows(rows, root=folder)


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Images with each kind of trouble once, curated against an evaluation set with one of them."""
    folder = tmp_path_factory.mktemp("scene é")
    things = write_things(folder / "things", num_things=6, num_views=4, side=128)
    rows = [
        {"image": path.relative_to(folder).as_posix(), "label": path.parent.name, "domain": "<b>things",
         "role": "query+index" if path.parent.name.startswith("thing 05") else "train"}
        for path in sorted(things.rglob("*.jpg"))
    ]  # fmt: skip
    extra = folder / "extra"
    extra.mkdir()
    for number, image in enumerate(PHOTOGRAPHS):
        image.save(extra / f"{number}.jpg", quality=90)
    shutil.copy(extra / "0.jpg", extra / "0 again.jpg")
    PHOTOGRAPHS[1].resize((200, 200)).save(extra / "1 small.jpg", quality=70)
    shutil.copy(extra / "2.jpg", extra / "2 elsewhere.jpg")
    (extra / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    labels = {
        "0.jpg": "a", "0 again.jpg": "a", "1.jpg": "b", "1 small.jpg": "b", "2.jpg": "c",
        "2 elsewhere.jpg": "d", "3.jpg": "e", "4.jpg": "e", "broken.jpg": "e",
    }  # fmt: skip
    rows += [{"image": f"extra/{name}", "label": label, "domain": "more"} for name, label in labels.items()]
    Catalog.from_rows(rows, root=folder).write(folder / "all.parquet")
    evaluation = folder / "benchmark"
    evaluation.mkdir()
    PHOTOGRAPHS[3].resize((180, 180)).save(evaluation / "query.png")
    Catalog.from_rows(
        [
            {"image": "query.png", "label": "q", "role": "query"},
            {"image": "gone.png", "label": "q", "role": "train"},
        ],
        root=evaluation,
    ).write(evaluation / "c.parquet")
    result = curate(
        [folder / "all.parquet"], output=folder / "out.parquet", against=(evaluation / "c.parquet",)
    )
    return folder, result


def test_each_trouble_is_found(scene):
    folder, result = scene
    dropped = {
        row["image"]: (row["rule"], row["instead"]) for row in lines(folder / "out.parquet.dropped.csv")
    }
    assert {
        name.removeprefix("extra/"): found for name, found in dropped.items() if name.startswith("extra")
    } == {
        "0 again.jpg": ("duplicate", "extra/0.jpg"),
        "1 small.jpg": ("duplicate", "extra/1.jpg"),
        "2.jpg": ("conflict", "extra/2 elsewhere.jpg"),
        "2 elsewhere.jpg": ("conflict", "extra/2.jpg"),
        "3.jpg": ("leak", "query.png"),
        "broken.jpg": ("unreadable", ""),
    }
    assert result.exit_status == 3 and result.num_unreadable == 1
    kept = Catalog.read(folder / "out.parquet")
    assert len(kept) + len(dropped) == len(Catalog.read(folder / "all.parquet"))
    assert kept.has_role("query+index").sum() == 4  # never dropped
    assert all(len(sha256) == 64 for sha256 in kept.strings("sha256"))
    relations = {row["relation"] for row in lines(folder / "out.parquet.pairs.csv")}
    assert {"duplicate", "conflict", "leak"} <= relations


def test_the_same_again_is_the_same_and_quick(scene, tmp_path):
    folder, result = scene
    target = tmp_path / "again.parquet"
    again = curate(
        [folder / "all.parquet"], output=target, against=(folder / "benchmark" / "c.parquet",),
        hashes=folder / "out.parquet.hashes.sqlite",
    )  # fmt: skip
    assert again.catalog.table.equals(result.catalog.table)
    first, second = folder / "first.parquet", folder / "out.parquet"
    curate(
        [folder / "all.parquet"], output=first, against=(folder / "benchmark" / "c.parquet",),
        hashes=folder / "out.parquet.hashes.sqlite",
    )  # fmt: skip
    assert first.read_bytes() == second.read_bytes()
    for suffix in ("dropped", "pairs"):
        assert Path(f"{first}.{suffix}.csv").read_bytes() == Path(f"{second}.{suffix}.csv").read_bytes()


def test_the_page_is_whole_and_needs_nothing(scene):
    folder, _ = scene
    text = (folder / "out.parquet.report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.mistakes and all(image.get("alt") for image in page.all("img"))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "b")
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    words = " ".join(page.text)
    for wanted in ("<b>things", "broken.jpg", "Leak", "Conflict", "Duplicate", "cannot be read"):
        assert wanted in words


def test_leaks_may_only_be_reported(scene, tmp_path):
    folder, _ = scene
    result = curate(
        [folder / "all.parquet"], output=tmp_path / "o.parquet",
        against=(folder / "benchmark" / "c.parquet",), leaks="report",
        hashes=folder / "out.parquet.hashes.sqlite",
    )  # fmt: skip
    assert "leak" not in result.dropped and result.pairs["leak"] == 1


def test_stanford_cars_against_uneds_cars(tmp_path):
    """The known trap: one of the training images is a test image of UnED's cars, saved again."""
    miniatures.stanford_cars_refined(tmp_path)
    miniatures.uned(tmp_path)
    from samething.datasets import catalog

    catalog(dataset="uned", data_root=tmp_path, output=tmp_path / "uned.parquet", domain="cars")
    measured = Catalog.read(tmp_path / "uned.parquet")
    rows = np.flatnonzero(~measured.has_role("train"))
    for number, path in enumerate(sorted({*measured.paths})):
        miniatures.image(path, 100 + number)
    cars = tmp_path / "stanford_cars/cars_train/cars_train"
    miniatures.image(cars / "00002.jpg", 7)
    with Image.open(measured.paths[rows[0]]) as image:
        image.resize((90, 60), Image.Resampling.BICUBIC).save(cars / "00001.jpg", quality=85)
    catalog(
        dataset="stanford_cars_refined",
        data_root=tmp_path,
        output=tmp_path / "cars.parquet",
        test=0.0,
        val=0.0,
    )
    result = curate(
        [tmp_path / "cars.parquet"], output=tmp_path / "o.parquet", against=(tmp_path / "uned.parquet",)
    )
    assert result.dropped == {"leak": 1}
    (leak,) = result.dropped_table.to_pylist()
    assert leak["image"].endswith("00001.jpg") and leak["instead"] == measured.strings("image")[rows[0]]


def test_m4d_by_its_recipe(tmp_path):
    for key in ("products_10k", "gldv2", "deep_fashion", "stanford_cars_refined"):
        miniatures.BUILDERS[key](tmp_path)
    folder = tmp_path / "google_landmark_recognition_2021"
    names = [f"{number:016x}" for number in range(130)]
    lines = [["id", "landmark_id"], *([name, 5] for name in names)]
    miniatures.table(folder / "train.csv", lines)
    for name in names:
        miniatures.image(folder / "train" / name[0] / name[1] / name[2] / f"{name}.jpg")
    done = samething("curate", "--recipe", "m4d-35k", "--data-root", tmp_path, "-o", tmp_path / "m4d.parquet")
    assert done.returncode == 0, done.stderr
    kept = Catalog.read(tmp_path / "m4d.parquet")
    assert len(kept) == 100 and set(kept.strings("dataset")) == {"gldv2"}  # the others have too few images
    words = " ".join(done.stdout.split())
    assert "79,200" in words and "328,400" in words and "34,800" in words
    page = (tmp_path / "m4d.parquet.report.html").read_text(encoding="utf-8")
    assert "Beside the published numbers" in page and "141,500" in page


def test_rules_one_after_another(tmp_path):
    numbers(tmp_path, {"a": 2, "b": 3, "c": 9, "d": 9}, dataset="x").write(tmp_path / "c.parquet")
    result = curate(
        [tmp_path / "c.parquet"], output=tmp_path / "o.parquet", duplicates="none", min_images=(3,),
        max_images=("x=4",), budget_images=10, thin="images",
    )  # fmt: skip
    assert result.dropped["too few images"] == 2 and result.dropped["too many images"] == 10
    assert result.dropped["budget"] == 1 and len(result.catalog) == 10
    assert sum(result.dropped.values()) + len(result.catalog) == 23


def test_several_catalogs_keep_their_labels_apart(tmp_path):
    for name in ("one", "two"):
        numbers(tmp_path / name, {"5": 2}, dataset=name).write(tmp_path / name / "c.parquet")
    result = curate(
        [tmp_path / "one/c.parquet", tmp_path / "two/c.parquet"],
        output=tmp_path / "o.parquet",
        duplicates="none",
    )
    assert set(result.catalog.strings("label")) == {"one/5", "two/5"}
    assert result.catalog.paths[-1] == tmp_path / "two/5/1.jpg"


def test_addresses_stay_what_they_are_in_catalogs_put_together(tmp_path):
    """A folder was written before URLs: s3://… became two/s3://…, and shards were looked for elsewhere."""
    addresses = {"one": "a.jpg", "two": "s3://bucket/b.jpg", "three": "tar://c.jpg::shards/0.tar"}
    parts = [
        Catalog.from_rows([{"image": image, "label": name, "dataset": name}], root=tmp_path / name)
        for name, image in addresses.items()
    ]
    joined = joined_catalogs(parts)
    found = [source.location for source in sources_of(joined)]
    assert found == [
        str(tmp_path / "one/a.jpg"),
        "s3://bucket/b.jpg",
        f"tar://c.jpg::{tmp_path}/three/shards/0.tar",
    ]


def test_an_evaluation_set_may_have_columns_of_its_own(tmp_path):
    """Its column ``year`` is text, that of the catalog a number; both are no business of curation."""
    for name, year in (("c", 1999), ("e", "1999")):
        rows = [
            {"image": f"{number}.jpg", "label": "a", "sha256": f"{number:064d}", "year": year}
            for number in (1, 2)
        ]
        rows[1] |= {"sha256": "" if name == "e" else "2" * 64}
        Catalog.from_rows(rows, root=tmp_path / name).write(tmp_path / f"{name}.parquet")
    result = curate(
        [tmp_path / "c.parquet"],
        output=tmp_path / "o.parquet",
        duplicates="exact",
        against=(tmp_path / "e.parquet",),
    )
    assert result.dropped == {"leak": 1} and result.catalog.table["year"].to_pylist() == [1999]


def test_labels_refined_by_a_table(tmp_path):
    numbers(tmp_path, {"car": 4, "bus": 2}).write(tmp_path / "c.parquet")
    (tmp_path / "colours.csv").write_text("img_path,colour\ncar/0.jpg,red\ncar/1.jpg,red\ncar/2.jpg,blue\n")
    result = curate(
        [tmp_path / "c.parquet"],
        output=tmp_path / "o.parquet",
        duplicates="none",
        refine_by=tmp_path / "colours.csv",
    )
    assert result.catalog.strings("label").tolist() == ["car/red", "car/red", "car/blue", "car", "bus", "bus"]
    assert any("1 classes were split into 3" in note and "3 images" in note for note in result.notes)


@pytest.fixture
def described(tmp_path) -> FeatureSet:
    """Clear clusters, six images per class."""
    found = feature_folder(tmp_path / "features", num_classes=24, per_class=6)
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(24, 48)), 6, axis=0) + 0.3 * rng.normal(size=(144, 48))
    data = tmp_path / "features" / str(found.manifest.content["data"])
    np.save(data / "features.npy", rows.astype(np.float16))
    return FeatureSet.open(found.folder)


def test_wrong_labels_are_dropped(described, tmp_path):
    labels = described.catalog.strings("label").copy()
    training = np.flatnonzero(described.catalog.has_role("train"))
    wrong = training[[1, 20, 40]]
    labels[wrong] = labels[training[[14, 32, 50]]]
    described.catalog.with_column("label", labels).write(tmp_path / "c.parquet")
    result = curate(
        [tmp_path / "c.parquet"], output=tmp_path / "o.parquet", duplicates="none", noise="agreement",
        features=(tmp_path / "features",), root=tmp_path / "features",
    )  # fmt: skip
    found = {row["image"] for row in result.dropped_table.to_pylist()}
    planted = {described.catalog.strings("image")[row] for row in wrong}
    assert planted <= found
    assert len(found) <= 12


@pytest.mark.parametrize(
    "options",
    [
        {"duplicates": "embedding"}, {"noise": "agreement"}, {"bits": 16},
        {"closeness": 2.0}, {"min_images": ("x",)}, {"budget_images": 1, "budget_classes": 1},
        {"against": (Path("c.parquet"),), "duplicates": "none"}, {"seed": -1},
        {"min_images": (9,), "duplicates": "none"},
        {"colour": "red"}, {"recipe": "m5d"}, {"data_root": Path()},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_written(tmp_path, options):
    numbers(tmp_path, {"a": 2}).write(tmp_path / "c.parquet")
    with pytest.raises(SamethingError) as error:
        curate([tmp_path / "c.parquet"], output=tmp_path / "o.parquet", **options)
    assert error.value.next_step and not (tmp_path / "o.parquet").exists()


def test_no_catalog_and_no_recipe():
    with pytest.raises(InputError, match="0 catalogs"):
        curate()
    assert CurateConfig(min_images=(3, "x=4")).limits("min_images").of("x", otherwise=0) == 4


def test_the_command_says_what_it_did(tmp_path):
    numbers(tmp_path, {"a": 2, "b": 4}).write(tmp_path / "c.parquet")
    done = samething(
        "curate",
        tmp_path / "c.parquet",
        "-o",
        tmp_path / "o.parquet",
        "--min-images",
        "3",
        "--duplicates",
        "none",
    )
    assert done.returncode == 0, done.stderr
    assert "2 dropped: its class has too few images" in done.stdout
