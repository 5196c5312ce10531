"""The nearest rows of a generation, exact, ties in the order of their ids, vectors checked."""

from __future__ import annotations

from typing import Final

import numpy as np

from samething.arrays import Float, Int, Queries, Shaped
from samething.index.description import vector_crc32
from samething.index.generation import Generation
from samething.index.sqlite_rows import Connection, Slots
from samething.index.view import View
from samething.retrieval import nearest_units

SPARE: Final = 16
"""Slots looked at beyond the k asked for, some of which may be dead or tied."""


def nearest_rows(
    db: Connection,
    generation: Generation,
    view: View,
    queries: Queries,
    k: int,
    chosen: Slots | None,
    *,
    is_few: bool = False,
) -> tuple[Shaped[np.ndarray, "q k"], Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Ids, scores and slots of the ``k`` nearest rows of each query.

    Args:
        db: a transaction of the generation.
        generation: where the rows are.
        view: the state of that transaction.
        queries: float32 rows of length 1.
        k: from 1 to the number of rows there are.
        chosen: slots of the rows to look at, ascending; None: all.
        is_few: compare the vectors of the rows found alone with their checksums, not all of them once.
    """
    if not is_few or chosen is None:
        generation.checked(db, view)
    gallery = view.vectors if chosen is None else view.vectors.take(chosen, axis=0)
    ids = np.empty((len(queries), k), dtype=object)
    scores = np.empty((len(queries), k))
    slots = np.empty((len(queries), k), dtype=np.int64)
    waiting = np.arange(len(queries))
    num_asked = min(len(gallery), k + SPARE)
    while len(waiting):
        if chosen is None:
            top = view.searched.nearest(queries[waiting], num_asked)
        else:
            top = nearest_units(queries[waiting], gallery, num_asked)
        found = top.indices if chosen is None else chosen[top.indices]
        unsettled = []
        for number, places, values in zip(waiting, found, top.scores, strict=True):
            alive = np.flatnonzero(~view.is_dead[places])
            # a row that was not asked for may be tied with the last one
            if num_asked < len(gallery) and (len(alive) < k or values[alive[k - 1]] <= values[-1]):
                unsettled.append(number)
                continue
            alive = alive[values[alive] >= values[alive[k - 1]]]
            names = _ids(db, generation, view, places[alive])
            order = sorted(range(len(alive)), key=lambda place: (-values[alive[place]], names[place]))[:k]
            ids[number] = [names[place] for place in order]
            scores[number], slots[number] = values[alive[order]], places[alive[order]]
        waiting = np.array(unsettled, dtype=np.int64)
        num_asked = min(len(gallery), 4 * num_asked)
    return ids, scores, slots


def _ids(db: Connection, generation: Generation, view: View, slots: Slots) -> list[str]:
    names: list[str] = []
    for slot in slots.tolist():
        name, check = db.execute("SELECT id, vector_crc32 FROM rows WHERE slot = ?", (slot,)).fetchone() or (
            "",
            None,
        )
        if vector_crc32([name], view.kept[slot : slot + 1]) != [check]:
            raise generation.damaged(f"the vector of {name or f'slot {slot}'!r} is not what was written")
        names.append(name)
    return names
