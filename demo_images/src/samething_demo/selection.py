"""Which drawings may stand for one instance: not blank, not twice the same, not another's as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np

from samething.arrays import Float
from samething_demo.drawings import SKETCH_SIDE, Drawing, sketch

NEAR_IDENTICAL: Final = 0.985
"""Sketches whose inner product is above this show the same drawing (families copy from each other)."""

_BLOCK_ROWS: Final = 512

Candidate: TypeAlias = Sequence[tuple[str, Drawing]]
"""Sources and drawings that bear one name."""


def distinct_drawings(
    candidates: Mapping[str, Candidate], *, min_drawings: int, num_shared: int
) -> dict[str, tuple[tuple[str, Drawing], ...]]:
    """Keep the drawings that tell the instances apart.

    Blank drawings go, and of near-identical ones within a name all but the first. A name with fewer than
    ``min_drawings`` left goes. Of two names that share at least
    ``num_shared`` near-identical pairs (synonyms such as plus and add) the one with fewer drawings goes, the
    later one when they have as many.
    """
    kept: dict[str, tuple[tuple[str, Drawing], ...]] = {}
    sketches: dict[str, Float[np.ndarray, "drawings cells"]] = {}
    for name in sorted(candidates):
        drawings, rows = _without_repeats(candidates[name])
        if len(drawings) >= min_drawings:
            kept[name], sketches[name] = drawings, rows
    for name in _confusable(sketches, num_shared):
        del kept[name]
    return kept


def _without_repeats(
    candidate: Candidate,
) -> tuple[tuple[tuple[str, Drawing], ...], Float[np.ndarray, "drawings cells"]]:
    drawings: list[tuple[str, Drawing]] = []
    rows = np.empty((0, SKETCH_SIDE**2), np.float32)
    for source, drawing in candidate:
        row = sketch(drawing)
        if row is not None and not (rows @ row > NEAR_IDENTICAL).any():
            drawings.append((source, drawing))
            rows = np.vstack([rows, row])
    return tuple(drawings), rows


def _confusable(sketches: Mapping[str, Float[np.ndarray, "drawings cells"]], num_shared: int) -> set[str]:
    """Names to drop because another one has the same drawings; the most drawn name of a group stays."""
    names = sorted(sketches, key=lambda name: (-len(sketches[name]), name))
    if not names:
        return set()
    rows = np.concatenate([sketches[name] for name in names])
    owner = np.repeat(np.arange(len(names)), [len(sketches[name]) for name in names])
    pairs: dict[tuple[int, int], int] = {}
    for start in range(0, len(rows), _BLOCK_ROWS):
        near = rows[start : start + _BLOCK_ROWS] @ rows.T > NEAR_IDENTICAL
        for left, right in np.argwhere(near):
            pair = (int(owner[start + left]), int(owner[right]))
            if pair[0] < pair[1]:
                pairs[pair] = pairs.get(pair, 0) + 1
    dropped: set[int] = set()
    for (first, second), count in sorted(pairs.items()):
        if count >= num_shared and first not in dropped:
            dropped.add(second)
    return {names[number] for number in dropped}
