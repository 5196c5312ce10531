"""What a reader of one's own images hands over: the images it found and those it had to leave out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np

from samething.arrays import Int
from samething.catalog import Catalog

Labels: TypeAlias = Literal["folder", "none"]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """One image that did not get into the catalog."""

    image: str
    """Path as in the catalog; bytes that are no UTF-8 appear as ``\\xNN``."""
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """Images found, not yet opened."""

    catalog: Catalog
    has_roles: bool
    """Whether the source says itself which images are for training, queries and the index."""
    dropped: tuple[Dropped, ...] = ()
    rows: Int[np.ndarray, " n"] | None = None
    """Row of the source table for each row of the catalog; none for a folder."""
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of other files by suffix, and of folders that were not looked into by what they are."""
    warnings: tuple[str, ...] = ()
    """What looks odd: missing images, numbers that are not the published ones."""
