"""Several embeddings of one catalog, measured on the same queries, side by side."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Group
from rich.text import Text

from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.looked_again import LookedAgain
from samething.evaluation.measuring import evaluate_embeddings
from samething.evaluation.no_match import NoMatch
from samething.evaluation.protocols import MEAN, Scope, protocol_of, title_of_scope
from samething.evaluation.result import Estimates, EvaluationResult
from samething.evaluation.task import TaskSet
from samething.files import Json
from samething.metrics import Metric, title_of
from samething.pages import Cell, Cells, Table
from samething.rerank.gains import Gain
from samething.statistics import PairedDifference, paired_difference, percent


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Several embeddings of one catalog, measured on the same queries."""

    results: Mapping[str, EvaluationResult]
    """Name of the embedding -> its result, in the order given; all in the same scopes."""
    dimensions: Mapping[str, int]
    """Name of the embedding -> its number of dimensions."""
    shown: Scope = "merged"
    """The scope that printing the comparison shows, where the protocol has it."""
    reference: str | None = None
    """Name of the embedding that printing compares the others with."""
    no_match: Mapping[str, NoMatch] = dataclasses.field(default_factory=dict)
    """Name of an embedding -> how well it tells that there is no match, where that was asked for."""
    _differences: dict[str, dict[str, dict[str, PairedDifference]]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def of(
        cls,
        embeddings: Mapping[str, np.ndarray],
        catalog: Catalog,
        *,
        gains: Mapping[str, Gain | LookedAgain] | None = None,
        shown: Scope = "merged",
        **options: Any,
    ) -> Comparison:
        """Evaluate every embedding with the gain of its name, else as :func:`evaluate_embeddings`."""
        if not embeddings:
            raise InputError(
                "no embeddings", expected="at least one", next_step="name what is to be compared"
            )
        scopes = protocol_of(options.get("protocol", "default")).scopes
        tasks = TaskSet.of(catalog, options.get("role", "test"), scopes)
        results = {
            name: evaluate_embeddings(rows, tasks, gain=(gains or {}).get(name), **options)
            for name, rows in embeddings.items()
        }
        dimensions = {name: rows.shape[1] for name, rows in embeddings.items()}
        return cls(results=results, dimensions=dimensions, shown=shown)

    @functools.cached_property
    def first(self) -> EvaluationResult:
        """The first result: queries, domains and metrics are the same in all."""
        return next(iter(self.results.values()))

    @functools.cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The protocol's metrics."""
        return self.first.metrics

    @functools.cached_property
    def scope(self) -> Scope:
        """The scope that printing shows: the one asked for, if the protocol has it."""
        scopes = self.first.protocol.scopes
        return self.shown if self.shown in scopes else scopes[0]

    @functools.cached_property
    def shown_estimates(self) -> Mapping[str, Estimates]:
        """Name of the embedding -> its estimates in the scope that printing shows."""
        return {name: result.estimates(self.scope) for name, result in self.results.items()}

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
                        name, reference, metric=self.metrics[0], domain=domain, scope=self.scope
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
                    "metric": self.metrics[0],
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
            metric: np.nanmax([row[metric].value for row in found.values()] + [-1]) for metric in self.metrics
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
        columns: Cells = [Cell(what, counts), "dim", *map(title_of, self.metrics)]
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
            [name, *(difference_cell(of[domain], short=short and domain != MEAN) for domain in domains)]
            for name, of in self.differences(reference).items()
        ]
        columns: Cells = [
            "",
            *(Cell(domain, f"n = {self.first.num_queries(domain):,}") for domain in domains),
        ]
        note = "* the 95 % interval does not hold 0" if short else ""
        return Table(title, columns, rows, note)

    def __rich__(self) -> Group:
        """All metrics as means over the domains, then the first metric domain by domain."""
        scope, first, metric = title_of_scope(self.scope), self.first, self.metrics[0]
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
    low, high = (percent(end, sign=True) for end in (difference.low, difference.high))
    return Cell(text, f"{low} to {high}; p {p}", kind)
