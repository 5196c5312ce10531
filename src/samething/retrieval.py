"""Exact search by cosine similarity, in blocks under a memory ceiling; never a matrix of all pairs.

Two precisions, for two uses:

``float64``
    What evaluation uses. A score is the cosine rounded to 10 decimals, so entries that are nearer than that
    are tied, and ties go to the lower gallery row. The scores do not depend on the block sizes, the number of
    threads or the BLAS: unit vectors are cut into whole numbers small enough that every sum of products is
    exact in float64 (Ozaki et al., *Error-free transformations of matrix multiplication by using fast
    routines of matrix multiplication and its applications*, Numerical Algorithms 59, 2012). Without that, two
    equal gallery rows get scores that differ in their last bit, depending on where in a block they lie.
``float32``
    One third of the arithmetic at half the width, for big jobs. Scores are right to about 1e-6, and the order
    of entries that are nearer than that is not defined.

The memory ceiling covers everything beyond the arguments and the result. Embeddings may be memory-mapped:
they are converted a block at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from samething.arrays import Embeddings, Gallery, NumRelevant, Queries, Relevance, TopIndices, TopScores
from samething.errors import InputError

Precision: TypeAlias = Literal["float64", "float32"]

# Rows as the scoring functions take them: (parts, rows, d), two parts in float64 and one in float32.
Prepared: TypeAlias = Float[np.ndarray, "parts _ d"]

# A unit vector x becomes high + low / 2^18, both whole, with x ≈ that / 2^26. A sum of high · high is at most
# 2^52 and the two of high · low at most sqrt(d) · 2^44 (Cauchy-Schwarz): within float64's 2^53 up to 2^17
# dimensions. What is cut off changes a cosine by at most 1e-11 up to d = 2^14, and typically by 1e-14.
_HIGH: Final = 2.0**26
_LOW: Final = 2.0**18
_SCORE_STEPS: Final = 1e10
"""Steps of 1: scores are rounded to 10 decimals."""

_GROUP: Final = 32
"""Columns of which one maximum is taken when candidates are sought."""

_UNIT_TOLERANCE: Final = 1e-3
"""How far from 1 the norm of a row called normalised may be; float16 rounding alone makes 5e-4."""

# Bytes at the peak, of temporaries included: for every pair of a block, and for every coordinate of its rows.
_BYTES_PER_PAIR: Final = {"float64": 32, "float32": 12}
_BYTES_PER_COORDINATE: Final = {"float64": 56, "float32": 28}
# Likewise for every neighbour or relevant entry of a query: its row, score and order, old, new and sorted.
_BYTES_PER_NEIGHBOUR: Final = 96


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """The nearest gallery entries of each query, best first."""

    indices: TopIndices
    """Gallery rows; -1 where the gallery has no further entry for the query."""
    scores: TopScores
    """Cosine similarities, descending; -inf where the index is -1."""

    def relevance(
        self, query_labels: Int[np.ndarray, " q"], gallery_labels: Int[np.ndarray, " g"]
    ) -> Relevance:
        """Ranked relevance: which of the entries bear their query's label. Padding is not relevant."""
        if len(gallery_labels) == 0:
            return np.zeros(self.indices.shape, dtype=bool)
        same: Relevance = gallery_labels[self.indices] == query_labels[:, None]
        return same & (self.indices >= 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Positives:
    """The gallery entries that are relevant to each query, one query after another."""

    rows: Int[np.ndarray, " p"]
    """Gallery rows."""
    counts: NumRelevant
    """How many of the rows belong to each query."""

    @classmethod
    def from_labels(
        cls,
        query_labels: Int[np.ndarray, " q"],
        gallery_labels: Int[np.ndarray, " g"],
        *,
        leave_out: Int[np.ndarray, " q"] | None = None,
    ) -> Positives:
        """The entries that bear the query's label, in gallery order, without the one to leave out.

        Args:
            query_labels: one label a query.
            gallery_labels: one label a gallery row.
            leave_out: gallery row that is the query's own picture, -1 for none.
        """
        order = np.argsort(gallery_labels, kind="stable")
        ordered = gallery_labels[order]
        first = np.searchsorted(ordered, query_labels, side="left")
        counts = np.searchsorted(ordered, query_labels, side="right") - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = order[np.repeat(first, counts) + within]
        if leave_out is not None:
            query = np.repeat(np.arange(len(counts)), counts)
            kept = rows != leave_out[query]
            rows = rows[kept]
            counts = np.bincount(query[kept], minlength=len(counts))
        return cls(rows, counts)


def exact_topk(
    queries: Queries,
    gallery: Gallery,
    k: int,
    *,
    leave_out: Int[np.ndarray, " q"] | None = None,
    precision: Precision = "float64",
    normalised: bool = False,
    memory_mib: int = 256,
) -> TopK:
    """The k gallery entries with the highest cosine similarity to each query.

    Ties go to the lower gallery row. A gallery with fewer than k entries to offer is padded to k columns.

    Args:
        queries: float16, float32 or float64 rows.
        gallery: rows to search, of any of these types.
        k: entries a query, at least 1.
        leave_out: gallery row that each query may not retrieve, such as its own picture; -1 for none.
        precision: see the module.
        normalised: rows have norm 1 already and are not normalised again; norms off by over 1e-3 are refused.
        memory_mib: ceiling of the working memory in MiB, beyond the arguments and the result. At least one
            query and one gallery row are held, whatever the ceiling.

    Raises:
        InputError: a row is zero or not finite, or an argument is out of its range.
    """
    if k < 1:
        raise InputError(f"k={k}", expected="at least 1", next_step="ask for one neighbour or more")
    _check_left_out(leave_out, len(gallery))
    num_rows, num_columns = _block_sizes(
        queries, gallery, precision, memory_mib, bytes_per_query=_BYTES_PER_NEIGHBOUR * k
    )
    indices = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=precision)
    for own in _blocks(len(queries), num_rows):
        prepared = _prepare(queries[own], own.start, "queries", precision, normalised)
        for columns in _blocks(len(gallery), num_columns):
            block = _prepare(gallery[columns], columns.start, "gallery", precision, normalised)
            found = _scores(prepared, block)
            if leave_out is not None:
                _forbid(found, np.arange(len(found)), leave_out[own], columns)
            best, values = _best_columns(found, k, floors=scores[own][:, -1])
            # earlier blocks hold lower gallery rows, so a stable sort keeps the rule for ties
            rows = np.concatenate([indices[own], best + columns.start], axis=1)
            values = np.concatenate([scores[own], values], axis=1)
            order = np.argsort(-values, axis=1, kind="stable")[:, :k]
            indices[own] = np.take_along_axis(rows, order, axis=1)
            scores[own] = np.take_along_axis(values, order, axis=1)
    indices[scores == -np.inf] = -1
    if precision == "float64":
        scores /= _SCORE_STEPS
    return TopK(indices, scores)


def positive_ranks(
    queries: Queries,
    gallery: Gallery,
    positives: Positives,
    *,
    leave_out: Int[np.ndarray, " q"] | None = None,
    precision: Precision = "float64",
    normalised: bool = False,
    memory_mib: int = 256,
) -> Int[np.ndarray, " p"]:
    """The rank of every relevant entry in its query's ranking of the whole gallery, counted from 1.

    The ranking is that of :func:`exact_topk`; the entry left out has no rank and does not count. Nothing of
    the size of queries × gallery is kept.

    Args:
        queries: float16, float32 or float64 rows.
        gallery: rows to search, of any of these types.
        positives: the relevant entries of each query.
        leave_out: gallery row that each query may not retrieve, -1 for none.
        precision: see the module.
        normalised: as in :func:`exact_topk`.
        memory_mib: as in :func:`exact_topk`.

    Returns:
        One query after another as in ``positives.counts``, ascending in each: what
        :func:`samething.metrics.average_precision` takes.

    Raises:
        InputError: a row is zero or not finite, a relevant entry is the one left out, or an argument is out
            of its range.
    """
    _check_left_out(leave_out, len(gallery))
    _check_positives(positives, leave_out, len(gallery))
    most_positives = int(positives.counts.max(initial=0))
    num_rows, num_columns = _block_sizes(
        queries, gallery, precision, memory_mib, bytes_per_query=_BYTES_PER_NEIGHBOUR * most_positives
    )
    ranks = np.empty(len(positives.rows), dtype=np.int64)
    ends = np.cumsum(positives.counts)
    for own in _blocks(len(queries), num_rows):
        prepared = _prepare(queries[own], own.start, "queries", precision, normalised)
        counts = positives.counts[own]
        span = slice(int(ends[own.start] - counts[0]), int(ends[own.stop - 1]))
        rows = positives.rows[span]
        query = np.repeat(np.arange(len(counts)), counts)
        keys = np.empty(len(rows), dtype=precision)
        for pairs in _blocks(len(rows), max(1, num_columns // 2)):
            entries = _prepare_rows(gallery, rows[pairs], "gallery", precision, normalised)
            keys[pairs] = _pair_scores(prepared, query[pairs], entries)
        order = np.lexsort((rows, -keys, query))
        rows, keys = rows[order], keys[order]
        before = np.zeros(len(rows), dtype=np.int64)
        for columns in _blocks(len(gallery), num_columns):
            block = _prepare(gallery[columns], columns.start, "gallery", precision, normalised)
            found = _scores(prepared, block)
            # relevant entries are ordered among themselves above; here only the others are counted
            _forbid(found, query, rows, columns)
            if leave_out is not None:
                _forbid(found, np.arange(len(found)), leave_out[own], columns)
            before += _num_before(found, counts, rows - columns.start, keys)
        starts = np.cumsum(counts) - counts
        ranks[span] = before + np.arange(len(rows)) - np.repeat(starts, counts) + 1
    return ranks


def require_directions(embeddings: Embeddings, rows: Int[np.ndarray, " p"]) -> None:
    """Refuse embeddings that have no direction and so no cosine; looks at 4096 rows at a time.

    Args:
        embeddings: all rows, by the numbers the user knows them by.
        rows: numbers of the rows that will be used.

    Raises:
        InputError: a row is all zeros or holds a number that is not finite; the first such row is named.
    """
    for own in _blocks(len(rows), 4096):
        _largest(embeddings[rows[own]], rows[own], "embeddings")


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _block_sizes(
    queries: Queries, gallery: Gallery, precision: Precision, memory_mib: int, bytes_per_query: int
) -> tuple[int, int]:
    """Queries and gallery rows a block: half of the memory for their scores, a quarter for each one's rows.

    Args:
        queries: for their number and dimension.
        gallery: for its number of rows.
        precision: decides the bytes a coordinate and a pair.
        memory_mib: the ceiling.
        bytes_per_query: what is held for a query besides its row and its scores.
    """
    if memory_mib < 1:
        raise InputError(f"memory_mib={memory_mib}", expected="at least 1 MiB", next_step="leave it at 256")
    memory = memory_mib * 2**20
    bytes_per_row = _BYTES_PER_COORDINATE[precision] * max(1, queries.shape[1])
    most_pairs = memory // 2 // _BYTES_PER_PAIR[precision]
    most_queries = max(1, min(len(queries), memory // 4 // (bytes_per_row + bytes_per_query)))
    most_entries = max(1, min(len(gallery), memory // 4 // bytes_per_row))
    num_rows = min(most_queries, int(most_pairs**0.5))
    num_columns = min(most_entries, most_pairs // num_rows)
    # a small gallery leaves room for more queries
    return min(most_queries, most_pairs // num_columns), num_columns


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


def _check_positives(positives: Positives, leave_out: Int[np.ndarray, " q"] | None, num_entries: int) -> None:
    rows = positives.rows
    if positives.counts.sum() != len(rows) or np.any((rows < 0) | (rows >= num_entries)):
        raise InputError(
            f"{len(rows)} positives for counts that sum to {positives.counts.sum()}, or rows out of range",
            expected=f"as many rows as the counts say, each from 0 to {num_entries - 1}",
            next_step="make them with Positives.from_labels",
        )
    if leave_out is not None and np.any(rows == np.repeat(leave_out, positives.counts)):
        raise InputError(
            "a query's own picture among its positives",
            expected="positives without the gallery row that the query may not retrieve",
            next_step="give leave_out to Positives.from_labels too",
        )


# ---- rows


def _largest(rows: Embeddings, row_numbers: Int[np.ndarray, " n"], name: str) -> Float[np.ndarray, " n"]:
    """Largest magnitude in each row, checked to be finite and not 0."""
    largest: Float[np.ndarray, " n"] = np.abs(rows).max(axis=1, initial=0)
    wrong = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
    if len(wrong):
        problem = "is all zeros" if largest[wrong[0]] == 0 else "holds a number that is not finite"
        raise InputError(
            f"row {int(row_numbers[wrong[0]])} of the {name} {problem}",
            expected="finite rows that are not zero, because a cosine needs a direction",
            next_step="leave the row out, or find out why the model gives such an embedding",
        )
    return largest


def _prepare(rows: Embeddings, start: int, name: str, precision: Precision, normalised: bool) -> Prepared:
    """Consecutive rows, of which the first is number ``start``, as the scoring functions take them."""
    return _prepared(rows, np.arange(start, start + len(rows)), name, precision, normalised)


def _prepare_rows(
    rows: Embeddings, chosen: Int[np.ndarray, " p"], name: str, precision: Precision, normalised: bool
) -> Prepared:
    """Any rows, repeats allowed."""
    return _prepared(rows[chosen], chosen, name, precision, normalised)


def _prepared(
    rows: Embeddings, row_numbers: Int[np.ndarray, " n"], name: str, precision: Precision, normalised: bool
) -> Prepared:
    # narrow types are widened before any arithmetic, float64 is narrowed after it: no overflow either way
    rows = rows.astype(np.promote_types(rows.dtype, precision), copy=False)
    largest = _largest(rows, row_numbers, name)
    if normalised:
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= _UNIT_TOLERANCE))
        if len(wrong):
            raise InputError(
                f"row {int(row_numbers[wrong[0]])} of the {name} has norm {norms[wrong[0]]:.6g}",
                expected=f"norm 1 within {_UNIT_TOLERANCE}, as normalised=True says",
                next_step="leave normalised at False",
            )
        unit = rows
    else:
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


# ---- scores


def _scores(queries: Prepared, entries: Prepared) -> Float[np.ndarray, "q g"]:
    """Cosines of all pairs; in float64 as whole numbers of 1e-10."""
    scores: Float[np.ndarray, "q g"] = queries[0] @ entries[0].T
    if len(queries) == 1:
        return scores
    cross = queries[0] @ entries[1].T
    cross += queries[1] @ entries[0].T
    return _rounded(scores, cross)


def _pair_scores(
    queries: Prepared, query: Int[np.ndarray, " p"], entries: Prepared
) -> Float[np.ndarray, " p"]:
    """The same for pairs: entry j with query ``query[j]``. In float64 equal to :func:`_scores` to the bit."""
    scores: Float[np.ndarray, " p"] = np.einsum("pd,pd->p", queries[0][query], entries[0])
    if len(queries) == 1:
        return scores
    cross = np.einsum("pd,pd->p", queries[0][query], entries[1])
    cross += np.einsum("pd,pd->p", queries[1][query], entries[0])
    return _rounded(scores, cross)


def _rounded(scores: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """``scores + cross / 2^18`` in units of 2^-52, to whole numbers of 1e-10; both arguments are used up."""
    cross /= _LOW
    scores += cross
    scores *= _SCORE_STEPS / _HIGH**2
    # adding 0 turns a negative zero into zero
    np.rint(scores, out=scores)
    scores += 0.0
    return scores


def _forbid(
    scores: Float[np.ndarray, "q g"],
    query: Int[np.ndarray, " p"],
    rows: Int[np.ndarray, " p"],
    columns: slice,
) -> None:
    """Set the scores of pairs to -inf where their gallery row lies in the block of ``columns``."""
    inside = (rows >= columns.start) & (rows < columns.stop)
    scores[query[inside], rows[inside] - columns.start] = -np.inf


def _best_columns(
    scores: Float[np.ndarray, "q g"], k: int, floors: Float[np.ndarray, " q"]
) -> tuple[TopIndices, TopScores]:
    """Columns and scores of the k best of each row, best first, of equal ones the lower column first.

    Args:
        scores: one row a query.
        k: how many.
        floors: a score below which each row's entries are of no use; they may be left out.

    Returns:
        k columns, padded with -1 and -inf where a row has fewer that are of use.
    """
    num_rows = len(scores)
    columns = np.full((num_rows, k), -1, dtype=np.int64)
    values = np.full((num_rows, k), -np.inf, dtype=scores.dtype)
    # if nearly all scores tie nearly all are candidates: an eighth of the rows at a time bounds their memory
    for own in _blocks(num_rows, max(1, num_rows // 8)):
        least = np.maximum(floors[own], _reached_by(scores[own], k))
        # numpy finds the places in a flat array three times as fast as in two dimensions
        row, column = np.divmod(np.flatnonzero(scores[own] >= least[:, None]), scores.shape[1])
        score = scores[own][row, column]
        order = np.lexsort((-score, row))  # stable, and the columns of a row ascend
        place = np.arange(len(row)) - np.searchsorted(row, row)
        kept, place, row = order[place < k], place[place < k], row[place < k]
        columns[own.start + row, place] = column[kept]
        values[own.start + row, place] = score[kept]
    return columns, values


def _reached_by(scores: Float[np.ndarray, "q g"], k: int) -> Float[np.ndarray, " q"]:
    """A score that at least k entries of each row reach, and seldom many more; -inf if the row has fewer.

    The k-th highest maximum of disjoint groups of columns: every group above it holds one such entry. It
    takes one pass of maxima, which costs a twentieth of selecting among all columns.
    """
    num_rows, num_columns = scores.shape
    if k > num_columns:
        return np.full(num_rows, -np.inf, dtype=scores.dtype)
    num_groups = num_columns // _GROUP
    if num_groups >= 4 * k:
        scores = scores[:, : num_groups * _GROUP].reshape(num_rows, _GROUP, num_groups).max(axis=1)
    return np.partition(scores, scores.shape[1] - k, axis=1)[:, -k]


def _num_before(
    scores: Float[np.ndarray, "q g"],
    counts: NumRelevant,
    columns: Int[np.ndarray, " p"],
    keys: Float[np.ndarray, " p"],
) -> Int[np.ndarray, " p"]:
    """How many scores of its query's row come before each relevant entry: higher, or equal and further left.

    Args:
        scores: one row a query; what does not count is -inf.
        counts: relevant entries of each query.
        columns: column of each relevant entry, which may lie outside the block on either side.
        keys: its score.
    """
    num_columns = scores.shape[1]
    ordered = np.sort(scores, axis=1)
    before = np.empty(len(keys), dtype=np.int64)
    ends = np.cumsum(counts)
    for row in np.flatnonzero(counts):
        own = slice(int(ends[row] - counts[row]), int(ends[row]))
        not_higher = np.searchsorted(ordered[row], keys[own], side="right")
        lower = np.searchsorted(ordered[row], keys[own], side="left")
        before[own] = num_columns - not_higher
        for entry in own.start + np.flatnonzero(not_higher > lower):
            to_the_left = scores[row, : max(0, int(columns[entry]))]
            before[entry] += np.count_nonzero(to_the_left == keys[entry])
    return before
