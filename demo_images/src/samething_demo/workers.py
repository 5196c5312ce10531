"""The two kinds of job of a build, and the processes that do them."""

from __future__ import annotations

import functools
import hashlib
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final, TypeVar

from PIL import Image

from samething.errors import SamethingError
from samething.files import PARTIAL_SUFFIX, disk_errors, file_sha256
from samething_demo.emoji import find_emoji
from samething_demo.instances import SIDE, Instance
from samething_demo.objects import find_objects
from samething_demo.photos import find_photos
from samething_demo.symbols import find_symbols

Result = TypeVar("Result")

_JPEG_QUALITY: Final = 88

# the slowest first, so that no process is left alone with it at the end
_FINDERS: Final = (find_emoji, find_symbols, find_photos, find_objects)


def find_jobs(limit_per_domain: int | None) -> list[Callable[[], Sequence[Instance]]]:
    """The jobs that find out which instances there are."""
    return [functools.partial(finder, limit_per_domain) for finder in _FINDERS]


def make_images(instances: Sequence[Instance], root: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Write the images of some instances below ``root``, except those that are there already.

    An image is there when its file has the checksum that ``known`` gives for it.

    Returns:
        SHA-256 by path relative to ``root``, of all images of the instances.

    Raises:
        InputError: the disk is full or may not be written to.
    """
    checksums: dict[str, str] = {}
    for instance in instances:
        missing = []
        for source in instance.sources:
            path = instance.image(source)
            if path in known and _has_checksum(root / path, known[path]):
                checksums[path] = known[path]
            else:
                missing.append(source)
        for source, image in instance.images(missing) if missing else ():
            path = instance.image(source)
            checksums[path] = _write_image(root / path, image)
    return checksums


def _has_checksum(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def _write_image(target: Path, image: Image.Image) -> str:
    """Write and rename, without waiting for the disk: the checksum tells an image that was cut off."""
    assert image.size == (SIDE, SIDE)
    buffer = io.BytesIO()
    if target.suffix == ".png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        partial.write_bytes(buffer.getvalue())
        partial.replace(target)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


class Workers:
    """Processes that do jobs; to be used in a ``with`` statement.

    With one worker the jobs run in this process. When the ``with`` block is left with an exception, jobs not
    begun are dropped.

    Args:
        num_workers: number of processes.
    """

    def __init__(self, num_workers: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if num_workers > 1:
            # fresh processes: a fork would inherit whatever threads and locks the caller has
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def results(self, jobs: Iterable[Callable[[], Result]]) -> Iterator[Result]:
        """Run jobs and yield their results as they come, in no particular order.

        Raises:
            SamethingError: a worker process was killed; and whatever a job raises.
        """
        if self._pool is None:
            for job in jobs:
                yield job()
            return
        try:
            for future in as_completed([self._pool.submit(job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise SamethingError(
                "a worker process ended without a result",
                expected="worker processes that live until the build ends",
                next_step="run it again: it resumes (with fewer workers if memory was short; a script "
                'must call it under if __name__ == "__main__")',
            ) from error


def _start_worker() -> None:
    """Leave Ctrl-C to the parent process, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
