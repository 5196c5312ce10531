"""The images of several catalogs as one list: their files, and the parts of them that are meant."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from samething.catalog import BOX_COLUMNS, Catalog
from samething.errors import ImageError
from samething.images import decode

Box: TypeAlias = tuple[int, int, int, int]


class Images:
    """The rows of several catalogs, one after another; a path is put together when it is asked for."""

    def __init__(self, catalogs: Sequence[Catalog]) -> None:
        self._roots = [os.path.abspath(catalog.root) for catalog in catalogs]  # noqa: PTH100
        self._images = [catalog.table["image"].fill_null("").combine_chunks() for catalog in catalogs]
        self._boxes = [_boxes(catalog) for catalog in catalogs]
        self._ends = np.cumsum([len(catalog) for catalog in catalogs])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, row, side="right"))
        return part, row - (int(self._ends[part - 1]) if part else 0)

    def path(self, row: int) -> str:
        """Absolute path of a row's file."""
        part, own = self._place(row)
        return os.path.normpath(os.path.join(self._roots[part], self._images[part][own].as_py()))  # noqa: PTH118

    def box(self, row: int) -> Box | None:
        """The part of the image that is meant, in pixels; None for all of it."""
        part, own = self._place(row)
        boxes = self._boxes[part]
        if boxes is None or boxes[own, 0] < 0:
            return None
        left, top, right, bottom = boxes[own].tolist()
        return left, top, right, bottom

    def key(self, row: int) -> str:
        """Path and box in one text."""
        return self.path(row) + box_text(self.box(row))

    def decode(self, row: int) -> Image.Image:
        """The row's image, cut to its box.

        Raises:
            ImageError: it cannot be read, or the box lies outside of it.
        """
        return decode_part(Path(self.path(row)), self.box(row))


def decode_part(path: Path, box: Box | None) -> Image.Image:
    """An image, or the part of it in a box.

    Raises:
        ImageError: it cannot be read, or the box lies outside of it.
    """
    image = decode(path)
    if box is None:
        return image
    left, top, right, bottom = box
    right, bottom = min(right, image.width), min(bottom, image.height)
    if left >= right or top >= bottom:
        raise ImageError(
            f"{path}: the box {box} lies outside of its {image.width} × {image.height} pixels",
            expected="a box with an extent inside the image",
            next_step="correct the box columns of the catalog",
        )
    return image.crop((left, top, right, bottom))


def box_text(box: Box | None) -> str:
    """A box as the end of a key; empty for none.

    >>> box_text((1, 2, 3, 4)), box_text(None)
    ('#1,2,3,4', '')
    """
    return "" if box is None else "#" + ",".join(map(str, box))


def _boxes(catalog: Catalog) -> np.ndarray | None:
    """Rows of left, top, right, bottom; -1 where there is no box. None for a catalog without such columns."""
    if not all(name in catalog.table.column_names for name in BOX_COLUMNS):
        return None
    columns = [catalog.table[name].cast("int32").fill_null(-1).to_numpy() for name in BOX_COLUMNS]
    return np.stack(columns, axis=1)
