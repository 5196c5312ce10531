"""The images of several catalogs as one list: where they are, and the parts of them that are meant."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from samething.catalog import Catalog
from samething.images import Source, decode

_ROWS_AT_A_TIME = 1 << 14


class Images:
    """The rows of several catalogs, one after another; a source is put together when it is asked for."""

    def __init__(self, catalogs: Sequence[Catalog]) -> None:
        self._catalogs = catalogs
        self._ends = np.cumsum([len(catalog) for catalog in catalogs])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[Source]:
        for catalog in self._catalogs:
            for start in range(0, len(catalog), _ROWS_AT_A_TIME):
                rows = np.arange(start, min(start + _ROWS_AT_A_TIME, len(catalog)))
                yield from map(_absolute, catalog.take(rows).sources)

    def source(self, row: int) -> Source:
        """Where a row's image is, under its absolute path or its URL, and which part of it is meant."""
        part = int(np.searchsorted(self._ends, row, side="right"))
        return _absolute(self._catalogs[part].source(row - (int(self._ends[part - 1]) if part else 0)))

    def decode(self, row: int) -> Image.Image:
        """The row's image, cut to its box.

        Raises:
            ImageError: it cannot be read, or the box lies outside of it.
        """
        return decode(self.source(row))


def _absolute(source: Source) -> Source:
    if source.is_remote:
        return source
    return Source(os.path.abspath(source.location), source.box, source.label, source.domain)  # noqa: PTH100
