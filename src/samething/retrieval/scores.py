"""Rows to scores: what is searched is brought to unit length, or to one scale, and multiplied exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Iterator
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from samething.arrays import Embeddings, Float, Gallery, Int, Queries
from samething.errors import InputError

Precision: TypeAlias = Literal["float64", "float32"]
Distance: TypeAlias = Literal["cosine", "euclidean"]

# A vector x of length at most 1 becomes high + low / 2^18, both whole, with x ≈ that / 2^26. A sum of
# high · high is at most 2^52 and the two of high · low at most sqrt(d) · 2^44 (Cauchy-Schwarz): within
# float64's 2^53 up to 2^17 dimensions. What is cut off changes a cosine by at most 1e-11 up to d = 2^14, and
# typically by 1e-14.
_HIGH: Final = 2.0**26
_LOW: Final = 2.0**18
_SCORE_STEPS: Final = 1e10
"""Steps of 1: scores are rounded to 10 decimals."""

_UNIT_TOLERANCE: Final = 1e-3
"""How far from 1 the norm of a row called normalised may be; float16 rounding alone makes 5e-4."""

BYTES_PER_COORDINATE: Final = 64
"""At the peak of preparing a row: the row itself, its magnitudes, its unit vector and the two parts."""

_LARGEST_BLOCK: Final = 65_536
"""Gallery entries of a tile."""

_WORTH_A_CARD: Final = 1e11
"""Operations of a search, seconds of a processor, that outweigh waking a card."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """How two rows are compared: everything that their score depends on."""

    precision: Precision = "float64"
    distance: Distance = "cosine"
    normalised: bool = False
    """Rows have norm 1 already (cosine)."""
    scale: float = 1.0
    """euclidean: a power of two that no vector is longer than."""
    device: Any = None
    """The torch device that multiplies; None: numpy does."""

    @classmethod
    def of(
        cls,
        queries: Queries,
        gallery: Gallery,
        *,
        precision: Precision,
        distance: Distance,
        normalised: bool,
        device: str | None = None,
    ) -> Scorer:
        """The scorer of a search, with the scale that its vectors need.

        Args:
            queries: what is asked.
            gallery: what is searched.
            precision: of the scores.
            distance: what a score is.
            normalised: rows have norm 1 already.
            device: of torch, that multiplies; None: a card for big jobs, where torch is loaded and sees one.

        Raises:
            InputError: a row is not finite (euclidean).
        """
        torch: Any = sys.modules.get("torch")
        is_big = 2.0 * len(queries) * len(gallery) * queries.shape[1] >= _WORTH_A_CARD
        if device is None and is_big and torch is not None and torch.cuda.is_available():
            device = "cuda"
        where = None if device is None else importlib.import_module("torch").device(device)
        if distance == "cosine":
            return cls(precision, distance, normalised, device=where)
        longest = max(_longest(queries, "queries"), _longest(gallery, "gallery"))
        scale = 2.0 ** np.ceil(np.log2(longest)) if longest > 0 else 1.0
        return cls(precision, distance, scale=scale, device=where)

    def prepare(self, rows: Float[np.ndarray, "b d"], start: int, name: str) -> Prepared:
        """Rows ready to be multiplied; ``start`` and ``name`` are for messages.

        Raises:
            InputError: a row is zero (cosine), not finite, or not of norm 1 where it should be.
        """
        # narrow types are widened before any arithmetic, float64 is narrowed only after it: nothing overflows
        rows = rows.astype(np.promote_types(rows.dtype, self.precision), copy=False)
        is_cosine, unit = self.distance == "cosine", rows

        def largest() -> Float[np.ndarray, " b"]:
            return _largest(rows, np.arange(start, start + len(rows)), name, zero_is_wrong=is_cosine)

        if not is_cosine:
            largest()
            unit = rows / self.scale
        elif self.normalised:
            norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
            if not (np.abs(norms - 1) <= _UNIT_TOLERANCE).all():
                largest()  # says what is zero or not finite
                wrong = np.flatnonzero(~(np.abs(norms - 1) <= _UNIT_TOLERANCE))
                raise InputError(
                    f"row {start + int(wrong[0])} of the {name} has norm {norms[wrong[0]]:.6g}",
                    expected=f"norm 1 within {_UNIT_TOLERANCE}, as normalised=True says",
                    next_step="leave normalised at False",
                )
        else:
            # the largest coordinate becomes 1 first, so that no square leaves the range
            unit = rows / largest()[:, None]
            unit /= np.sqrt(np.einsum("nd,nd->n", unit, unit))[:, None]
        if self.precision == "float32":
            parts = unit.astype(np.float32, copy=False)[None]
        else:
            scaled = unit * _HIGH
            parts = np.empty((2, *unit.shape))
            np.rint(scaled, out=parts[0])
            scaled -= parts[0]
            scaled *= _LOW
            np.rint(scaled, out=parts[1])
        if is_cosine:
            return Prepared(parts, None)
        # in float64 a sum of whole numbers, so exact
        squares: np.ndarray = np.einsum("nd,nd->n", parts[0], parts[0])
        if len(parts) == 2:
            squares += np.einsum("nd,nd->n", parts[0], parts[1]) * (2 / _LOW)
            squares /= _HIGH**2
        return Prepared(parts, squares)

    def scores(self, queries: Prepared, entries: Prepared, *, pairwise: bool = False) -> Any:
        """Every query with every entry, or pairwise the i-th with the i-th; higher is nearer.

        In float64 both ways, and numpy and torch on any device, give the same bits. The scores are where the
        rows are.
        """
        each = functools.partial(np.einsum, "nd,nd->n")
        products: Any = each if pairwise else lambda one, other: one @ other.T
        scores = products(queries.parts[0], entries.parts[0])
        if self.precision == "float64":
            cross = products(queries.parts[0], entries.parts[1])
            cross += products(queries.parts[1], entries.parts[0])
            cross /= _LOW
            scores += cross
            scores /= _HIGH**2
        if queries.squares is not None and entries.squares is not None:
            scores *= 2
            scores -= queries.squares if pairwise else queries.squares[:, None]
            scores -= entries.squares
        if self.precision == "float64":
            scores *= _SCORE_STEPS
            # both round halves to even
            (np.rint if isinstance(scores, np.ndarray) else sys.modules["torch"].round)(scores, out=scores)
            scores /= _SCORE_STEPS
        if self.distance == "euclidean":
            scores *= self.scale**2
        return scores


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Rows ready to be multiplied."""

    parts: Any
    """As they are in float32, in float64 as two parts of whole numbers (see the top of the file):
    (parts, b, d), of numpy or torch."""
    squares: Any
    """Squared lengths (b,) in units of the scale, where the distance needs them."""

    def on(self, device: Any) -> Prepared:
        """The same as tensors on a torch device; as it is for None."""
        if device is None:
            return self
        torch = importlib.import_module("torch")
        there = [
            None if part is None else torch.from_numpy(part).to(device) for part in (self.parts, self.squares)
        ]
        return Prepared(*there)


@contextlib.contextmanager
def float32_products(precision: Literal["highest", "medium"] = "highest") -> Iterator[None]:
    """Where torch is in use, its float32 products are float32: a program may have allowed less.

    Args:
        precision: torch's word for it; medium may be less, or float32 by another library.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        yield
        return
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def require_directions(embeddings: Embeddings, rows: Int[np.ndarray, " r"]) -> None:
    """Refuse embeddings that have no direction and so no cosine.

    Args:
        embeddings: all rows, numbered as the user knows them.
        rows: numbers of the rows that will be used.

    Raises:
        InputError: one of them is all zeros or holds a number that is not finite; the first one is named.
    """
    for own in blocks(len(rows), 4096):
        _largest(embeddings[rows[own]], rows[own], "embeddings")


def require_search(leave_out: Int[np.ndarray, " q"] | None, num_entries: int, memory_mib: int) -> None:
    """Refuse arguments of a search that are out of their range.

    Raises:
        InputError: a left-out entry is not in the gallery, or there is no memory.
    """
    if memory_mib < 1:
        raise InputError(f"memory_mib={memory_mib}", expected="at least 1 MiB", next_step="leave it at 256")
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


def _longest(rows: Float[np.ndarray, "n d"], name: str) -> float:
    """Length of the longest vector, without leaving the range."""
    longest = 0.0
    for own in blocks(len(rows), 4096):
        part = rows[own].astype(np.float64)
        largest = _largest(part, np.arange(own.start, own.stop), name, zero_is_wrong=False).max(initial=0)
        if largest > 0:
            part /= largest
            longest = max(longest, float(largest * np.sqrt(np.einsum("nd,nd->n", part, part).max())))
    if not longest < 1e150:
        raise InputError(
            f"a row of the {name} has length {longest:.3g}",
            expected="lengths whose squares are finite, because distances are compared",
            next_step="divide all embeddings by one number, or by their lengths",
        )
    return longest


def _largest(
    rows: Float[np.ndarray, "b d"],
    row_numbers: Int[np.ndarray, " b"],
    name: str,
    *,
    zero_is_wrong: bool = True,
) -> Float[np.ndarray, " b"]:
    """Largest magnitude in each row, checked to be finite and, where that matters, not 0."""
    largest: np.ndarray = np.abs(rows).max(axis=1, initial=0)
    wrong = np.flatnonzero(~(np.isfinite(largest) & ((largest > 0) | (not zero_is_wrong))))
    if len(wrong):
        problem = "is all zeros" if largest[wrong[0]] == 0 else "holds a number that is not finite"
        raise InputError(
            f"row {int(row_numbers[wrong[0]])} of the {name} {problem}",
            expected="finite rows that are not zero, because a cosine needs a direction"
            if zero_is_wrong
            else "finite rows",
            next_step="leave the row out, or find out why the model gives such an embedding",
        )
    return largest


def score_tiles(
    scorer: Scorer,
    queries: Queries,
    gallery: Gallery,
    *,
    leave_out: Int[np.ndarray, " q"] | None,
    memory_mib: int,
    first_row: int = 0,
) -> Iterator[tuple[slice, slice, Any]]:
    """Scores of all queries with all entries, a tile at a time: all queries meet a part before the next one.

    Args:
        scorer: how rows are compared, and where: tiles of a device are tensors there.
        queries: one row per query.
        gallery: entries, which are converted once.
        leave_out: entry that each query may not retrieve; its score is -inf.
        memory_mib: ceiling in MiB of the working memory; on a card, half of its free memory is.
        first_row: number of the gallery's first row.

    Yields:
        The queries, the numbered entries and their scores.
    """
    device = scorer.device
    if device is not None and device.type == "cuda":
        memory_mib = max(1, sys.modules["torch"].cuda.mem_get_info(device)[0] // 2**21)
    num_rows, num_columns = _tile_sizes(len(queries), len(gallery), queries.shape[1], memory_mib)
    for columns in blocks(len(gallery), num_columns):
        start = first_row + columns.start
        entries = scorer.prepare(gallery[columns], start, "gallery").on(device)
        for own in blocks(len(queries), num_rows):
            asked = scorer.prepare(queries[own], own.start, "queries").on(device)
            with float32_products():
                scores = scorer.scores(asked, entries)
            if leave_out is not None:
                hidden = leave_out[own] - start
                hiding = np.flatnonzero((hidden >= 0) & (hidden < scores.shape[1]))
                scores[hiding, hidden[hiding]] = -np.inf
            yield own, slice(start, first_row + columns.stop), scores


def pair_scores(
    scorer: Scorer,
    queries: Queries,
    gallery: Gallery,
    pairs: tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]],
    *,
    memory_mib: int,
) -> Float[np.ndarray, " p"]:
    """Scores of some pairs of query and entry: in float64 to the bit what :func:`score_tiles` has for them.

    Raises:
        InputError: a row is zero or not finite; it is named as the user knows it.
    """
    query, rows = pairs
    scores = np.empty(len(rows), dtype=scorer.precision)
    size = max(1, memory_mib * 2**20 // 8 // (BYTES_PER_COORDINATE * max(1, queries.shape[1])))
    for own in blocks(len(rows), size):
        asked = scorer.prepare(queries[query[own]], 0, "queries")
        try:
            entries = scorer.prepare(gallery[rows[own]], 0, "gallery")
        except InputError:
            for row in rows[own]:
                scorer.prepare(gallery[row : row + 1], int(row), "gallery")
            raise
        scores[own] = scorer.scores(asked, entries, pairwise=True)
    return scores


def _tile_sizes(num_queries: int, num_entries: int, width: int, memory_mib: int) -> tuple[int, int]:
    """Queries and gallery rows per tile: half of the memory for scores and products, a quarter for rows."""
    memory = memory_mib * 2**20
    most_rows = memory // 8 // (BYTES_PER_COORDINATE * max(1, width))
    num_columns = max(1, min(num_entries, most_rows, _LARGEST_BLOCK))
    # scores of this tile and of the one before, and two temporary products, each of 8 bytes per pair
    num_rows = max(1, min(num_queries, most_rows, memory // 2 // (32 * num_columns)))
    return num_rows, num_columns


def blocks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``length``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
