"""Feature folders on real images: what is computed, what is kept, and what a killed run leaves behind."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samething
import samething.backbones.loading
from samething.backbones import load_backbone, load_from_metadata
from samething.catalog import Catalog
from samething.errors import ArtefactError, FingerprintError, InputError, SamethingError
from samething.features import FeatureSet, features
from samething.features.inference import Accelerator, choose_accelerator
from samething.files import file_sha256, only_one_writer
from samething.images import decode, prepare
from samething.sessions import PARITY_COSINE, parity_cosine
from scenes import photographs, write_things
from test_backbones import TINY, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

BACKBONE = f"timm:{TINY}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    save_tiny(path)
    return path


@pytest.fixture
def compute(weights):
    """features() with the tiny backbone in this process, in batches of 4."""

    def run(catalog: Path, output: Path, **options: object) -> FeatureSet:
        settings = {"backbone": BACKBONE, "weights": weights, "batch_size": 4, "num_workers": 0}
        return features(catalog, output=output, **{**settings, "runtime": "torch", **options})

    return run


@pytest.fixture
def images(tmp_path) -> Path:
    return write_things(tmp_path / "my images é", num_things=5, num_views=2)


def catalog_of(folder: Path, *, hashes: bool = True, only: list[str] | None = None) -> Path:
    """A catalog of every file below a folder, readable or not."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    rows = [
        {
            "image": str(path.relative_to(folder)),
            "label": path.parent.name,
            "sha256": file_sha256(path) if hashes else None,
        }
        for path in files
        if only is None or path.name in only
    ]
    return Catalog.from_rows(rows, root=folder).write(folder.parent / "catalog.parquet")


def stored(folder: FeatureSet | Path) -> bytes:
    """The bytes of the finished features.npy."""
    opened = FeatureSet.open(folder.folder if isinstance(folder, FeatureSet) else folder)
    return (opened.folder / opened.manifest.content["data"] / "features.npy").read_bytes()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's content, but for how fast it was made, which is never the same twice, and its checksum."""
    varying = rb'"images_per_second": [^,]+,|"content_fingerprint": "[^"]+"'
    return {
        str(path.relative_to(folder)): re.sub(varying, b"", path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# ---- what is in the folder


def test_rows_are_the_backbones_own_in_catalog_order(images, compute, weights, tmp_path):
    path = catalog_of(images)
    shuffled = Catalog.read(path).take(np.random.default_rng(0).permutation(10))
    shuffled.write(path)
    result = compute(path, tmp_path / "features", decoding="exact")
    backbone = load_backbone(BACKBONE, weights=weights)
    assert result.catalog.strings("image").tolist() == shuffled.strings("image").tolist()
    for row, image in enumerate(shuffled.paths):
        with torch.inference_mode():
            pixels = torch.from_numpy(prepare(decode(image), backbone.preprocessing)[None])
            expected = backbone(pixels)[0].numpy()
        np.testing.assert_allclose(result.rows[row], expected, rtol=2e-3, atol=2e-3)
    assert len(np.unique(result.rows, axis=0)) == 10
    assert result.rows.dtype == np.float16
    assert isinstance(result.rows, np.memmap)
    assert result.num_computed == 10
    assert result.exit_status == 0
    assert result.preprocessing == backbone.preprocessing
    assert result.backbone == backbone.metadata()
    assert "10" in result.__rich__()
    assert sorted(path.name for path in result.folder.iterdir()) == [
        ".lock", f"data-{shuffled.fingerprint}", "job.json", "manifest.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (result.folder / f"data-{shuffled.fingerprint}").iterdir()) == [
        "catalog.parquet", "features.npy", "unreadable.csv",
    ]  # fmt: skip


def test_features_npy_is_an_ordinary_array(images, compute, tmp_path):
    result = compute(catalog_of(images), tmp_path / "features")
    whole = tmp_path / "copy.npy"
    np.save(whole, np.asarray(result.rows))
    assert np.array_equal(np.load(whole), result.rows)
    assert (
        file_sha256(next(result.folder.rglob("features.npy"))) in result.manifest.content["sha256"].values()
    )
    assert result.manifest.content["images_per_second"] > 0


def test_a_rerun_does_nothing(images, compute, tmp_path):
    path = catalog_of(images)
    compute(path, tmp_path / "features")
    before = files_of(tmp_path / "features")
    shutil.rmtree(images)  # not even looked at
    again = compute(path, tmp_path / "features", batch_size=3)
    assert again.num_computed == 0
    assert "nothing to compute" in again.__rich__()
    assert files_of(tmp_path / "features") == before


def test_the_same_image_twice_is_computed_once(images, compute, tmp_path):
    first = sorted(images.rglob("*.jpg"))[0]
    (images / "copies").mkdir()
    for name in ("z.jpg", "y.jpg"):
        shutil.copy(first, images / "copies" / name)
    path = catalog_of(images)
    result = compute(path, tmp_path / "features")
    assert (len(result.rows), result.num_computed) == (12, 10)
    same = [row for row, sha in enumerate(result.catalog.strings("sha256")) if sha == file_sha256(first)]
    assert len(same) == 3
    assert len(np.unique(result.rows[same], axis=0)) == 1


def test_a_lost_copy_does_not_take_the_others_with_it(images, compute, tmp_path):
    first = sorted(images.rglob("*.jpg"))[0]
    shutil.copy(first, images / "zz copy.jpg")
    path = catalog_of(images)
    whole = compute(path, tmp_path / "whole")
    first.unlink()
    result = compute(path, tmp_path / "features")
    assert stored(result) == stored(whole)  # the same image is still there under another name
    (images / "zz copy.jpg").unlink()
    result = compute(path, tmp_path / "without")
    assert {bad.image for bad in result.unreadable} == {str(first.relative_to(images)), "zz copy.jpg"}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_bytes(images, compute, tmp_path, num_workers):
    path = catalog_of(images)
    alone = compute(path, tmp_path / "alone")
    helped = compute(path, tmp_path / "helped", num_workers=num_workers)
    assert files_of(alone.folder) == files_of(helped.folder)


def test_a_csv_table_gets_its_hashes(images, compute, tmp_path):
    """Without hashes an image is known by its content all the same, not by its name."""
    rows = [f"{path.relative_to(images)},{path.parent.name}" for path in sorted(images.rglob("*.jpg"))]
    table = images / "annotations.csv"
    table.write_text("\n".join(["img_path,label", *rows]) + "\n", encoding="utf-8")
    result = compute(table, tmp_path / "features")
    assert result.catalog.strings("sha256")[0] == file_sha256(result.catalog.paths[0])
    assert compute(table, tmp_path / "features").num_computed == 0
    turned = sorted(images.rglob("*.jpg"))[3]
    Image.open(turned).rotate(180).save(turned)
    again = compute(table, tmp_path / "features")
    assert again.num_computed == 1
    assert [row for row in range(10) if not np.array_equal(again.rows[row], result.rows[row])] == [3]


# ---- images that cannot be read


def write_bad(images: Path) -> None:
    whole = sorted(images.rglob("*.jpg"))[0].read_bytes()
    (images / "bad").mkdir()
    (images / "bad" / "cut ü.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "bad" / "empty.jpg").write_bytes(b"")
    (images / "bad" / "empty too.jpg").write_bytes(b"")
    (images / "bad" / "text.png").write_text("no image")
    Image.new("1", (12_000, 12_000)).save(images / "bad" / "bomb.png")


def test_unreadable_images_are_listed_and_left_out(images, compute, tmp_path):
    good = compute(catalog_of(images), tmp_path / "good")
    write_bad(images)
    result = compute(catalog_of(images), tmp_path / "features")
    assert result.exit_status == 3
    assert (len(result.rows), result.num_computed) == (10, 10)
    reasons = {bad.image: bad.reason for bad in result.unreadable}
    assert {name: any(word in reasons[name] for word in words) for name, words in {
        "bad/cut ü.jpg": ("damaged", "truncated"),
        "bad/empty.jpg": ("is empty",),
        "bad/empty too.jpg": ("is empty",),
        "bad/text.png": ("not an image",),
        "bad/bomb.png": ("pixels",),
    }.items()} == dict.fromkeys(reasons, True)  # fmt: skip
    assert not any("bytes" in reason.split("(")[0] or str(tmp_path) in reason for reason in reasons.values())
    assert "bad/empty.jpg: is empty" in result.__rich__()
    kept = ~np.char.startswith(result.catalog.strings("image").astype(str), "bad/")
    assert kept.all()
    np.testing.assert_allclose(result.rows, good.rows, rtol=2e-3, atol=2e-3)
    reopened = FeatureSet.open(result.folder)
    assert reopened.unreadable == result.unreadable
    before = files_of(result.folder)
    again = compute(catalog_of(images), tmp_path / "features")
    assert (again.num_computed, again.exit_status) == (0, 3)
    assert files_of(result.folder) == before


def test_a_first_batch_without_a_readable_image(images, compute, tmp_path):
    """The choice of the runtime waits for an image to try it on."""
    (images / "AAA").mkdir()
    for number in range(5):
        (images / "AAA" / f"{number}.jpg").write_text(f"text {number}")
    result = compute(catalog_of(images), tmp_path / "features", runtime="onnxruntime")
    assert (len(result.rows), len(result.unreadable)) == (10, 5)
    assert result.manifest.content["runtime"] == "onnxruntime"


def test_a_image_changed_since_the_catalog_is_reported(images, compute, tmp_path):
    path = catalog_of(images)
    changed = sorted(images.rglob("*.jpg"))[2]
    Image.open(changed).rotate(90).save(changed)
    result = compute(path, tmp_path / "features")
    assert [bad.image for bad in result.unreadable] == [str(changed.relative_to(images))]
    assert "changed since the catalog was made" in result.unreadable[0].reason


def test_what_could_not_be_read_is_tried_again(images, compute, tmp_path):
    path = catalog_of(images)
    whole = compute(path, tmp_path / "whole")
    lost = sorted(images.rglob("*.jpg"))[4]
    content = lost.read_bytes()
    lost.unlink()
    result = compute(path, tmp_path / "features")
    assert [(bad.image, bad.reason) for bad in result.unreadable] == [
        (str(lost.relative_to(images)), "No such file or directory")
    ]
    lost.write_bytes(content)
    again = compute(path, tmp_path / "features")
    assert (again.num_computed, again.exit_status) == (1, 0)
    np.testing.assert_allclose(again.rows, whole.rows, rtol=2e-3, atol=2e-3)
    assert len(list(again.folder.glob("data-*"))) == 1
    assert compute(path, tmp_path / "features").num_computed == 0


def test_no_readable_image_is_an_error_that_mending_ends(images, compute, tmp_path):
    path = catalog_of(images)
    good = {file: file.read_bytes() for file in images.rglob("*.jpg")}
    for file in good:
        file.write_bytes(b"")
    with pytest.raises(InputError, match="none of the 10 images could be read") as caught:
        compute(path, tmp_path / "features")
    assert "view 0.jpg: " in caught.value.given
    assert not (tmp_path / "features" / "manifest.json").exists()
    for file, content in good.items():
        file.write_bytes(content)
    assert len(compute(path, tmp_path / "features").rows) == 10


def test_features_beyond_float16_are_listed(images, compute, tmp_path, monkeypatch):
    class Louder(torch.nn.Module):
        def forward(self, features):
            return features * 1e9

    def loud(*arguments, **options):
        backbone = load_backbone(*arguments, **options)
        backbone.network = torch.nn.Sequential(backbone.network, Louder())
        return backbone

    monkeypatch.setattr(samething.backbones.loading, "load_backbone", loud)
    with pytest.raises(InputError, match="not finite in float16"):
        compute(catalog_of(images), tmp_path / "features")


def test_a_catalog_without_images(compute, tmp_path):
    path = Catalog.from_rows([], root=tmp_path).write(tmp_path / "catalog.parquet")
    with pytest.raises(InputError, match="without images"):
        compute(path, tmp_path / "features")
    assert not (tmp_path / "features").exists()


# ---- a catalog that changes


@pytest.mark.parametrize(
    ("change", "num_computed"),
    [("added", 2), ("removed", 0), ("changed", 1), ("moved", 0), ("relabelled", 0)],
)
def test_only_what_is_new_is_computed(images, compute, tmp_path, change, num_computed):
    compute(catalog_of(images), tmp_path / "features")
    files = sorted(images.rglob("*.jpg"))
    if change == "added":
        for number, image in enumerate(photographs()[:2]):
            image.save(images / f"{number} new.png")
    elif change == "removed":
        files[3].unlink()
    elif change == "changed":
        Image.open(files[3]).rotate(180).save(files[3])
    else:
        files[3].rename(files[3].with_name("zzz.jpg") if change == "moved" else images / files[3].name)
    path = catalog_of(images)
    updated = compute(path, tmp_path / "features")
    fresh = compute(path, tmp_path / "fresh")
    assert updated.num_computed == num_computed
    assert stored(updated) == stored(fresh)
    assert updated.catalog.table.equals(fresh.catalog.table)
    assert updated.manifest.fingerprint == fresh.manifest.fingerprint
    assert len(list(updated.folder.glob("data-*"))) == 1


def test_moved_images_are_found_with_root(images, compute, tmp_path):
    path = catalog_of(images)
    images.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="--root"):
        compute(path, tmp_path / "features")
    assert len(compute(path, tmp_path / "features", root=tmp_path / "elsewhere").rows) == 10


# ---- folders that belong to something else


def test_another_preprocessing_is_refused_by_name(images, compute, tmp_path):
    path = catalog_of(images)
    before = stored(compute(path, tmp_path / "features"))
    with pytest.raises(FingerprintError, match=r"backbone\.preprocessing\.resize") as caught:
        compute(path, tmp_path / "features", views="squash")
    assert "squash" in caught.value.expected
    assert stored(tmp_path / "features") == before


def test_other_weights_and_backbones_are_refused_by_name(images, compute, tmp_path):
    path = catalog_of(images)
    compute(path, tmp_path / "features")
    save_tiny(tmp_path / "other.pth", seed=5)
    with pytest.raises(FingerprintError, match=r"backbone\.weights") as caught:
        compute(path, tmp_path / "features", weights=tmp_path / "other.pth")
    assert "backbone.name" not in str(caught.value)
    with pytest.raises(FingerprintError, match=r"backbone\.name is 'timm:test_efficientnet"):
        compute(path, tmp_path / "features", backbone="efficientnet_lite0", weights=None)


def test_a_folder_with_other_things_is_left_alone(images, compute, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ArtefactError, match=r"letter\.txt"):
        compute(catalog_of(images), tmp_path / "home")
    assert set(files_of(tmp_path / "home")) == {"letter.txt"}


def test_two_writers_at_once_are_refused(images, compute, tmp_path):
    with only_one_writer(tmp_path / "features"), pytest.raises(ArtefactError, match="another process"):
        compute(catalog_of(images), tmp_path / "features")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}], ids=str)
def test_impossible_numbers_are_refused(images, compute, tmp_path, options):
    with pytest.raises(InputError, match=next(iter(options))):
        compute(catalog_of(images), tmp_path / "features", **options)


def test_a_target_below_a_file_is_refused(images, compute, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        compute(catalog_of(images), tmp_path / "file" / "features")


def test_a_read_only_target_is_refused(images, compute, tmp_path):
    folder = tmp_path / "read only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
    else:  # permission bits do not bind root; a read-only mount does
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("root without the right to mount")
    try:
        with pytest.raises(InputError, match="cannot write") as caught:
            compute(catalog_of(images), folder)
        assert "-o" in caught.value.next_step
    finally:
        if os.geteuid() != 0:
            folder.chmod(0o755)
        else:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "text", "no list", "no catalog"])
def test_damaged_folders_are_not_opened(images, compute, tmp_path, damage):
    result = compute(catalog_of(images), tmp_path / "features")
    array = next(result.folder.rglob("features.npy"))
    content = array.read_bytes()
    if damage == "missing":
        array.unlink()
    elif damage in ("no list", "no catalog"):
        array.with_name("unreadable.csv" if damage == "no list" else "catalog.parquet").unlink()
    else:
        array.write_bytes({"cut": content[:-100], "empty": b"", "text": b"no array"}[damage])
    with pytest.raises(ArtefactError) as caught:
        FeatureSet.open(result.folder)
    assert str(array.parent) in caught.value.given


def test_an_array_of_another_size_is_not_opened(images, compute, tmp_path):
    result = compute(catalog_of(images), tmp_path / "features")
    np.save(next(result.folder.rglob("features.npy")), np.zeros((9, 3), np.float16))
    with pytest.raises(ArtefactError, match=r"features\.npy is cut short"):
        FeatureSet.open(result.folder)


def test_a_subset_knows_which_images_it_holds(images, compute, tmp_path):
    result = compute(catalog_of(images), tmp_path / "features")
    chosen = np.arange(10) % 3 == 0
    part = result.subset(chosen)
    assert np.array_equal(part.rows, result.rows[chosen])
    assert part.catalog.strings("image").tolist() == result.catalog.strings("image")[chosen].tolist()
    assert part.manifest.fingerprint != result.manifest.fingerprint


# ---- runtimes


def test_runtimes_agree(images, compute, tmp_path):
    path = catalog_of(images)
    ours = compute(path, tmp_path / "torch")
    theirs = compute(path, tmp_path / "onnxruntime", runtime="onnxruntime")
    assert ours.manifest.content["runtime"] == "torch"
    assert theirs.manifest.content["runtime"] == "onnxruntime"
    record = theirs.manifest.content["runtime_record"]
    assert (record["name"], record["device"], record["threads"]) == ("onnxruntime", "cpu", 1)
    assert PARITY_COSINE <= record["cosines"]["onnxruntime"] <= 1 + 1e-6
    one, other = (np.asarray(result.rows, np.float64) for result in (ours, theirs))
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() >= PARITY_COSINE


def test_a_grown_folder_keeps_its_runtime(images, compute, tmp_path):
    whole = compute(catalog_of(images), tmp_path / "features")
    photographs()[0].save(images / "new.png")
    grown = compute(catalog_of(images), tmp_path / "features", runtime="onnxruntime")
    assert (grown.num_computed, grown.manifest.content["runtime"]) == (1, "torch")
    # one image measures nothing: what is known of the others stays
    assert grown.manifest.content["images_per_second"] == whole.manifest.content["images_per_second"]
    assert grown.manifest.content["runtime_record"]["name"] == "torch"


def test_auto_records_every_candidate(images, compute, tmp_path):
    record = compute(catalog_of(images), tmp_path / "features", runtime="auto").manifest.content[
        "runtime_record"
    ]
    assert record["images_per_s"]["torch"] > 0
    measured = set(record["images_per_s"]) | set(record["left_out"])
    assert measured == {"torch", "torch-bfloat16", "onnxruntime", "openvino", "openvino-bfloat16"}


# ---- a network of one's own


def test_features_of_ones_own_network(images, compute, tmp_path, monkeypatch):
    path = catalog_of(images)
    (tmp_path / "my_networks.py").write_text(
        "import torch\n"
        "from samething.backbones import Backbone\n"
        "from samething.images import Preprocessing\n"
        "def mine():\n"
        "    torch.manual_seed(0)\n"
        "    network = torch.nn.Sequential(\n"
        "        torch.nn.Conv2d(3, 7, 8, 8), torch.nn.ReLU(),\n"
        "        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),\n"
        "    )\n"
        "    return Backbone(network, name='mine', width=7, preprocessing=Preprocessing(size=32))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_networks

    own = my_networks.mine()
    given = compute(path, tmp_path / "given", backbone=own, weights=None)
    named = compute(path, tmp_path / "named", backbone="python:my_networks:mine", weights=None)
    assert (given.backbone["name"], named.backbone["name"]) == ("mine", "python:my_networks:mine")
    np.testing.assert_array_equal(given.rows, named.rows)
    pixels = torch.from_numpy(
        prepare(Image.open(images / given.catalog.strings("image")[0]), own.preprocessing)
    )
    np.testing.assert_allclose(given.rows[0], own(pixels[None])[0].numpy(), atol=2e-2)
    assert load_from_metadata(named.backbone).metadata() == named.backbone
    with pytest.raises(InputError, match="loaded already"):
        compute(path, tmp_path / "other", backbone=own, weights=None, pooling="gem")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("python:", "MODULE:NAME"),
        ("python:no_such_module:x", "PYTHONPATH"),
        ("python:json:no_such_name", "is NoneType"),
        ("python:os:getcwd", "is str"),
    ],
)
def test_a_name_that_leads_to_no_backbone(name, said, images, compute, tmp_path):
    with pytest.raises(InputError, match=said):
        compute(catalog_of(images), tmp_path / "features", backbone=name, weights=None)


# ---- killed, stopped by a full disk, and gone on


PROGRAM = """
import sys, torch
from pathlib import Path
from samething.features import features
torch.set_num_threads(1)
catalog, output, weights, backbone = sys.argv[1:]
print("start", flush=True)
features(Path(catalog), output=Path(output), weights=Path(weights), backbone=backbone, batch_size=4,
         num_workers=2, runtime="torch")
"""


@contextlib.contextmanager
def running(catalog: Path, output: Path, weights: Path):
    """A run in a process of its own, begun; killed at the end."""
    source = str(Path(samething.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(catalog), str(output), str(weights), BACKBONE],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "start\n"
        yield process
        process.kill()


def seconds_until_unlocked(folder: Path) -> float:
    """A worker that outlives its run holds the folder's lock, and the next run would be refused."""
    start = time.monotonic()
    while time.monotonic() < start + 10:
        with contextlib.suppress(SamethingError), only_one_writer(folder):
            return time.monotonic() - start
        time.sleep(0.01)
    return float("inf")


def kill_and_resume(images: Path, compute, weights: Path, tmp_path: Path, *, num_kills: int) -> None:
    path = catalog_of(images)
    undisturbed = compute(path, tmp_path / "undisturbed")
    output = tmp_path / "killed"
    num_killed = num_done = 0
    for _ in range(4 * num_kills):
        if num_killed == num_kills:
            break
        if (output / "manifest.json").exists():  # the kill came too late
            assert files_of(output) == files_of(undisturbed.folder)
            shutil.rmtree(output)
        with running(path, output, weights) as process:
            num_done = len(list(output.glob("data-*/blocks/*.npz")))
            while process.poll() is None and len(list(output.glob("data-*/blocks/*.npz"))) <= num_done:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.05))
            num_killed += process.poll() is None
        assert seconds_until_unlocked(output) < 2
        num_done = len(list(output.glob("data-*/blocks/*.npz")))
    assert num_killed == num_kills
    finished = (output / "manifest.json").exists()
    resumed = compute(path, output, batch_size=7, num_workers=1, runtime="onnxruntime")  # as it began
    if not finished:
        assert resumed.num_computed <= len(undisturbed.rows) - 4 * num_done + 3  # the last block may be short
    assert files_of(output) == files_of(undisturbed.folder)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(compute, weights, tmp_path):
    images = write_things(tmp_path / "images", num_things=10, num_views=4)
    kill_and_resume(images, compute, weights, tmp_path, num_kills=2)


@pytest.mark.slow
def test_ten_kills(compute, weights, tmp_path):
    images = write_things(tmp_path / "images", num_things=50, num_views=4)
    kill_and_resume(images, compute, weights, tmp_path, num_kills=10)


@contextlib.contextmanager
def files_up_to(num_bytes: int):
    """A disk that is full for larger files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_and_the_rest_is_done_later(images, compute, tmp_path):
    for number, image in enumerate(photographs() * 5):
        image.rotate(number).resize((64, 64)).save(images / f"{number}.png")
    path = catalog_of(images)
    whole = compute(path, tmp_path / "whole")
    array_bytes, row_bytes = len(stored(whole)), 2 * whole.rows.shape[1]
    assert array_bytes > 4 * row_bytes + 4000  # room for the blocks and tables, not for the whole
    with files_up_to(array_bytes - row_bytes), pytest.raises(InputError, match="no space left") as caught:
        compute(path, tmp_path / "features")
    assert "features.npy" in caught.value.given
    assert "run the same command again" in caught.value.next_step
    with pytest.raises(ArtefactError, match="not a finished"):
        FeatureSet.open(tmp_path / "features")
    resumed = compute(path, tmp_path / "features")
    assert resumed.num_computed == 0  # the batches had been kept
    assert files_of(resumed.folder) == files_of(whole.folder)


def test_a_disk_that_is_full_early(images, compute, tmp_path):
    path = catalog_of(images)
    whole = compute(path, tmp_path / "whole")
    with files_up_to(3000), pytest.raises(InputError, match="no space left"):
        compute(path, tmp_path / "features")
    assert files_of(compute(path, tmp_path / "features").folder) == files_of(whole.folder)


def test_progress_is_short_where_nobody_watches(images, compute, tmp_path, capfd):
    compute(catalog_of(images), tmp_path / "features")
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert len(errors.strip().splitlines()) <= 1


# ---- how images are read, and what a job would take


def test_the_way_of_reading_is_part_of_the_identity(images, compute, tmp_path):
    path = catalog_of(images)
    exact = compute(path, tmp_path / "features", decoding="exact")
    with pytest.raises(FingerprintError, match=r"backbone\.preprocessing\.decoding"):
        compute(path, tmp_path / "features")
    fast = compute(path, tmp_path / "fast")
    scaled = compute(path, tmp_path / "scaled", decoding="scaled")
    assert len({result.manifest.fingerprint for result in (exact, fast, scaled)}) == 3
    one, other = (np.asarray(result.rows, np.float64) for result in (exact, fast))
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() > 0.9999


def test_a_dry_run_measures_and_writes_nothing(images, compute, tmp_path):
    write_bad(images)
    path = catalog_of(images)
    estimate = compute(path, tmp_path / "features", dry_run=True, num_workers=1)
    assert not (tmp_path / "features").exists()
    assert (estimate.num_images, estimate.num_to_compute) == (15, 14)  # the empty ones are one image
    assert (estimate.num_sampled, estimate.num_unreadable) == (14, 5)
    assert estimate.pixels_bytes == 3 * 4 * 3 * 160 * 160
    assert 0 < estimate.time_s < 600
    assert estimate.memory_bytes > estimate.pixels_bytes
    for words in ("14 of 15 images", "images/s with torch", "memory", "are free", "5 of these could not"):
        assert words in estimate.__rich__().replace("[bold]", "").replace("[/bold]", "")
    result = compute(path, tmp_path / "features")
    finished = sum(file.stat().st_size for file in result.folder.rglob("*") if file.is_file())
    assert finished < 5 * estimate.disk_bytes
    again = compute(path, tmp_path / "features", dry_run=True)
    assert again.num_to_compute == 4  # what cannot be read is tried again
    with pytest.raises(FingerprintError, match="holds features of"):
        compute(path, tmp_path / "features", dry_run=True, decoding="exact")


def test_a_dry_run_where_all_is_done(images, compute, tmp_path):
    path = catalog_of(images)
    compute(path, tmp_path / "features")
    before = files_of(tmp_path / "features")
    estimate = compute(path, tmp_path / "features", dry_run=True)
    assert (estimate.num_to_compute, estimate.time_s < 5) == (0, True)
    assert "nothing to compute" in estimate.__rich__()
    assert files_of(tmp_path / "features") == before


def test_the_accelerators_arithmetic_and_order(weights):
    """On a CPU for want of another device: padding, two batches under way, half precision behind its gate."""
    backbone = load_backbone(BACKBONE, weights=weights)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 160, 160), np.uint8)
    with torch.inference_mode():
        expected = backbone(torch.from_numpy(pixels)).numpy()
    accelerator = Accelerator(backbone, batch_size=4, device="cpu")
    first, second = accelerator.submit(pixels[:4].copy()), accelerator.submit(pixels[4:].copy())
    np.testing.assert_allclose(np.concatenate([first(), second()]), expected, rtol=1e-3, atol=1e-4)
    sample = torch.from_numpy(pixels[:4])
    name, chosen = choose_accelerator(backbone, sample, batch_size=4, num_images=9, device="cpu")
    cosine = parity_cosine(chosen.extract(sample), accelerator.extract(sample))
    assert cosine >= PARITY_COSINE
    assert (name == "cuda-float32") == (chosen.dtype == torch.float32)
    pinned, _ = choose_accelerator(
        backbone, sample, batch_size=4, num_images=9, name="cuda-bfloat16", device="cpu"
    )
    assert pinned == "cuda-bfloat16"
