"""The nearest rows of a generation, exact, ties in the order of their ids, vectors checked.

A row with regions is as near as the nearest of them and of the whole image (MaxSim).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

import samething.index.sqlite_regions as sqlite_regions
from samething.arrays import Float, Int, Queries, Shaped
from samething.index.description import vector_crc32
from samething.index.generation import Generation
from samething.index.sqlite_rows import Connection, Slots, at_slots
from samething.index.view import View
from samething.retrieval import nearest_units

SPARE: Final = 16
"""Slots looked at beyond the k asked for, some of which may be dead or tied."""
MORE: Final = 4
"""How many times more slots are looked at where several may be of a row, or the first do not suffice."""


def nearest_rows(
    db: Connection,
    generation: Generation,
    view: View,
    queries: Queries,
    k: int,
    chosen: Slots | None,
    *,
    is_few: bool = False,
    stored: dict[int, tuple[Any, ...]] | None = None,
) -> tuple[Shaped[np.ndarray, "q k"], Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Ids and scores of the ``k`` nearest rows of each query, and the slots of what is nearest in them.

    Args:
        db: a transaction of the generation.
        generation: where the rows are.
        view: the state of that transaction.
        queries: float32 rows of length 1.
        k: from 1 to the number of rows there are.
        chosen: slots of the rows to look at and of their regions, ascending; None: all.
        is_few: compare the vectors of the rows found alone with their checksums, not all of them once.
        stored: takes up what the database has of the rows that were looked at, for ``Generation.read``.
    """
    if not is_few or chosen is None:
        generation.checked(db, view)
    gallery = view.searched.gallery if chosen is None else view.searched.gallery.take(chosen, axis=0)
    ids = np.empty((len(queries), k), dtype=object)
    scores = np.empty((len(queries), k))
    slots = np.empty((len(queries), k), dtype=np.int64)
    waiting = np.arange(len(queries))
    num_asked = min(len(gallery), num_sought(view, k))
    while len(waiting):
        if chosen is None:
            top = view.searched.nearest(queries[waiting], num_asked)
        else:
            top = nearest_units(queries[waiting], gallery, num_asked)
        found = top.indices if chosen is None else chosen[top.indices]
        unsettled = []
        for number, places, values in zip(waiting, found, top.scores, strict=True):
            alive = np.flatnonzero(~view.is_dead[places])
            if view.rows is not None:
                alive = alive[_best_of_each(view.rows[places[alive]], values[alive], places[alive])]
            # a row that was not asked for may be tied with the last one
            if num_asked < len(gallery) and (len(alive) < k or values[alive[k - 1]] <= values[-1]):
                unsettled.append(number)
                continue
            alive = alive[values[alive] >= values[alive[k - 1]]]
            names = _ids(db, generation, view, places[alive], stored)
            order = sorted(range(len(alive)), key=lambda place: (-values[alive[place]], names[place]))[:k]
            ids[number] = [names[place] for place in order]
            scores[number], slots[number] = values[alive[order]], places[alive[order]]
        waiting = np.array(unsettled, dtype=np.int64)
        num_asked = min(len(gallery), MORE * num_asked)
    return ids, scores, slots


def num_sought(view: View, k: int) -> int:
    """Slots to begin with, for ``k`` rows."""
    return (k + SPARE) * (1 if view.rows is None else MORE)


def _best_of_each(rows: Slots, values: Float[np.ndarray, " n"], slots: Slots) -> Int[np.ndarray, " rows"]:
    """Where the best slot of each row is, best first; of equal ones the first, which is the whole image."""
    order = np.lexsort((slots, -values))
    return order[np.sort(np.unique(rows[order], return_index=True)[1])]


def _ids(
    db: Connection,
    generation: Generation,
    view: View,
    slots: Slots,
    stored: dict[int, tuple[Any, ...]] | None,
) -> list[str]:
    columns = "id" if stored is None else generation.rows.stored_names
    whole = at_slots(db, f"{columns}, vector_crc32", slots.tolist())
    names: list[str] = []
    checks: list[int | None] = []
    for slot in slots.tolist():
        name, *others, check = whole.get(slot, ("", None))
        if view.rows is not None and view.rows[slot] != slot:
            name, _, check = sqlite_regions.at(db, slot) or ("", None, None)
        elif stored is not None and others:
            stored[slot] = (name, *others)
        names.append(name)
        checks.append(check)
    if (found := vector_crc32(names, view.kept[slots])) != checks:
        wrong = next(place for place, check in enumerate(checks) if check != found[place])
        name = names[wrong] or f"slot {slots[wrong]}"
        raise generation.damaged(f"the vector of {name!r} is not what was written")
    return names
