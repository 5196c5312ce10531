"""A study's result for people and programs: results.parquet, report.md and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from samething.files import atomic_path, write_text
from samething.pages import Table, as_drawn, new_axes, write_page


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """What a study found; its folder holds the same as results.parquet, report.md and report.html."""

    folder: Path
    title: str
    facts: Mapping[str, str]
    """What was asked, under which conditions."""
    findings: Sequence[str]
    """What came out, in sentences."""
    tables: Sequence[Table]
    rows: Sequence[Mapping[str, Any]]
    """The result table as numbers; shares in [0, 1]."""
    chosen: Mapping[str, Any]
    """What was chosen on the validation images, as JSON."""
    num_new: int = 0
    """Trials that were run now, rather than found in the log."""

    def markdown(self) -> str:
        """The report as Markdown."""
        parts = [f"# {self.title}", "\n".join(f"- {name}: {text}" for name, text in self.facts.items())]
        parts += ["\n".join(f"- {finding}" for finding in self.findings)]
        parts += [f"## {table.title}\n\n{table.markdown()}" for table in self.tables]
        return "\n\n".join(parts) + "\n"

    def write(self, figures: Mapping[str, Any]) -> None:
        """Write the three files.

        Args:
            figures: matplotlib figures by their titles.
        """
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        table = pa.table({name: [row.get(name) for row in self.rows] for name in names})
        with atomic_path(self.folder / "results.parquet") as partial:
            pq.write_table(table, partial, compression="zstd")
        write_text(self.folder / "report.md", self.markdown())
        write_page(
            self.folder / "report.html",
            "study.html",
            title=self.title,
            facts=self.facts,
            findings=self.findings,
            tables=self.tables,
            figures=figures,
        )

    def __rich__(self) -> str:
        from rich.markup import escape

        lines = [f"[bold]{escape(self.title)}[/bold] in {escape(str(self.folder))}"]
        lines += [f"  {escape(finding)}" for finding in self.findings]
        return "\n".join([*lines, f"  tables and figures: {escape(str(self.folder / 'report.html'))}"])


# ---- drawings


@dataclasses.dataclass(frozen=True)
class Point:
    """One thing of a bubble chart."""

    name: str
    series: str
    """What has a colour of its own."""
    x: float
    score: float
    """A share."""
    is_on_front: bool
    """Whether no other one beats it."""
    area: float = 1.0
    """Size of the bubble, relative to the others."""


def bubble_figure(points: Sequence[Point], *, x_label: str, y_label: str) -> Any:
    """Scores over a logarithmic axis: a number per thing, a colour per series, filled and joined in front."""
    from matplotlib.lines import Line2D

    figure, axes = new_axes(10.0, 4.6, xlabel=x_label, ylabel=y_label)
    numbers = {name: str(number) for number, name in enumerate(dict.fromkeys(p.name for p in points), 1)}
    colours = {series: f"C{number}" for number, series in enumerate(dict.fromkeys(p.series for p in points))}
    largest = max(point.area for point in points)
    for point in points:
        colour = colours[point.series]
        axes.scatter(
            [point.x],
            [100 * point.score],
            s=60 + 240 * point.area / largest,
            facecolor=colour if point.is_on_front else "white",
            edgecolor=colour,
            zorder=4 if point.is_on_front else 2,
        )
        axes.annotate(
            numbers[point.name],
            (point.x, 100 * point.score),
            ha="center",
            va="center",
            fontsize=8,
            zorder=5 if point.is_on_front else 3,
            color="white" if point.is_on_front else "black",
        )
    front = sorted((point.x, point.score) for point in points if point.is_on_front)
    axes.plot([x for x, _ in front], [100 * share for _, share in front], "k", linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    handles = [Line2D([], [], ls="", marker="o", color=colour) for colour in colours.values()]
    handles += [Line2D([], [], ls="", marker=f"${number}$", color="black") for number in numbers.values()]
    axes.legend(
        handles, [as_drawn(name) for name in (*colours, *numbers)], loc="center left",
        bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def pareto_front(costs: Sequence[int | float], scores: Sequence[int | float]) -> list[bool]:
    """Points that no other one beats: none costs less and scores as much, or costs as much and scores more.

    >>> pareto_front([1, 2, 3, 3], [0.5, 0.4, 0.6, 0.7])
    [True, False, False, True]
    """
    pairs = list(zip(costs, scores, strict=True))
    return [
        not any(
            other_cost <= cost and other_score >= score and (other_cost, other_score) != (cost, score)
            for other_cost, other_score in pairs
        )
        for cost, score in pairs
    ]
