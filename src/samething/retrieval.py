"""Exact search by cosine similarity, a block of queries at a time under a memory ceiling.

Two precisions, for two uses:

``float64``
    What evaluation uses. A score is the cosine rounded to 10 decimals, and ties go to the lower gallery row.
    The scores do not depend on block sizes, threads or the BLAS, so equal gallery rows always tie: unit
    vectors are cut into whole numbers so small that every sum of products is exact in float64 (Ozaki et al.,
    *Error-free transformations of matrix multiplication by using fast routines of matrix multiplication and
    its applications*, Numerical Algorithms 59, 2012).
``float32``
    A third of the arithmetic at half the width, for big jobs. Scores are right to about 1e-6, and the order
    of entries that are nearer than that is not defined.

Embeddings may be memory-mapped: they are converted a block at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from samething.arrays import Embeddings, Gallery, NumRelevant, Queries, TopIndices, TopScores
from samething.errors import InputError

Precision: TypeAlias = Literal["float64", "float32"]

# A unit vector x becomes high + low / 2^18, both whole, with x ≈ that / 2^26. A sum of high · high is at most
# 2^52 and the two of high · low at most sqrt(d) · 2^44 (Cauchy-Schwarz): within float64's 2^53 up to 2^17
# dimensions. What is cut off changes a cosine by at most 1e-11 up to d = 2^14, and typically by 1e-14.
_HIGH: Final = 2.0**26
_LOW: Final = 2.0**18
_SCORE_STEPS: Final = 1e10
"""Steps of 1: scores are rounded to 10 decimals."""

_UNIT_TOLERANCE: Final = 1e-3
"""How far from 1 the norm of a row called normalised may be; float16 rounding alone makes 5e-4."""

_GROUP: Final = 32
"""Columns of which one maximum is taken while the best are sought."""

_BYTES_PER_COORDINATE: Final = 64
"""At the peak of preparing a row: the row itself, its magnitudes, its unit vector and the two parts."""


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """The nearest gallery entries of each query, best first."""

    indices: TopIndices
    """Gallery rows; -1 where the gallery has no further entry for the query."""
    scores: TopScores
    """Cosine similarities, descending; -inf where the index is -1."""


def exact_topk(
    queries: Queries,
    gallery: Gallery,
    k: int,
    *,
    leave_out: Int[np.ndarray, " q"] | None = None,
    normalised: bool = False,
    memory_mib: int = 256,
    precision: Precision = "float64",
) -> TopK:
    """The k gallery entries with the highest cosine similarity to each query.

    Ties go to the lower gallery row. A gallery with fewer than k entries to offer is padded to k columns.

    Args:
        queries: float16, float32 or float64 rows.
        gallery: rows to search, of any of these types.
        k: entries a query, at least 1.
        leave_out: gallery row that each query may not retrieve, such as its own picture; -1 for none.
        normalised: rows have norm 1 already and are not normalised again; norms off by over 1e-3 are refused.
        memory_mib: ceiling in MiB of the working memory beyond arguments and result. The scores of one query
            are always held, 8 bytes a gallery row. Less memory converts the gallery more often.
        precision: see the module.

    Raises:
        InputError: a row is zero or not finite, or an argument is out of its range.

    >>> found = exact_topk(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0], [3.0, 4.0], [2.0, 0.0]]), 2)
    >>> found.indices, found.scores
    (array([[2, 1]]), array([[1. , 0.6]]))
    """
    if k < 1:
        raise InputError(f"k={k}", expected="at least 1", next_step="ask for one neighbour or more")
    indices = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=precision)
    for own, block in _score_blocks(queries, gallery, leave_out, normalised, memory_mib, precision):
        for query, row in enumerate(block, start=own.start):
            best = _best_columns(row, k)
            best = best[row[best] > -np.inf]
            indices[query, : len(best)] = best
            scores[query, : len(best)] = row[best]
    return TopK(indices, scores)


def positive_ranks(
    queries: Queries,
    gallery: Gallery,
    query_labels: Int[np.ndarray, " q"],
    gallery_labels: Int[np.ndarray, " g"],
    *,
    leave_out: Int[np.ndarray, " q"] | None = None,
    normalised: bool = False,
    memory_mib: int = 256,
    precision: Precision = "float64",
) -> tuple[Int[np.ndarray, " p"], NumRelevant]:
    """The rank of every relevant entry in its query's ranking of the whole gallery, counted from 1.

    Relevant are the gallery entries that bear the query's label. The ranking is that of :func:`exact_topk`;
    the entry left out has no rank and does not count. Further arguments and errors as in :func:`exact_topk`.

    Returns:
        The ranks, one query after another, ascending in each, and how many of them each query has: what
        :func:`samething.metrics.average_precision` takes.

    >>> angles = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> positive_ranks(angles[:1], angles, np.array([7]), np.array([7, 8, 7]), leave_out=np.array([0]))
    (array([2]), array([1]))
    """
    by_label = np.argsort(gallery_labels, kind="stable")
    starts = np.searchsorted(gallery_labels[by_label], query_labels, side="left")
    ends = np.searchsorted(gallery_labels[by_label], query_labels, side="right")
    ranks = [np.empty(0, dtype=np.int64)]
    counts = np.zeros(len(queries), dtype=np.int64)
    for own, block in _score_blocks(queries, gallery, leave_out, normalised, memory_mib, precision):
        for query, row in enumerate(block, start=own.start):
            positives = by_label[starts[query] : ends[query]]
            positives = positives[row[positives] > -np.inf]
            ranks.append(_ranks_of_columns(row, positives))
            counts[query] = len(positives)
    return np.concatenate(ranks), counts


def require_directions(embeddings: Embeddings, rows: Int[np.ndarray, " r"]) -> None:
    """Refuse embeddings that have no direction and so no cosine.

    Args:
        embeddings: all rows, numbered as the user knows them.
        rows: numbers of the rows that will be used.

    Raises:
        InputError: one of them is all zeros or holds a number that is not finite; the first one is named.
    """
    for own in _blocks(len(rows), 4096):
        _largest(embeddings[rows[own]], rows[own], "embeddings")


# ---- rankings from one query's scores


def _best_columns(row: Float[np.ndarray, " g"], k: int) -> Int[np.ndarray, " k"]:
    """Columns of the k highest scores, or of all if there are fewer, best first, of equal ones the lower."""
    candidates = np.arange(len(row))
    num_groups = len(row) // _GROUP
    if num_groups >= k:
        # the k groups with the highest maxima hold at least k scores that reach the lowest of these maxima;
        # a pass of maxima costs a fraction of selecting among all columns
        maxima = row[: num_groups * _GROUP].reshape(_GROUP, num_groups).max(axis=0)
        candidates = np.flatnonzero(row >= np.partition(maxima, num_groups - k)[num_groups - k])
    # candidates ascend, and a stable sort keeps those that share a score so
    best: np.ndarray = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    return best


def _ranks_of_columns(row: Float[np.ndarray, " g"], chosen: Int[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
    """Ranks of some columns, ascending: 1 + the higher scores + the equal scores in lower columns."""
    columns = np.arange(len(row))
    ranks = np.empty(len(chosen), dtype=np.int64)
    for part in _blocks(len(chosen), max(1, 2**20 // max(1, len(row)))):  # a few MiB of comparisons at a time
        scores, own = row[chosen[part], None], chosen[part, None]
        earlier = row > scores
        earlier |= (row == scores) & (columns < own)
        ranks[part] = 1 + np.count_nonzero(earlier, axis=1)
    return np.sort(ranks)


# ---- scores


def _score_blocks(
    queries: Queries,
    gallery: Gallery,
    leave_out: Int[np.ndarray, " q"] | None,
    normalised: bool,
    memory_mib: int,
    precision: Precision,
) -> Iterator[tuple[slice, Float[np.ndarray, "b g"]]]:
    """Consecutive queries and their cosines with the whole gallery, -inf where the entry is left out.

    A block is overwritten by the next one.
    """
    if memory_mib < 1:
        raise InputError(f"memory_mib={memory_mib}", expected="at least 1 MiB", next_step="leave it at 256")
    _check_left_out(leave_out, len(gallery))
    num_rows, num_columns = _block_sizes(len(queries), len(gallery), queries.shape[1], memory_mib)
    # one buffer for all blocks, because the old one would still be held while the next is made
    buffer = np.empty((num_rows, len(gallery)), dtype=precision)
    for own in _blocks(len(queries), num_rows):
        scores = buffer[: own.stop - own.start]
        prepared = _prepare(queries[own], own.start, "queries", normalised, precision)
        for columns in _blocks(len(gallery), num_columns):
            entries = _prepare(gallery[columns], columns.start, "gallery", normalised, precision)
            scores[:, columns] = _cosines(prepared, entries)
        if leave_out is not None:
            query = np.flatnonzero(leave_out[own] >= 0)
            scores[query, leave_out[own][query]] = -np.inf
        yield own, scores


def _block_sizes(num_queries: int, num_entries: int, width: int, memory_mib: int) -> tuple[int, int]:
    """Queries and gallery rows a block: half of the memory for scores, the rest for what is temporary."""
    memory = memory_mib * 2**20
    most_rows = memory // 8 // (_BYTES_PER_COORDINATE * max(1, width))
    num_rows = max(1, min(num_queries, most_rows, memory // 2 // (8 * max(1, num_entries))))
    # the products of a block: two matrices of 8 bytes a pair
    num_columns = max(1, min(num_entries, most_rows, memory // 8 // (16 * num_rows)))
    return num_rows, num_columns


def _cosines(
    queries: Float[np.ndarray, "parts b d"], entries: Float[np.ndarray, "parts c d"]
) -> Float[np.ndarray, "b c"]:
    scores: np.ndarray = queries[0] @ entries[0].T
    if len(queries) == 1:
        return scores
    cross = queries[0] @ entries[1].T
    cross += queries[1] @ entries[0].T
    cross /= _LOW
    scores += cross
    scores *= _SCORE_STEPS / _HIGH**2
    np.rint(scores, out=scores)
    scores /= _SCORE_STEPS
    return scores


def _prepare(
    rows: Float[np.ndarray, "b d"], start: int, name: str, normalised: bool, precision: Precision
) -> Float[np.ndarray, "parts b d"]:
    """Unit vectors: as they are in float32, in float64 as two parts of whole numbers (see the top)."""
    # narrow types are widened before any arithmetic, float64 is narrowed only after it: nothing overflows
    rows = rows.astype(np.promote_types(rows.dtype, precision), copy=False)
    largest = _largest(rows, np.arange(start, start + len(rows)), name)
    if normalised:
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= _UNIT_TOLERANCE))
        if len(wrong):
            raise InputError(
                f"row {start + int(wrong[0])} of the {name} has norm {norms[wrong[0]]:.6g}",
                expected=f"norm 1 within {_UNIT_TOLERANCE}, as normalised=True says",
                next_step="leave normalised at False",
            )
        unit = rows
    else:
        # the largest coordinate becomes 1 first, so that no square leaves the range
        unit = rows / largest[:, None]
        unit /= np.sqrt(np.einsum("nd,nd->n", unit, unit))[:, None]
    if precision == "float32":
        return unit.astype(np.float32, copy=False)[None]
    scaled = unit * _HIGH
    parts = np.empty((2, *unit.shape))
    np.rint(scaled, out=parts[0])
    scaled -= parts[0]
    scaled *= _LOW
    np.rint(scaled, out=parts[1])
    return parts


# ---- checks


def _largest(
    rows: Float[np.ndarray, "b d"], row_numbers: Int[np.ndarray, " b"], name: str
) -> Float[np.ndarray, " b"]:
    """Largest magnitude in each row, checked to be finite and not 0."""
    largest: np.ndarray = np.abs(rows).max(axis=1, initial=0)
    wrong = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if len(wrong):
        problem = "is all zeros" if largest[wrong[0]] == 0 else "holds a number that is not finite"
        raise InputError(
            f"row {int(row_numbers[wrong[0]])} of the {name} {problem}",
            expected="finite rows that are not zero, because a cosine needs a direction",
            next_step="leave the row out, or find out why the model gives such an embedding",
        )
    return largest


def _check_left_out(leave_out: Int[np.ndarray, " q"] | None, num_entries: int) -> None:
    if leave_out is None:
        return
    wrong = np.flatnonzero((leave_out < -1) | (leave_out >= num_entries))
    if len(wrong):
        query = int(wrong[0])
        raise InputError(
            f"leave_out[{query}]={int(leave_out[query])}",
            expected=f"a gallery row from 0 to {num_entries - 1}, or -1 for none",
            next_step="give rows of the gallery that is searched, not of the catalog",
        )


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
