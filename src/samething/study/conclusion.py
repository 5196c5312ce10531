"""What all studies say in one way: scores in cells, what the test cannot tell apart, and their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samething.files import Json, write_json
from samething.pages import Table
from samething.study.questions import Questions, percent
from samething.study.study_folder import StudyFolder
from samething.study.study_report import StudyResult


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
