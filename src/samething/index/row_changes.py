"""Rows of a generation with the parts of their images: stored, changed, deleted, copied.

All of it in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

import samething.index.sqlite_regions as sqlite_regions
from samething.arrays import Shaped
from samething.images.parts import Place
from samething.index.description import Regions, vector_crc32
from samething.index.generation import Generation
from samething.index.interface import Amendment
from samething.index.sqlite_rows import Connection, StoredRow
from samething.index.view import Kept

KeptRegions: TypeAlias = tuple[Sequence[Place], Shaped[np.ndarray, "_ _"]]
"""Places of a row's parts, and their vectors as they are kept."""
_ROWS_A_COPY: Final = 5_000


def as_kept(generation: Generation, regions: Mapping[str, Regions]) -> dict[str, KeptRegions]:
    """Regions as a generation keeps them."""
    return {
        name: (own.places, generation.kept(own.vectors)) for name, own in regions.items() if len(own.places)
    }


def upsert(
    generation: Generation,
    db: Connection,
    vectors: Kept,
    rows: Sequence[StoredRow],
    regions: Mapping[str, KeptRegions] | None = None,
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
            places, own = regions.get(name, ((), vectors[:0]))
            of_own = range(free, free := free + len(own))
            sqlite_regions.insert(db, of_own, slot, places, vector_crc32([name] * len(own), own))
            parts.append(own)
        added = np.concatenate(parts)
    if len(added):
        generation.append(db, len(view.kept), added)
    generation.rows.remove(db, list(there.values()))
    generation.rows.insert(db, slots, rows, checks)
    generation.bury(db, dead)


def amend(generation: Generation, db: Connection, amendment: Amendment) -> None:
    """Change rows by what they are. See :meth:`AbstractIndex.amend`."""
    slots = generation.rows.slots(db, amendment.ids)
    there = generation.read(db, list(slots.values()), list(generation.description.columns))
    kept, gone = amendment.changed(dict(zip(slots, there, strict=True)))
    rows = generation.rows.stored(kept.to_pylist())
    names = [row.values[0] for row in rows]
    if not names:
        pass
    elif (vectors := amendment.vectors) is None:
        upsert(generation, db, generation.kept_at(db, [slots[name] for name in names]), rows)
    else:
        own = generation.kept(np.stack([vectors[name] for name in names]))
        upsert(generation, db, own, rows, as_kept(generation, amendment.regions))
    delete(generation, db, gone)


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
            items = source.read(theirs, slots.tolist(), columns)
            parts = [regions_of(source, theirs, kept, slot) for slot in slots.tolist()]
            regions = {item["id"]: (own.places, own.vectors) for item, own in zip(items, parts, strict=True)}
            upsert(generation, db, kept[slots], generation.rows.stored(items), regions)


def regions_of(generation: Generation, db: Connection, vectors: Any, row: int) -> Regions:
    """The parts of the row in a slot, out of all vectors: decoded or as they are kept."""
    found = [] if generation.description.regions is None else sqlite_regions.of_row(db, row)
    slots = np.array([slot for slot, _ in found], dtype=np.int64)
    return Regions([place for _, place in found], vectors[slots])
