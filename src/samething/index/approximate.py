"""Approximate search of large indexes: a graph beside the exact search, at a recall that was measured.

FAISS links each vector, of 8 bits per dimension, with some near ones (Malkov and Yashunin, *Efficient and
robust approximate nearest neighbor search using hierarchical navigable small world graphs*, TPAMI 2020).
Very many vectors, whose links would take hours, are put into lists around centres instead, of which a search
reads the nearest, in 2 bits per dimension (Jégou, Douze and Schmid, *Product quantization for nearest
neighbor search*, TPAMI 2011; scanned in registers as by André, Kermarrec and Le Scouarnec, VLDB 2015).
What either finds is ranked again by the exact search, so scores are those of the exact search. Rows newer
than it are searched exactly beside it, deleted ones are left out, and a filter makes a search exact.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from samething.arrays import Float, Int, Queries, Shaped
from samething.errors import InputError
from samething.files import atomic_path, file_sha256
from samething.index.generation import Generation
from samething.index.ranked import MORE, SPARE, nearest_rows, num_sought
from samething.index.sqlite_rows import Connection, Slots
from samething.index.view import Searched, View
from samething.retrieval import nearest_units
from samething.retrieval.codes import CodedRows

LEAST_ROWS: Final = 1000
LARGEST_GRAPH: Final = 2_000_000
"""More rows are kept in lists: 5,000 a second are linked, and fewer as the graph outgrows the caches."""
_LISTS_PER_ROOT: Final = 4
"""Lists per square root of the number of rows, as FAISS advises: 4 to 16."""
_ROWS_PER_CENTRE: Final = 40
"""Rows that a centre is learnt from; with fewer FAISS warns."""
_LISTED_CANDIDATES: Final = 200
"""Fewest that lists are asked for: codes of 2 bits order them roughly, and the exact ranking decides."""
_LINKS: Final = 32
_BREADTH_OF_BUILDING: Final = 40
_LEAST_BREADTH: Final = 16
_LARGEST_BREADTH: Final = 4096
_FINENESS: Final = 8
"""The breadth chosen is above one that is not enough by an eighth of that at most."""
_ROWS_AT_A_TIME: Final = 50_000
_Z95: Final = 1.6449
"""95 % of a normal distribution lie below so many standard deviations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallReport:
    """How an index is searched, and what was measured when that was chosen."""

    target: float
    """Recall that was asked for."""
    recall: float
    """Share of the exact nearest rows that the search finds, over the sampled queries."""
    lower_bound: float
    """What the recall of other such queries is above, with 95 % confidence."""
    k: int
    """Neighbours a query."""
    num_queries: int
    """Rows of the index that were asked for while the graph did not hold them."""
    num_rows: int
    """Rows of the index then."""
    num_slots: int
    """Slots of the file of vectors then; rows beyond are searched exactly."""
    breadth: int
    """Candidates that a search keeps, or lists that it reads; 0: exact search, since none were enough."""
    latency_ms: float
    """Median of a query."""
    exact_latency_ms: float
    """Median of the exact search, for some of the queries."""
    sha256: str = ""
    """Of the graph's file."""
    tried: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Breadth -> lower bound, for all that were tried."""
    structure: Literal["graph", "lists"] = "graph"
    """What is searched."""

    def __rich__(self) -> str:
        """In words."""
        found_by = (
            f"graph, {self.breadth} candidates" if self.structure == "graph" else f"{self.breadth} lists"
        )
        way = found_by if self.breadth else "exact search, since nothing faster reached it"
        return (
            f"{way}: recall@{self.k} {self.recall:.4f}, with 95 % confidence at least {self.lower_bound:.4f} "
            f"(asked for {self.target:g}), {self.latency_ms:.2f} ms per query; exact search "
            f"{self.exact_latency_ms:.2f} ms ({self.num_rows:,} rows, {self.num_queries:,} queries)"
        )


class Graph:
    """A graph, or lists, of the vectors of a generation, named by their slots.

    Args:
        path: its file.
        report: what was measured with it.
    """

    def __init__(self, path: Path, report: RecallReport, nodes: Any) -> None:
        self.path, self.report, self.nodes = path, report, nodes

    @classmethod
    def open(cls, path: Path, report: RecallReport) -> Graph | None:
        """The graph in a file; None where it is gone or damaged, since exact search finds everything."""
        if not path.exists() or file_sha256(path) != report.sha256:
            return None
        return cls(path, report, _faiss().read_index(str(path)))

    def search(
        self,
        db: Connection,
        generation: Generation,
        view: View,
        queries: Queries,
        k: int,
        stored: dict[int, tuple[Any, ...]] | None,
    ) -> tuple[Shaped[np.ndarray, "q k"], Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """As :func:`nearest_rows`, at the recall of the report; ``k`` is at most the number of rows."""
        num_slots = len(view.kept)
        newer = np.arange(self.report.num_slots, num_slots)
        parts = []
        for query in queries:
            num = num_sought(view, k)
            while True:
                found = candidates(self.nodes, query, num, breadth=self.report.breadth)
                found.sort()
                chosen = np.concatenate([found, newer]) if len(newer) else found
                chosen = chosen[~view.is_dead[chosen]]
                is_enough = view.num_rows_among(chosen) >= k
                if is_enough or view.rows is None or num >= num_slots:
                    break
                num *= MORE  # all that was found is of a few rows
            own = chosen if is_enough else None
            parts.append(nearest_rows(db, generation, view, query[None], k, own, is_few=True, stored=stored))
        if len(parts) == 1:
            return parts[0]
        ids, scores, slots = (np.concatenate(part) for part in zip(*parts, strict=True))
        return ids, scores, slots


def candidates(nodes: Any, query: Float[np.ndarray, " d"], num: int, *, breadth: int) -> Slots:
    """Slots of about the ``num`` nearest nodes, each once; found with ``breadth`` candidates, or lists."""
    faiss = _faiss()
    if isinstance(nodes, faiss.IndexIVF):
        options, num = faiss.SearchParametersIVF(nprobe=breadth), max(num, _LISTED_CANDIDATES)
    else:
        options = faiss.SearchParametersHNSW(efSearch=max(breadth, num))
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(
        1
    )  # for this thread's one query a second one would only wait, a core for itself
    found = nodes.search(query[None], num, params=options)[1][0]
    faiss.omp_set_num_threads(num_threads)
    slots: Slots = found[found >= 0]
    return slots


def tuned_graph(
    path: Path,
    searched: Searched,
    slots: Slots,
    *,
    target: float,
    k: int,
    num_queries: int,
) -> RecallReport:
    """Build a graph or lists, choose how broadly they are searched, and write them to a file.

    The queries are rows that the graph does not hold yet: asking for its own nodes would be too easy.

    Args:
        path: the file to write.
        searched: all vectors by slot.
        slots: those that have a row, ascending.
        target: recall whose lower 95 % bound is to be reached, in (0, 1].
        k: neighbours per query.
        num_queries: how many to ask.

    Raises:
        InputError: a recall out of range, or too few rows.
    """
    if not 0 < target <= 1:
        raise InputError(
            f"a recall of {target}", expected="more than 0 and at most 1", next_step="0.98 is a start"
        )
    if len(slots) < LEAST_ROWS:
        raise InputError(
            f"an index of {len(slots)} rows",
            expected=f"at least {LEAST_ROWS:,}: smaller ones are searched exactly in no time",
            next_step="leave it as it is",
        )
    faiss, vectors = _faiss(), searched.gallery
    random = np.random.default_rng(0)
    sample = np.sort(random.choice(slots, min(num_queries, len(slots) // 10), replace=False))
    rest = np.setdiff1d(slots, sample, assume_unique=True)
    nodes = _trained(vectors, slots, random)
    _add(nodes, vectors, rest)
    expected, exact_ms = _expected(searched, sample, rest, k)
    breadth, recall, latency, tried = _broad_enough(nodes, vectors, sample, expected, target=target, k=k)
    is_reached = breadth > 0
    if is_reached:
        _add(nodes, vectors, sample)
        with atomic_path(path) as partial:
            faiss.write_index(nodes, str(partial))
    return RecallReport(
        target=target,
        recall=recall if is_reached else 1.0,
        lower_bound=tried[breadth] if is_reached else 1.0,
        k=k,
        num_queries=len(sample),
        num_rows=len(slots),
        num_slots=len(vectors),
        breadth=breadth,
        latency_ms=latency if is_reached else exact_ms,
        exact_latency_ms=exact_ms,
        sha256=file_sha256(path) if is_reached else "",
        tried={str(each): bound for each, bound in tried.items()},
        structure="lists" if isinstance(nodes, faiss.IndexIVF) else "graph",
    )


def _broad_enough(
    nodes: Any,
    vectors: Float[np.ndarray, "n d"] | CodedRows,
    sample: Slots,
    expected: list[set[int]],
    *,
    target: float,
    k: int,
) -> tuple[int, float, float, dict[int, float]]:
    """The narrowest search, nearly, whose recall has a lower bound of ``target``.

    What a narrow search finds a broader one finds too. So of all that fall short the broadest is the
    likeliest to pass by luck, and however many are tried, the bound is right as often as that of one.

    Returns:
        Breadth, 0 if none is enough; recall; median milliseconds of a query; and the bound of each tried.
    """
    tried: dict[int, float] = {}
    found = (0, 0.0, 0.0)
    low = breadth = _LEAST_BREADTH
    while breadth <= _LARGEST_BREADTH:
        times, num_found = [], 0
        for row, wanted in zip(sample, expected, strict=True):
            started = time.perf_counter()
            query = vectors[row : row + 1]
            near = np.sort(candidates(nodes, query[0], k + SPARE, breadth=breadth))
            top = nearest_units(query, vectors[near], min(k, len(near)))
            times.append(time.perf_counter() - started)
            num_found += len(wanted.intersection(near[top.indices[0]].tolist()))
        recall = num_found / (k * len(sample))
        tried[breadth] = lower_bound(recall, len(sample))
        if tried[breadth] >= target:
            found = (breadth, recall, 1e3 * float(np.median(times)))
        else:
            low = breadth
        high = found[0]
        if high and high - low <= max(1, low // _FINENESS):
            break
        breadth = (low + high) // 2 if high else 2 * breadth
    return *found, tried


def _faiss() -> Any:
    import faiss  # takes 0.2 s

    return faiss


def lower_bound(recall: float, num_queries: int) -> float:
    """Lower end of the one-sided 95 % interval of a mean of shares (Wilson, JASA 22, 1927).

    A share of several neighbours varies less than a yes or no, so the interval is on the safe side.

    >>> round(lower_bound(1.0, 1000), 4), round(lower_bound(0.99, 1000), 4)
    (0.9973, 0.9833)
    """
    spread = _Z95**2 / num_queries
    return (
        recall
        + spread / 2
        - _Z95 * math.sqrt(recall * (1 - recall) / num_queries + spread**2 / (4 * _Z95**2))
    ) / (1 + spread)


def _trained(vectors: Float[np.ndarray, "n d"] | CodedRows, slots: Slots, random: np.random.Generator) -> Any:
    """Room for the vectors of some slots: a graph in 8 bits per dimension, or lists if they are many."""
    faiss, dim = _faiss(), vectors.shape[1]
    is_large = len(slots) > LARGEST_GRAPH
    num_lists = int(_LISTS_PER_ROOT * len(slots) ** 0.5)
    num_learnt = _ROWS_PER_CENTRE * num_lists if is_large else _ROWS_AT_A_TIME
    learnt = vectors[np.sort(random.choice(slots, min(len(slots), num_learnt), replace=False))]
    product = faiss.METRIC_INNER_PRODUCT
    if is_large:
        num_parts = dim // 2 if dim % 2 == 0 else dim  # 4 bits each
        lists = faiss.IndexIVFPQFastScan(faiss.IndexFlatIP(dim), dim, num_lists, num_parts, 4, product)
        lists.cp.spherical = True
        lists.train(learnt)
        return lists
    graph = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_8bit, _LINKS, product)
    graph.hnsw.efConstruction = _BREADTH_OF_BUILDING
    graph.train(learnt)
    return faiss.IndexIDMap(graph)


def _add(nodes: Any, vectors: Float[np.ndarray, "n d"] | CodedRows, slots: Slots) -> None:
    from samething.progress import progress_bar

    with progress_bar("images") as progress:
        task = progress.add_task(
            "graph" if isinstance(nodes, _faiss().IndexIDMap) else "lists", total=len(slots)
        )
        for start in range(0, len(slots), _ROWS_AT_A_TIME):
            part = slots[start : start + _ROWS_AT_A_TIME]
            nodes.add_with_ids(vectors[part], part)
            progress.advance(task, len(part))


def _expected(searched: Searched, sample: Slots, rest: Slots, k: int) -> tuple[list[set[int]], float]:
    """The ``k`` nearest of the rest for each sampled row, and the median milliseconds of an exact query."""
    others, queries, times = searched.among(rest), searched.gallery[sample], []
    top = others.nearest(queries, k)
    for row in range(min(20, len(sample))):
        started = time.perf_counter()
        others.nearest(queries[row : row + 1], k)
        times.append(time.perf_counter() - started)
    return [set(rest[places].tolist()) for places in top.indices], 1e3 * float(np.median(times))


def note_report(db: Connection, generation: Generation, report: RecallReport | None) -> None:
    """Say how searches are from now on; it counts as a change, after which readers look at the note again."""
    generation.set_notes(db, "approximate", {"report": report and dataclasses.asdict(report)})
    generation.bury(db, [])
