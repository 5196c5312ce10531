"""Vectors of parts of a row's image, which lie in slots of their own beside that of the whole image.

The table ``regions`` names the slot of each part, the slot of its row, and the place in the image. It is
there in an index with regions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from samething.arrays import Shaped
from samething.images.parts import Place
from samething.index.description import vector_crc32
from samething.index.sqlite_rows import Connection, Slots, checksum


def insert(
    db: Connection, slots: Sequence[int], row: int, places: Sequence[Place], checks: Sequence[int]
) -> None:
    """Name the slots of a row's parts; ``checks`` are the CRC-32 of its id and each part's vector."""
    named = [(slot, row, *map(float, place)) for slot, place in zip(slots, places, strict=True)]
    db.executemany(
        "INSERT INTO regions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [(*values, check, checksum(values)) for values, check in zip(named, checks, strict=True)],
    )


def remove(db: Connection, rows: Sequence[int]) -> list[int]:
    """Forget the parts of rows; the slots that they had."""
    gone = [slot for row in rows for slot, _ in of_row(db, row)]
    db.executemany("DELETE FROM regions WHERE row = ?", [(row,) for row in rows])
    return gone


def of_row(db: Connection, row: int) -> list[tuple[int, Place]]:
    """Slot and place of each part of a row, in the order in which they were given.

    Raises:
        ValueError: one is damaged.
    """
    return [
        (values[0], _place(values))
        for values in db.execute("SELECT * FROM regions WHERE row = ? ORDER BY slot", (row,))
    ]


def at(db: Connection, slot: int) -> tuple[str, Place, int] | None:
    """The id of the row, the place and the vector's checksum of the part in a slot.

    Raises:
        ValueError: it is damaged.
    """
    found = db.execute(
        "SELECT regions.*, id FROM regions JOIN rows ON rows.slot = regions.row WHERE regions.slot = ?",
        (slot,),
    ).fetchone()
    return None if found is None else (found[-1], _place(found[:-1]), found[-3])


def places(db: Connection, slots: Slots, rows: Slots) -> list[Place | None]:
    """Where the parts in slots are; None for the slot of a row itself."""
    pairs = zip(slots.tolist(), rows.tolist(), strict=True)
    found = [None if slot == row else at(db, slot) for slot, row in pairs]
    return [None if part is None else part[1] for part in found]


def since(db: Connection, slot: int) -> tuple[Slots, Slots]:
    """Slots of the parts from one on, and those of their rows."""
    found = db.execute("SELECT slot, row FROM regions WHERE slot >= ?", (slot,)).fetchall()
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def problems(db: Connection, vectors: Shaped[np.ndarray, "n _"]) -> tuple[list[int], list[str]]:
    """The slots of all parts, and a sentence for each that is not what was written."""
    slots, found = [], []
    for *values, name in db.execute(
        "SELECT regions.*, id FROM regions LEFT JOIN rows ON rows.slot = regions.row"
    ):
        slot = values[0]
        slots.append(slot)
        if checksum(values[:6]) != values[7] or name is None:
            found.append(f"the region in slot {slot} is damaged")
        elif not slot < len(vectors) or vector_crc32([name], vectors[slot : slot + 1]) != [values[6]]:
            found.append(f"the vector of a region of {name!r} is not what was written")
    return slots, found


def _place(values: Sequence[Any]) -> Place:
    if checksum(values[:6]) != values[7]:
        raise ValueError(f"the region in slot {values[0]} is damaged")
    left, top, right, bottom = values[2:6]
    return left, top, right, bottom
