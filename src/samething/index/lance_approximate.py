"""Approximate search for tables that are too large to keep their vectors in memory.

LanceDB groups the vectors into cells around centres (IVF-flat) and looks into the cells nearest to a query.
How many cells is chosen by measuring: the recall of the index's own vectors against exact search. What is
found is scored again in float64, so scores are those of the exact search. A search with a filter reads all
vectors that the filter lets through, so its recall is 1 however few they are.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt

from samething.arrays import Queries
from samething.errors import InputError
from samething.files import read_json, write_json
from samething.index.checksums import vector_crc32
from samething.index.interface import Between, Condition
from samething.retrieval import exact_topk, nearest_units

_SPARE: Final = 16
"""Rows fetched beyond the k asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallReport:
    """How an index is searched, and what was measured when that was chosen."""

    target: float
    """Recall that was asked for."""
    recall: float
    """Share of the exact nearest rows that the search finds, over the sampled queries."""
    k: int
    """Neighbours a query."""
    num_queries: int
    """Rows of the index that were asked for, each without itself."""
    num_rows: int
    """Rows of the index then."""
    num_cells: int
    """Cells the vectors are grouped into."""
    num_probes: int
    """Cells looked into for a query; 0: exact search."""
    latency_ms: float
    """Median of a query."""
    exact_latency_ms: float
    """Median of the exact search in memory, for the same queries."""
    tried: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Number of cells looked into -> recall, for all that were tried."""

    def __rich__(self) -> str:
        """In words."""
        way = f"{self.num_probes} of {self.num_cells} cells" if self.num_probes else "exact search"
        return (
            f"{way}: recall@{self.k} {self.recall:.4f} (asked for {self.target:g}), "
            f"{self.latency_ms:.2f} ms per query; exact search {self.exact_latency_ms:.2f} ms "
            f"({self.num_rows:,} rows, {self.num_queries} queries)"
        )

    def write(self, path: Path) -> None:
        """Keep it beside the table."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> RecallReport | None:
        """What was kept, or None."""
        return cls(**read_json(path)) if path.exists() else None


def build_cells(table: Any, *, num_rows: int) -> int:
    """Group the vectors of a table into cells, some 1,000 rows each; returns the number of cells."""
    from lancedb.index import IvfFlat

    num_cells = max(2, round(min(num_rows / 500, 4 * math.sqrt(num_rows))))
    table.create_index("vector", config=IvfFlat(distance_type="dot", num_partitions=num_cells), replace=True)
    return num_cells


def approximate_rows(
    table: Any, query: Float[np.ndarray, " d"], k: int, *, num_probes: int, where: str | None = None
) -> Any:
    """Id, vector and row number of about the ``k`` nearest rows; with a filter of exactly those."""
    asked = table.search(query).distance_type("dot").limit(k + _SPARE)
    if where is None:
        asked = asked.minimum_nprobes(num_probes).maximum_nprobes(num_probes)
    else:
        asked = asked.bypass_vector_index().where(where, prefilter=True)
    return asked.select(["id", "vector", "vector_crc32", "_distance"]).with_row_id(True).to_arrow()


def search_cells(
    table: Any, queries: Queries, k: int, *, num_probes: int, where: str | None
) -> tuple[Shaped[np.ndarray, "q k"], Float[np.ndarray, "q k"], UInt[np.ndarray, "q k"]] | None:
    """Ids, scores and row numbers of the rows found for each query; None when a vector is damaged."""
    import pyarrow.compute as pc

    found = []
    for query in queries:
        rows = approximate_rows(table, query, k, num_probes=num_probes, where=where)
        rows = rows.take(pc.sort_indices(rows["id"]))
        names, vectors = np.array(rows["id"].to_pylist(), dtype=object), _matrix(rows)
        if (vector_crc32(names.tolist(), vectors) != rows["vector_crc32"].to_numpy()).any():
            return None
        if not len(names):
            found.append((names, np.empty(0), np.empty(0, np.uint64)))
            continue
        top = exact_topk(query[None], vectors, min(k, len(names)), normalised=True)
        best = top.indices[0]
        found.append((names[best], top.scores[0], rows["_rowid"].to_numpy()[best]))
    # cells hold different numbers of rows, so that one query may find fewer than another
    width = min((len(names) for names, _, _ in found), default=0)
    ids = np.empty((len(queries), width), dtype=object)
    scores = np.empty((len(queries), width))
    row_ids = np.empty((len(queries), width), dtype=np.uint64)
    for place, (names, values, numbers) in enumerate(found):
        ids[place], scores[place], row_ids[place] = names[:width], values[:width], numbers[:width]
    return ids, scores, row_ids


def choose_probes(
    table: Any,
    ids: list[str],
    vectors: Float[np.ndarray, "n d"],
    sample: Int[np.ndarray, " m"],
    *,
    target: float,
    num_cells: int,
    k: int,
) -> RecallReport:
    """The least number of cells, in powers of two, whose recall on the sampled rows reaches the target.

    Args:
        table: the table, its cells built.
        ids: id of each row of ``vectors``.
        vectors: all vectors of the table, float32 of length 1.
        sample: rows to ask for; a row does not count as its own neighbour.
        target: recall to reach, in (0, 1].
        num_cells: number of cells.
        k: neighbours per query.
    """
    require_recall(target)
    expected, exact_times = [], []
    for row in sample:
        started = time.perf_counter()
        top = nearest_units(vectors[row : row + 1], vectors, min(k + 1, len(vectors)))
        exact_times.append(time.perf_counter() - started)
        expected.append({ids[other] for other in top.indices[0] if other != row})
    tried: dict[str, float] = {}
    num_probes = 1
    while True:
        times, shares = [], []
        for row, wanted in zip(sample, expected, strict=True):
            started = time.perf_counter()
            found = approximate_rows(table, vectors[row], k + 1, num_probes=num_probes)
            times.append(time.perf_counter() - started)
            scores = _matrix(found) @ vectors[row]
            names = found["id"].to_pylist()
            best = [names[place] for place in np.argsort(-scores, kind="stable") if names[place] != ids[row]]
            shares.append(len(wanted & set(best[: len(wanted)])) / max(1, len(wanted)))
        tried[str(num_probes)] = float(np.mean(shares))
        if tried[str(num_probes)] >= target or num_probes >= num_cells:
            break
        num_probes = min(2 * num_probes, num_cells)
    return RecallReport(
        target=target,
        recall=tried[str(num_probes)],
        k=k,
        num_queries=len(sample),
        num_rows=len(vectors),
        num_cells=num_cells,
        num_probes=num_probes,
        latency_ms=1e3 * float(np.median(times)),
        exact_latency_ms=1e3 * float(np.median(exact_times)),
        tried=tried,
    )


def require_recall(target: float) -> None:
    """Refuse a recall that is none.

    Raises:
        InputError: outside of (0, 1].
    """
    if not 0 < target <= 1:
        raise InputError(
            f"a recall of {target}", expected="more than 0 and at most 1", next_step="0.98 is a start"
        )


def _matrix(found: Any) -> Float[np.ndarray, "m d"]:
    column = found["vector"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat, dtype=np.float32).reshape(-1, column.type.list_size)


def filter_sql(where: Mapping[str, Condition], kinds: Mapping[str, str]) -> str:
    """A filter in LanceDB's SQL. Quotes in texts are doubled: the only escape there is.

    >>> filter_sql({"label": ["it's"], "width": Between(3)}, {"label": "text", "width": "integer"})
    "label IN ('it''s') AND width IS NOT NULL AND width >= 3"
    """
    parts = []
    for name, condition in where.items():
        if isinstance(condition, Between):
            parts.append(f"{name} IS NOT NULL")
            for end, sign in ((condition.low, ">="), (condition.high, "<=")):
                if end is not None:
                    parts.append(f"{name} {sign} {end!r}")
        elif not condition:
            parts.append("false")
        else:
            texts = ", ".join("'" + text.replace("'", "''") + "'" for text in condition)
            is_list = kinds[name] == "texts"
            parts.append(f"array_has_any({name}, [{texts}])" if is_list else f"{name} IN ({texts})")
    return " AND ".join(parts)
