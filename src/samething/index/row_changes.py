"""Rows of a generation with the parts of their images: stored, deleted, copied.

All of it in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

import samething.index.sqlite_regions as sqlite_regions
from samething.index.description import Regions, vector_crc32
from samething.index.generation import Generation
from samething.index.sqlite_rows import Connection, StoredRow
from samething.index.view import Kept

_ROWS_A_COPY: Final = 5_000


def as_kept(generation: Generation, regions: Mapping[str, Regions]) -> dict[str, Regions]:
    """Regions with their vectors as a generation keeps them."""
    return {name: Regions(own.places, generation.kept(own.vectors)) for name, own in regions.items()}


def upsert(
    generation: Generation,
    db: Connection,
    vectors: Kept,
    rows: Sequence[StoredRow],
    regions: Mapping[str, Regions] | None = None,
) -> None:
    """Insert rows with distinct ids; those that are there are replaced, and keep an equal vector.

    Args:
        generation: where.
        db: a transaction of it that writes.
        vectors: of the whole images.
        rows: their columns.
        regions: parts by the row's id, instead of those that are there; None: these stay, and so must the
            vectors of the whole images.
    """
    view = generation.looked_at_anew(db)
    checks = vector_crc32([row.values[0] for row in rows], vectors)
    slots: list[int] = []
    new: list[int] = []
    dead: list[int] = []
    there = generation.rows.slots(db, [row.values[0] for row in rows])
    for number, row in enumerate(rows):
        slot = there.get(row.values[0], -1)
        if slot >= 0 and np.array_equal(view.kept[slot], vectors[number]):
            slots.append(slot)
            continue
        dead += [slot] if slot >= 0 else []
        slots.append(len(view.kept) + len(new))
        new.append(number)
    added = vectors[new]
    if regions is not None and generation.description.regions is not None:
        dead += sqlite_regions.remove(db, list(there.values()))
        parts = [added]
        free = len(view.kept) + len(new)
        for slot, row in zip(slots, rows, strict=True):
            name = row.values[0]
            if own := regions.get(name):
                of_own = range(free, free := free + len(own.places))
                checks_of_own = vector_crc32([name] * len(own.places), own.vectors)
                sqlite_regions.insert(db, of_own, slot, own.places, checks_of_own)
                parts.append(own.vectors)
        added = np.concatenate(parts)
    if len(added):
        generation.append(db, len(view.kept), added)
    if there:
        generation.rows.remove(db, list(there.values()))
    generation.rows.insert(db, slots, rows, checks)
    generation.bury(db, dead)


def delete(generation: Generation, db: Connection, ids: Sequence[str]) -> None:
    """Delete the rows of those ids that are there, with their parts."""
    slots = list(generation.rows.slots(db, ids).values())
    gone = [] if generation.description.regions is None else sqlite_regions.remove(db, slots)
    generation.rows.remove(db, slots)
    generation.bury(db, [*slots, *gone])


def copy_rows(source: Generation, generation: Generation, db: Connection) -> None:
    """Insert all rows of another generation of the same description, some thousands at a time."""
    with source.reading() as (theirs, view):
        kept = source.checked(theirs, view).kept
        living = np.flatnonzero(~view.is_dead & ~view.is_region)
        columns = list(source.description.columns)
        for start in range(0, len(living), _ROWS_A_COPY):
            slots = living[start : start + _ROWS_A_COPY]
            items = source.rows.read(theirs, slots.tolist(), columns)
            regions = {
                item["id"]: regions_of(source, theirs, kept, slot)
                for item, slot in zip(items, slots.tolist(), strict=True)
            }
            upsert(generation, db, kept[slots], generation.rows.stored(items), regions)


def regions_of(generation: Generation, db: Connection, vectors: Any, row: int) -> Regions:
    """The parts of the row in a slot, out of all vectors: decoded or as they are kept."""
    found = [] if generation.description.regions is None else sqlite_regions.of_row(db, row)
    slots = np.array([slot for slot, _ in found], dtype=np.int64)
    return Regions([place for _, place in found], vectors[slots])
