"""Decoding in processes that can be ended, each end tried with a real process."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
from PIL import Image

from samething.errors import ImageError
from samething.images import decode
from samething.images.apart import Decoders

ROCKET = os.path.join(os.path.dirname(skimage.data.__file__), "rocket.jpg")  # noqa: PTH118, PTH120


@pytest.fixture
def decoders():
    made = Decoders(2, deadline_s=60, memory_bytes=200 << 20)
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
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: decoders.call("it", os.getpid), range(40)))
        sizes = {image.size for image in pool.map(lambda _: decoders.call("it", decode, ROCKET), range(16))}
    assert 1 <= len(found) <= 2 and os.getpid() not in found
    assert sizes == {(640, 427)}
    assert threading.active_count() < 20


def test_processes_end_with_the_one_that_started_them():
    code = """if True:
        import os
        from samething.images.apart import Decoders
        print(Decoders(1, deadline_s=60).call('it', os.getpid), flush=True)
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
