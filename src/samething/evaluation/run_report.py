"""The HTML report of a run: one self-contained file with tables, curves, a map and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from samething.arrays import Embeddings
from samething.evaluation.analysis import Analysis, MapPoint, ShownQuery, map_of
from samething.evaluation.comparison import Comparison
from samething.evaluation.protocols import MEAN, title_of_scope
from samething.metrics import title_of
from samething.pages import Cell, Table, Thumbnail, bars_figure, image_url, new_axes, write_page


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
    opening: Mapping[str, Any] | None = None,
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
        opening: what the report begins with: ``sentences``, ``advice``, and a figure ``curve``.
    """
    domains = [*comparison.first.domains, MEAN]
    metric = comparison.metrics[0]
    curves = {}
    for name, label in (
        ("loss", "training loss"),
        ("val/mmp@5", "validation mMP@5"),
        ("learning_rate", "learning rate"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            curves[label], axes = new_axes(4.2, 2.6, xlabel="step", title=label)
            axes.plot(*zip(*points, strict=True), linewidth=1.4)
    return write_page(
        target,
        "run.html",
        title=title,
        opening=opening,
        facts=facts,
        featured=featured,
        scope=title_of_scope(comparison.scope),
        tables=[comparison.table(domain, featured=featured) for domain in [MEAN, *domains[:-1]]],
        bars=bars_figure(
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
        **_looked_at(queries, analysis, embeddings),
    )


_COLOURS: Final = (
    "#2867b2", "#e07b00", "#1a8a4a", "#c8352b", "#7a4fb5", "#8c5a3c", "#d657a5", "#5f6b76", "#a3a318", "#12a3b4",  # noqa: E501
)  # fmt: skip


def _looked_at(
    queries: Sequence[ShownQuery], analysis: Analysis | None, embeddings: Embeddings | None
) -> dict[str, Any]:
    """What the page shows image by image; an image that is shown twice is read once."""
    groups = {"queries": queries, "worst": (), "near_misses": ()}
    points: Sequence[MapPoint] = ()
    content: dict[str, Any] = {"histogram": None, "confusions": None}
    if analysis is not None:
        groups |= {"worst": analysis.worst(8), "near_misses": analysis.near_misses(8)}
        names, counts, totals = analysis.confusions()
        if embeddings is not None:
            points, content["map_method"] = map_of(embeddings, analysis.catalog)
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
        content["histogram"] = figure
        content["confusions"] = Table("Confusions between domains", ["query", *names, "queries"], rows)
        content["colours"] = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    paths = [point.path for point in points]
    for query in (query for group in groups.values() for query in group):
        paths += [query.path, *(hit.path for hit in query.hits)]
    urls = {path: image_url(path) for path in dict.fromkeys(paths)}
    for name, group in groups.items():
        content[name] = [
            [
                Thumbnail(urls[one.path], one.label, one.domain, kind="asked", alt=f"query: {one.label}"),
                *(
                    Thumbnail(
                        urls[hit.path],
                        hit.label,
                        f"{hit.score:.3f}",
                        kind="right" if hit.is_right else "wrong",
                        mark="✓" if hit.is_right else "✗",
                    )
                    for hit in one.hits
                ),
            ]
            for one in group
        ]
    return {**content, "points": points, "urls": urls}
