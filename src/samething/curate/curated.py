"""The result of ``samething curate``: what stayed, what was dropped and why, and what to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import rich.console
import rich.markup
import rich.table

from samething.catalog import Catalog
from samething.curate.duplicates import Relation
from samething.curate.ledger import MEANINGS, Rule


@dataclasses.dataclass(frozen=True)
class DomainCounts:
    """Training images and classes of one domain, before and after."""

    domain: str
    classes_before: int
    classes_after: int
    images_before: int
    images_after: int

    @property
    def numbers(self) -> list[str]:
        """Cells of a table."""
        numbers = (self.classes_before, self.classes_after, self.images_before, self.images_after)
        return [f"{number:,}" for number in numbers]


@dataclasses.dataclass(frozen=True)
class PublishedCounts:
    """A part of a recipe beside what its authors published."""

    dataset: str
    """``all`` for everything together."""
    classes: int
    images: int
    published_classes: int | None
    published_images: int | None

    @property
    def difference(self) -> str:
        """Images more or fewer than published, in percent."""
        if not self.published_images:
            return "–"
        return f"{100 * (self.images / self.published_images - 1):+.1f} %"

    @property
    def cells(self) -> list[str]:
        """Cells of a table: data set, classes, published, images, published, difference."""
        numbers = (self.classes, self.published_classes, self.images, self.published_images)
        shown = ["–" if number is None else f"{number:,}" for number in numbers]
        return [self.dataset, *shown, self.difference]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curation:
    """A curated catalog that was written, with everything that was decided on the way."""

    catalog: Catalog
    path: Path
    """The file written."""
    report: Path
    """The HTML page."""
    counts: Sequence[DomainCounts]
    """Training images per domain."""
    dropped: Mapping[Rule, int]
    """Dropped images by rule; each is a row of ``PATH.dropped.csv``."""
    dropped_table: pa.Table
    """Columns image, label, domain, dataset, role, rule, reason, instead."""
    pairs: Mapping[Relation, int]
    """Pairs that show one image, by what they are to each other; each is a row of ``PATH.pairs.csv``."""
    pair_table: pa.Table
    """Columns first_… and second_… (image, label, dataset, role), relation, method, score, closeness,
    became."""
    published: Sequence[PublishedCounts] = ()
    """For a recipe: its numbers beside the published ones."""
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

    def __rich__(self) -> rich.console.Group:
        escape = rich.markup.escape
        table = rich.table.Table(title=f"{len(self.catalog):,} images in {escape(str(self.path))}")
        table.add_column("domain (training)")
        for name in ("classes before", "after", "images before", "after"):
            table.add_column(name, justify="right")
        for row in self.counts:
            table.add_row(escape(row.domain), *row.numbers)
        parts: list[rich.console.RenderableType] = [table]
        lines = [f"{number:,} dropped: {MEANINGS[rule]}" for rule, number in self.dropped.items()]
        lines += [f"{number:,} pairs found: {name}" for name, number in self.pairs.items()]
        if self.published:
            parts.append(self._published_table())
        lines += [f"[yellow]note[/yellow] {escape(note)}" for note in self.notes]
        lines.append(f"why: {escape(str(self.path))}.dropped.csv; images: {escape(str(self.report))}")
        return rich.console.Group(*parts, *lines)

    def _published_table(self) -> rich.table.Table:
        table = rich.table.Table(title="beside the published numbers")
        table.add_column("data set")
        for name in ("classes", "published", "images", "published", "difference"):
            table.add_column(name, justify="right")
        for row in self.published:
            table.add_row(*row.cells)
        return table
