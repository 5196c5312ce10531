"""Opening every listed image once: its checksum, its sides, and whether it is an image at all."""

from __future__ import annotations

import numpy as np

from samething.catalog import Catalog
from samething.datasets.listing import Dropped, Listing
from samething.errors import ImageError
from samething.images import Identity, Source, identify, in_threads, located
from samething.progress import progress_bar


def survey_images(listing: Listing, max_pixels: int) -> tuple[Catalog, list[Dropped]]:
    """Fill in width, height and SHA-256, and leave out what has no readable image header.

    Progress is shown on stderr where that is a terminal.
    """
    catalog = listing.catalog
    images = catalog.strings("image")
    # an image of several rows (its boxes, its roles) is opened once
    once, rows_once = np.unique(images, return_inverse=True)
    sources = [Source(located(catalog.root, image)) for image in once]
    results: list[Identity | ImageError] = []
    with progress_bar("images", only_on_terminal=True) as progress:
        task = progress.add_task("read", total=len(sources))
        for result in in_threads(lambda source: identify(source, max_pixels), sources):
            results.append(result)
            progress.advance(task)
    seen: list[Identity] = []
    kept: list[int] = []
    dropped: list[Dropped] = []
    for row, number in enumerate(rows_once):
        result = results[number]
        if isinstance(result, ImageError):
            place = "" if listing.rows is None else f"row {listing.rows[row]}: "
            dropped.append(Dropped(images[row], place + result.reason))
        else:
            kept.append(row)
            seen.append(result)
    widths, heights, hashes = zip(*seen, strict=True) if seen else ((), (), ())
    surveyed = catalog.take(np.asarray(kept, np.int64))
    surveyed = surveyed.with_column("width", widths).with_column("height", heights)
    return surveyed.with_column("sha256", hashes), dropped
