"""Several embeddings of one catalog, measured on the same queries, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.gains import Gain
from samething.evaluation.measuring import evaluate_embeddings
from samething.evaluation.no_match import NoMatch
from samething.evaluation.result import MEAN, EvaluationResult, cell, short_cell, title_of_scope
from samething.evaluation.rules import Metric, Protocol, Rules, title_of
from samething.files import Json
from samething.metrics import PairedDifference, paired_difference
from samething.retrieval import Precision


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Several embeddings of one catalog, measured on the same queries."""

    results: Mapping[str, EvaluationResult]
    """Name of the embedding -> its result, in the order given."""
    dimensions: Mapping[str, int]
    """Name of the embedding -> its number of dimensions."""
    shown: Protocol = "merged"
    """The protocol that printing the comparison shows."""
    reference: str | None = None
    """Name of the embedding that printing compares the others with."""
    no_match: Mapping[str, NoMatch] = dataclasses.field(default_factory=dict)
    """Name of an embedding -> how well it tells that there is no match, where that was asked for."""

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
        rules: str | Rules = "default",
        gains: Mapping[str, Gain] | None = None,
        distractors: Sequence[Path] = (),
        shown: Protocol = "merged",
    ) -> Comparison:
        """Evaluate every embedding, ``gains`` by name; else as :func:`evaluate_embeddings`."""
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
                rules=rules,
                distractors=distractors,
                gain=(gains or {}).get(name),
            )
            for name, rows in embeddings.items()
        }
        dimensions = {name: rows.shape[1] for name, rows in embeddings.items()}
        return cls(results=results, dimensions=dimensions, shown=shown)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The protocol's metrics."""
        return next(iter(self.results.values())).metrics

    @property
    def scope(self) -> Protocol:
        """The index that printing shows: the one asked for, if the protocol has it."""
        scopes = next(iter(self.results.values())).scopes
        return self.shown if self.shown in scopes else scopes[0]

    def difference(
        self,
        first: str,
        second: str,
        *,
        metric: Metric = "mmp@5",
        protocol: Protocol | None = None,
        domain: str = MEAN,
    ) -> PairedDifference:
        """How far the first is ahead on the same queries, with a paired bootstrap interval and test.

        Args:
            first: name of an embedding.
            second: name of another.
            metric: one of the protocol's.
            protocol: index searched; by default the first of the protocol's.
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
            one.values(metric, protocol=protocol)[chosen],
            other.values(metric, protocol=protocol)[chosen],
            one.mean_groups[chosen],
            num_resamples=one.num_resamples,
        )

    def differences(self, reference: str) -> dict[str, dict[str, PairedDifference]]:
        """Every other embedding minus the reference, first metric: name -> domain -> difference."""
        domains = (*self.results[reference].domains, MEAN)
        return {
            name: {
                domain: self.difference(
                    name, reference, metric=self.metrics[0], domain=domain, protocol=self.scope
                )
                for domain in domains
            }
            for name in self.results
            if name != reference
        }

    def to_json(self) -> Json:
        """Name -> ``dimension``, what :meth:`EvaluationResult.to_json` says, and ``intervals``.

        Where there is a reference, every other embedding also has ``against``: the reference's name,
        the metric, and a domain or ``mean`` -> ``difference``, ``interval``, ``p_value``, ``num_queries``.
        """
        against = self.differences(self.reference) if self.reference is not None else {}
        return {
            name: {
                "dimension": self.dimensions[name],
                **result.to_json(),
                "intervals": result.intervals(),
                **({"no_match": self.no_match[name].to_json()} if name in self.no_match else {}),
                **({"against": self._against(against[name])} if name in against else {}),
            }
            for name, result in self.results.items()
        }

    def _against(self, differences: Mapping[str, PairedDifference]) -> Json:
        numbers = {
            domain: {
                "difference": found.difference,
                "interval": [found.low, found.high],
                "p_value": found.p_value,
                "num_queries": found.num_queries,
            }
            if found.num_queries
            else None
            for domain, found in differences.items()
        }
        return {"reference": self.reference, "metric": self.metrics[0], "domains": numbers}

    def __rich__(self) -> Group:
        """All metrics as means over the domains, then the first metric domain by domain."""
        first = next(iter(self.results.values()))
        featured = self.metrics[0]
        means = Table(
            title=f"{_mean_of(first)}, {title_of_scope(self.scope)}, % (95 % interval)",
            box=SIMPLE_HEAD,
        )
        means.add_column("embedding", overflow="fold")
        means.add_column("dim", justify="right")
        by_domain = Table(
            title=f"{title_of(featured)} a domain, {title_of_scope(self.scope)}, % ± half of the 95 % interval",  # noqa: E501
            box=SIMPLE_HEAD,
        )
        by_domain.add_column("embedding", overflow="fold")
        for metric in self.metrics:
            means.add_column(title_of(metric), justify="right", min_width=len("87.3 (84.1–"))
        for domain in first.domains:
            by_domain.add_column(
                f"{escape(domain)}\nn = {first.num_queries(domain):,}",
                justify="right",
                min_width=len("100.0"),
            )
        for name, result in self.results.items():
            cells = [cell(result, metric, MEAN, self.scope) for metric in self.metrics]
            means.add_row(Text(name), f"{self.dimensions[name]:,}", *cells)
            by_domain.add_row(
                Text(name), *(short_cell(result, featured, domain, self.scope) for domain in first.domains)
            )
        parts: list[RenderableType] = [means, by_domain]
        if self.reference is not None:
            parts.append(self._differences_table(self.reference))
        parts += [
            Text.assemble((name, "bold"), f": {found.__rich__()}") for name, found in self.no_match.items()
        ]
        return Group(*parts)

    def _differences_table(self, reference: str) -> Table:
        """The mean with its interval, domains without theirs, which are in the JSON and the report."""
        table = Table(
            title=f"{title_of(self.metrics[0])} against {escape(reference)}, points (95 % interval; p by randomisation)",  # noqa: E501
            caption="* the 95 % interval does not hold 0",
            box=SIMPLE_HEAD,
        )
        table.add_column("embedding", overflow="fold")
        result = self.results[reference]
        table.add_column(
            f"{MEAN}\nn = {result.num_queries():,}", justify="right", min_width=len("(+10.0 to +20.0;")
        )
        for domain in result.domains:
            table.add_column(escape(domain), justify="right", min_width=len("+10.0*"))
        for name, by_domain in self.differences(reference).items():
            table.add_row(
                Text(name),
                difference_cell(by_domain[MEAN]).replace(" ", "\n", 1),
                *(_marked(by_domain[domain]) for domain in result.domains),
            )
        return table


def _marked(found: PairedDifference) -> str:
    """Such as ``+1.2*``, in points; the mark where the interval does not hold 0."""
    if found.num_queries == 0:
        return "–"
    return f"{100 * found.difference:+.1f}{'*' if found.low > 0 or found.high < 0 else ''}"


def _mean_of(result: EvaluationResult) -> str:
    if result.rules.mean == "queries":
        return f"Mean of {result.num_queries():,} queries"
    return f"Mean of {len(result.domains)} domains"


def difference_cell(difference: PairedDifference) -> str:
    """Such as ``+1.2 (0.3 to 2.1; p .004)``, in points.

    >>> difference_cell(PairedDifference(difference=0.01, low=0.0, high=0.02, num_queries=9, p_value=0.5))
    '+1.0 (+0.0 to +2.0; p .500)'
    >>> difference_cell(PairedDifference(difference=0.01, low=0.0, high=0.02, num_queries=9, p_value=0.0004))
    '+1.0 (+0.0 to +2.0; p < .001)'
    """
    if difference.num_queries == 0:
        return "–"
    p = f"{difference.p_value:.3f}".replace("0.", ".", 1) if difference.p_value >= 0.001 else "< .001"
    return f"{100 * difference.difference:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f}; p {p})"  # noqa: E501
