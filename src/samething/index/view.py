"""What a reader has of one state of an index: its vectors as they are kept, and what searches among them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeAlias

import numpy as np

from samething.arrays import Bool, Shaped
from samething.index.sqlite_rows import Slots
from samething.retrieval import CodeScan, FewCodes, FlatScan

Kept: TypeAlias = Shaped[np.ndarray, "n _"]
"""Vectors as they lie in the file: little-endian float32, or bytes of codes."""
Searched: TypeAlias = FlatScan | FewCodes | CodeScan
"""All vectors of a view, for threads that ask at the same time."""


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """One state of a generation, ready to be searched."""

    change: int
    """Number of changes until then."""
    kept: Kept
    """All vectors by slot as they are kept, mapped from the file."""
    searched: Searched
    is_dead: Bool[np.ndarray, " n"]
    """Slots whose row was deleted or replaced."""
    num_dead: int
    rows: Slots | None = None
    """The slot of the whole image by slot, its own of a whole image; None in an index without regions."""
    filters: dict[str, Slots] = dataclasses.field(default_factory=dict)
    """Slots that filters let through, by what the filter says."""

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows that are there."""
        num_living = len(self.kept) - self.num_dead
        return num_living if self.rows is None else num_living - int((self.is_region & ~self.is_dead).sum())

    @property
    def is_region(self) -> Bool[np.ndarray, " n"]:
        """Slots of parts of images."""
        return (
            self.rows != np.arange(len(self.kept)) if self.rows is not None else np.zeros_like(self.is_dead)
        )

    def num_rows_among(self, slots: Slots) -> int:
        """Rows that slots are of."""
        return len(slots) if self.rows is None else len(np.unique(self.rows[slots]))

    def with_regions(self, rows: Slots) -> Slots:
        """The slots of rows and of their regions, ascending."""
        if self.rows is None:
            return rows
        is_chosen = np.zeros(len(self.kept), dtype=bool)
        is_chosen[rows] = True
        return np.flatnonzero(is_chosen[self.rows] & ~self.is_dead)
