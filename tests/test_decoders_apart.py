"""Decoding in processes that can be ended, each end tried with a real process."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pillow_heif
import pytest
import skimage.data
import tifffile
from PIL import Image
from pillow_jxl import JpegXLImagePlugin  # noqa: F401  (registers the format for saving)

from samething.errors import ImageError
from samething.images import decode
from samething.images.apart import Decoders
from test_image_formats import camera_file

pillow_heif.register_heif_opener()

ROCKET = os.path.join(os.path.dirname(skimage.data.__file__), "rocket.jpg")  # noqa: PTH118, PTH120


@pytest.fixture
def decoders():
    made = Decoders(2, deadline_s=60.0, memory_bytes=200 << 20)
    yield made
    made.close()


def test_pixels_are_those_of_this_process(decoders):
    found = decoders.call("it", decode, ROCKET)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(decode(ROCKET)))
    with pytest.raises(ImageError, match="at most 20 pixels"):
        decoders.call("it", decode, ROCKET, max_pixels=5)


def test_what_takes_too_long_is_ended_and_the_next_is_decoded(decoders):
    """A decoder that went on for minutes could be stopped by nobody, not even by SIGTERM."""
    decoders.call("it", decode, ROCKET)
    decoders.deadline_s = 0.2
    with pytest.raises(ImageError, match=r"takes longer than 0\.2 seconds"):
        decoders.call("it", time.sleep, 3600)
    decoders.deadline_s = 60
    assert decoders.call("it", decode, ROCKET).size == (640, 427)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_what_takes_too_much_memory_is_refused(decoders):
    """Four requests took 3.9 GB together."""
    with pytest.raises(ImageError, match="takes more than 200 MiB"):
        decoders.call("it", Image.new, "RGB", (9000, 9000))
    assert decoders.call("it", decode, ROCKET).size == (640, 427)


@pytest.mark.parametrize("ending", [(os._exit, 7), (signal.raise_signal, signal.SIGSEGV)])
def test_a_decoder_that_crashes_costs_its_image_alone(decoders, ending):
    with pytest.raises(ImageError, match=r"ended the process that decoded it \(status (7|-11)\)"):
        decoders.call("it", *ending)
    assert decoders.call("it", decode, ROCKET).size == (640, 427)


def test_many_threads_share_a_few_processes(decoders):
    before = threading.active_count()
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: decoders.call("it", os.getpid), range(40)))
        sizes = {image.size for image in pool.map(lambda _: decoders.call("it", decode, ROCKET), range(16))}
    assert 1 <= len(found) <= 2 and os.getpid() not in found
    assert sizes == {(640, 427)}
    assert threading.active_count() <= before + 1


def test_one_thread_watches_all_deadlines(decoders):
    """Each call started a timer's thread, which took a fifth of its time."""
    others = set(threading.enumerate())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decoders.call("it", os.getpid), range(8)))
    watchers = set(threading.enumerate()) - others
    assert len(watchers) == 1  # who waits for a minute to pass, when a shorter time is given
    decoders.deadline_s = 0.3
    with pytest.raises(ImageError, match="takes longer than"):
        decoders.call("it", time.sleep, 3600)
    assert set(threading.enumerate()) - others <= watchers


FORMATS = (
    "JPEG", "PROGRESSIVE", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000", "BMP", "ICO", "PPM",
    "TGA", "JXL", "RAW", "PLANES",
)  # fmt: skip


def sample(kind: str) -> bytes:
    photo = Image.open(ROCKET).convert("RGB").resize((96, 64))
    if kind == "RAW":
        return camera_file(preview_side=1024)
    stream = io.BytesIO()
    if kind == "PLANES":
        planes = np.ascontiguousarray(np.asarray(photo, np.uint16).transpose(2, 0, 1) * 257)
        tifffile.imwrite(stream, planes, photometric="rgb", planarconfig="separate")
    else:
        options = {"TIFF": {"compression": "tiff_lzw"}, "PROGRESSIVE": {"progressive": True}}.get(kind, {})
        photo.save(stream, "JPEG" if kind == "PROGRESSIVE" else kind, **options)
    return stream.getvalue()


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Bytes changed, most of them near the beginning, a stretch repeated, or the end left away."""
    changed = bytearray(content)
    reach = len(content) if random.random() < 0.5 else min(len(content), 256)
    for place in random.integers(0, reach, random.integers(1, 12)):
        changed[place] = random.choice([0, 1, 127, 128, 255, random.integers(256)])
    if random.random() < 0.3:
        start, end = sorted(random.integers(0, len(changed), 2))
        changed[start:start] = changed[start:end] * random.integers(1, 20)
    return bytes(changed[: random.integers(1, len(changed) + 1)] if random.random() < 0.3 else changed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_files_give_an_image_or_an_image_error(kind):
    """No traceback, no crash, and nothing beyond the limits of time and memory, whatever a file holds."""
    random = np.random.default_rng(FORMATS.index(kind))
    decoders = Decoders(2, deadline_s=30.0, memory_bytes=1 << 30)
    content, num_read = sample(kind), 0
    assert decoders.call("whole", decode, content).mode == "RGB"
    for number in range(150):
        try:
            num_read += decoders.call(f"file {number}", decode, mutated(content, random)).mode == "RGB"
        except ImageError as error:
            for ending in ("ended the process", "takes longer"):
                assert ending not in error.reason, f"{kind}, file {number}"
    decoders.close()
    assert num_read < 150


def test_processes_end_with_the_one_that_started_them():
    code = """if True:
        import os
        from samething.images.apart import Decoders
        print(Decoders(1, deadline_s=60.0).call('it', os.getpid), flush=True)
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number = int(done.stdout)
    for _ in range(200):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the process goes on")
