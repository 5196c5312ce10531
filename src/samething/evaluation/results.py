"""The result of an evaluation: what every query scored, and what can be said from that."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Int

from samething.arrays import NumRelevant, PerQuery
from samething.errors import InputError
from samething.files import Json, write_json
from samething.metrics import bootstrap_interval, domain_mean, domain_mean_interval

Protocol: TypeAlias = Literal["merged", "per_domain"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("merged", "per_domain")

METRICS: Final = {"mmp@5": "mMP@5", "r@1": "R@1", "map": "mAP"}
"""Names in files → names in tables."""

MEAN: Final = "mean"
"""The entry beside the domains: the plain mean over them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over queries with its bootstrap interval; all NaN where no query has a relevant picture."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Percent, with half the width of the interval: ``38.9 ± 1.4``.

        >>> print(Estimate(value=0.389, low=0.375, high=0.403))
        38.9 ± 1.4
        """
        if np.isnan(self.value):
            return "–"
        return f"{100 * self.value:.1f} ± {50 * (self.high - self.low):.1f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One line of a table: a domain, or the mean over domains."""

    domain: str
    num_queries: int
    """Queries that entered the means: those with a relevant picture in the index."""
    num_queries_without_positive: int
    """Queries left out."""
    num_index: int
    """Pictures of the domain in the index; for the mean, of all domains."""
    metrics: Mapping[str, Estimate]
    """By the names in :data:`METRICS`."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EvaluationResult:
    """What every query scored, and everything that can be said from that."""

    domains: tuple[str, ...]
    """Domains that have a query, sorted."""
    query_rows: Int[np.ndarray, " q"]
    """Catalog row of each query."""
    query_domains: Int[np.ndarray, " q"]
    """Place of each query's domain in ``domains``."""
    num_relevant: NumRelevant
    """Relevant pictures in the index of each query, itself left out; the same in both protocols."""
    num_index: tuple[int, ...]
    """Pictures of each domain in the index."""
    num_distractors: int
    """Pictures in the merged index that belong to domains without a query."""
    dim: int
    """Dimension of the embeddings."""
    values: Mapping[Protocol, Mapping[str, PerQuery]]
    """Protocol → metric → one value in [0, 1] a query, NaN without a relevant picture."""
    num_resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Of the bootstrap."""
    level: float = 0.95
    """Share of the resampled means inside an interval."""
    shown: Protocol = "merged"
    """The protocol that printing shows."""

    def summary(self) -> dict[str, dict[str, dict[str, Json]]]:
        """Protocol → domain (and ``mean``) → numbers, as :meth:`write_json` writes them.

        ``num_queries`` counts the queries that entered the means, ``num_queries_without_positive`` those left
        out of them because the index holds nothing relevant; under ``mean`` both are sums over the domains.
        ``mean`` is the plain mean over the domains in which some query has a positive. A number that cannot
        be had is None.
        """
        return {
            protocol: {
                row.domain: {
                    "num_queries": row.num_queries,
                    "num_queries_without_positive": row.num_queries_without_positive,
                    **{name: _or_none(estimate.value) for name, estimate in row.metrics.items()},
                }
                for row in self.table(protocol)
            }
            for protocol in PROTOCOLS
        }

    def intervals(self) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
        """Protocol → domain (and ``mean``) → metric → lower and upper end of the bootstrap interval.

        Queries are resampled inside each domain; see :func:`samething.metrics.bootstrap_interval`.
        """
        return {
            protocol: {
                row.domain: {name: (estimate.low, estimate.high) for name, estimate in row.metrics.items()}
                for row in self.table(protocol)
            }
            for protocol in PROTOCOLS
        }

    def table(self, protocol: Protocol | None = None) -> list[ResultRow]:
        """One row a domain and a last one for their mean; by default of the protocol that is shown."""
        return list(self._tables[protocol or self.shown])

    def row(self, domain: str = MEAN, protocol: Protocol | None = None) -> ResultRow:
        """The row of one domain, or of the mean.

        Raises:
            InputError: no query is of that domain.
        """
        for row in self.table(protocol):
            if row.domain == domain:
                return row
        raise InputError(
            f"domain {domain!r}",
            expected=f"one of {', '.join([*self.domains, MEAN])}",
            next_step="give a domain that has queries",
        )

    def write_json(self, path: Path) -> None:
        """Write :meth:`summary` as JSON, atomically."""
        write_json(path, self.summary())

    # the rows are costly (the bootstrap) and the result cannot change
    @functools.cached_property
    def _tables(self) -> Mapping[Protocol, tuple[ResultRow, ...]]:
        return {protocol: tuple(self._rows(protocol)) for protocol in PROTOCOLS}

    def _rows(self, protocol: Protocol) -> list[ResultRow]:
        bootstrap = {"num_resamples": self.num_resamples, "seed": self.seed}
        answerable = self.num_relevant > 0
        rows = []
        for number, domain in enumerate(self.domains):
            own = self.query_domains == number
            metrics = {}
            for name, values in self.values[protocol].items():
                low, high = bootstrap_interval(values[own], level=self.level, **bootstrap)
                value = float(values[own & answerable].mean()) if np.any(own & answerable) else float("nan")
                metrics[name] = Estimate(value=value, low=low, high=high)
            rows.append(
                ResultRow(
                    domain=domain,
                    num_queries=int(np.count_nonzero(own & answerable)),
                    num_queries_without_positive=int(np.count_nonzero(own & ~answerable)),
                    num_index=self.num_index[number],
                    metrics=metrics,
                )
            )
        means = {}
        for name, values in self.values[protocol].items():
            low, high = domain_mean_interval(values, self.query_domains, level=self.level, **bootstrap)
            means[name] = Estimate(value=domain_mean(values, self.query_domains), low=low, high=high)
        distractors = self.num_distractors if protocol == "merged" else 0
        rows.append(
            ResultRow(
                domain=MEAN,
                num_queries=sum(row.num_queries for row in rows),
                num_queries_without_positive=sum(row.num_queries_without_positive for row in rows),
                num_index=sum(row.num_index for row in rows) + distractors,
                metrics=means,
            )
        )
        return rows

    def __rich__(self) -> object:
        """A table of the protocol in ``shown``, for ``rich.print``."""
        from rich.markup import escape
        from rich.table import Table

        rows = self.table()
        table = Table(title=f"{TITLES[self.shown]}, {self.dim}-d embeddings", caption=caption(self))
        table.add_column("domain")
        left_out = any(row.num_queries_without_positive for row in rows)
        names = ["queries", *(["without positive"] if left_out else []), "index", *METRICS.values()]
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if row.domain == MEAN:
                table.add_section()
            counts = [row.num_queries, row.num_queries_without_positive, row.num_index]
            if not left_out:
                counts.pop(1)
            table.add_row(
                escape(row.domain),
                *(f"{count:,}" for count in counts),
                *(str(estimate) for estimate in row.metrics.values()),
                style="bold" if row.domain == MEAN else None,
            )
        return table


# titles of tables
TITLES: Final[Mapping[Protocol, str]] = {
    "merged": "One index over all domains",
    "per_domain": "One index a domain",
}


def caption(result: EvaluationResult) -> str:
    """What the ± of a table means."""
    return f"percent ± half the {100 * result.level:g} % bootstrap interval over queries"


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
