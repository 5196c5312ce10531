"""Several embeddings of the same pictures side by side, and whether one is ahead of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from samething.arrays import Embeddings
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.protocols import evaluate_embeddings
from samething.evaluation.results import MEAN, METRICS, TITLES, Estimate, EvaluationResult, Protocol, caption
from samething.metrics import PairedDifference, paired_difference
from samething.retrieval import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One line of a comparison."""

    name: str
    dim: int
    num_queries: int
    metrics: Mapping[str, Estimate]
    """By the names in :data:`METRICS`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Several embeddings of the same pictures, evaluated on the same queries and index."""

    results: Mapping[str, EvaluationResult]
    """By name, in the order of the table."""

    @property
    def shown(self) -> Protocol:
        """The protocol that printing shows: the first result's."""
        return next(iter(self.results.values())).shown

    def rows(self, domain: str = MEAN, protocol: Protocol | None = None) -> list[ComparisonRow]:
        """One row a name, for one domain or the mean over domains."""
        chosen = {name: result.row(domain, protocol or self.shown) for name, result in self.results.items()}
        return [
            ComparisonRow(
                name=name, dim=self.results[name].dim, num_queries=row.num_queries, metrics=row.metrics
            )
            for name, row in chosen.items()
        ]

    def difference(
        self,
        first: str,
        second: str,
        *,
        metric: str = "mmp@5",
        domain: str = MEAN,
        protocol: Protocol | None = None,
    ) -> PairedDifference:
        """How far ``first`` is ahead of ``second``: a paired bootstrap over the same queries.

        Args:
            first: a name of the comparison.
            second: another.
            metric: ``mmp@5``, ``r@1`` or ``map``.
            domain: a domain, or the mean over domains.
            protocol: by default the one that is shown.

        Raises:
            InputError: one of the names is unknown.
        """
        for given, known in ((first, self.results), (second, self.results), (metric, METRICS)):
            if given not in known:
                raise InputError(
                    f"{given!r}", expected=f"one of {', '.join(known)}", next_step="correct the name"
                )
        ahead, behind = self.results[first], self.results[second]
        ahead.row(domain)  # refuses an unknown domain
        own = np.full(len(ahead.query_rows), domain == MEAN)
        if domain != MEAN:
            own = ahead.query_domains == ahead.domains.index(domain)
        protocol = protocol or self.shown
        return paired_difference(
            ahead.values[protocol][metric][own],
            behind.values[protocol][metric][own],
            ahead.query_domains[own],
            num_resamples=ahead.num_resamples,
            seed=ahead.seed,
            level=ahead.level,
        )

    def __rich__(self) -> object:
        """A table of the means over domains, for ``rich.print``; the best of each column is bold."""
        from rich.markup import escape
        from rich.table import Table

        rows = self.rows()
        first = next(iter(self.results.values()))
        counts = f"{rows[0].num_queries:,} queries, {first.row(MEAN).num_index:,} index pictures"
        title = f"{TITLES[self.shown]}, mean of {len(first.domains)} domains ({counts})"
        table = Table(title=title, caption=caption(first))
        table.add_column("embedding")
        table.add_column("dim", justify="right")
        for name in METRICS.values():
            table.add_column(name, justify="right", no_wrap=True)
        best = {name: max(row.metrics[name].value for row in rows) for name in METRICS}
        for row in rows:
            cells = [
                f"[bold]{estimate}[/bold]" if estimate.value == best[name] else str(estimate)
                for name, estimate in row.metrics.items()
            ]
            table.add_row(escape(row.name), str(row.dim), *cells)
        return table


def compare_embeddings(
    embeddings: Mapping[str, Embeddings],
    catalog: Catalog,
    *,
    roles: Literal["test", "val"] = "test",
    precision: Precision = "float64",
    memory_mib: int = 256,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Evaluate several embeddings of one catalog's pictures; arguments as in :func:`evaluate_embeddings`.

    Args:
        embeddings: name → rows in catalog order; the dimensions may differ.
        catalog: the pictures.
        roles: which of them are searched.
        precision: of the search.
        memory_mib: of each search.
        num_resamples: bootstrap resamples behind each interval.
        seed: of the bootstrap.

    Raises:
        InputError: nothing to compare, or as :func:`evaluate_embeddings`.
    """
    if not embeddings:
        raise InputError(
            "no embeddings to compare", expected="at least one name with its rows", next_step="give some"
        )
    return Comparison(
        {
            name: evaluate_embeddings(
                rows,
                catalog,
                roles=roles,
                precision=precision,
                memory_mib=memory_mib,
                num_resamples=num_resamples,
                seed=seed,
            )
            for name, rows in embeddings.items()
        }
    )
