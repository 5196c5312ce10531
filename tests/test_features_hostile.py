"""A thousand good images among fifty that are not, and decoders that end their process."""

import ctypes
import faulthandler
import io
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import samething
import samething.features.worker_pool
from samething.catalog import Catalog
from samething.features import FeatureSet, features
from samething.features.worker_pool import ImageReader, ImageStream
from samething.files import file_sha256
from samething.images import Preprocessing
from scenes import photographs, write_things
from test_backbones import TINY, save_tiny

# fmt: off
SCRIPTS = (

    "Ελληνικά",
    "кириллица",
    "עברית",
    "العربية",
    "हिन्दी",
    "中文",
    "日本語",
    "한국어",
    "ไทย",
    "🦊",
    "a'b\"c",
    "-o",
)


def write_good(folder: Path) -> None:
    """A thousand images that differ, in several formats, with names in many scripts."""
    sources, rng = photographs(), np.random.default_rng(0)
    for number in range(1000):
        image = sources[number % len(sources)]
        left, top = (int(rng.integers(0, side - 60)) for side in image.size)
        small = image.crop((left, top, left + 48 + number % 12, top + 50)).rotate(number % 4 * 90)
        suffix = (".jpg", ".png", ".webp", ".bmp", ".gif")[number % 5]
        path = folder / f"{SCRIPTS[number % len(SCRIPTS)]} {number // 100}" / f"{number} ü{suffix}"
        path.parent.mkdir(exist_ok=True, parents=True)
        small.save(path)


def write_hostile(folder: Path) -> list[Path]:
    """Fifty files that cannot be read, ten of a kind."""
    folder.mkdir()
    whole = io.BytesIO()
    photographs()[0].resize((200, 150)).save(whole, "JPEG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("image.jpg", whole.getvalue())
    wrong = [
        b"text",
        archive.getvalue(),
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0" * 99,
    ]
    for number in range(10):
        name = SCRIPTS[number]
        (folder / f"{name} cut.jpg").write_bytes(whole.getvalue()[: 200 + 300 * number])
        Image.new("1", (10_000 + number, 9_000)).save(folder / f"{name} bomb.png")
        (folder / f"{name} wrong.jpg").write_bytes(wrong[number % 5] + bytes([number]))
        (folder / f"{name} empty.jpg").touch()
        (folder / f"{name} secret.jpg").write_bytes(whole.getvalue() + bytes([number]))
    return sorted(folder.iterdir())


PROGRAM = """
import sys
from pathlib import Path
import torch
from samething.features import features
catalog, output, weights, backbone = sys.argv[1:]
torch.set_num_threads(1)
result = features(Path(catalog), output=Path(output), weights=Path(weights), backbone=backbone, batch_size=64,
                  num_workers=2, runtime="torch")
print(len(result.rows), len(result.unreadable), result.exit_status)
"""


def without_roots_rights() -> None:
    """Root reads every file; a process begun after this is bound by permissions, root or not.

    It gives up CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2) for itself and what it starts.
    """
    if os.geteuid() == 0:
        for capability in (1, 2):
            assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


@pytest.mark.slow
def test_a_thousand_good_and_fifty_hostile(tmp_path):
    """Ends with 1,000 rows and 50 reasons, in a process that permissions bind."""
    images = tmp_path / "images"
    write_good(images)
    hostile = write_hostile(images / "hostile")
    assert len(hostile) == 50
    files = sorted(path for path in images.rglob("*") if path.is_file())
    rows = [
        {"image": str(path.relative_to(images)), "label": path.parent.name, "sha256": file_sha256(path)}
        for path in files
    ]
    catalog = Catalog.from_rows(rows, root=images).write(tmp_path / "catalog.parquet")
    save_tiny(tmp_path / "tiny.pth")
    for path in hostile:
        if "secret" in path.name:
            path.chmod(0)
    source = str(Path(samething.__file__).parent.parent)
    arguments = (catalog, tmp_path / "features", tmp_path / "tiny.pth", f"timm:{TINY}")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        preexec_fn=without_roots_rights, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1000", "50", "3"]
    result = FeatureSet.open(tmp_path / "features")
    good = {str(path.relative_to(images)) for path in files} - {
        str(path.relative_to(images)) for path in hostile
    }
    assert set(result.catalog.strings("image")) == good
    reasons = {Path(bad.image).stem.split()[-1]: bad.reason for bad in result.unreadable}
    assert {kind: word in reasons[kind] for kind, word in {
        "cut": "damaged", "bomb": "pixels", "wrong": "not an image", "empty": "is empty",
        "secret": "Permission",
    }.items()} == dict.fromkeys(reasons, True)  # fmt: skip
    assert np.isfinite(result.rows).all()


# ---- decoders that take their process with them


@pytest.fixture
def reader(tmp_path):
    images = write_things(tmp_path / "images", num_things=5, num_views=4)
    files = sorted(images.rglob("*.jpg"))
    rows = [{"image": str(path.relative_to(images)), "label": "x"} for path in files]
    return ImageReader(Catalog.from_rows(rows, root=images), {}, Preprocessing(size=32))


def batches(num: int, size: int) -> dict[int, list[int]]:
    return {at: list(range(start, min(num, start + size))) for at, start in enumerate(range(0, num, size))}


def collected(stream: ImageStream) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    pixels, reasons = {}, {}
    for batch in stream:
        for row, image in zip(batch.rows, batch.pixels, strict=True):
            assert row not in pixels
            pixels[row] = image.copy()
        reasons |= batch.reasons
    return pixels, reasons


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_every_image_comes_once_whatever_the_workers(reader, num_workers, size):
    alone, none = collected(ImageStream(reader, batches(20, size), num_workers=0))
    assert sorted(alone) == list(range(20))
    assert none == {}
    stream = ImageStream(reader, batches(20, size), num_workers=num_workers)
    helped, _ = collected(stream)
    assert all(np.array_equal(helped[row], alone[row]) for row in range(20))
    assert sorted(helped) == sorted(alone)
    expected = (2 * min(num_workers, -(-20 // size)) + 1) * min(size, 20) * 3 * 32 * 32
    assert stream.num_bytes == expected  # and does not grow with the number of images


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_image_that_ends_its_decoder_costs_only_itself(reader, monkeypatch, number):
    own = ImageReader.read

    def deadly(self, row):
        if row in (3, 11):
            faulthandler.disable()  # it would write of a fatal error, which is no news here
            os.kill(os.getpid(), number)
        return own(self, row)

    monkeypatch.setattr(ImageReader, "read", deadly)
    pixels, reasons = collected(ImageStream(reader, batches(20, 4), num_workers=2))
    assert sorted(pixels) == [row for row in range(20) if row not in (3, 11)]
    assert sorted(reasons) == [3, 11]
    assert all(signal.Signals(number).name in reason for reason in reasons.values())


def test_a_worker_killed_by_chance_costs_nothing(reader, monkeypatch, tmp_path):
    own = ImageReader.read

    def once(self, row):
        if row == 7 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, row)

    monkeypatch.setattr(ImageReader, "read", once)
    pixels, reasons = collected(ImageStream(reader, batches(20, 4), num_workers=2))
    assert sorted(pixels) == list(range(20))
    assert reasons == {}


def test_leaving_early_leaves_no_process(reader):
    stream = ImageStream(reader, batches(20, 2), num_workers=2)
    iterator = iter(stream)
    next(iterator)
    processes = [worker.process for worker in stream._workers]
    assert all(process.is_alive() for process in processes)
    iterator.close()
    assert not any(process.is_alive() for process in processes)


def test_a_block_that_a_loss_of_power_emptied_is_made_again(tmp_path):
    images = write_things(tmp_path / "images", num_things=3, num_views=4)
    rows = [{"image": str(path), "label": "x"} for path in sorted(images.rglob("*.jpg"))]
    catalog = Catalog.from_rows(rows, root=images).write(tmp_path / "catalog.parquet")
    save_tiny(tmp_path / "tiny.pth")
    options = {
        "weights": tmp_path / "tiny.pth", "backbone": f"timm:{TINY}", "batch_size": 4, "num_workers": 0,
        "runtime": "torch",
    }  # fmt: skip
    whole = features(catalog, output=tmp_path / "whole", **options)
    from samething.features.job import Job

    def stop(*arguments, **more):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            features(catalog, output=tmp_path / "features", **options)
    blocks = sorted((tmp_path / "features").rglob("0*.npz"))
    assert len(blocks) == 3
    blocks[0].write_bytes(b"")
    blocks[1].write_bytes(blocks[1].read_bytes()[:-40])
    again = features(catalog, output=tmp_path / "features", **options)
    assert again.num_computed == 8
    assert np.array_equal(again.rows, whole.rows)
    shutil.rmtree(tmp_path / "features")
