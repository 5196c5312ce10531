"""Every query's metrics under a protocol, the numbers that are made of them, and several side by side."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import rich.table
from rich.console import Group
from rich.text import Text

from samething.arrays import Bool, Int, PerQuery
from samething.errors import InputError
from samething.evaluation.protocols import (
    MEAN,
    PROTOCOLS,
    SCOPES,
    Protocol,
    Scope,
    challenge_domain,
    composite_weights,
)
from samething.files import Json, finite
from samething.metrics import Metric, title_of
from samething.pages import Cell, Cells, Table
from samething.statistics import (
    Estimate,
    PairedDifference,
    domain_mean,
    mean_estimates,
    paired_difference,
    percent,
)

if TYPE_CHECKING:
    from samething.evaluation.no_match import NoMatch

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
        if metric not in self.protocol.metrics or scope not in scopes:
            known = f"{', '.join(self.protocol.metrics)} over {' or '.join(SCOPES[one] for one in scopes)}"
            raise InputError(
                f"{metric} over {SCOPES.get(scope, scope)}",
                expected=f"{known}, as in the protocol {self.protocol.name}",
                next_step="evaluate by a protocol that has it",
            )
        return (self.merged if scope == "merged" else self.per_domain)[metric]

    def value(self, metric: Metric, *, domain: str = MEAN, scope: Scope | None = None) -> float:
        """Mean over the queries of a domain, or the protocol's mean over all; NaN if no query has a value."""
        chosen = self.queries_of(domain)
        return domain_mean(self.values(metric, scope=scope)[chosen], self.mean_groups[chosen])

    def estimates(self, scope: Scope) -> Estimates:
        """Every :meth:`value` of a scope with its 95 % bootstrap interval; computed once."""
        if scope not in self._estimates:
            metrics, groups = self.protocol.metrics, self.mean_groups
            values = np.stack([self.values(metric, scope=scope) for metric in metrics])
            chosen = {domain: self.queries_of(domain) for domain in (*self.domains, MEAN)}
            found = {
                domain: mean_estimates(values[:, own], groups[own], num_resamples=self.num_resamples)
                for domain, own in chosen.items()
            }
            self._estimates[scope] = {
                domain: dict(zip(metrics, row, strict=True)) for domain, row in found.items()
            }
        return self._estimates[scope]

    def composite(self, metric: Metric) -> Estimate:
        """The score weighted by the protocol's shares of domains, with its 95 % bootstrap interval.

        Weights are those of :func:`composite_weights` over the domains that have a value; NaN without any.
        """
        weights = self.composite_weights
        numbers = np.array([weights.get(domain, 0.0) for domain in self.domains])
        values = self.values(metric)[None]
        return mean_estimates(values, self.query_domains, numbers, num_resamples=self.num_resamples)[0]

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
        # a positive is of the query's own domain, so all scopes agree
        return int(
            np.count_nonzero(~np.isnan(self.values(self.protocol.metrics[0])[self.queries_of(domain)]))
        )

    def num_queries_without_positive(self, domain: str = MEAN) -> int:
        """Queries that were left out because the index holds nothing that is relevant to them."""
        return int(np.count_nonzero(self.queries_of(domain))) - self.num_queries(domain)

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
                    **{metric: found.value for metric, found in self.estimates(scope)[domain].items()},
                }
                for domain in domains
            }
        if protocol.domain_shares is not None:
            scores = {metric: self.composite(metric) for metric in self.protocol.metrics}
            weights = self.composite_weights
            present = {challenge_domain(domain) for domain in weights}
            content["composite"] = {
                **{metric: found.value for metric, found in scores.items()},
                "intervals": {metric: (found.low, found.high) for metric, found in scores.items()},
                "weights": weights,
                "domains_without_a_weight": [domain for domain in self.domains if domain not in weights],
                "missing": [name for name in protocol.domain_shares if name not in present],
            }
        if protocol.decimals is not None:
            content["rounded"] = {
                scope: {
                    domain: {
                        metric: self.rounded(metric, domain=domain, scope=scope)
                        for metric in self.protocol.metrics
                    }
                    for domain in domains
                }
                for scope in protocol.scopes
            }
        if intervals:
            content["intervals"] = self.intervals()
        plain: dict[str, Json] = finite(content)
        return plain

    def intervals(self) -> Json:
        """Scope -> domain or ``mean`` -> metric -> lower and upper end of its interval, or nulls."""
        return finite(
            {
                scope: {
                    domain: {metric: (found.low, found.high) for metric, found in row.items()}
                    for domain, row in self.estimates(scope).items()
                }
                for scope in self.protocol.scopes
            }
        )

    def __rich__(self) -> rich.table.Table:
        left_out = self.num_queries_without_positive()
        notes = [f"{left_out} queries without a relevant entry in the index are left out"] if left_out else []
        if self.protocol.decimals is not None:
            numbers = [
                f"{title_of(m)} {self.rounded(m, scope=self.scope):.3f}" for m in self.protocol.metrics
            ]
            notes.append("mean as its authors round: " + ", ".join(numbers))
        if self.protocol.domain_shares is not None:
            weights = self.composite_weights
            parts = ", ".join(f"{domain} {100 * weight:.0f} %" for domain, weight in weights.items())
            notes += [
                f"composite {title_of(metric)} {percent(*self.composite(metric))}, weights: {parts}"
                if weights
                else "no composite score: none of the domains is one of the challenge's"
                for metric in self.protocol.metrics
            ]
        columns = ["domain", "queries", *(f"{title_of(metric)} % (95 %)" for metric in self.protocol.metrics)]
        rows = [
            [domain, f"{self.num_queries(domain):,}", *(percent(*found) for found in row.values())]
            for domain, row in self.estimates(self.scope).items()
        ]
        featured = len(rows) - 1
        return Table(SCOPES[self.scope], columns, rows, "\n".join(notes), featured).printed()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Several embeddings of one catalog, measured on the same queries."""

    results: Mapping[str, EvaluationResult]
    """Name of the embedding -> its result, in the order given; all in the same scopes."""
    dimensions: Mapping[str, int]
    """Name of the embedding -> its number of dimensions."""
    reference: str | None = None
    """Name of the embedding that printing compares the others with."""
    no_match: Mapping[str, NoMatch] = dataclasses.field(default_factory=dict)
    """Name of an embedding -> how well it tells that there is no match, where that was asked for."""
    _differences: dict[str, dict[str, dict[str, PairedDifference]]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    @functools.cached_property
    def first(self) -> EvaluationResult:
        """The first result: queries, domains and metrics are the same in all."""
        return next(iter(self.results.values()))

    @functools.cached_property
    def shown_estimates(self) -> Mapping[str, Estimates]:
        """Name of the embedding -> its estimates in the scope that printing shows."""
        return {name: result.estimates(self.first.scope) for name, result in self.results.items()}

    def difference(
        self,
        first: str,
        second: str,
        *,
        metric: Metric = "mmp@5",
        scope: Scope | None = None,
        domain: str = MEAN,
    ) -> PairedDifference:
        """How far the first is ahead on the same queries, with a paired bootstrap interval and test.

        Args:
            first: name of an embedding.
            second: name of another.
            metric: one of the protocol's.
            scope: what was searched; by default the first of the protocol's.
            domain: a domain, or the mean over all.

        Raises:
            InputError: a name, metric or domain is none of the comparison's.
        """
        for name in (first, second):
            if name not in self.results:
                raise InputError(
                    f"no embedding called {name!r}",
                    expected=f"one of {', '.join(self.results)}",
                    next_step="use a name that was compared",
                )
        one, other = self.results[first], self.results[second]
        chosen = one.queries_of(domain)
        return paired_difference(
            one.values(metric, scope=scope)[chosen],
            other.values(metric, scope=scope)[chosen],
            one.mean_groups[chosen],
            num_resamples=one.num_resamples,
        )

    def differences(self, reference: str) -> Mapping[str, Mapping[str, PairedDifference]]:
        """Every other embedding minus the reference: name -> domain or ``mean`` -> difference; computed once.

        Of the first metric, in the scope that printing shows.
        """
        if reference not in self._differences:
            self._differences[reference] = {
                name: {
                    domain: self.difference(
                        name,
                        reference,
                        metric=self.first.protocol.metrics[0],
                        domain=domain,
                        scope=self.first.scope,
                    )
                    for domain in (*self.first.domains, MEAN)
                }
                for name in self.results
                if name != reference
            }
        return self._differences[reference]

    def to_json(self) -> dict[str, Json]:
        """Name -> ``dimension``, what :meth:`EvaluationResult.to_json` says, and ``intervals``.

        Where there is a reference, every other embedding also has ``against``: the reference's name,
        the metric, and a domain or ``mean`` -> ``difference``, ``interval``, ``p_value``, ``num_queries``.
        """
        content: dict[str, Json] = {}
        for name, result in self.results.items():
            own = {"dimension": self.dimensions[name], **result.to_json(intervals=True)}
            if name in self.no_match:
                own["no_match"] = self.no_match[name].to_json()
            if self.reference is not None and name != self.reference:
                own["against"] = {
                    "reference": self.reference,
                    "metric": self.first.protocol.metrics[0],
                    "domains": {
                        domain: found.to_json()
                        for domain, found in self.differences(self.reference)[name].items()
                    },
                }
            content[name] = own
        return content

    def table(self, domain: str = MEAN, *, title: str = "", featured: str | None = None) -> Table:
        """All metrics of a domain, or of the mean; the best value of each is marked."""
        found = {name: estimates[domain] for name, estimates in self.shown_estimates.items()}
        best = {
            metric: np.nanmax([row[metric].value for row in found.values()] + [-1])
            for metric in self.first.protocol.metrics
        }
        rows: list[Cells] = []
        for name, row in found.items():
            cells: Cells = [name, f"{self.dimensions[name]:,}"]
            for metric, one in row.items():
                ends = "" if math.isnan(one.value) else f"{percent(one.low)}–{percent(one.high)}"
                cells.append(Cell(percent(one.value), ends, "best" if one.value == best[metric] else ""))
            rows.append(cells)
        counts = f"{self.first.num_queries(domain):,} queries"
        if left_out := self.first.num_queries_without_positive(domain):
            counts += f", {left_out:,} without a positive left out"
        what = f"mean of the {self.first.protocol.mean}" if domain == MEAN else domain
        columns: Cells = [Cell(what, counts), "dim", *map(title_of, self.first.protocol.metrics)]
        place = list(found).index(featured) if featured in found else None
        return Table(title, columns, rows, featured=place)

    def difference_table(self, reference: str, *, short: bool = False, title: str = "") -> Table:
        """The first metric of every other embedding minus that of the reference; sure ones are marked.

        Args:
            reference: name of an embedding.
            short: only the mean has its interval, and what is sure has a star.
            title: of the table.
        """
        domains = (MEAN, *self.first.domains)
        rows: list[Cells] = [
            [name, *[difference_cell(of[domain], short=short and domain != MEAN) for domain in domains]]
            for name, of in self.differences(reference).items()
        ]
        counts = [Cell(domain, f"n = {self.first.num_queries(domain):,}") for domain in domains]
        note = "* the 95 % interval does not hold 0" if short else ""
        return Table(title, ["", *counts], rows, note)

    def __rich__(self) -> Group:
        """All metrics as means over the domains, then the first metric domain by domain."""
        scope, first, metric = SCOPES[self.first.scope], self.first, self.first.protocol.metrics[0]
        whole = f"{len(first.domains)} domains"
        if first.protocol.mean == "queries":
            whole = f"{first.num_queries():,} queries"
        columns = [Cell(domain, f"n = {first.num_queries(domain):,}") for domain in first.domains]
        rows = []
        for name, found in self.shown_estimates.items():
            halves = [
                (one.value, 50 * (one.high - one.low)) for one in (found[d][metric] for d in first.domains)
            ]
            cells = [f"{percent(value)} ±{half:.1f}" if half >= 0 else "–" for value, half in halves]
            rows.append([name, *cells])
        title = f"{title_of(metric)} per domain, {scope}, % ± half of the 95 % interval"
        tables = [
            self.table(title=f"Mean of {whole}, {scope}, % (95 % interval)"),
            Table(title, ["embedding", *columns], rows),
        ]
        if self.reference is not None:
            # the mean with its interval, domains without theirs, which are in the JSON and the report
            title = f"{title_of(metric)} against {self.reference}, points (95 % interval; p by randomisation)"
            tables.append(self.difference_table(self.reference, short=True, title=title))
        said = [
            Text.assemble((name, "bold"), f": {found.__rich__()}") for name, found in self.no_match.items()
        ]
        return Group(*(table.printed() for table in tables), *said)


def difference_cell(difference: PairedDifference, *, short: bool = False) -> Cell:
    """Points with interval and p-value, or, ``short``, with a star; what is sure is marked.

    >>> difference_cell(PairedDifference(difference=0.01, low=0.0, high=0.02, num_queries=9, p_value=0.5))
    Cell(text='+1.0', small='+0.0 to +2.0; p .500', kind='', style='')
    >>> tiny = PairedDifference(difference=0.01, low=0.005, high=0.02, num_queries=9, p_value=0.0004)
    >>> difference_cell(tiny).small, difference_cell(tiny, short=True).text
    ('+0.5 to +2.0; p < .001', '+1.0*')
    """
    if difference.num_queries == 0:
        return Cell("–")
    text, kind = percent(difference.difference, sign=True), "best" if difference.is_sure else ""
    if short:
        return Cell(f"{text}*" if kind else text, kind=kind)
    p = f"{difference.p_value:.3f}".replace("0.", ".", 1) if difference.p_value >= 0.001 else "< .001"
    interval = f"{percent(difference.low, sign=True)} to {percent(difference.high, sign=True)}"
    return Cell(text, f"{interval}; p {p}", kind)
