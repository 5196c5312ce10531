"""The k nearest gallery entries of each query."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np
from jaxtyping import Float, Int

from samething.arrays import Gallery, Queries, TopIndices, TopScores
from samething.errors import InputError
from samething.progress import progress_bar
from samething.retrieval import groups
from samething.retrieval.scores import (
    BYTES_PER_COORDINATE,
    Distance,
    Precision,
    Scorer,
    blocks,
    require_search,
)

_GROUP: Final = 32
"""Columns of which one maximum is taken while the best are sought."""


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
    show_progress: bool = False,
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
        memory_mib: ceiling in MiB of the working memory beyond arguments and result. In float64 the scores of
            one query are always held, 8 bytes a gallery row. Less memory converts the rows more often.
        precision: see :mod:`samething.retrieval`.
        distance: see :mod:`samething.retrieval`.
        show_progress: show a bar.

    Raises:
        InputError: a row is zero or not finite, or an argument is out of its range.

    >>> found = exact_topk(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0], [3.0, 4.0], [2.0, 0.0]]), 2)
    >>> found.indices, found.scores
    (array([[2, 1]]), array([[1. , 0.6]]))
    """
    if k < 1:
        raise InputError(f"k={k}", expected="at least 1", next_step="ask for one neighbour or more")
    require_search(leave_out, len(gallery), memory_mib)
    scorer = Scorer.of(queries, gallery, precision=precision, distance=distance, normalised=normalised)
    with progress_bar("million pairs", disable=not show_progress) as progress:
        task = progress.add_task("search", total=round(len(queries) * len(gallery) / 1e6))

        def on_pairs(num_pairs: int) -> None:
            progress.advance(task, num_pairs / 1e6)

        if precision == "float32" and groups.pays(len(gallery), k):
            indices, scores = groups.topk(queries, gallery, k, leave_out, scorer, memory_mib, on_pairs)
            return TopK(indices, scores)
        indices = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=precision)
        for own, block in _score_blocks(queries, gallery, leave_out, scorer, memory_mib):
            for query, row in enumerate(block, start=own.start):
                best = _best_columns(row, k)
                best = best[row[best] > -np.inf]
                indices[query, : len(best)] = best
                scores[query, : len(best)] = row[best]
            on_pairs(block.size)
    return TopK(indices, scores)


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


def _score_blocks(
    queries: Queries,
    gallery: Gallery,
    leave_out: Int[np.ndarray, " q"] | None,
    scorer: Scorer,
    memory_mib: int,
) -> Iterator[tuple[slice, Float[np.ndarray, "b g"]]]:
    """Consecutive queries and their scores with the whole gallery, -inf where the entry is left out.

    A block is overwritten by the next one.
    """
    num_rows, num_columns = _block_sizes(len(queries), len(gallery), queries.shape[1], memory_mib)
    # one buffer for all blocks, because the old one would still be held while the next is made
    buffer = np.empty((num_rows, len(gallery)), dtype=scorer.precision)
    for own in blocks(len(queries), num_rows):
        scores = buffer[: own.stop - own.start]
        prepared = scorer.prepare(queries[own], own.start, "queries")
        for columns in blocks(len(gallery), num_columns):
            entries = scorer.prepare(gallery[columns], columns.start, "gallery")
            scores[:, columns] = scorer.scores(prepared, entries)
        if leave_out is not None:
            query = np.flatnonzero(leave_out[own] >= 0)
            scores[query, leave_out[own][query]] = -np.inf
        yield own, scores


def _block_sizes(num_queries: int, num_entries: int, width: int, memory_mib: int) -> tuple[int, int]:
    """Queries and gallery rows per block: half of the memory for scores, the rest for what is temporary."""
    memory = memory_mib * 2**20
    most_rows = memory // 8 // (BYTES_PER_COORDINATE * max(1, width))
    num_rows = max(1, min(num_queries, most_rows, memory // 2 // (8 * max(1, num_entries))))
    # the products of a block: two matrices of 8 bytes per pair
    num_columns = max(1, min(num_entries, most_rows, memory // 8 // (16 * num_rows)))
    return num_rows, num_columns
