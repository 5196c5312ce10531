"""The nearest gallery entries, found exactly: the k nearest of each query, and all pairs above a score."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any, Final

import numpy as np

import samething.retrieval.on_device as on_device
import samething.retrieval.tiles as tiles
from samething.arrays import Embeddings, Float, Float32, Gallery, Int, Queries, TopIndices, TopScores
from samething.errors import InputError
from samething.progress import progress_bar
from samething.retrieval.codes import CodedRows
from samething.retrieval.scores import (
    Distance,
    Precision,
    Prepared,
    Scorer,
    blocks,
    require_search,
    score_tiles,
)

_SCORES_AT_A_TIME: Final = 2**24
"""Scores of unit vectors in memory at once: 64 MiB."""
_ROWS_AT_A_TIME: Final = 4096
"""Rows whose products stay in the cache: with a few queries, or with as many other rows."""
_FEW_ROWS: Final = 64
"""So many are scored in float64 at once: choosing among them first would take longer."""
_MOST_PAIRS: Final = 160
"""Pairs that a row keeps with each block of later rows, the nearest."""
_FEW_QUERIES: Final = 8
"""With more of them, one product of matrices costs less than reading the rows once for each."""
_CACHED_BYTES: Final = 2**25
"""Rows that are read again and again out of a processor's cache."""
_SPARE: Final = 8
"""Entries that are asked for beyond those wanted."""


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """The nearest gallery entries of each query, best first."""

    indices: TopIndices
    """Gallery rows; -1 where the gallery has no further entry for the query."""
    scores: TopScores
    """Cosine similarities (or minus squared distances), descending; -inf where the index is -1."""


def exact_topk(
    queries: Queries,
    gallery: Gallery,
    k: int,
    *,
    leave_out: Int[np.ndarray, " q"] | None = None,
    normalised: bool = False,
    memory_mib: int = 256,
    precision: Precision = "float64",
    distance: Distance = "cosine",
    device: str | None = None,
) -> TopK:
    """The k gallery entries that are nearest to each query.

    Ties go to the lower gallery row. A gallery with fewer than k entries to offer is padded to k columns.

    In float32 and with a gallery of many times k entries, the whole is one pass of matrix products into a
    buffer that stays in the cache, a maximum over groups of 64 entries, and a second look at the groups
    that can hold one of the best.

    Args:
        queries: float16, float32 or float64 rows.
        gallery: rows to search, of any of these types.
        k: entries per query, at least 1.
        leave_out: gallery row that each query may not retrieve, such as its own image; -1 for none.
        normalised: rows have norm 1 already and are not normalised again; norms off by over 1e-3 are refused.
        memory_mib: ceiling in MiB of the working memory beyond arguments and result. Less memory converts the
            queries more often.
        precision: see :mod:`samething.retrieval`.
        distance: see :mod:`samething.retrieval`.
        device: of torch, that multiplies; by default a card for big jobs, where torch is loaded and sees one,
            and the processor else. In float64 the result is the same to the bit.

    Raises:
        InputError: a row is zero or not finite, or an argument is out of its range.

    >>> found = exact_topk(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0], [3.0, 4.0], [2.0, 0.0]]), 2)
    >>> found.indices, found.scores
    (array([[2, 1]]), array([[1. , 0.6]]))
    """
    if k < 1:
        raise InputError(f"k={k}", expected="at least 1", next_step="ask for one neighbour or more")
    require_search(leave_out, len(gallery), memory_mib)
    scorer = Scorer.of(
        queries, gallery, precision=precision, distance=distance, normalised=normalised, device=device
    )
    if precision == "float32" and scorer.device is None and tiles.pays(len(gallery), k):
        return TopK(*tiles.topk(queries, gallery, k, leave_out, scorer, memory_mib))
    best = tiles.Best.empty(len(queries), k, precision)
    for own, columns, tile in score_tiles(
        scorer, queries, gallery, leave_out=leave_out, memory_mib=memory_mib
    ):
        if scorer.device is not None:
            # of equal ones those met before come first
            least = np.nextafter(best.scores[own, -1], np.inf)
            queried, column, score = on_device.reaching(tile, k, least)
            best.merge(own.start + queried, columns.start + column, score)
            continue
        for query, row in enumerate(tile, start=own.start):
            found = _reaching(row, k)
            rows = np.concatenate([best.rows[query], found + columns.start])
            values = np.concatenate([best.scores[query], row[found]])
            order = np.argsort(-values, kind="stable")[:k]
            best.rows[query], best.scores[query] = rows[order], values[order]
    best.rows[best.scores == -np.inf] = -1
    return TopK(best.rows, best.scores)


def _reaching(scores: Float[np.ndarray, " g"], k: int, *, margin: float = 0.0) -> Int[np.ndarray, " r"]:
    """Columns, ascending, among which are all whose score is at least the k-th highest less ``margin``."""
    num_groups = len(scores) // tiles.GROUP
    maxima = scores
    if num_groups >= k:
        # the k highest maxima are k scores, so the k-th highest score is not below the lowest of them;
        # a pass of maxima costs a fraction of selecting among all columns
        maxima = scores[: num_groups * tiles.GROUP].reshape(tiles.GROUP, num_groups).max(axis=0)
    if len(maxima) <= k:
        return np.arange(len(scores))
    bound = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
    return np.flatnonzero(scores >= bound - scores.dtype.type(margin))


# ---- unit vectors in float32, in float64's order


class FlatScan:
    """Float32 rows of length 1, searched by several threads.

    FAISS multiplies with a single query, or with a few where the rows stay in the cache: up to five times as
    fast as NumPy, and other threads may run meanwhile. The first search, which may be the only one, is still
    NumPy's: loading FAISS takes several times as long.

    Args:
        gallery: all rows.
    """

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self._is_first = True

    def among(self, rows: Int[np.ndarray, " r"]) -> FlatScan:
        """The same for some of the rows, copied."""
        return FlatScan(self.gallery[rows])

    def nearest(self, queries: Queries, k: int) -> TopK:
        """See :func:`nearest_units`, of the whole gallery."""
        few = len(queries) <= (_FEW_QUERIES if self.gallery.nbytes <= _CACHED_BYTES else 1)
        by_faiss, self._is_first = few and not self._is_first, False
        return nearest_units(queries, self.gallery, k, by_faiss=by_faiss)


def _near(query: Float[np.ndarray, " d"], gallery: Gallery, k: int, margin: float) -> Int[np.ndarray, " r"]:
    """What :func:`_reaching` finds among the products of one query with all rows, by FAISS."""
    import faiss  # takes 0.2 s

    # more than k, until the last one is too far: near copies may be among the nearest, too
    for num in (2 * k + _SPARE, 16 * (k + _SPARE)):
        scores, rows = faiss.knn(query[None], gallery, min(num, len(gallery)), faiss.METRIC_INNER_PRODUCT)
        least = scores[0, k - 1] - np.float32(margin)
        if scores[0, -1] < least or num >= len(gallery):
            return np.sort(rows[0, scores[0] >= least])
    return _reaching(gallery @ query, k, margin=margin)


def _products(queries: Queries, gallery: CodedRows) -> Float[np.ndarray, "q g"]:
    """Products of queries with rows in codes, of which a part is decoded at a time."""
    scores = np.empty((len(queries), len(gallery)), dtype=np.float32)
    columns = np.ascontiguousarray(queries.T)
    for start in range(0, len(gallery), _ROWS_AT_A_TIME):
        part = gallery[start : start + _ROWS_AT_A_TIME]
        scores[:, start : start + len(part)] = (part @ columns).T
    return scores


def nearest_units(queries: Queries, gallery: Gallery | CodedRows, k: int, *, by_faiss: bool = False) -> TopK:
    """What ``exact_topk`` returns in float64, ties included, at the price of reading the gallery once.

    A product in float32 says which rows can be among the k nearest: those whose score is not further below
    the k-th than rounding can move two scores. Only these are scored again in float64.

    Args:
        queries: float32 rows of length 1.
        gallery: float32 rows of length 1, or codes of such. They are not checked again: an index checks what
            it is given.
        k: from 1 to the number of gallery rows.
        by_faiss: FAISS reads the gallery, once for each query; it is not made for codes.
    """
    scorer = Scorer(normalised=True)  # that of ``exact_topk``
    if max(len(queries), len(gallery)) <= _FEW_ROWS:
        parts = scorer.prepare(np.concatenate([queries, gallery[:]]), 0, "vectors").parts
        mine, theirs = parts[:, : len(queries)], parts[:, len(queries) :]
        exact = scorer.scores(Prepared(mine, None), Prepared(theirs, None))
        best = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        return TopK(best, exact[np.arange(len(exact))[:, None], best])
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float64)
    margin = _margin(gallery.shape[1])
    num_at_a_time = max(1, _SCORES_AT_A_TIME // len(gallery))
    for start in range(0, len(queries), num_at_a_time):
        block = queries[start : start + num_at_a_time]
        if by_faiss:
            near = [_near(query, gallery[:], k, margin) for query in block]
        else:
            products = block @ gallery.T if isinstance(gallery, np.ndarray) else _products(block, gallery)
            near = [_reaching(row, k, margin=margin) for row in products]
        for number, rows in enumerate(near, start=start):
            # in ascending order, so that ties go to the lower gallery row
            query = scorer.prepare(queries[number : number + 1], number, "queries")
            exact = scorer.scores(query, scorer.prepare(gallery[rows], 0, "gallery"))[0]
            best = np.argsort(-exact, kind="stable")[:k]
            indices[number], scores[number] = rows[best], exact[best]
    return TopK(indices, scores)


def _margin(dim: int) -> float:
    """Most that rounding moves two scores of unit vectors towards each other.

    A dot product of d terms is off by at most d · 2^-24 times the product of the lengths, in whatever order
    it is summed (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1); a thousandth more,
    because lengths may be off by that; and the rounding of the final scores to 10 decimals and of the bound.
    """
    return 2 * 1.003 * dim * 2.0**-24 + 1e-9 + 2.0**-23


# ---- all pairs above a score


@dataclasses.dataclass(frozen=True, eq=False)
class NearPairs:
    """Pairs of rows whose cosine is high enough."""

    first: Int[np.ndarray, " p"]
    """The lower row."""
    second: Int[np.ndarray, " p"]
    cosine: Float32[np.ndarray, " p"]
    num_crowded: int
    """Rows that may have more near ones than were kept."""


def pairs_above(embeddings: Embeddings, least: float, *, memory_mib: int = 512) -> NearPairs:
    """Pairs with a cosine of at least ``least``; each row is compared with those after it, once.

    Args:
        embeddings: n rows, also memory-mapped ones.
        least: lowest cosine of a pair, in float32.
        memory_mib: ceiling in MiB of the working memory.

    Raises:
        InputError: a row is zero or not finite.

    >>> found = pairs_above(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]], np.float32), 0.9)
    >>> found.first, found.second, found.cosine.round(4)
    (array([0]), array([2]), array([0.9988], dtype=float32))
    """
    num_rows, width = embeddings.shape
    size = _ROWS_AT_A_TIME
    # two blocks, each also as it is widened, and of each pair a cosine and two marks
    while size > 64 and 4 * size * width * 4 + 6 * size * size > memory_mib * 2**20:
        size //= 2
    scorer = Scorer.of(embeddings, embeddings, precision="float32", distance="cosine", normalised=False)
    # torch's kernels are the faster ones on many machines
    torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    crowded = np.zeros(num_rows, bool)
    million = num_rows**2 / 2e6
    with progress_bar("million pairs", disable=million < 1) as progress:
        task = progress.add_task("near pairs", total=round(million))
        for block in blocks(num_rows, size):
            rows = scorer.prepare(embeddings[block], block.start, "embeddings").parts[0]
            for later in blocks(num_rows - block.start, size):
                start = block.start + later.start
                others = rows
                if later.start:
                    others = scorer.prepare(embeddings[start : start + size], start, "embeddings").parts[0]
                if torch is None:
                    cosines = rows @ others.T
                else:
                    cosines = (torch.from_numpy(rows) @ torch.from_numpy(others).T).numpy()
                near = cosines >= least
                if not later.start:
                    near &= ~np.tri(len(rows), dtype=bool)
                if near.any():
                    many = near.sum(axis=1) > _MOST_PAIRS
                    crowded[block] |= many
                    for row in np.flatnonzero(many):
                        columns = np.flatnonzero(near[row])
                        order = np.argsort(-cosines[row, columns], kind="stable")
                        near[row, columns[order[_MOST_PAIRS:]]] = False
                    first, second = np.nonzero(near)
                    found.append((first + block.start, second + start, cosines[first, second]))
                progress.advance(task, len(rows) * len(others) / (1e6 if later.start else 2e6))
    first, second, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
    return NearPairs(first, second, cosine, int(crowded.sum()))
