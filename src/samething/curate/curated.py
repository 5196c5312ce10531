"""The result of ``samething curate``: what stayed, what was dropped and why, and what to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import rich.console
import rich.markup

from samething.catalog import Catalog
from samething.curate.duplicates import Relation
from samething.curate.ledger import MEANINGS, Rule
from samething.pages import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curation:
    """A curated catalog that was written, with everything that was decided on the way."""

    catalog: Catalog
    path: Path
    """The file written."""
    report: Path
    """The HTML page."""
    counts: Mapping[str, Sequence[int]]
    """Per domain: classes of training before and after, images of training before and after."""
    dropped: Mapping[Rule, int]
    """Dropped images by rule; each is a row of ``PATH.dropped.csv``."""
    dropped_table: pa.Table
    """Columns image, label, domain, dataset, role, rule, reason, instead."""
    pairs: Mapping[Relation, int]
    """Pairs that show one image, by what they are to each other; each is a row of ``PATH.pairs.csv``."""
    pair_table: pa.Table
    """Columns first_… and second_… (image, label, dataset, role), relation, method, score, closeness,
    became."""
    published: Mapping[str, tuple[int, int | None, int, int | None]] = dataclasses.field(default_factory=dict)
    """For a recipe, per data set and of ``all``: classes, those published, images, those published."""
    notes: Sequence[str] = ()
    """What was refined, and what could not be looked at."""

    @property
    def num_unreadable(self) -> int:
        """Files that could not be read."""
        return self.dropped.get("unreadable", 0)

    @property
    def exit_status(self) -> int:
        """0, or 3 when files could not be read."""
        return 3 if self.num_unreadable else 0

    @property
    def tables(self) -> list[Table]:
        """The training images by domain, and for a recipe the published numbers beside its own."""
        rows = []
        for domain, numbers in self.counts.items():
            kept = f"{100 * numbers[3] / numbers[2]:.1f} %" if numbers[2] else "–"
            rows.append([domain, *(f"{number:,}" for number in numbers), kept])
        columns = ["domain (training)", "classes before", "after", "images before", "after", "kept"]
        tables = [Table("", columns, rows)]
        if self.published:
            rows = []
            for dataset, found in self.published.items():
                difference = f"{100 * (found[2] / found[3] - 1):+.1f} %" if found[3] else "–"
                cells = ["–" if number is None else f"{number:,}" for number in found]
                rows.append([dataset, *cells, difference])
            columns = ["data set", "classes", "published", "images", "published", "difference"]
            tables.append(Table("beside the published numbers", columns, rows))
        return tables

    def __rich__(self) -> rich.console.Group:
        escape = rich.markup.escape
        first, *further = self.tables
        first = dataclasses.replace(first, title=f"{len(self.catalog):,} images in {self.path}")
        lines = [f"{number:,} dropped: {MEANINGS[rule]}" for rule, number in self.dropped.items()]
        lines += [f"{number:,} pairs found: {name}" for name, number in self.pairs.items()]
        lines += [f"[yellow]note[/yellow] {escape(note)}" for note in self.notes]
        lines.append(f"why: {escape(str(self.path))}.dropped.csv; images: {escape(str(self.report))}")
        return rich.console.Group(*(table.printed() for table in (first, *further)), *lines)
