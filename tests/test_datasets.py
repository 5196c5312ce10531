"""One's own images: real folders and tables on disk, with everything that goes wrong in them."""

import csv
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from samething.catalog import Catalog
from samething.cli import main
from samething.datasets import CatalogReport, Dropped, catalog
from samething.errors import ArtefactError, InputError
from samething.files import read_csv, write_csv
from samething.search.collection import Collection
from scenes import printed

SAMPLES = Path(skimage.data.__file__).parent


def image(path: Path, number: int, size: tuple[int, int] = (12, 8), **options: object) -> Path:
    """An image file whose content depends on the number alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path, **options)
    return path


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """Ten things with three images each, under names with spaces and letters from elsewhere."""
    folder = tmp_path / "my images – Möbel"
    for thing in range(10):
        for view in range(3):
            image(folder / f"Stuhl 椅子 {thing}" / f"view {view}.png", 3 * thing + view, (12 + view, 8))
    return folder


def rows(report: CatalogReport) -> list[dict[str, object]]:
    return report.catalog.table.to_pylist()


def dropped_file(report: CatalogReport) -> list[list[str]]:
    with Path(f"{report.path}.dropped.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


# ---- folders


def test_a_folder_with_a_sub_folder_for_each_thing(things, tmp_path):
    report = catalog(things, domain="furniture", output=tmp_path / "catalog.parquet")
    assert len(report.catalog) == 30
    first = rows(report)[0]
    path = things / "Stuhl 椅子 0" / "view 0.png"
    assert first | {"role": "?"} == {
        "image": "Stuhl 椅子 0/view 0.png",
        "label": "Stuhl 椅子 0",
        "domain": "furniture",
        "dataset": "my images – Möbel",
        "role": "?",
        "width": 12,
        "height": 8,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert [row["width"] for row in rows(report)[:3]] == [12, 13, 14]
    assert report.counts == [
        {"domain": "furniture", "role": "train", "instances": 7, "images": 21},
        {"domain": "furniture", "role": "val", "instances": 1, "images": 3},
        {"domain": "furniture", "role": "query+index", "instances": 2, "images": 6},
    ]
    assert (report.dropped, report.warnings, dict(report.passed_over), report.exit_status) == ((), (), {}, 0)
    assert not Path(f"{report.path}.dropped.csv").exists()
    read = Catalog.read(report.path)
    assert read.fingerprint == report.catalog.fingerprint
    assert all(path.is_file() for path in read.paths)


def test_running_again_gives_the_same_bytes_and_another_seed_does_not(things, tmp_path):
    first = catalog(things, output=tmp_path / "a.parquet")
    second = catalog(things, output=tmp_path / "b.parquet")
    again = catalog(things, output=tmp_path / "a.parquet")
    assert first.path.read_bytes() == second.path.read_bytes() == again.path.read_bytes()
    assert catalog(things, seed=1, output=tmp_path / "c.parquet").path.read_bytes() != first.path.read_bytes()


def test_nested_folders_and_images_directly_in_the_folder(tmp_path):
    folder = tmp_path / "images"
    image(folder / "loose.png", 1)
    image(folder / "chairs" / "red" / "1.png", 2)
    image(folder / "chairs" / "red" / "2.png", 3)
    image(folder / "chairs" / "3.png", 4)
    report = catalog(folder, output=tmp_path / "catalog.parquet")
    assert {row["image"]: row["label"] for row in rows(report)} == {
        "chairs/3.png": "chairs",
        "chairs/red/1.png": "chairs/red",
        "chairs/red/2.png": "chairs/red",
    }
    assert report.dropped == (Dropped("loose.png", "it lies in no sub-folder, so it has no label"),)
    assert report.exit_status == 3


def test_unreadable_images_are_listed_with_reasons_and_the_rest_goes_on(things, tmp_path):
    folder = things / "Stuhl 椅子 3"
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page, saved.jpg").write_bytes(b"<html>not found</html>" * 10)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "cut.jpg").write_bytes(image(tmp_path / "whole.jpg", 1).read_bytes()[:15])
    report = catalog(things, output=tmp_path / "catalog.parquet")
    assert len(report.catalog) == 30
    reasons = {Path(entry.image).name: entry.reason for entry in report.dropped}
    assert reasons["empty.jpg"] == "is empty"
    assert reasons["page, saved.jpg"] == "is not an image in a known format"
    assert reasons["gone.jpg"] == "No such file or directory"
    assert set(reasons) == {"empty.jpg", "page, saved.jpg", "gone.jpg", "cut.jpg"}
    assert report.exit_status == 3
    assert dropped_file(report) == [
        ["image", "reason"],
        *([entry.image, entry.reason] for entry in report.dropped),
    ]
    text = printed(report)
    assert "images dropped: 4" in text
    assert "page, saved.jpg: is not an image" in text
    assert "catalog.parquet.dropped.csv" in text

    for name in reasons:
        (folder / name).unlink()
    assert catalog(things, output=tmp_path / "catalog.parquet").exit_status == 0
    assert not Path(f"{report.path}.dropped.csv").exists(), "the list of the earlier run is gone"


def test_a_file_cut_off_behind_its_header_is_left_to_the_features(things, tmp_path):
    path = things / "Stuhl 椅子 3" / "view 0.png"
    path.write_bytes(path.read_bytes()[:-40])
    assert len(catalog(things, output=tmp_path / "catalog.parquet").catalog) == 30


def test_a_name_that_is_no_text_is_dropped_with_its_bytes_shown(things, tmp_path):
    image(things / os.fsdecode(b"l\xe4.png"), 50)
    image(things / os.fsdecode(b"Schr\xe4nke") / "1.png", 51)
    report = catalog(things, output=tmp_path / "catalog.parquet")
    assert sorted(report.dropped, key=lambda entry: entry.image) == [
        Dropped("Schr\\xe4nke/1.png", "its path is not UTF-8; rename it"),
        Dropped("l\\xe4.png", "its path is not UTF-8; rename it"),
    ]
    assert len(dropped_file(report)) == 3
    assert printed(report)


def test_images_upright_and_under_wrong_names(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "p" / "a" / "turned.jpg", 1, (30, 20), exif=exif)
    image(tmp_path / "p" / "a" / "b.png", 2, (30, 20)).rename(tmp_path / "p" / "a" / "named wrongly.jpg")
    shutil.copy(SAMPLES / "coffee.png", tmp_path / "p" / "a" / "without suffix")
    found = {
        row["image"]: (row["width"], row["height"])
        for row in rows(catalog(tmp_path / "p", output=tmp_path / "c"))
    }
    assert found == {
        "a/turned.jpg": (20, 30),
        "a/named wrongly.jpg": (30, 20),
        "a/without suffix": (600, 400),
    }


def test_other_files_hidden_ones_and_links(things, tmp_path):
    (things / "notes.TXT").write_text("x")
    (things / "Stuhl 椅子 1" / "price.txt").write_text("x")
    (things / "README").write_text("x")
    image(things / ".thumbnails" / "1.png", 1)
    (things / "linked").symlink_to(things / "Stuhl 椅子 1")
    report = catalog(things, output=tmp_path / "catalog.parquet")
    assert len(report.catalog) == 30
    assert report.passed_over == {".txt": 2, "hidden": 1, "link to a folder": 1, "without suffix": 1}
    assert report.exit_status == 0
    assert "passed over: 2 .txt, 1 hidden, 1 link to a folder, 1 without suffix" in printed(report)


SYSTEM = ("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information", "__MACOSX")


@pytest.mark.parametrize("command", ["catalog", "index"])
def test_what_systems_keep_beside_images_is_not_listed(things, tmp_path, command):
    """Before, thumbnails of a storage device, bins and leftovers of archives were labels and trained on."""
    for number, name in enumerate(SYSTEM):
        image(things / name / "1.png", 60 + number)
        image(things / "Stuhl 椅子 1" / name / "1.png", 70 + number)
    image(things / "old" / "drafts" / "1.png", 80)
    image(things / "Stuhl 椅子 1" / "draft 1.png", 81)
    if command == "index":
        collection = Collection(things, exclude=("old", "draft *"))
        assert len(collection.files()) == 30
        assert collection.passed_over == {"folder of the system": 12, "excluded": 2}
        again = Collection.from_json(collection.to_json(tmp_path), tmp_path)
        assert again == collection and len(again.files()) == 30
        return
    report = catalog(things, exclude=["old", "draft *"], output=tmp_path / "catalog.parquet")
    assert len(report.catalog) == 30 and report.exit_status == 0
    assert report.passed_over == {"folder of the system": 12, "excluded": 2}
    assert len(catalog(things, output=tmp_path / "c.parquet").catalog) == 32
    with pytest.raises(InputError, match="--exclude old"):
        catalog(report.path, exclude=["old"], output=tmp_path / "d.parquet")


def test_cells_that_a_spreadsheet_would_compute_are_text_and_read_back(tmp_path):
    """Before, a file named =HYPERLINK(…) in dropped.csv was a formula to whoever opened the list."""
    names = ["=HYPERLINK(1)", "+1", "-1", "@x", "'=1", "''@", "'tis", "plain", "\t=1", "", 'a,b\n"c"']
    write_csv(tmp_path / "x.csv", ["image", "reason"], [(name, 1) for name in names])
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as stream:
        written = [row["image"] for row in csv.DictReader(stream)]
    assert not [cell for cell in written if cell[:1] in {*"=+-@\t"} and cell]
    assert [row["image"] for row in read_csv(tmp_path / "x.csv")] == names
    assert written[6:8] == names[6:8]


def test_names_cannot_act_on_a_terminal(tmp_path, capsys, monkeypatch):
    """Before, a folder's name could clear the screen, and a mark of direction turned a suffix around."""
    monkeypatch.setenv("COLUMNS", "300")
    for number, name in enumerate(["\x1b[2J\x1b]0;owned\x07 a", "b \u202egpj.exe", "c \x9b31m"]):
        for view in range(2):
            image(tmp_path / "p" / name / f"{view}.png", 10 * number + view)
    (tmp_path / "p" / "\x1b[31m.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SystemExit):
        main(["catalog", str(tmp_path / "p"), "--domain", "\x1b[5mblink", "-o", str(tmp_path / "c.parquet")])
    with pytest.raises(SystemExit):
        main(["catalog", str(tmp_path / "\x1b[2J"), "-o", str(tmp_path / "c.parquet")])
    shown = "".join(capsys.readouterr())
    assert "\\x1b[31m.png" in shown and "\\x1b[5m" in shown and "\\x1b[2J does not exist" in shown
    assert not {"\x1b", "\u202e", "\x9b", "\x07"} & {*shown}


def test_a_root_above_the_folder(things, tmp_path):
    report = catalog(things, root=tmp_path, output=tmp_path / "out" / "catalog.parquet")
    assert rows(report)[0]["image"] == "my images – Möbel/Stuhl 椅子 0/view 0.png"
    assert rows(report)[0]["label"] == "Stuhl 椅子 0"
    assert Catalog.read(report.path).root.resolve() == tmp_path.resolve()
    with pytest.raises(InputError, match="does not lie in the root"):
        catalog(things, root=tmp_path / "out", output=tmp_path / "other.parquet")


def test_images_without_labels_are_for_the_index(tmp_path):
    image(tmp_path / "p" / "1.png", 1)
    image(tmp_path / "p" / "deep" / "2.png", 2)
    report = catalog(tmp_path / "p", labels="none", output=tmp_path / "catalog.parquet")
    found = [(row["image"], row["label"], row["role"]) for row in rows(report)]
    assert found == [("1.png", "1.png", "index"), ("deep/2.png", "deep/2.png", "index")]
    assert (report.warnings, report.exit_status) == ((), 0)


# ---- what looks odd


def test_the_same_image_under_two_labels_is_a_warning(things, tmp_path):
    shutil.copy(things / "Stuhl 椅子 0" / "view 0.png", things / "Stuhl 椅子 1" / "again.png")
    report = catalog(things, output=tmp_path / "catalog.parquet")
    assert len(report.warnings) == 1
    assert "Stuhl 椅子 1/again.png is the same image as Stuhl 椅子 0/view 0.png" in report.warnings[0]
    assert report.exit_status == 0
    assert "warning" in printed(report)


def test_labels_with_one_image_are_a_warning_and_stay_in_training(things, tmp_path):
    for number in range(5):
        image(things / f"single {number}" / "1.png", 100 + number)
    report = catalog(things, output=tmp_path / "catalog.parquet")
    assert report.warnings == (
        "labels with one image only, which cannot be trained on: 5 (single 0, single 1, single 2, …)",
    )
    assert {row["role"] for row in rows(report) if str(row["label"]).startswith("single")} == {"train"}


def test_one_label_and_no_test_share_are_warnings(tmp_path):
    for number in range(2):
        image(tmp_path / "p" / "only" / f"{number}.png", number)
    report = catalog(tmp_path / "p", output=tmp_path / "catalog.parquet")
    assert report.warnings == (
        "there is one label only; training needs at least two",
        "too few labels with two images or more to set any aside for the test",
    )


def test_a_long_list_of_warnings_is_shortened_on_the_screen_only(things, tmp_path):
    for number in range(20):
        shutil.copy(things / "Stuhl 椅子 0" / "view 0.png", things / "Stuhl 椅子 1" / f"again {number}.png")
    report = catalog(things, output=tmp_path / "catalog.parquet")
    assert len(report.warnings) == 20
    assert printed(report).count("same image") == 8
    assert "… and 12 more" in printed(report)


def test_square_brackets_in_names_are_printed_as_they_are(tmp_path):
    for number in range(2):
        image(tmp_path / "p" / "[red] chair" / f"{number}.png", number)
    (tmp_path / "p" / "[red] chair" / "[x].jpg").write_bytes(b"")
    assert "[red] chair/[x].jpg: is empty" in printed(
        catalog(tmp_path / "p", output=tmp_path / "[out].parquet")
    )


# ---- errors about folders


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    with pytest.raises(InputError, match="holds no images: it is empty"):
        catalog(folder, output=tmp_path / "catalog.parquet")
    for name in ("a.txt", "b.txt", "c.csv", "LICENSE"):
        (folder / name).write_text("x")
    with pytest.raises(InputError, match=r"4 other files were seen \(2 \.txt, 1 without suffix, 1 \.csv\)"):
        catalog(folder, output=tmp_path / "catalog.parquet")
    assert not (tmp_path / "catalog.parquet").exists()


def test_a_flat_folder_of_images_is_told_about_labels_none(tmp_path):
    image(tmp_path / "p" / "1.png", 1)
    with pytest.raises(InputError, match="1 images, but none with a label") as caught:
        catalog(tmp_path / "p", output=tmp_path / "catalog.parquet")
    assert "--labels none" in caught.value.next_step


def test_a_folder_of_which_nothing_can_be_read_keeps_its_reasons(tmp_path):
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 images .* \(for instance a/1\.jpg: is empty\)"):
        catalog(tmp_path / "p", output=tmp_path / "catalog.parquet")
    assert "a/1.jpg,is empty" in (tmp_path / "catalog.parquet.dropped.csv").read_text()
    assert not (tmp_path / "catalog.parquet").exists()


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(ArtefactError, match="expected: a folder of images"):
        catalog(tmp_path / "nothing", output=tmp_path / "catalog.parquet")


def test_an_output_that_cannot_be_written_is_noticed_before_the_images_are_read(tmp_path):
    # reading the images first would end in the error that none can be read
    (tmp_path / "p" / "a").mkdir(parents=True)
    (tmp_path / "p" / "a" / "1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="is not a file"):
        catalog(tmp_path / "p", output=tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        catalog(tmp_path / "p", output=tmp_path / "p" / "a" / "1.jpg" / "catalog.parquet")


def test_impossible_shares(things, tmp_path):
    with pytest.raises(InputError, match=r"val=0\.6"):
        catalog(things, val=0.6, test=0.6, output=tmp_path / "catalog.parquet")


# ---- tables


def table(path: Path, header: list[str], lines: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *lines])
    return path


def test_the_papers_annotation_file(things, tmp_path):
    lines = [
        [f"Stuhl 椅子 {thing}/view {view}.png", f"{thing:03}"] for thing in range(10) for view in range(3)
    ]
    report = catalog(
        table(things / "annotations.csv", ["img_path", "label"], lines),
        domain="furniture",
        output=tmp_path / "catalog.parquet",
    )
    assert [row["label"] for row in rows(report)][::3] == [f"{thing:03}" for thing in range(10)]
    assert {(row["domain"], row["dataset"]) for row in rows(report)} == {("furniture", "annotations")}
    assert {count["role"]: count["instances"] for count in report.counts} == {
        "train": 7,
        "val": 1,
        "query+index": 2,
    }
    assert report.exit_status == 0
    assert rows(report)[0]["sha256"]
    from_folder = catalog(things, domain="furniture", output=tmp_path / "folder.parquet")
    assert list(from_folder.catalog.strings("sha256")) == list(report.catalog.strings("sha256"))


def test_a_tables_roles_and_domains_are_kept(things, tmp_path):
    lines = [
        ["Stuhl 椅子 0/view 0.png", "x", "chairs", "query"],
        ["Stuhl 椅子 0/view 1.png", "x", "chairs", "index"],
        ["Stuhl 椅子 1/view 0.png", "x", "tables", "train"],
        ["Stuhl 椅子 1/view 1.png", "y", "tables", "val"],
    ]
    source = table(tmp_path / "t.csv", ["img_path", "label", "domain", "role"], lines)
    report = catalog(source, root=things, output=tmp_path / "catalog.parquet")
    assert [row["role"] for row in rows(report)] == ["query", "index", "train", "val"]
    assert [row["label"] for row in rows(report)] == ["chairs/x", "chairs/x", "tables/x", "y"]
    with pytest.raises(InputError, match="has a column domain"):
        catalog(source, root=things, domain="other", output=tmp_path / "catalog.parquet")


def test_rows_that_cannot_be_used_are_dropped_with_their_numbers(things, tmp_path):
    (things / "broken.png").write_bytes(b"\x89PNG")
    good, second = "Stuhl 椅子 0/view 0.png", "Stuhl 椅子 0/view 1.png"
    lines = [
        [good, "a"],
        ["missing.png", "a"],
        ["", "a"],
        [second, ""],
        [f"./{good}", "b"],
        [good, "a"],
        ["broken.png", "a"],
        [second, "a"],
    ]
    report = catalog(
        table(things / "t.csv", ["img_path", "label"], lines), output=tmp_path / "catalog.parquet"
    )
    assert [row["image"] for row in rows(report)] == [good, second]
    assert set(report.dropped) == {
        Dropped("missing.png", "row 1: No such file or directory"),
        Dropped("", "row 2: the path is empty"),
        Dropped(second, "row 3: the label is empty"),
        Dropped(f"./{good}", "row 4: listed before in row 0, with the label 'a' and not 'b'"),
        Dropped(good, "row 5: listed before in row 0"),
        Dropped("broken.png", "row 6: is not an image in a known format"),
    }
    assert report.exit_status == 3
    assert len(dropped_file(report)) == 7


def test_a_table_whose_images_are_elsewhere_says_so(things, tmp_path):
    source = table(tmp_path / "t.csv", ["img_path", "label"], [["Stuhl 椅子 0/view 0.png", "a"]])
    with pytest.raises(ArtefactError, match="none of the first 1 images") as caught:
        catalog(source, output=tmp_path / "catalog.parquet")
    assert "--root" in caught.value.next_step
    assert len(catalog(source, root=things, output=tmp_path / "catalog.parquet").catalog) == 1


def test_absolute_paths_below_the_root_become_relative(things, tmp_path):
    inside, outside = things / "Stuhl 椅子 0" / "view 0.png", image(tmp_path / "elsewhere.png", 5)
    source = table(things / "t.csv", ["img_path", "label"], [[str(inside), "a"], [str(outside), "b"]])
    report = catalog(source, output=tmp_path / "catalog.parquet")
    assert [row["image"] for row in rows(report)] == ["Stuhl 椅子 0/view 0.png", str(outside)]
    assert report.exit_status == 0


@pytest.mark.parametrize("lines", [[], [["", ""], ["", "a"]]])
def test_a_table_without_usable_rows(tmp_path, lines):
    source = table(tmp_path / "t.csv", ["img_path", "label"], lines)
    with pytest.raises(InputError, match=r"no rows|2 rows, but none that can be used"):
        catalog(source, output=tmp_path / "catalog.parquet")


def test_a_table_without_labels_is_for_the_index(things, tmp_path):
    lines = [["Stuhl 椅子 0/view 0.png"], ["Stuhl 椅子 1/view 0.png"]]
    source = table(things / "t.csv", ["img_path"], lines)
    with pytest.raises(InputError, match="has the columns img_path"):
        catalog(source, output=tmp_path / "catalog.parquet")
    report = catalog(source, labels="none", output=tmp_path / "catalog.parquet")
    assert [(row["label"], row["role"]) for row in rows(report)] == [(line[0], "index") for line in lines]
    with pytest.raises(InputError, match="has the columns name"):
        catalog(table(things / "n.csv", ["name"], lines), labels="none", output=tmp_path / "catalog.parquet")


def test_a_catalog_can_be_read_again(things, tmp_path):
    first = catalog(things, domain="furniture", output=tmp_path / "here" / "first.parquet")
    second = catalog(first.path, output=tmp_path / "second.parquet")
    assert second.catalog.fingerprint == first.catalog.fingerprint
    unlabelled = catalog(first.path, labels="none", output=tmp_path / "third.parquet")
    assert set(unlabelled.catalog.strings("role")) == {"index"}
    assert unlabelled.catalog.strings("domain")[0] == "furniture"


# ---- the command


def test_the_command_in_a_process_of_its_own(things, tmp_path):
    (things / "Stuhl 椅子 3" / "empty.jpg").write_bytes(b"")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "COLUMNS": "120"}
    program = [sys.executable, "-c", "from samething.cli import main; main()", "catalog"]
    command = [*program, str(things), "--domain", "furniture"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "images dropped: 1" in done.stdout
    assert "furniture" in done.stdout
    # rich before 15 ends a bar that nobody sees by an empty line
    assert done.stderr == ("" if int(importlib.metadata.version("rich").split(".")[0]) >= 15 else "\n")
    assert len(Catalog.read(tmp_path / "catalog.parquet")) == 30
    done = subprocess.run([*program, "--help"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for word in ("--domain", "--labels", "--root", "--val", "--test", "--seed", "-o", "in [0, 1)"):
        assert word in done.stdout
