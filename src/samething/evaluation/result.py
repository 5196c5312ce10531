"""Every query's metrics under a protocol, and the numbers that are made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Bool, Int
from rich.table import Table
from rich.text import Text

from samething.arrays import PerQuery
from samething.errors import InputError
from samething.evaluation.rules import (
    RULES,
    Metric,
    Protocol,
    Rules,
    challenge_domain,
    composite_weights,
    title_of,
)
from samething.files import Json, write_json
from samething.metrics import (
    bootstrap_interval,
    domain_mean,
    domain_mean_interval,
    weighted_mean_interval,
)

MEAN: Final = "mean"
"""Name of the row that is the mean over all; no domain may be called so."""


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
    """The same with one index per domain."""
    num_resamples: int = 2000
    """Bootstrap resamples behind each interval."""
    rules: Rules = RULES["default"]
    """The protocol."""
    shown: Protocol = "merged"
    """The protocol that printing the result shows."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The protocol's metrics."""
        return self.rules.metrics

    @property
    def scopes(self) -> tuple[Protocol, ...]:
        """Which indices were searched."""
        return self.rules.scopes

    def values(self, metric: Metric, *, protocol: Protocol | None = None) -> PerQuery:
        """One value per query; without ``protocol`` the first that was searched.

        Raises:
            InputError: the metric or the index is none of this result's.
        """
        protocol = protocol or self.scopes[0]
        if metric not in self.metrics or protocol not in self.scopes:
            raise InputError(
                f"{metric} over {title_of_scope(protocol)}",
                expected=f"{', '.join(self.metrics)} over {' or '.join(map(title_of_scope, self.scopes))}, as in the "  # noqa: E501
                f"protocol {self.rules.name}",
                next_step="evaluate by a protocol that has it",
            )
        return (self.merged if protocol == "merged" else self.per_domain)[metric]

    def value(self, metric: Metric, *, domain: str = MEAN, protocol: Protocol | None = None) -> float:
        """Mean over the queries of a domain, or the protocol's mean over all; NaN if no query has a value."""
        chosen = self.queries_of(domain)
        return domain_mean(self.values(metric, protocol=protocol)[chosen], self.mean_groups[chosen])

    def interval(
        self, metric: Metric, *, domain: str = MEAN, protocol: Protocol | None = None
    ) -> tuple[float, float]:
        """95 % bootstrap interval of :meth:`value`, with queries drawn inside each domain."""
        chosen = self.queries_of(domain)
        values = self.values(metric, protocol=protocol)[chosen]
        if domain != MEAN:
            return bootstrap_interval(values, num_resamples=self.num_resamples)
        return domain_mean_interval(values, self.mean_groups[chosen], num_resamples=self.num_resamples)

    def composite(self, metric: Metric) -> tuple[float, float, float]:
        """The score weighted by the protocol's shares of domains, with its 95 % bootstrap interval.

        Weights are those of :func:`composite_weights` over the domains that have a value; NaN without any.
        """
        weights = self.composite_weights
        values = self.values(metric)
        numbers = [weights.get(domain, 0.0) for domain in self.domains]
        return weighted_mean_interval(
            values, self.query_domains, np.array(numbers), num_resamples=self.num_resamples
        )

    @property
    def composite_weights(self) -> dict[str, float]:
        """Domain -> its weight in :meth:`composite`."""
        known = tuple(domain for domain in self.domains if self.num_queries(domain))
        return composite_weights(known, self.rules.domain_shares or {})

    def rounded(self, metric: Metric, *, domain: str = MEAN, protocol: Protocol | None = None) -> float:
        """A value as the protocol's authors print it: domains rounded, their mean rounded again."""
        decimals = self.rules.decimals if self.rules.decimals is not None else 17
        if domain != MEAN:
            return float(np.round(self.value(metric, domain=domain, protocol=protocol), decimals))
        known = [name for name in self.domains if self.num_queries(name)]
        numbers = [self.rounded(metric, domain=name, protocol=protocol) for name in known]
        return float(np.round(np.mean(numbers), decimals)) if numbers else float("nan")

    def num_queries(self, domain: str = MEAN) -> int:
        """Queries that entered the means, of a domain or of all."""
        return int(np.count_nonzero(self._answerable[self.queries_of(domain)]))

    def num_queries_without_positive(self, domain: str = MEAN) -> int:
        """Queries that were left out because the index holds nothing that is relevant to them."""
        return int(np.count_nonzero(~self._answerable[self.queries_of(domain)]))

    @property
    def _answerable(self) -> Bool[np.ndarray, " q"]:
        # a positive is of the query's own domain, so both protocols agree
        known: np.ndarray = ~np.isnan(self.values(self.metrics[0]))
        return known

    @property
    def mean_groups(self) -> Int[np.ndarray, " q"]:
        """The groups of queries that weigh the same in the mean."""
        return self.query_domains if self.rules.mean == "domains" else np.zeros_like(self.query_domains)

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
        chosen: np.ndarray = self.query_domains == self.domains.index(domain)
        return chosen

    def to_json(self) -> Json:
        """Index searched -> domain or ``mean`` -> counts and metrics; a number that cannot be had is null.

        A protocol by name also has ``protocol``, its name; one with shares of domains ``composite``; one that
        rounds ``rounded``, laid out as the whole.
        """
        content: dict[str, Json] = {} if self.rules.name == "default" else {"protocol": self.rules.name}
        for scope in self.scopes:
            content[scope] = {domain: self._numbers(domain, scope) for domain in (*self.domains, MEAN)}
        if self.rules.domain_shares is not None:
            content["composite"] = self._composite_numbers()
        if self.rules.decimals is not None:
            content["rounded"] = {
                scope: {
                    domain: {
                        metric: _or_null(self.rounded(metric, domain=domain, protocol=scope))
                        for metric in self.metrics
                    }
                    for domain in (*self.domains, MEAN)
                }
                for scope in self.scopes
            }
        return content

    def _composite_numbers(self) -> Json:
        scores = {metric: self.composite(metric) for metric in self.metrics}
        weights = self.composite_weights
        present = {challenge_domain(domain) for domain in weights}
        return {
            **{metric: _or_null(value) for metric, (value, _, _) in scores.items()},
            "intervals": {
                metric: [_or_null(low), _or_null(high)] for metric, (_, low, high) in scores.items()
            },
            "weights": weights,
            "domains_without_a_weight": [domain for domain in self.domains if domain not in weights],
            "missing": [name for name in self.rules.domain_shares or {} if name not in present],
        }

    def _numbers(self, domain: str, protocol: Protocol) -> Json:
        values = {metric: self.value(metric, domain=domain, protocol=protocol) for metric in self.metrics}
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
                    for metric in self.metrics
                }
                for domain in (*self.domains, MEAN)
            }
            for protocol in self.scopes
        }

    def write_json(self, path: Path) -> Path:
        """Write :meth:`to_json`, atomically."""
        write_json(Path(path), self.to_json())
        return Path(path)

    def __rich__(self) -> Table:
        shown = self.shown if self.shown in self.scopes else self.scopes[0]
        left_out = self.num_queries_without_positive()
        notes = [f"{left_out} queries without a relevant entry in the index are left out"] if left_out else []
        if self.rules.decimals is not None:
            numbers = [f"{title_of(m)} {self.rounded(m, protocol=shown):.3f}" for m in self.metrics]
            notes.append("mean as its authors round: " + ", ".join(numbers))
        if self.rules.domain_shares is not None:
            notes += [self._composite_note(metric) for metric in self.metrics]
        table = Table(title=title_of_scope(shown), caption="\n".join(notes) or None)
        table.add_column("domain")
        table.add_column("queries", justify="right")
        for metric in self.metrics:
            table.add_column(f"{title_of(metric)} % (95 %)", justify="right")
        for domain in (*self.domains, MEAN):
            if domain == MEAN:
                table.add_section()
            cells = [cell(self, metric, domain, shown) for metric in self.metrics]
            style = "bold" if domain == MEAN else None
            table.add_row(Text(domain), f"{self.num_queries(domain):,}", *cells, style=style)
        return table

    def _composite_note(self, metric: Metric) -> str:
        weights = self.composite_weights
        if not weights:
            return "no composite score: none of the domains is one of the challenge's"
        value, low, high = self.composite(metric)
        parts = ", ".join(f"{domain} {100 * weight:.0f} %" for domain, weight in weights.items())
        return f"composite {title_of(metric)} {100 * value:.1f} ({100 * low:.1f}–{100 * high:.1f}), weights: {parts}"  # noqa: E501


# ---- printing


def title_of_scope(protocol: Protocol) -> str:
    """The index searched, in words."""
    return "one index over all domains" if protocol == "merged" else "one index per domain"


def cell(result: EvaluationResult, metric: Metric, domain: str, protocol: Protocol) -> str:
    """Such as ``87.3 (84.1–90.0)``, in percent."""
    value = result.value(metric, domain=domain, protocol=protocol)
    if math.isnan(value):
        return "–"
    low, high = result.interval(metric, domain=domain, protocol=protocol)
    return f"{100 * value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def short_cell(result: EvaluationResult, metric: Metric, domain: str, protocol: Protocol) -> str:
    """Such as ``87.3 ±2.9``, in percent."""
    value = result.value(metric, domain=domain, protocol=protocol)
    if math.isnan(value):
        return "–"
    low, high = result.interval(metric, domain=domain, protocol=protocol)
    return f"{100 * value:.1f} ±{50 * (high - low):.1f}"
