"""Many images at once: identified, decoded and prepared in threads, in their order, a bounded number ahead.

Reading waits for disks and networks, and decoders let go of Python's lock, so threads suffice. Features have
worker processes of their own (:mod:`samething.features`), because a decoder may crash there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from samething.arrays import Pixels
from samething.errors import ImageError, is_utf8, visible
from samething.images.decoding import MAX_PIXELS, dimensions
from samething.images.pixels import read_pixels
from samething.images.preparing import Preprocessing
from samething.images.source import Source, disk_state, open_image_file, unreadable

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

NUM_DECODERS: Final = os.cpu_count() or 1
"""Threads where most of the time goes into decoding."""
NUM_READERS: Final = min(32, 4 * NUM_DECODERS)
"""Threads where most of the time is spent waiting for a disk or a network."""


def in_threads(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    ahead: int = 1024,
    num_threads: int = NUM_READERS,
) -> Iterator[_Result | ImageError]:
    """What ``work`` makes of each item, in their order; an :class:`ImageError` is a result like any other.

    Args:
        work: called in several threads at once.
        items: taken from as the work goes on.
        ahead: items that are in work, or done and not yet asked for, at most.
        num_threads: threads.
    """

    def result(item: _Item) -> _Result | ImageError:
        try:
            return work(item)
        except ImageError as error:
            return error

    pool = ThreadPoolExecutor(num_threads)
    waiting: deque[Future[_Result | ImageError]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(result, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def checksum(source: Source) -> str:
    """SHA-256 of an image's file, 64 hexadecimal digits.

    Raises:
        ImageError: it cannot be read.
    """
    if not is_utf8(source.location):  # no table and no index can hold its name
        raise ImageError.of(
            visible(source.location),
            ": its path is not UTF-8",
            expected="names in UTF-8, as tables and databases keep them",
            next_step="rename the file or folder",
        )
    if source.is_remote:
        return hashlib.sha256(source.read()).hexdigest()
    try:
        with open_image_file(source.location) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(source.location, error) from error


def identify(source: Source, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Width and height in pixels, upright, and SHA-256 of an image's file, which is not decoded.

    Raises:
        ImageError: it cannot be read, or is no image.
    """
    if source.is_remote:
        content = source.read()
        return *dimensions(content, max_pixels=max_pixels), hashlib.sha256(content).hexdigest()
    return *dimensions(source.location, max_pixels=max_pixels), checksum(source)


def prepared(sources: Iterable[Source], preprocessing: Preprocessing, *, ahead: int = 64) -> Iterator[Pixels]:
    """The pixels of images as a backbone takes them, uint8 (3, height, width) each.

    Raises:
        ImageError: the image that is next cannot be read.
    """
    work = functools.partial(read_pixels, preprocessing=preprocessing)
    for result in in_threads(work, sources, ahead=ahead, num_threads=NUM_DECODERS):
        if isinstance(result, ImageError):
            raise result
        yield result


def as_they_are(sources: Iterable[Source]) -> Iterator[Source]:
    """The sources with size, time and mark as the disk, or a server, says they are; nothing is read.

    A shard is asked about once for all its members.
    """
    sources = list(sources)
    files = list(dict.fromkeys(source.container for source in sources if source.is_remote))
    with ThreadPoolExecutor(NUM_READERS) as pool:
        marks = dict(zip(files, pool.map(lambda file: Source(file).version(), files), strict=True))
    for source in sources:
        if source.is_remote:
            yield dataclasses.replace(source, mark=marks[source.container])
        else:
            yield dataclasses.replace(source, **disk_state(source.location))
