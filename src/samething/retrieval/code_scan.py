"""Exact search among rows in codes: FAISS scans their bytes, we settle the order.

Codes of 4 bits are scanned by table look-ups in registers (André et al., *Cache locality is not enough:
high-performance nearest neighbor search with product quantization fast scan*, VLDB 9, 2015): a table per
number says what each of its 16 codes adds to the score, rounded to a byte. How far that rounding can move a
score is known. So rows are asked for until no other one can be among the nearest, and are scored again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from samething.arrays import Float, Int, Queries, UInt8
from samething.retrieval.codes import CodedRows, Coder, Codes
from samething.retrieval.nearest import FlatScan, TopK, nearest_units

_PART_BYTES: Final = 2**22
"""Codes of a part: what one change makes a reader bring into order again, in 40 ms at most."""
_FEW_BYTES: Final = 2**25
_LEAST_ASKED: Final = 1024
_MOST_ASKED: Final = 16384
"""Above it, copies of one image or rows of next to one score: all rows are scored in float32 then."""
_ROUNDING: Final = 1e-5
"""Of scores in float32."""
_ROWS_AT_ONCE: Final = 128
"""Rows that become float32 in the cache, where NumPy multiplies them."""
_BLOCK: Final = 32
"""Rows that are scanned together; the order of their half bytes within a register is FAISS's."""
_ORDER: Final = np.array([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])
_BALLAST: Final = 2
"""Tables beyond those of the code, of which one is wide enough that sums of bytes stay below 2^16."""
_SIGNED: Final = np.array([*range(8), *range(-8, 0)], dtype=np.float32)
"""What the 16 values of a half byte stand for."""


class CodeScan:
    """The rows of an index in codes, ready to be searched by several threads.

    Memory: a second copy of the codes, made by the second search. The first one, which may be the only one,
    reads them as they are: loading FAISS and bringing them into its order take several times as long.

    Args:
        gallery: all rows.
        shortest: no row is shorter than that before it is brought to unit length.
        before: a scan of the first of these rows, whose parts are taken over.
    """

    def __init__(self, gallery: CodedRows, *, shortest: float, before: CodeScan | None = None) -> None:
        self.gallery, self._shortest = gallery, shortest
        self._rows_a_part = max(1, _PART_BYTES // gallery.coder.num_bytes // _BLOCK) * _BLOCK
        self._parts: list[Any] = (
            [] if before is None else before._parts[: len(before.gallery) // self._rows_a_part]
        )
        self._guard = threading.Lock()
        # before rows are brought to unit length; 0: not asked for yet
        self._lengths = np.zeros(len(gallery), dtype=np.float32)
        if before is not None:
            self._lengths[: len(before._lengths)] = before._lengths
        self._is_first = before is None

    def among(self, rows: Int[np.ndarray, " r"]) -> CodeScan:
        """The same for some of the rows, copied."""
        return CodeScan(self.gallery.take(rows), shortest=self._shortest)

    def nearest(self, queries: Queries, k: int) -> TopK:
        """As :func:`nearest_units`, of the decoded rows."""
        candidates = self._read if self._is_first and len(queries) == 1 else self._candidates
        self._is_first = False
        indices = np.empty((len(queries), k), dtype=np.int64)
        scores = np.empty((len(queries), k), dtype=np.float64)
        waiting, num_asked = np.arange(len(queries)), max(_LEAST_ASKED, 2 * k)
        while len(waiting) and num_asked <= min(_MOST_ASKED, len(self.gallery)):
            unsettled = []
            for number, found in zip(waiting, candidates(queries[waiting], num_asked), strict=True):
                top = self._settled(queries[number : number + 1], k, *found)
                if top is None:
                    unsettled.append(number)
                else:
                    indices[number], scores[number] = top.indices[0], top.scores[0]
            waiting, num_asked = np.array(unsettled, dtype=np.int64), 4 * num_asked
            candidates = self._candidates
        if len(waiting):
            top = nearest_units(queries[waiting], self.gallery, k)
            indices[waiting], scores[waiting] = top.indices, top.scores
        return TopK(indices, scores)

    def _settled(
        self,
        query: Queries,
        k: int,
        rows: Int[np.ndarray, " r"],
        rough: Float[np.ndarray, " r"],
        end: float,
        error: float,
    ) -> TopK | None:
        """The nearest of all rows, if they are surely among those found.

        Args:
            query: one.
            k: rows to find.
            rows: found, ascending.
            rough: their scores before they are brought to unit length.
            end: no other row's rough score is above it.
            error: how far rough scores may be off.
        """
        if len(rows) < k:
            return None
        if len(rows) > 2 * k:  # the k best bound the k-th score from below, so that few are scored exactly
            best = rows[np.sort(np.argpartition(rough, -k)[-k:])]
            least = nearest_units(query, self.gallery[best], k).scores[0, -1]
            if least > 0:
                near = rough >= least * self._shortest - error - _ROUNDING
                rows, rough = rows[near], rough[near]
                new = rows[self._lengths[rows] == 0]
                self._lengths[new] = self.gallery.coder.lengths(self.gallery.codes[new])
                rows = rows[rough >= least * self._lengths[rows] - error - _ROUNDING]
        top = nearest_units(query, self.gallery[rows], k)
        if top.scores[0, -1] <= max(end + error, 0.0) / self._shortest + _ROUNDING:
            return None
        return TopK(rows[top.indices], top.scores)

    def _read(
        self, queries: Queries, num: int
    ) -> Iterator[tuple[Int[np.ndarray, " r"], Float[np.ndarray, " r"], float, float]]:
        """As :meth:`_candidates`, by multiplication alone."""
        coder, codes = self.gallery.coder, self.gallery.codes
        for query in queries:
            starts = range(0, len(codes), _ROWS_AT_ONCE)
            rough = np.concatenate(
                [coder.products(codes[start : start + _ROWS_AT_ONCE], query) for start in starts]
            )
            kept = np.sort(np.argpartition(rough, -num)[-num:])
            end = float(rough[kept].min()) if num < len(codes) else -np.inf
            yield kept, rough[kept], end, _ROUNDING

    def _candidates(
        self, queries: Queries, num: int
    ) -> Iterator[tuple[Int[np.ndarray, " r"], Float[np.ndarray, " r"], float, float]]:
        """For each query what :meth:`_settled` is given: rows, rough scores, their end and their error."""
        asked, errors = _asked(self.gallery.coder, queries)
        values, places = [], []
        ends = np.full(len(queries), -np.inf)
        for start, part in zip(range(0, len(self.gallery), self._rows_a_part), self._ready(), strict=True):
            own, found = part.search(asked, min(num, part.ntotal))
            if num < part.ntotal:
                ends = np.maximum(ends, own[:, -1])
            values.append(own)
            places.append(np.where(found >= 0, found + start, -1))
        rough, rows = np.concatenate(values, axis=1), np.concatenate(places, axis=1)
        if len(values) > 1:
            ends = np.maximum(ends, np.partition(rough, -num, axis=1)[:, -num])
        for row, own, end, error in zip(rows, rough, ends, errors, strict=True):
            kept = np.flatnonzero((row >= 0) & (own >= end))
            kept = kept[np.argsort(row[kept])]
            yield row[kept], own[kept], float(end), float(error)

    def _ready(self) -> list[Any]:
        with self._guard:
            for start in range(len(self._parts) * self._rows_a_part, len(self.gallery), self._rows_a_part):
                codes = self.gallery.codes[start : start + self._rows_a_part]
                self._parts.append(_part(codes, self.gallery.coder))
            return self._parts


class FewCodes:
    """So few rows in codes that all of them are decoded, at the first search, and stay in memory.

    A matrix product with them costs less than a scan whose candidates are scored again.

    Args:
        gallery: all rows, at most :meth:`most`.
        before: of the first of these rows; what it has decoded is taken over.
    """

    def __init__(self, gallery: CodedRows, *, before: FewCodes | None = None) -> None:
        self.gallery = gallery
        self._decoded: FlatScan | None = None if before is None else before._decoded
        """The first rows, as far as they were decoded."""

    @staticmethod
    def most(coder: Coder) -> int:
        """How many rows are few: they take 32 MiB as float32."""
        return _FEW_BYTES // (4 * len(coder.step))

    def among(self, rows: Int[np.ndarray, " r"]) -> FlatScan:
        """The same for some of the rows, copied."""
        return FlatScan(self.gallery[rows])

    def nearest(self, queries: Queries, k: int) -> TopK:
        """As :func:`nearest_units`, of the decoded rows."""
        decoded = self._decoded
        if decoded is None:
            decoded = self._decoded = FlatScan(self.gallery[:])
        elif len(decoded.gallery) < len(self.gallery):
            newer = self.gallery[len(decoded.gallery) :]
            decoded = self._decoded = FlatScan(np.concatenate([decoded.gallery, newer]))
        return decoded.nearest(queries, k)


def _part(codes: Codes, coder: Coder) -> Any:
    import faiss  # takes 0.2 s

    part: Any
    product = faiss.METRIC_INNER_PRODUCT
    if coder.kind == "int8":
        width = len(coder.step)
        part = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, product)
        # a byte stands for low + (byte + 1/2) / 255 · range: for byte - 128
        trained = np.repeat(np.array([-128.5, 255.0], dtype=np.float32), width)
        faiss.copy_array_to_vector(trained, part.sq.trained)
        faiss.copy_array_to_vector((codes ^ 0x80).ravel(), part.codes)
    else:
        width = 2 * codes.shape[1] + _BALLAST
        part = faiss.IndexPQFastScan(width, width, 4, product)
        values = np.tile(_SIGNED, (width, 1))
        values[-_BALLAST:] = np.arange(16) == 15
        faiss.copy_array_to_vector(values.ravel(), part.pq.centroids)
        faiss.copy_array_to_AlignedTable(_interleaved(codes), part.codes)
        part.ntotal2 = -(-len(codes) // _BLOCK) * _BLOCK
    part.is_trained, part.ntotal = True, len(codes)
    return part


def _interleaved(codes: Codes) -> UInt8[np.ndarray, " packed"]:
    """Codes of 4 bits as FAISS scans them: of 32 rows all half bytes of one number, then of the next."""
    num_blocks = -(-len(codes) // _BLOCK)
    padded = np.pad(codes, ((0, num_blocks * _BLOCK - len(codes)), (0, 0))).reshape(num_blocks, _BLOCK, -1)
    low, high = padded[:, _ORDER].swapaxes(1, 2), padded[:, _ORDER + 16].swapaxes(1, 2)
    both = np.zeros((num_blocks, 2 * codes.shape[1] + _BALLAST, 16), dtype=np.uint8)
    both[:, 0:-_BALLAST:2] = (low & 15) | (high << 4)
    both[:, 1:-_BALLAST:2] = (low >> 4) | (high & 0xF0)
    return both.ravel()


def _asked(coder: Coder, queries: Queries) -> tuple[Float[np.ndarray, "q e"], Float[np.ndarray, " q"]]:
    """Queries as the parts take them, and how far a score of theirs may be off."""
    weights = (queries * coder.step).astype(np.float32)
    if coder.kind == "int8":
        return weights, np.full(len(queries), _ROUNDING)
    odd = weights.shape[1] % 2
    width = weights.shape[1] + odd + _BALLAST
    spans = 15 * np.abs(weights)
    widest = 255 * spans.sum(axis=1) / (2**16 - 1 - width)
    weights = np.pad(weights, ((0, 0), (0, odd + _BALLAST)))
    weights[:, -1] = widest
    step = np.maximum(widest, spans.max(axis=1)) / 255
    return weights, width * step / 2 + _ROUNDING
