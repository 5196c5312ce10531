"""The HTML report: one self-contained file with tables, curves, a map and images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from samething.arrays import Embeddings
from samething.evaluation.analysis import Analysis, ShownQuery, map_of
from samething.evaluation.comparison import Comparison, difference_cell
from samething.evaluation.result import MEAN, title_of_scope
from samething.evaluation.rules import title_of
from samething.pages import as_drawn, write_page


def write_report(
    target: Path,
    *,
    title: str,
    comparison: Comparison,
    featured: str,
    records: Sequence[Mapping[str, Any]],
    queries: Sequence[ShownQuery],
    facts: Mapping[str, str],
    analysis: Analysis | None = None,
    embeddings: Embeddings | None = None,
) -> Path:
    """Write the report of one run.

    Args:
        target: the HTML file.
        title: its heading.
        comparison: the embeddings that were compared.
        featured: name of the embedding that the report is about.
        records: lines of the run's metrics.jsonl, for the curves.
        queries: queries with their hits, for the image grid.
        facts: what was made from what, shown as a list.
        analysis: of the featured embedding, for similarities, failures, near-misses and confusions.
        embeddings: with ``analysis``: rows of its catalog, for the map.
    """
    return write_page(
        target,
        "report.html",
        title=title,
        facts=facts,
        featured=featured,
        metrics=[title_of(metric) for metric in comparison.metrics],
        scope=title_of_scope(comparison.scope),
        tables=[_table(comparison, domain, featured) for domain in [MEAN, *_domains(comparison)]],
        bars=_bar_chart(comparison),
        bar_metric=title_of(comparison.metrics[0]),
        differences=_differences(comparison, featured),
        no_match=[(name, found.__rich__()) for name, found in comparison.no_match.items()],
        curves=_curves(records),
        queries=queries,
        **_looked_at(analysis, embeddings),
    )


_COLOURS: Final = (
    "#2867b2", "#e07b00", "#1a8a4a", "#c8352b", "#7a4fb5", "#8c5a3c", "#d657a5", "#5f6b76", "#a3a318", "#12a3b4",  # noqa: E501
)  # fmt: skip


def _looked_at(analysis: Analysis | None, embeddings: Embeddings | None) -> dict[str, Any]:
    """What the page shows image by image."""
    if analysis is None:
        return {"histogram": None, "points": [], "worst": [], "near_misses": [], "confusions": None}
    names, counts, totals = analysis.confusions()
    points, method = map_of(embeddings, analysis.catalog) if embeddings is not None else ([], "")
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    return {
        "histogram": _histogram(analysis),
        "points": points,
        "map_method": method,
        "colours": colours,
        "worst": analysis.worst(8),
        "near_misses": analysis.near_misses(8),
        "confusions": {
            "names": names,
            "rows": [
                {
                    "name": name,
                    "num_queries": int(total),
                    "cells": [
                        {"count": int(count), "share": float(count / total) if total else 0.0}
                        for count in row
                    ],
                }
                for name, row, total in zip(names, counts, totals, strict=True)
                if total
            ],
        },
    }


def _differences(comparison: Comparison, featured: str) -> dict[str, Any] | None:
    """The featured embedding against every other, a domain and overall."""
    if len(comparison.results) < 2 or featured not in comparison.results:
        return None
    by_name = comparison.differences(featured)
    return {
        "domains": [MEAN, *_domains(comparison)],
        "rows": [
            {
                "name": name,
                "cells": [
                    {
                        "parts": difference_cell(found).split(" ", 1),
                        "is_sure": found.low > 0 or found.high < 0,
                    }
                    for found in (by_domain[domain] for domain in (MEAN, *_domains(comparison)))
                ],
            }
            for name, by_domain in by_name.items()
        ],
    }


def _histogram(analysis: Analysis) -> Any:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(-1, 1, 81)
    for values, label, colour in (
        (analysis.same, "same thing", "#1a8a4a"),
        (analysis.best_wrong, "nearest other thing of each query", "#e07b00"),
        (analysis.different, "different things, random pairs", "#c8352b"),
    ):
        axes.hist(
            values,
            bins=bins.tolist(),
            density=True,
            histtype="stepfilled",
            alpha=0.4,
            color=colour,
            label=f"{label} (n = {len(values):,})",
        )
    axes.set(xlabel="cosine similarity", ylabel="density", xlim=(-0.6, 1))
    axes.legend(fontsize=8, frameon=False)
    return figure


def _domains(comparison: Comparison) -> Sequence[str]:
    return next(iter(comparison.results.values())).domains


def _table(comparison: Comparison, domain: str, featured: str) -> dict[str, Any]:
    """The rows of one domain; the best value of each metric is marked."""
    results = comparison.results
    values = {
        metric: {
            name: result.value(metric, domain=domain, protocol=comparison.scope)
            for name, result in results.items()
        }
        for metric in comparison.metrics
    }
    best = {
        metric: max([v for v in row.values() if not math.isnan(v)], default=None)
        for metric, row in values.items()
    }
    first = next(iter(results.values()))
    return {
        "domain": ("mean of the domains" if first.rules.mean == "domains" else "mean of the queries")
        if domain == MEAN
        else domain,
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
                        "interval": [
                            _percent(end)
                            for end in result.interval(metric, domain=domain, protocol=comparison.scope)
                        ],
                        "is_best": values[metric][name] == best[metric],
                    }
                    for metric in comparison.metrics
                ],
            }
            for name, result in results.items()
        ],
    }


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def _bar_chart(comparison: Comparison) -> Any:
    import matplotlib
    import matplotlib.figure

    metric = comparison.metrics[0]
    domains = [*_domains(comparison), MEAN]
    figure = matplotlib.figure.Figure(
        figsize=(9, 3.2 + 0.15 * len(comparison.results) / 3), layout="constrained"
    )
    axes = figure.subplots()
    width = 0.8 / len(comparison.results)
    # twenty colours where ten would come again
    colours = matplotlib.colormaps["tab10" if len(comparison.results) <= 10 else "tab20"]
    for number, (name, result) in enumerate(comparison.results.items()):
        places = [
            place + (number - (len(comparison.results) - 1) / 2) * width for place in range(len(domains))
        ]
        values = [100 * result.value(metric, domain=domain, protocol=comparison.scope) for domain in domains]
        ends = [
            [100 * end for end in result.interval(metric, domain=domain, protocol=comparison.scope)]
            for domain in domains
        ]
        below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
        above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
        axes.bar(
            places,
            values,
            width,
            label=as_drawn(name),
            color=colours(number % colours.N),
            yerr=[below, above],
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(range(len(domains)), [as_drawn(domain) for domain in domains])
    axes.set_ylabel(f"{title_of(metric)} %")
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
