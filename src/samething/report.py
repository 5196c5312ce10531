"""The HTML report: one self-contained file with tables, curves and pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samething.evaluation import MEAN, METRICS, Comparison, Metric
from samething.pages import as_drawn, write_page

_METRIC_NAMES: Mapping[Metric, str] = {"mmp@5": "mMP@5", "r@1": "R@1", "map": "mAP"}


@dataclasses.dataclass(frozen=True)
class ShownHit:
    """A picture that a query found."""

    path: Path
    label: str
    score: float
    is_right: bool


@dataclasses.dataclass(frozen=True)
class ShownQuery:
    """A query with what it found, best first."""

    path: Path
    label: str
    domain: str
    hits: tuple[ShownHit, ...]


def write_report(
    target: Path,
    *,
    title: str,
    comparison: Comparison,
    featured: str,
    records: Sequence[Mapping[str, Any]],
    queries: Sequence[ShownQuery],
    facts: Mapping[str, str],
) -> Path:
    """Write the report of one run.

    Args:
        target: the HTML file.
        title: its heading.
        comparison: the embeddings that were compared.
        featured: name of the embedding that the report is about.
        records: lines of the run's metrics.jsonl, for the curves.
        queries: queries with their hits, for the picture grid.
        facts: what was made from what, shown as a list.
    """
    return write_page(
        target,
        "report.html",
        title=title,
        facts=facts,
        featured=featured,
        metrics=[_METRIC_NAMES[metric] for metric in METRICS],
        tables=[_table(comparison, domain, featured) for domain in [MEAN, *_domains(comparison)]],
        bars=_bar_chart(comparison),
        curves=_curves(records),
        queries=queries,
    )


def _domains(comparison: Comparison) -> Sequence[str]:
    return next(iter(comparison.results.values())).domains


def _table(comparison: Comparison, domain: str, featured: str) -> dict[str, Any]:
    """The rows of one domain; the best value of each metric is marked."""
    results = comparison.results
    values = {
        metric: {name: result.value(metric, domain=domain) for name, result in results.items()}
        for metric in METRICS
    }
    best = {
        metric: max([v for v in row.values() if not math.isnan(v)], default=None)
        for metric, row in values.items()
    }
    first = next(iter(results.values()))
    return {
        "domain": "mean of the domains" if domain == MEAN else domain,
        "num_queries": first.num_queries(domain),
        "num_left_out": first.num_queries_without_positive(domain),
        "rows": [
            {
                "name": name,
                "dimension": comparison.dimensions[name],
                "is_featured": name == featured,
                "cells": [
                    {
                        "text": _percent(values[metric][name]),
                        "interval": [_percent(end) for end in result.interval(metric, domain=domain)],
                        "is_best": values[metric][name] == best[metric],
                    }
                    for metric in METRICS
                ],
            }
            for name, result in results.items()
        ],
    }


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _bar_chart(comparison: Comparison, metric: Metric = "mmp@5") -> Any:
    import matplotlib.figure

    domains = [*_domains(comparison), MEAN]
    figure = matplotlib.figure.Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(comparison.results)
    for number, (name, result) in enumerate(comparison.results.items()):
        places = [
            place + (number - (len(comparison.results) - 1) / 2) * width for place in range(len(domains))
        ]
        values = [100 * result.value(metric, domain=domain) for domain in domains]
        ends = [[100 * end for end in result.interval(metric, domain=domain)] for domain in domains]
        below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
        above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
        axes.bar(
            places, values, width, label=as_drawn(name), yerr=[below, above], error_kw={"elinewidth": 0.8}
        )
    axes.set_xticks(range(len(domains)), [as_drawn(domain) for domain in domains])
    axes.set_ylabel(f"{_METRIC_NAMES[metric]} %")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A drawing a curve that there are points of, under its title."""
    import matplotlib.figure

    figures = {}
    for name, label in (
        ("loss", "training loss"),
        ("val/mmp@5", "validation mMP@5"),
        ("learning_rate", "learning rate"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            figure = matplotlib.figure.Figure(figsize=(4.2, 2.6), layout="constrained")
            axes = figure.subplots()
            axes.plot(*zip(*points, strict=True), linewidth=1.4)
            axes.set(xlabel="step", title=label)
            axes.grid(alpha=0.3)
            figures[label] = figure
    return figures
