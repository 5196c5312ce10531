"""A study's result for people and programs: results.parquet, report.md and report.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from samething.files import Json, atomic_path, write_json, write_text
from samething.pages import Table, write_page
from samething.statistics import percent
from samething.study.contest import Contest, Questions
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

    def __rich__(self) -> str:
        from rich.markup import escape

        lines = [f"[bold]{escape(self.title)}[/bold] in {escape(str(self.folder))}"]
        lines += [f"  {escape(finding)}" for finding in self.findings]
        return "\n".join([*lines, f"  tables and figures: {escape(str(self.folder / 'report.html'))}"])


def conclude(
    folder: StudyFolder,
    title: str,
    facts: Mapping[str, str],
    findings: Sequence[str],
    tables: Sequence[Table],
    rows: Sequence[Mapping[str, Any]],
    figures: Mapping[str, str],
    *,
    chosen: Mapping[str, Json],
    recipe: Mapping[str, Json] | None = None,
) -> StudyResult:
    """End a study: results.parquet, report.md, report.html, chosen.json and, last, the manifest.

    Args:
        folder: the study's.
        title: of the report.
        facts: what was asked, under which conditions.
        findings: what came out, in sentences.
        tables: of the report.
        rows: the result table as numbers.
        figures: URLs of drawings by their titles.
        chosen: what was chosen on validation images.
        recipe: content of chosen.json, where that is more.
    """
    result = StudyResult(
        folder.folder, title, facts, findings, tables, rows, chosen=chosen, num_new=folder.num_new
    )
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    with atomic_path(result.folder / "results.parquet") as partial:
        pq.write_table(table, partial, compression="zstd")
    write_text(result.folder / "report.md", result.markdown())
    values = {"title": title, "facts": facts, "findings": findings, "tables": tables, "figures": figures}
    write_page(result.folder / "report.html", "study.html", **values)
    write_json(result.folder / "chosen.json", dict(recipe or chosen))
    folder.finish({"chosen": dict(chosen), "num_trials": len(folder.trials)})
    return result


def shown(row: Mapping[str, Any], part: str, *, sign: bool = False) -> str:
    """A score of a result row with its interval, and with the standard deviation over seeds if it has one.

    >>> shown({"val": 0.5, "val_low": 0.4, "val_high": 0.6, "val_spread": 0.01}, "val")
    '50.0 (40.0–60.0) ±1.0'
    """
    text = percent(row[part], row[f"{part}_low"], row[f"{part}_high"], sign=sign)
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


def queries_said(contest: Contest) -> str:
    """How many questions were asked."""
    val, test = len(contest.val.domain_of), len(contest.test.domain_of)
    return f"{val:,} of validation, {test:,} of test, of unseen instances"


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
