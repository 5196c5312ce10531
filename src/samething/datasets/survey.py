"""Opening every listed image once: its checksum, its sides, and whether it is an image at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import rich.console
import rich.progress

from samething.catalog import Catalog
from samething.datasets.listing import Dropped, Listing
from samething.errors import ImageError
from samething.files import file_sha256
from samething.images import Source, dimensions, located

# Reading waits for the disk more than it computes, so more threads than cores pay.
_NUM_THREADS: Final = min(32, 4 * (os.cpu_count() or 1))

# Images handed to the threads at a time; a million waiting tasks would take gigabytes.
_IMAGES_AT_A_TIME: Final = 4096


def survey_images(listing: Listing) -> tuple[Catalog, list[Dropped]]:
    """Fill in width, height and SHA-256, and leave out what has no readable image header.

    Progress is shown on stderr where that is a terminal.
    """
    catalog = listing.catalog
    images = catalog.strings("image")
    # an image of several rows (its boxes, its roles) is opened once
    once, rows_once = np.unique(images, return_inverse=True)
    sources = [Source(located(catalog.root, image)) for image in once]
    results = list(_with_progress(_look_at_all(sources), len(sources)))
    seen: list[tuple[int, int, str]] = []
    kept: list[int] = []
    dropped: list[Dropped] = []
    for row, number in enumerate(rows_once):
        result = results[number]
        if isinstance(result, str):
            place = "" if listing.rows is None else f"row {listing.rows[row]}: "
            dropped.append(Dropped(images[row], place + result))
        else:
            kept.append(row)
            seen.append(result)
    widths, heights, hashes = zip(*seen, strict=True) if seen else ((), (), ())
    surveyed = catalog.take(np.asarray(kept, np.int64))
    surveyed = surveyed.with_column("width", widths).with_column("height", heights)
    return surveyed.with_column("sha256", hashes), dropped


def _look_at(source: Source) -> tuple[int, int, str] | str:
    """Width, height and SHA-256 of an image, or the reason why it cannot be used."""
    try:
        if source.is_remote:
            content = source.read()
            return (*dimensions(content), hashlib.sha256(content).hexdigest())
        path = Path(source.location)
        return (*dimensions(path), file_sha256(path))
    except ImageError as error:
        return error.given.removeprefix(source.location).lstrip(": ")
    except OSError as error:
        return error.strerror or str(error)


def _look_at_all(sources: Sequence[Source]) -> Iterator[tuple[int, int, str] | str]:
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in range(0, len(sources), _IMAGES_AT_A_TIME):
            yield from pool.map(_look_at, sources[start : start + _IMAGES_AT_A_TIME])


def _with_progress(
    results: Iterator[tuple[int, int, str] | str], total: int
) -> Iterator[tuple[int, int, str] | str]:
    console = rich.console.Console(stderr=True)
    yield from rich.progress.track(
        results, "reading images", total=total, console=console, disable=not console.is_terminal
    )
