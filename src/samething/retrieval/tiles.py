"""The nearest entries in float32, near the speed of the matrix product.

A block of scores is made in a buffer that stays in the cache, and of every group of 64 gallery entries only
the maximum is kept. An entry that belongs to the k best is in a group whose maximum reaches the k-th best
score so far, and in one of the k groups with the highest maxima; those few groups are scored again.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike

from samething.arrays import Bool, Float, Gallery, Int, Queries, TopIndices, TopScores
from samething.retrieval.scores import BYTES_PER_COORDINATE, Prepared, Scorer, blocks, float32_products

GROUP: Final = 64
"""Gallery entries of which one maximum is kept."""
_BUFFER: Final = 2**18
"""Scores in the buffer, 1 MiB: half of a common second-level cache."""
_QUERIES: Final = 512
"""Queries that meet a block of the gallery: the more, the less often the gallery is read from memory."""
_MARGIN: Final = 1e-5
"""Two ways of summing up a score in float32 differ by less."""
_WORTH_TORCH: Final = 5e11
"""Operations that outweigh the seconds that importing torch takes."""


def pays(num_entries: int, k: int) -> bool:
    """Whether the groups that are looked at twice are few against all."""
    return num_entries >= 4 * GROUP * (k + 1)


def topk(
    queries: Queries,
    gallery: Gallery,
    k: int,
    leave_out: Int[np.ndarray, " q"] | None,
    scorer: Scorer,
    memory_mib: int,
) -> tuple[TopIndices, TopScores]:
    """Rows and scores of the k nearest entries; arguments as in ``exact_topk``.

    The gallery is prepared once, a part at a time, and every query meets a part before the next one comes.
    """
    width = queries.shape[1] + (scorer.distance == "euclidean")
    memory = memory_mib * 2**20
    num_queries = max(1, min(len(queries), _QUERIES, memory // 8 // (BYTES_PER_COORDINATE * width)))
    # entries that tie with the best are all looked at: sorting them takes some 80 bytes each
    num_queries = max(1, min(num_queries, memory // 4 // (80 * GROUP * (k + 1))))
    # the part itself, and a maximum for each of its groups and queries
    part_rows = max(1, memory // 4 // (GROUP * 4 * width + 4 * num_queries)) * GROUP
    part_rows = min(part_rows, -(-len(gallery) // GROUP) * GROUP)
    buffer_rows = max(1, min(_BUFFER, memory // 32) // num_queries // GROUP) * GROUP
    torch = _torch_if_it_pays(2.0 * len(queries) * len(gallery) * width)
    hidden = np.full(len(queries), -1) if leave_out is None else leave_out
    best = Best.empty(len(queries), k, np.float32)
    part = np.zeros((part_rows, width), dtype=np.float32)
    buffer = np.empty(min(buffer_rows, part_rows) * num_queries, dtype=np.float32)
    maxima = np.empty((part_rows // GROUP) * num_queries, dtype=np.float32)
    with float32_products():
        for rows in blocks(len(gallery), part_rows):
            num_rows = rows.stop - rows.start
            for own in blocks(num_rows, max(1, memory // 8 // (BYTES_PER_COORDINATE * width))):
                entries = slice(rows.start + own.start, rows.start + own.stop)
                part[own] = _as_products(
                    scorer.prepare(gallery[entries], entries.start, "gallery"), "gallery"
                )
            padded = -(-num_rows // GROUP) * GROUP
            for own in blocks(len(queries), num_queries):
                count = own.stop - own.start
                asked = _as_products(scorer.prepare(queries[own], own.start, "queries"), "queries")
                transposed = np.ascontiguousarray(asked.T)
                tops = maxima[: padded // GROUP * count].reshape(-1, count)
                for columns in blocks(padded, len(buffer) // num_queries):
                    scores = buffer[: (columns.stop - columns.start) * count].reshape(-1, count)
                    own_groups = slice(columns.start // GROUP, columns.stop // GROUP)
                    num_padding = max(0, columns.stop - num_rows)
                    _multiply(torch, part[columns], transposed, scores, num_padding, tops[own_groups])
                best.meet(own, asked, part[:num_rows], rows.start, tops, hidden, memory // 8)
    return best.finished(queries, scorer)


def _as_products(rows: Prepared, side: str) -> Float[np.ndarray, "b e"]:
    """Rows whose products are scores: for distances 2 q·g - |g|², which orders as -|q - g|² does."""
    if rows.squares is None:
        return np.asarray(rows.parts[0])
    if side == "queries":
        return np.concatenate([2 * rows.parts[0], -np.ones_like(rows.squares)[:, None]], axis=1)
    return np.concatenate([rows.parts[0], rows.squares[:, None]], axis=1)


# ---- products and maxima


def _torch_if_it_pays(operations: float) -> Any:
    """torch for big jobs or where it is there already; None: numpy multiplies."""
    if "torch" in sys.modules or (operations >= _WORTH_TORCH and importlib.util.find_spec("torch")):
        return importlib.import_module("torch")
    return None


def _multiply(
    torch: Any,
    entries: Float[np.ndarray, "c d"],
    queries: Float[np.ndarray, "d b"],
    scores: Float[np.ndarray, "c b"],
    num_padding: int,
    maxima: Float[np.ndarray, "t b"],
) -> None:
    """Products of a block, by torch if that is given, and the maximum of each of its groups."""
    if torch is None:
        np.matmul(entries, queries, out=scores)
    else:
        torch.mm(torch.from_numpy(entries), torch.from_numpy(queries), out=torch.from_numpy(scores))
    if num_padding:
        scores[-num_padding:] = -np.inf
    groups = scores.reshape(-1, GROUP, scores.shape[1])
    if torch is None:
        groups.max(axis=1, out=maxima)
    else:
        torch.amax(torch.from_numpy(groups), 1, out=torch.from_numpy(maxima))


# ---- the best so far


@dataclasses.dataclass
class Best:
    """The k best entries that every query has met, best first; -1 and -inf where there are fewer."""

    rows: Int[np.ndarray, "q k"]
    scores: Float[np.ndarray, "q k"]

    @classmethod
    def empty(cls, num_queries: int, k: int, dtype: DTypeLike) -> Best:
        """Nothing met so far."""
        return cls(
            np.full((num_queries, k), -1, dtype=np.int64), np.full((num_queries, k), -np.inf, dtype=dtype)
        )

    def meet(
        self,
        own: slice,
        queries: Float[np.ndarray, "b e"],
        entries: Float[np.ndarray, "c e"],
        first_row: int,
        maxima: Float[np.ndarray, "t b"],
        leave_out: Int[np.ndarray, " q"],
        memory: int,
    ) -> None:
        """Look again at the groups that can hold one of a query's best; ``own`` are the queries' numbers."""
        k = self.rows.shape[1]
        promising = maxima > self.scores[own, -1]
        # one group more than k, because one entry may be the one that is left out
        many = np.flatnonzero(np.count_nonzero(promising, axis=0) > k + 1)
        floor = self.scores[own, -1].copy()
        if len(many):
            lowest = self._keep_highest(promising, maxima, many, k + 1)
            floor[many] = np.maximum(floor[many], lowest - np.float32(_MARGIN))
        query, group = np.nonzero(promising.T)
        if not len(query):
            return
        kept_query, kept_row, kept_score = [], [], []
        for pairs in blocks(len(query), max(1, memory // (GROUP * 4 * (queries.shape[1] + 4)))):
            rows = group[pairs, None] * GROUP + np.arange(GROUP)
            inside = np.minimum(rows, len(entries) - 1)
            scores = np.matmul(entries[inside], queries[query[pairs], :, None])[:, :, 0]
            asker = own.start + query[pairs]
            good = (scores > floor[query[pairs], None]) & (rows < len(entries))
            good &= rows + first_row != leave_out[asker, None]
            pair, place = np.nonzero(good)
            kept_query.append(asker[pair])
            kept_row.append(rows[pair, place] + first_row)
            kept_score.append(scores[pair, place])
        self.merge(np.concatenate(kept_query), np.concatenate(kept_row), np.concatenate(kept_score))

    @staticmethod
    def _keep_highest(
        promising: Bool[np.ndarray, "t b"],
        maxima: Float[np.ndarray, "t b"],
        many: Int[np.ndarray, " m"],
        count: int,
    ) -> Float[np.ndarray, " m"]:
        """Only the groups with the highest maxima remain, the first of equal ones; returns the lowest."""
        chosen = np.ascontiguousarray(maxima[:, many].T)
        place = chosen.shape[1] - count
        lowest = np.partition(chosen, place, axis=1)[:, place]
        is_highest = chosen > lowest[:, None]
        # of equal maxima the first ones, because ties go to the lower row
        equal = chosen == lowest[:, None]
        equal &= np.cumsum(equal, axis=1) <= count - np.count_nonzero(is_highest, axis=1)[:, None]
        promising[:, many] = (is_highest | equal).T
        return np.asarray(lowest)

    def merge(
        self, query: Int[np.ndarray, " p"], row: Int[np.ndarray, " p"], score: Float[np.ndarray, " p"]
    ) -> None:
        """Take in further entries; of equal scores the lower row comes first."""
        k = self.rows.shape[1]
        asked = np.unique(query)
        query = np.concatenate([np.repeat(asked, k), query])
        row = np.concatenate([self.rows[asked].ravel(), row])
        score = np.concatenate([self.scores[asked].ravel(), score])
        order = np.lexsort((row, -score, query))
        starts = np.searchsorted(query[order], asked)
        chosen = order[starts[:, None] + np.arange(k)]
        self.rows[asked], self.scores[asked] = row[chosen], score[chosen]

    def finished(self, queries: Queries, scorer: Scorer) -> tuple[TopIndices, TopScores]:
        """Rows and scores in the scorer's own scale."""
        if scorer.distance == "euclidean":
            for own in blocks(len(queries), 4096):
                squares = scorer.prepare(queries[own], own.start, "queries").squares
                assert squares is not None
                self.scores[own] -= squares[:, None]
            self.scores *= np.float32(scorer.scale**2)
        return self.rows, self.scores
