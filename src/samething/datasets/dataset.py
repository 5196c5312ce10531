"""What is known of a public data set before any of it is on the disk: a row of the table of data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Part: TypeAlias = Literal["all", "train", "val", "test"]

Reader: TypeAlias = Callable[[Any], pa.Table]
"""From the official files of a data set (:class:`~samething.datasets.official.OfficialFiles`) to the columns
of a catalog, paths relative to the data root."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """What the authors of a data set say how large a part of it is."""

    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Columns of the catalog and the value that the part has there; empty for the whole data set."""
    classes: int | None = None
    """Number of instances, None where it is not published."""
    images: int | None = None
    """Number of rows, None where it is not published."""
    rounded_to: int = 1
    """Published numbers are multiples of this: 100 where a paper says 141.5k."""

    def count(self, table: pa.Table) -> tuple[int, int]:
        """Instances and rows of the part in a table with a catalog's columns."""
        kept = np.ones(table.num_rows, dtype=bool)
        for column, value in self.where.items():
            kept &= pc.fill_null(pc.equal(table[column], value), False).to_numpy()
        labels = table["label"].filter(pa.array(kept))
        return int(pc.count_distinct(labels).as_py()), int(kept.sum())

    def differs(self, table: pa.Table) -> bool:
        """Whether a table has other numbers than those published, within their rounding.

        >>> rows = pa.table({"label": ["a", "a", "b"], "role": ["train", "train", "test"]})
        >>> Published(where={"role": "train"}, classes=1, images=2).differs(rows)
        False
        >>> Published(classes=2, images=4).differs(rows)
        True
        """
        pairs = zip((self.classes, self.images), self.count(table), strict=True)
        return any(said is not None and abs(said - found) > self.rounded_to / 2 for said, found in pairs)

    def describe(self) -> str:
        """The part and its numbers in words.

        >>> Published(where={"role": "train"}, classes=98, images=8054).describe()
        'role train: 98 classes, 8,054 images'
        """
        numbers = [(self.classes, "classes"), (self.images, "images")]
        said = ", ".join(f"{number:,} {unit}" for number, unit in numbers if number is not None)
        part = ", ".join(f"{column} {value}" for column, value in self.where.items())
        return f"{part or 'in all'}: {said}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A public data set: what it is, where it comes from, what its layout promises, how it is read."""

    key: str
    """Its name in commands, and the beginning of its labels."""
    title: str
    """Its name in the literature."""
    domain: str
    """Kind of things shown; ``several`` where a row says its own."""
    classes: int | None = None
    """Instances in all parts that are read, as published; None where it is not published."""
    images: int | None = None
    """Images (or boxes in images) in all parts that are read, as published; None where it is not."""
    gigabytes: float | None = None
    """Size of the files on disk, roughly; None where it is not known."""
    licence: str
    """Terms under which the images may be used, shortened; the source has the whole text."""
    source: str
    """Page to get it from."""
    get: str
    """What to run or to do, in a sentence."""
    files: tuple[str, ...]
    """What must be there, relative to the data root; a folder ends with a slash."""
    layout: str
    """Where the layout is described."""
    reader: Reader
    """Reads it."""
    has_roles: bool = False
    """Whether its authors divide it into training, validation, queries and index."""
    margin_percent: float | None = None
    """For boxes in images: what is added to each side, in percent of the box; None for whole images."""
    published: tuple[Published, ...] = ()
    """Sizes to compare what was read with."""
    note: str = ""
    """What a reader of the numbers should know."""

    def missing(self, data_root: Path) -> list[str]:
        """The promised files and folders that are not there."""
        return [
            name
            for name in self.files
            if not ((data_root / name).is_dir() if name.endswith("/") else (data_root / name).is_file())
        ]
