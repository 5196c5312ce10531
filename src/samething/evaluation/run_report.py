"""The HTML report of a run: one self-contained file with tables, curves, a map and images."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from samething.evaluation.analysis import NUM_HITS, Analysis
from samething.evaluation.protocols import MEAN, SCOPES
from samething.evaluation.result import Comparison
from samething.metrics import title_of
from samething.pages import Cell, Table, Thumbnail, bars_url, drawing_url, image_url, new_axes, write_page


def write_report(
    target: Path,
    *,
    title: str,
    comparison: Comparison,
    featured: str,
    records: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    analysis: Analysis,
    opening: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of one run.

    Args:
        target: the HTML file.
        title: its heading.
        comparison: the embeddings that were compared.
        featured: name of the embedding that the report is about.
        records: lines of the run's metrics.jsonl, for the curves.
        facts: what was made from what, shown as a list.
        analysis: of the featured embedding.
        opening: what the report begins with: ``sentences``, ``advice``, and a drawing ``curve``.
    """
    domains = [*comparison.first.domains, MEAN]
    metric = comparison.first.protocol.metrics[0]
    named = {"loss": "training loss", "val/mmp@5": "validation mMP@5", "learning_rate": "learning rate"}
    points = {
        label: [(record["step"], record[name]) for record in records if name in record]
        for name, label in named.items()
    }
    curves = {}
    for label, own in points.items():
        if own:
            figure, axes = new_axes(4.2, 2.6, xlabel="step", title=label)
            axes.plot(*zip(*own, strict=True), linewidth=1.4)
            curves[label] = drawing_url(figure)
    return write_page(
        target,
        "run.html",
        title=title,
        opening=opening,
        facts=facts,
        featured=featured,
        scope=SCOPES[comparison.first.scope],
        tables=[comparison.table(domain, featured=featured) for domain in [MEAN, *domains[:-1]]],
        bars=bars_url(
            domains,
            {
                name: [found[domain][metric] for domain in domains]
                for name, found in comparison.shown_estimates.items()
            },
            label=f"{title_of(metric)} %",
        ),
        bar_metric=title_of(metric),
        differences=comparison.difference_table(featured) if len(comparison.results) > 1 else None,
        no_match=[(name, found.__rich__()) for name, found in comparison.no_match.items()],
        curves=curves,
        **_looked_at(analysis),
    )


_COLOURS: Final = (
    "#2867b2", "#e07b00", "#1a8a4a", "#c8352b", "#7a4fb5", "#8c5a3c", "#d657a5", "#5f6b76", "#a3a318", "#12a3b4",  # noqa: E501
)  # fmt: skip


def _looked_at(analysis: Analysis) -> dict[str, Any]:
    """What the page shows image by image; an image that is shown twice is read once."""
    names, counts, totals = analysis.confusions()
    rows: list[list[str | Cell]] = []
    for name, row, total in zip(names, counts.tolist(), totals.tolist(), strict=True):
        if not total:
            continue
        cells = [
            Cell(
                f"{count}",
                f"{100 * count / total:.0f} %" if count else "",
                style=f"background:rgba(200,53,43,{0.7 * count / total:.2f})",
            )
            for count in row
        ]
        rows.append([name, *cells, f"{total}"])
    figure, axes = new_axes(9.0, 2.8, xlabel="cosine similarity", ylabel="density", xlim=(-0.6, 1))
    for values, label, colour in (
        (analysis.same, "same instance", "#1a8a4a"),
        (analysis.best_wrong, "nearest other instance of each query", "#e07b00"),
        (analysis.different, "different instances, random pairs", "#c8352b"),
    ):
        if len(values) == 0:  # a test of one thing has nothing wrong to show
            continue
        axes.hist(
            values,
            bins=np.linspace(-1, 1, 81).tolist(),
            density=True,
            histtype="stepfilled",
            alpha=0.4,
            color=colour,
            label=f"{label} (n = {len(values):,})",
        )
    axes.legend(fontsize=8, frameon=False)
    histogram = drawing_url(figure)
    labels, domains = analysis.catalog.strings("label"), analysis.catalog.strings("domain")
    paths, url_of = analysis.catalog.paths, functools.cache(image_url)
    mapped, places, method = analysis.on_a_map()

    def shown(place: int) -> list[Thumbnail]:
        """A query and what it found."""
        asked = analysis.queries[place]
        query = Thumbnail(
            url_of(paths[asked]), labels[asked], domains[asked], kind="asked", alt=f"query: {labels[asked]}"
        )
        answers = zip(analysis.found[place], analysis.scores[place], analysis.is_right[place], strict=True)
        return [query] + [
            Thumbnail(
                url_of(paths[entry]),
                labels[entry],
                f"{score:.3f}",
                kind="right" if is_right else "wrong",
                mark="✓" if is_right else "✗",
            )
            for entry, score, is_right in list(answers)[:NUM_HITS]
            if entry >= 0
        ]

    return {
        "histogram": histogram,
        "confusions": Table("Confusions between domains", ["query", *names, "queries"], rows),
        "colours": {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)},
        "map_method": method,
        "points": [
            {"url": url_of(paths[row]), "label": labels[row], "domain": domains[row], "x": x, "y": y}
            for row, (x, y) in zip(mapped, places.tolist(), strict=True)
        ],
        "queries": [shown(place) for place in analysis.examples(15)],
        "worst": [shown(place) for place in analysis.worst(8)],
        "near_misses": [shown(place) for place in analysis.near_misses(8)],
    }
