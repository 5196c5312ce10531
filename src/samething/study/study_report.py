"""A study's result for people and programs: results.parquet, report.md and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from samething.files import Json, atomic_path, write_json, write_text
from samething.pages import Table, as_drawn, new_axes, write_page
from samething.study.questions import Questions, percent
from samething.study.study_folder import StudyFolder


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


def conclude(
    folder: StudyFolder, result: StudyResult, figures: Mapping[str, Any], *, recipe: Mapping[str, Json]
) -> StudyResult:
    """End a study: its report, chosen.json and, last, the manifest.

    Args:
        folder: the study's.
        result: what it found.
        figures: matplotlib figures by their titles.
        recipe: content of chosen.json.

    Returns:
        The result.
    """
    result.write(figures)
    write_json(folder.folder / "chosen.json", dict(recipe))
    folder.finish({"chosen": dict(result.chosen), "num_trials": len(folder.trials)})
    return result


def shown(row: Mapping[str, Any], part: str, *, sign: bool = False) -> str:
    """A score of a result row with its interval, and with the standard deviation over seeds if it has one.

    >>> shown({"val": 0.5, "val_low": 0.4, "val_high": 0.6, "val_spread": 0.01}, "val")
    '50.0 (40.0–60.0) ±1.0'
    """
    text = percent(row[part], (row[f"{part}_low"], row[f"{part}_high"]), sign=sign)
    return f"{text} ±{100 * row[f'{part}_spread']:.1f}" if f"{part}_spread" in row else text


def domain_cells(row: Mapping[str, Any], questions: Questions) -> list[str]:
    """The score in each domain."""
    return [percent(row[f"{questions.part} {domain}"]) for domain in questions.domains]


def domain_table(rows: Sequence[Mapping[str, Any]], test: Questions, columns: Sequence[str]) -> Table:
    """Test scores of each domain; ``columns`` name the rows."""
    return Table(
        "Test mMP@5 % per domain",
        [*columns, *test.domains],
        [[*(str(row[name]) for name in columns), *domain_cells(row, test)] for row in rows],
    )


def queries_said(val: Questions, test: Questions) -> str:
    """How many questions were asked."""
    return f"{len(val.domain_of):,} of validation, {len(test.domain_of):,} of test, of unseen instances"


def said_of_others(upper_ends: Mapping[str, float]) -> str:
    """Which others are not behind the chosen one for certain.

    Args:
        upper_ends: of the interval of each one's difference to the chosen one on test.

    >>> said_of_others({"a": 0.002, "b": -0.01})
    'Not told apart from it on test (interval of the paired difference reaches 0), or better: a.'
    """
    if not upper_ends:
        return "Nothing else was compared with it."
    near = [name for name, high in upper_ends.items() if high >= 0]
    if not near:
        return "All others are behind it on test for certain (95 % intervals of the paired differences)."
    said = "Not told apart from it on test (interval of the paired difference reaches 0), or better"
    return f"{said}: {', '.join(near)}."


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
