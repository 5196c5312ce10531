"""How well embeddings find the same thing: queries x index -> numbers a domain, with confidence intervals.

Two protocols, always both:

merged
    One index over all domains; a hit needs the same label and the same domain.
per_domain
    One index a domain.

A query that is also in the index never retrieves itself, by row and not by rank. The metrics are mMP@5, R@1
and mAP over the whole ranking by cosine similarity. ``mean`` is the plain mean over domains, as in UnED.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from samething.arrays import Embeddings, PerQuery
from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.files import Json, write_json
from samething.metrics import (
    PairedDifference,
    average_precision,
    bootstrap_interval,
    domain_mean,
    domain_mean_interval,
    modified_mean_precision_at_k,
    paired_difference,
    recall_at_k,
    relevance_from_ranks,
)
from samething.retrieval import Precision, positive_ranks, require_directions

Metric: TypeAlias = Literal["mmp@5", "r@1", "map"]
Protocol: TypeAlias = Literal["merged", "per_domain"]

METRICS: Final[tuple[Metric, ...]] = ("mmp@5", "r@1", "map")
PROTOCOLS: Final[tuple[Protocol, ...]] = ("merged", "per_domain")
MEAN: Final = "mean"
"""Name of the row that is the plain mean over domains; no domain may be called so."""

_TITLES: Final = {"mmp@5": "mMP@5", "r@1": "R@1", "map": "mAP"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationResult:
    """Every query's metrics under both protocols, and the numbers that are made of them."""

    domains: tuple[str, ...]
    """Domains that have queries, sorted."""
    query_rows: Int[np.ndarray, " q"]
    """Catalog row of each query, ascending."""
    query_domains: Int[np.ndarray, " q"]
    """Domain of each query, as a position in ``domains``."""
    merged: Mapping[Metric, PerQuery]
    """Each metric's value for each query in [0, 1]; NaN where the index holds nothing that is relevant."""
    per_domain: Mapping[Metric, PerQuery]
    """The same with one index a domain."""
    num_resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    shown: Protocol = "merged"
    """The protocol that printing the result shows."""

    def values(self, metric: Metric, *, protocol: Protocol = "merged") -> PerQuery:
        """One value a query."""
        return (self.merged if protocol == "merged" else self.per_domain)[metric]

    def value(self, metric: Metric, *, domain: str = MEAN, protocol: Protocol = "merged") -> float:
        """Mean over the queries of a domain, or the plain mean over domains; NaN if no query has a value."""
        chosen = self._queries_of(domain)
        return domain_mean(self.values(metric, protocol=protocol)[chosen], self.query_domains[chosen])

    def interval(
        self, metric: Metric, *, domain: str = MEAN, protocol: Protocol = "merged"
    ) -> tuple[float, float]:
        """95 % bootstrap interval of :meth:`value`, with queries drawn inside each domain."""
        chosen = self._queries_of(domain)
        values = self.values(metric, protocol=protocol)[chosen]
        if domain != MEAN:
            return bootstrap_interval(values, num_resamples=self.num_resamples)
        return domain_mean_interval(values, self.query_domains[chosen], num_resamples=self.num_resamples)

    def num_queries(self, domain: str = MEAN) -> int:
        """Queries that entered the means, of a domain or of all."""
        return int(np.count_nonzero(self._answerable[self._queries_of(domain)]))

    def num_queries_without_positive(self, domain: str = MEAN) -> int:
        """Queries that were left out because the index holds nothing that is relevant to them."""
        return int(np.count_nonzero(~self._answerable[self._queries_of(domain)]))

    @property
    def _answerable(self) -> Bool[np.ndarray, " q"]:
        # a positive is of the query's own domain, so both protocols agree
        known: np.ndarray = ~np.isnan(self.merged["map"])
        return known

    def _queries_of(self, domain: str) -> Bool[np.ndarray, " q"]:
        if domain == MEAN:
            return np.ones(len(self.query_rows), dtype=bool)
        if domain not in self.domains:
            raise InputError(
                f"domain {domain!r}",
                expected=f"one of {', '.join((*self.domains, MEAN))}",
                next_step="look at the domains of the result",
            )
        chosen: np.ndarray = self.query_domains == self.domains.index(domain)
        return chosen

    def to_json(self) -> Json:
        """Protocol -> domain or ``mean`` -> counts and metrics; a number that cannot be had is null."""
        return {
            protocol: {domain: self._numbers(domain, protocol) for domain in (*self.domains, MEAN)}
            for protocol in PROTOCOLS
        }

    def _numbers(self, domain: str, protocol: Protocol) -> Json:
        values = {metric: self.value(metric, domain=domain, protocol=protocol) for metric in METRICS}
        return {
            "num_queries": self.num_queries(domain),
            "num_queries_without_positive": self.num_queries_without_positive(domain),
            **{metric: _or_null(value) for metric, value in values.items()},
        }

    def intervals(self) -> Json:
        """Protocol -> domain or ``mean`` -> metric -> lower and upper end of :meth:`interval`, or nulls."""
        return {
            protocol: {
                domain: {
                    metric: [_or_null(end) for end in self.interval(metric, domain=domain, protocol=protocol)]
                    for metric in METRICS
                }
                for domain in (*self.domains, MEAN)
            }
            for protocol in PROTOCOLS
        }

    def write_json(self, path: Path) -> Path:
        """Write :meth:`to_json`, atomically."""
        write_json(Path(path), self.to_json())
        return Path(path)

    def __rich__(self) -> Table:
        left_out = self.num_queries_without_positive()
        table = Table(
            title=_title(self.shown),
            caption=f"{left_out} queries without a relevant entry in the index are left out"
            if left_out
            else None,
        )
        table.add_column("domain")
        table.add_column("queries", justify="right")
        for metric in METRICS:
            table.add_column(f"{_TITLES[metric]} % (95 %)", justify="right")
        for domain in (*self.domains, MEAN):
            if domain == MEAN:
                table.add_section()
            cells = [_cell(self, metric, domain, self.shown) for metric in METRICS]
            style = "bold" if domain == MEAN else None
            table.add_row(Text(domain), f"{self.num_queries(domain):,}", *cells, style=style)
        return table


def evaluate_embeddings(
    embeddings: Embeddings,
    catalog: Catalog,
    *,
    precision: Precision = "float64",
    num_resamples: int = 2000,
    role: Literal["test", "val"] = "test",
    memory_mib: int = 256,
) -> EvaluationResult:
    """Search the index pictures of a catalog with its query pictures, under both protocols.

    Args:
        embeddings: one row a catalog row, float16, float32 or float64; may be memory-mapped. Rows that are
            neither query nor index are not looked at.
        catalog: its roles say which rows are queries and which are the index; the files need not exist.
        precision: ``float64`` is exact and repeatable, ``float32`` faster (see :mod:`samething.retrieval`).
        num_resamples: bootstrap resamples behind each interval, at least 1.
        role: ``test`` uses the roles ``query``, ``index`` and ``query+index``; ``val`` searches the
            validation pictures among themselves.
        memory_mib: ceiling of the search's working memory in MiB, beyond the embeddings of queries and index.

    Raises:
        InputError: the numbers of rows differ, there are no queries or no index, a row is zero or not finite,
            a query has no label, or a domain is called ``mean``.
    """
    _check(embeddings, catalog, num_resamples)
    query_rows, index_rows = _rows_by_role(catalog, role)
    used = np.union1d(query_rows, index_rows)
    require_directions(embeddings, used)
    classes = catalog.class_ids()
    names, domain_of_row = np.unique(catalog.strings("domain").astype(str), return_inverse=True)

    def measure(queries: np.ndarray, index: np.ndarray) -> dict[Metric, np.ndarray]:
        position = np.full(len(catalog), -1, dtype=np.int64)
        position[index] = np.arange(len(index))
        ranks, counts = positive_ranks(
            _take(embeddings, queries),
            _take(embeddings, index),
            classes[queries],
            classes[index],
            leave_out=position[queries],
            precision=precision,
            memory_mib=memory_mib,
        )
        nearest = relevance_from_ranks(ranks, counts, k=5)
        return {
            "mmp@5": modified_mean_precision_at_k(nearest, counts, k=5),
            "r@1": recall_at_k(nearest, counts, k=1),
            "map": average_precision(ranks, counts),
        }

    merged = measure(query_rows, index_rows)
    present, query_domains = np.unique(domain_of_row[query_rows], return_inverse=True)
    per_domain: dict[Metric, np.ndarray] = {metric: np.empty(len(query_rows)) for metric in METRICS}
    for number, domain in enumerate(present):
        own = query_domains == number
        found = measure(query_rows[own], index_rows[domain_of_row[index_rows] == domain])
        for metric in METRICS:
            per_domain[metric][own] = found[metric]
    return EvaluationResult(
        domains=tuple(str(names[domain]) for domain in present),
        query_rows=query_rows,
        query_domains=query_domains,
        merged=merged,
        per_domain=per_domain,
        num_resamples=num_resamples,
    )


def evaluate_files(
    *,
    embeddings: Path,
    catalog: Path,
    json: Path | None = None,
    merged: bool = True,
    precision: Precision = "float64",
) -> EvaluationResult:
    """Evaluate any model's embeddings from two files; the pictures themselves need not exist.

    Args:
        embeddings: a ``.npy`` file of floats, one row a picture in catalog order.
        catalog: a table with ``img_path,label,domain,role`` (``.csv``) or a catalog (``.parquet``); roles are
            ``query``, ``index`` and ``query+index``.
        json: where the numbers of both protocols are written.
        merged: print the protocol with one index over all domains rather than the one with an index a domain.
        precision: ``float64`` is exact and repeatable, ``float32`` faster.

    Raises:
        ArtefactError: a file is missing or unreadable.
        InputError: as in :func:`evaluate_embeddings`, naming both files where they do not fit.
    """
    rows, pictures = _load_embeddings(Path(embeddings)), Catalog.read(Path(catalog))
    if len(rows) != len(pictures):
        raise InputError(
            f"{embeddings} has {len(rows)} rows and {catalog} has {len(pictures)}",
            expected="one embedding a row of the catalog, in its order",
            next_step="embed the pictures of this catalog again, or give the catalog they were embedded from",
        )
    result = evaluate_embeddings(rows, pictures, precision=precision)
    if json is not None:
        result.write_json(json)
    return dataclasses.replace(result, shown="merged" if merged else "per_domain")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Several embeddings of one catalog, measured on the same queries."""

    results: Mapping[str, EvaluationResult]
    """Name of the embedding -> its result, in the order given."""
    dimensions: Mapping[str, int]
    """Name of the embedding -> its number of dimensions."""
    shown: Protocol = "merged"
    """The protocol that printing the comparison shows."""

    @classmethod
    def of(
        cls,
        embeddings: Mapping[str, np.ndarray],
        catalog: Catalog,
        *,
        precision: Precision = "float64",
        num_resamples: int = 2000,
        role: Literal["test", "val"] = "test",
        memory_mib: int = 256,
    ) -> Comparison:
        """Evaluate every embedding; arguments and errors as in :func:`evaluate_embeddings`."""
        if not embeddings:
            raise InputError(
                "no embeddings", expected="at least one", next_step="name what is to be compared"
            )
        results = {
            name: evaluate_embeddings(
                rows,
                catalog,
                precision=precision,
                num_resamples=num_resamples,
                role=role,
                memory_mib=memory_mib,
            )
            for name, rows in embeddings.items()
        }
        return cls(results=results, dimensions={name: rows.shape[1] for name, rows in embeddings.items()})

    def difference(
        self, first: str, second: str, *, metric: Metric = "mmp@5", protocol: Protocol = "merged"
    ) -> PairedDifference:
        """How far the first is ahead in the mean over domains, with a paired bootstrap interval (95 %)."""
        for name in (first, second):
            if name not in self.results:
                raise InputError(
                    f"no embedding called {name!r}",
                    expected=f"one of {', '.join(self.results)}",
                    next_step="use a name that was compared",
                )
        one, other = self.results[first], self.results[second]
        return paired_difference(
            one.values(metric, protocol=protocol),
            other.values(metric, protocol=protocol),
            one.query_domains,
            num_resamples=one.num_resamples,
        )

    def to_json(self) -> Json:
        """Name -> ``dimension``, what :meth:`EvaluationResult.to_json` says, and ``intervals``."""
        return {
            name: {"dimension": self.dimensions[name], **result.to_json(), "intervals": result.intervals()}
            for name, result in self.results.items()
        }

    def __rich__(self) -> Group:
        """All metrics as means over the domains, then mMP@5 domain by domain."""
        first = next(iter(self.results.values()))
        means = Table(
            title=f"Mean of {len(first.domains)} domains, {_title(self.shown)}, % (95 % interval)",
            box=SIMPLE_HEAD,
        )
        means.add_column("embedding", no_wrap=True)
        means.add_column("dim", justify="right")
        by_domain = Table(
            title=f"mMP@5 a domain, {_title(self.shown)}, % ± half of the 95 % interval", box=SIMPLE_HEAD
        )
        by_domain.add_column("embedding", no_wrap=True)
        for metric in METRICS:
            means.add_column(_TITLES[metric], justify="right")
        for domain in first.domains:
            by_domain.add_column(f"{domain}\nn = {first.num_queries(domain):,}", justify="right")
        for name, result in self.results.items():
            cells = [_cell(result, metric, MEAN, self.shown) for metric in METRICS]
            means.add_row(Text(name), f"{self.dimensions[name]:,}", *cells)
            by_domain.add_row(
                Text(name), *(_short_cell(result, "mmp@5", domain, self.shown) for domain in first.domains)
            )
        return Group(means, by_domain)


# ---- printing


def _title(protocol: Protocol) -> str:
    return "one index over all domains" if protocol == "merged" else "one index a domain"


def _cell(result: EvaluationResult, metric: Metric, domain: str, protocol: Protocol) -> str:
    """Such as ``87.3 (84.1–90.0)``, in percent."""
    value = result.value(metric, domain=domain, protocol=protocol)
    if math.isnan(value):
        return "–"
    low, high = result.interval(metric, domain=domain, protocol=protocol)
    return f"{100 * value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _short_cell(result: EvaluationResult, metric: Metric, domain: str, protocol: Protocol) -> str:
    """Such as ``87.3 ±2.9``, in percent."""
    value = result.value(metric, domain=domain, protocol=protocol)
    if math.isnan(value):
        return "–"
    low, high = result.interval(metric, domain=domain, protocol=protocol)
    return f"{100 * value:.1f} ±{50 * (high - low):.1f}"


# ---- reading and checking


def _rows_by_role(
    catalog: Catalog, role: Literal["test", "val"]
) -> tuple[Int[np.ndarray, " q"], Int[np.ndarray, " g"]]:
    """Catalog rows of the queries and of the index."""
    if role == "val":
        queries = index = np.flatnonzero(catalog.has_role("val"))
        wanted = "pictures with the role val"
    else:
        queries = np.flatnonzero(catalog.has_role("query", "query+index"))
        index = np.flatnonzero(catalog.has_role("index", "query+index"))
        wanted = "pictures with the roles query and index, or query+index"
    if len(queries) == 0 or len(index) == 0:
        raise InputError(
            f"a catalog with {len(queries)} query pictures and {len(index)} index pictures",
            expected=wanted,
            next_step="set the role column of the catalog",
        )
    labels = catalog.strings("label")
    for row in queries:
        if not labels[row].strip():
            raise InputError(
                f"row {row} of the catalog is a query with an empty label",
                expected="the label of the thing it shows",
                next_step="fill in the label, or give the row another role",
            )
    return queries, index


def _check(embeddings: Embeddings, catalog: Catalog, num_resamples: int) -> None:
    if len(embeddings) != len(catalog):
        raise InputError(
            f"{len(embeddings)} embeddings for a catalog of {len(catalog)} pictures",
            expected="one embedding a row of the catalog, in its order",
            next_step="give the catalog that the embeddings were made from",
        )
    if num_resamples < 1:
        raise InputError(
            f"num_resamples={num_resamples}", expected="at least 1", next_step="leave it at 2000"
        )
    if MEAN in catalog.domains:
        raise InputError(
            f"a domain called {MEAN!r}",
            expected="another name, because the mean over domains is reported under this one",
            next_step="rename the domain in the catalog",
        )


def _take(embeddings: Embeddings, rows: Int[np.ndarray, " r"]) -> Float[np.ndarray, "r d"]:
    """The rows, as a view where they lie side by side, so that a memory-mapped file is not read at once."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        side_by_side: np.ndarray = embeddings[rows[0] : rows[-1] + 1]
        return side_by_side
    copied: np.ndarray = embeddings[rows]
    return copied


def _load_embeddings(source: Path) -> np.ndarray:
    expected = "a .npy file of float16, float32 or float64, one row a picture"
    if not source.is_file():
        raise ArtefactError(f"{source} is not a file", expected=expected, next_step="check the path")
    try:
        rows = np.load(source, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtefactError(
            f"{source} cannot be read ({error})",
            expected=expected,
            next_step="write it with numpy.save, and check that the file is whole",
        ) from error
    if not isinstance(rows, np.ndarray):  # an .npz archive, whatever it is called
        raise InputError(
            f"{source} holds several arrays", expected=expected, next_step="save one: numpy.save"
        )
    if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"{source} holds {rows.dtype} of shape {rows.shape}",
            expected=expected,
            next_step="convert it with numpy: numpy.save(path, rows.astype(numpy.float32))",
        )
    return rows
