"""Exact nearest rows of unit vectors, as quick as float32 and with float64's order."""

from __future__ import annotations

import dataclasses
import threading
from typing import Final

import numpy as np
from jaxtyping import Float, Int

from samething.arrays import Gallery, Queries
from samething.retrieval import TopK
from samething.retrieval.scores import Scorer

_GROUP: Final = 64
"""Scores of which one maximum is taken while the best are sought."""
_SCORES_AT_A_TIME: Final = 2**24
"""Scores in memory at once: 64 MiB."""


_ROWS_AT_A_TIME: Final = 4096
"""Rows of the gallery whose products with a few queries stay in the cache until they are put in order."""
_QUERIES_TOGETHER: Final = 16
"""Queries of several threads that share one reading of the gallery."""


@dataclasses.dataclass(eq=False)
class _Waiting:
    query: Float[np.ndarray, " d"]
    scores: Float[np.ndarray, " g"] | None = None


class SharedProducts:
    """Products of a gallery with single queries of several threads.

    Reading the gallery is what takes the time, and the library that multiplies lets one thread in at a time.
    So one thread computes for all that wait meanwhile: eight clients cost little more than one.
    """

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self._computing = threading.Lock()
        self._guard = threading.Lock()
        self._waiting: list[_Waiting] = []

    def of(self, query: Float[np.ndarray, " d"]) -> Float[np.ndarray, " g"]:
        """Products of one query with all rows."""
        mine = _Waiting(query)
        with self._guard:
            self._waiting.append(mine)
        with self._computing:
            if mine.scores is None:  # no other thread has done it
                self._compute(mine)
        assert mine.scores is not None
        return mine.scores

    def _compute(self, mine: _Waiting) -> None:
        most = max(1, min(_QUERIES_TOGETHER, _SCORES_AT_A_TIME // max(1, len(self.gallery))))
        with self._guard:
            others = [waiting for waiting in self._waiting if waiting is not mine]
            batch, self._waiting = [mine, *others[: most - 1]], others[most - 1 :]
        if len(batch) == 1:
            mine.scores = self.gallery @ mine.query
            return
        together = _products(np.stack([waiting.query for waiting in batch]), self.gallery)
        for waiting, scores in zip(batch, together, strict=True):
            waiting.scores = scores


def _products(queries: Queries, gallery: Gallery) -> Float[np.ndarray, "q g"]:
    """Products of a few queries with all rows, a part of the gallery at a time.

    For two to sixteen queries this takes 0.5 to 0.7 of the time of ``queries @ gallery.T`` on one thread, and
    0.7 to 1 on two, with a million rows; for hundreds it would take several times as long.
    """
    scores = np.empty((len(queries), len(gallery)), dtype=np.float32)
    columns = np.ascontiguousarray(queries.T)
    for start in range(0, len(gallery), _ROWS_AT_A_TIME):
        part = gallery[start : start + _ROWS_AT_A_TIME]
        scores[:, start : start + len(part)] = (part @ columns).T
    return scores


def nearest(queries: Queries, gallery: Gallery, k: int, *, products: SharedProducts | None = None) -> TopK:
    """What ``exact_topk`` returns in float64, ties included, at the price of reading the gallery once.

    A product in float32 says which rows can be among the k nearest: those whose score is not further below
    the k-th than rounding can move two scores. Only these are scored again in float64.

    Args:
        queries: float32 rows of length 1.
        gallery: float32 rows of length 1. They are not checked again: an index checks what it is given.
        k: from 1 to the number of gallery rows.
        products: of this gallery, shared by threads that ask one query each.
    """
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float64)
    scorer = Scorer(normalised=True)  # that of ``exact_topk``
    num_at_a_time = max(1, _SCORES_AT_A_TIME // len(gallery))
    for start in range(0, len(queries), num_at_a_time):
        block = queries[start : start + num_at_a_time]
        if len(block) > 1:
            rough = block @ gallery.T
        else:
            rough = (gallery @ block[0] if products is None else products.of(block[0]))[None]
        for number, row in enumerate(rough, start=start):
            # in ascending order, so that ties go to the lower gallery row
            rows = _possible(row, k, margin=_margin(gallery.shape[1]))
            query = scorer.prepare(queries[number : number + 1], number, "queries")
            exact = scorer.scores(query, scorer.prepare(gallery[rows], 0, "gallery"))[0]
            best = np.argsort(-exact, kind="stable")[:k]
            indices[number], scores[number] = rows[best], exact[best]
    return TopK(indices, scores)


def _margin(dim: int) -> float:
    """Most that rounding moves two scores of unit vectors towards each other.

    A dot product of d terms is off by at most d · 2^-24 times the product of the lengths, in whatever order
    it is summed (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1); a thousandth more,
    because lengths may be off by that, and the rounding of the final scores to 10 decimals.
    """
    return 2 * 1.003 * dim * 2.0**-24 + 1e-9


def _possible(scores: Float[np.ndarray, " g"], k: int, *, margin: float) -> Int[np.ndarray, " r"]:
    """Rows, ascending, whose score is at least the k-th highest less ``margin``."""
    num_groups = len(scores) // _GROUP
    if num_groups < k:
        rows = np.arange(len(scores))
    else:
        # the k highest maxima are k scores, so the k-th highest score is not below the lowest of them
        maxima = scores[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0)
        bound = np.partition(maxima, num_groups - k)[num_groups - k]
        rows = np.flatnonzero(scores >= bound - np.float32(margin))
    kept = scores[rows].astype(np.float64)
    lowest = np.partition(kept, len(kept) - k)[len(kept) - k]
    possible: Int[np.ndarray, " r"] = rows[kept >= lowest - margin]
    return possible
