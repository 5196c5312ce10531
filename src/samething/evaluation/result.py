"""Every query's metrics under a protocol, and the numbers that are made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import rich.table

from samething.arrays import Bool, Int, PerQuery
from samething.errors import InputError
from samething.evaluation.protocols import (
    MEAN,
    PROTOCOLS,
    Protocol,
    Scope,
    challenge_domain,
    composite_weights,
    title_of_scope,
)
from samething.files import Json
from samething.metrics import Metric, title_of
from samething.pages import Table
from samething.statistics import (
    Estimate,
    domain_mean,
    domain_mean_estimates,
    percent,
    weighted_mean_interval,
)

Estimates: TypeAlias = Mapping[str, Mapping[Metric, Estimate]]
"""Domain or ``mean`` -> metric -> mean over its queries with the 95 % interval."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationResult:
    """Every query's metrics in the protocol's scopes, and the numbers that are made of them."""

    domains: tuple[str, ...]
    """Domains that have queries, sorted."""
    query_rows: Int[np.ndarray, " q"]
    """Catalog row of each query, ascending."""
    query_domains: Int[np.ndarray, " q"]
    """Domain of each query, as a position in ``domains``."""
    merged: Mapping[Metric, PerQuery]
    """Each metric's value for each query in [0, 1]; NaN where the index holds nothing that is relevant."""
    per_domain: Mapping[Metric, PerQuery]
    """The same with one index per domain."""
    num_resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    protocol: Protocol = PROTOCOLS["default"]
    """What was measured."""
    shown: Scope = "merged"
    """The scope that printing the result shows, where the protocol has it."""
    _estimates: dict[Scope, Estimates] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The protocol's metrics."""
        return self.protocol.metrics

    @property
    def scope(self) -> Scope:
        """The scope that printing shows: the one asked for, or else the protocol's first."""
        return self.shown if self.shown in self.protocol.scopes else self.protocol.scopes[0]

    def values(self, metric: Metric, *, scope: Scope | None = None) -> PerQuery:
        """One value per query; without ``scope`` the first that was searched.

        Raises:
            InputError: the metric or the scope is none of this result's.
        """
        scopes = self.protocol.scopes
        scope = scope or scopes[0]
        if metric not in self.metrics or scope not in scopes:
            known = f"{', '.join(self.metrics)} over {' or '.join(map(title_of_scope, scopes))}"
            raise InputError(
                f"{metric} over {title_of_scope(scope)}",
                expected=f"{known}, as in the protocol {self.protocol.name}",
                next_step="evaluate by a protocol that has it",
            )
        return (self.merged if scope == "merged" else self.per_domain)[metric]

    def value(self, metric: Metric, *, domain: str = MEAN, scope: Scope | None = None) -> float:
        """Mean over the queries of a domain, or the protocol's mean over all; NaN if no query has a value."""
        chosen = self.queries_of(domain)
        return domain_mean(self.values(metric, scope=scope)[chosen], self.mean_groups[chosen])

    def interval(
        self, metric: Metric, *, domain: str = MEAN, scope: Scope | None = None
    ) -> tuple[float, float]:
        """95 % bootstrap interval of :meth:`value`, with queries drawn inside each domain."""
        self.values(metric, scope=scope), self.queries_of(domain)  # refuses what is not there
        found = self.estimates(scope or self.protocol.scopes[0])[domain][metric]
        return found.low, found.high

    def estimates(self, scope: Scope) -> Estimates:
        """Every :meth:`value` of a scope with its 95 % bootstrap interval; computed once."""
        if scope not in self._estimates:
            values = np.stack([self.values(metric, scope=scope) for metric in self.metrics])
            groups = [(self.queries_of(domain), self.mean_groups) for domain in (*self.domains, MEAN)]
            found = domain_mean_estimates(values, groups, num_resamples=self.num_resamples)
            self._estimates[scope] = {
                domain: dict(zip(self.metrics, row, strict=True))
                for domain, row in zip((*self.domains, MEAN), found, strict=True)
            }
        return self._estimates[scope]

    def composite(self, metric: Metric) -> Estimate:
        """The score weighted by the protocol's shares of domains, with its 95 % bootstrap interval.

        Weights are those of :func:`composite_weights` over the domains that have a value; NaN without any.
        """
        weights = self.composite_weights
        numbers = np.array([weights.get(domain, 0.0) for domain in self.domains])
        return weighted_mean_interval(
            self.values(metric), self.query_domains, numbers, num_resamples=self.num_resamples
        )

    @property
    def composite_weights(self) -> dict[str, float]:
        """Domain -> its weight in :meth:`composite`."""
        known = tuple(domain for domain in self.domains if self.num_queries(domain))
        return composite_weights(known, self.protocol.domain_shares or {})

    def rounded(self, metric: Metric, *, domain: str = MEAN, scope: Scope | None = None) -> float:
        """A value as the protocol's authors print it: domains rounded, their mean rounded again."""
        decimals = self.protocol.decimals if self.protocol.decimals is not None else 17
        if domain != MEAN:
            return float(np.round(self.value(metric, domain=domain, scope=scope), decimals))
        known = [name for name in self.domains if self.num_queries(name)]
        numbers = [self.rounded(metric, domain=name, scope=scope) for name in known]
        return float(np.round(np.mean(numbers), decimals)) if numbers else float("nan")

    def num_queries(self, domain: str = MEAN) -> int:
        """Queries that entered the means, of a domain or of all."""
        return int(np.count_nonzero(self._answerable[self.queries_of(domain)]))

    def num_queries_without_positive(self, domain: str = MEAN) -> int:
        """Queries that were left out because the index holds nothing that is relevant to them."""
        return int(np.count_nonzero(~self._answerable[self.queries_of(domain)]))

    @property
    def _answerable(self) -> Bool[np.ndarray, " q"]:
        # a positive is of the query's own domain, so both scopes agree
        return np.asarray(~np.isnan(self.values(self.metrics[0])))

    @property
    def mean_groups(self) -> Int[np.ndarray, " q"]:
        """The groups of queries that weigh the same in the mean."""
        return self.query_domains if self.protocol.mean == "domains" else np.zeros_like(self.query_domains)

    def queries_of(self, domain: str) -> Bool[np.ndarray, " q"]:
        """Which queries a domain has; all for ``mean``.

        Raises:
            InputError: no such domain.
        """
        if domain == MEAN:
            return np.ones(len(self.query_rows), dtype=bool)
        if domain not in self.domains:
            raise InputError(
                f"domain {domain!r}",
                expected=f"one of {', '.join((*self.domains, MEAN))}",
                next_step="look at the domains of the result",
            )
        return np.asarray(self.query_domains == self.domains.index(domain))

    def to_json(self, *, intervals: bool = False) -> dict[str, Json]:
        """Scope -> domain or ``mean`` -> counts and metrics; a number that cannot be had is null.

        A protocol by name also has ``protocol``, its name; one with shares of domains ``composite``; one that
        rounds ``rounded``, laid out as the whole.

        Args:
            intervals: whether there is also ``intervals``, as :meth:`intervals` gives them.
        """
        protocol, domains = self.protocol, (*self.domains, MEAN)
        content: dict[str, Json] = {} if protocol.name == "default" else {"protocol": protocol.name}
        for scope in protocol.scopes:
            content[scope] = {
                domain: {
                    "num_queries": self.num_queries(domain),
                    "num_queries_without_positive": self.num_queries_without_positive(domain),
                    **{
                        metric: or_null(
                            self.estimates(scope)[domain][metric].value
                            if intervals
                            else self.value(metric, domain=domain, scope=scope)
                        )
                        for metric in self.metrics
                    },
                }
                for domain in domains
            }
        if protocol.domain_shares is not None:
            scores = {metric: self.composite(metric) for metric in self.metrics}
            weights = self.composite_weights
            present = {challenge_domain(domain) for domain in weights}
            content["composite"] = {
                **{metric: or_null(found.value) for metric, found in scores.items()},
                "intervals": {metric: _ends(found) for metric, found in scores.items()},
                "weights": weights,
                "domains_without_a_weight": [domain for domain in self.domains if domain not in weights],
                "missing": [name for name in protocol.domain_shares if name not in present],
            }
        if protocol.decimals is not None:
            content["rounded"] = {
                scope: {
                    domain: {
                        metric: or_null(self.rounded(metric, domain=domain, scope=scope))
                        for metric in self.metrics
                    }
                    for domain in domains
                }
                for scope in protocol.scopes
            }
        if intervals:
            content["intervals"] = self.intervals()
        return content

    def intervals(self) -> Json:
        """Scope -> domain or ``mean`` -> metric -> lower and upper end of :meth:`interval`, or nulls."""
        return {
            scope: {
                domain: {metric: _ends(found) for metric, found in row.items()}
                for domain, row in self.estimates(scope).items()
            }
            for scope in self.protocol.scopes
        }

    def __rich__(self) -> rich.table.Table:
        left_out = self.num_queries_without_positive()
        notes = [f"{left_out} queries without a relevant entry in the index are left out"] if left_out else []
        if self.protocol.decimals is not None:
            numbers = [f"{title_of(m)} {self.rounded(m, scope=self.scope):.3f}" for m in self.metrics]
            notes.append("mean as its authors round: " + ", ".join(numbers))
        if self.protocol.domain_shares is not None:
            weights = self.composite_weights
            parts = ", ".join(f"{domain} {100 * weight:.0f} %" for domain, weight in weights.items())
            notes += [
                f"composite {title_of(metric)} {percent(*self.composite(metric))}, weights: {parts}"
                if weights
                else "no composite score: none of the domains is one of the challenge's"
                for metric in self.metrics
            ]
        columns = ["domain", "queries", *(f"{title_of(metric)} % (95 %)" for metric in self.metrics)]
        rows = [
            [domain, f"{self.num_queries(domain):,}", *(percent(*found) for found in row.values())]
            for domain, row in self.estimates(self.scope).items()
        ]
        featured = len(rows) - 1
        return Table(title_of_scope(self.scope), columns, rows, "\n".join(notes), featured).printed()


def or_null(value: float | int) -> float | int | None:
    """The number as JSON has it: null for one that is not finite."""
    return value if math.isfinite(value) else None


def _ends(found: Estimate) -> list[Json]:
    return [or_null(found.low), or_null(found.high)]
