"""One state of the embedded engine's table, and what was loaded of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, UInt

from samething.index.checksums import vector_crc32
from samething.index.description import Table
from samething.index.interface import Between, Condition
from samething.retrieval import SharedProducts


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The vectors in memory, ordered by id, so that ties go to the lower id."""

    ids: Any
    """Arrow text array."""
    vectors: Float[np.ndarray, "n d"]
    """float32, length 1."""
    row_ids: UInt[np.ndarray, " n"]
    """Where each row is in this state of the table."""
    products: SharedProducts
    """Of the vectors, for threads that ask at the same time."""


class View:
    """One state of the table and what was loaded of it. It does not change when the table does."""

    def __init__(self, table: Any, checksums_size: int) -> None:
        self.table = table
        self.checksums_size = checksums_size
        self._matrix: Matrix | None = None
        self._columns: dict[str, Any] = {}

    def matrix(self) -> Matrix | None:
        """The vectors, or None when one of them is not what was written."""
        if self._matrix is None:
            rows = self._read(["id", "vector", "vector_crc32"])
            ids = rows["id"].combine_chunks()
            vectors = matrix_of(rows["vector"].combine_chunks(), rows.schema.field("vector").type.list_size)
            if (vector_crc32(ids.to_pylist(), vectors) != rows["vector_crc32"].to_numpy()).any():
                return None
            self._matrix = Matrix(ids, vectors, rows["_rowid"].to_numpy(), SharedProducts(vectors))
        return self._matrix

    def column(self, name: str) -> Any:
        """A metadata column in the order of the matrix."""
        return self.columns([name])[name]

    def columns(self, names: list[str]) -> Table:
        """Metadata columns in the order of the matrix, kept in memory."""
        import pyarrow as pa

        missing = [name for name in names if name not in self._columns]
        if missing:
            rows = self._read(list(dict.fromkeys(["id", *missing]))).combine_chunks()
            self._columns |= {name: rows[name] for name in missing}
        return pa.table({name: self._columns[name] for name in names})

    def _read(self, columns: list[str]) -> Table:
        import pyarrow.compute as pc

        rows = self.table.search().select(columns).with_row_id(True).limit(None).to_arrow()
        return rows.take(pc.sort_indices(rows["id"]))


def meets(column: Any, condition: Condition) -> Any:
    """Arrow booleans: which values of a column meet a condition; what is null does not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.combine_chunks()
    if isinstance(condition, Between):
        keep = pc.is_valid(column)
        for end, compare in ((condition.low, pc.greater_equal), (condition.high, pc.less_equal)):
            if end is not None:
                keep = pc.and_(keep, pc.fill_null(compare(column, pa.scalar(end)), False))
        return keep
    values = pa.array(condition, pa.string())
    if not pa.types.is_list(column.type):
        return pc.is_in(column, value_set=values)
    owners = pc.list_parent_indices(column).filter(pc.is_in(pc.list_flatten(column), value_set=values))
    keep = np.zeros(len(column), dtype=bool)
    keep[owners.to_numpy()] = True
    return pa.array(keep)


def matrix_of(column: Any, dim: int) -> Float[np.ndarray, "n d"]:
    """The vectors of an Arrow column, float32 (n, dim)."""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat, dtype=np.float32).reshape(-1, dim)
