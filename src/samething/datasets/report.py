"""The result of ``samething catalog``: the catalog, what is not in it and why, and what looks odd in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import rich.console
import rich.markup

from samething.catalog import Catalog
from samething.datasets.listing import Dropped
from samething.files import write_csv
from samething.pages import Cell, Cells, Table

DROPPED_SUFFIX: Final = ".dropped.csv"

_LINES_SHOWN: Final = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatalogReport:
    """A catalog that was written, with everything that a person should know about it."""

    catalog: Catalog
    path: Path
    """The file written."""
    dropped: tuple[Dropped, ...]
    """Images left out; also in ``PATH.dropped.csv``."""
    warnings: tuple[str, ...]
    """What looks odd: the same image under two labels, labels with one image only, …"""
    passed_over: Mapping[str, int]
    """Number of files that are no images, by suffix, and of folders that were not looked into."""

    @property
    def counts(self) -> list[dict[str, object]]:
        """Rows of ``domain``, ``role``, ``instances`` and ``images``."""
        return self.catalog.counts()

    @property
    def exit_status(self) -> int:
        """0 when every image is in the catalog, 3 when some were dropped."""
        return 3 if self.dropped else 0

    def __rich__(self) -> rich.console.Group:
        escape = rich.markup.escape
        rows = [
            [str(row["domain"]), str(row["role"]), f"{row['instances']:,}", f"{row['images']:,}"]
            for row in self.counts
        ]
        columns: Cells = ["domain", Cell("role", kind="text"), "things", "images"]
        table = Table(f"{len(self.catalog):,} images in {self.path}", columns, rows)
        lines = [f"[yellow]warning[/yellow] {escape(line)}" for line in _shortened(self.warnings)]
        if self.passed_over:
            kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in self.passed_over.items())
            lines.append(f"[dim]passed over: {escape(kinds)}[/dim]")
        if self.dropped:
            where = escape(f"{self.path}{DROPPED_SUFFIX}")
            lines.append(f"[red]images dropped: {len(self.dropped):,}[/red], listed in {where}:")
            reasons = [f"{entry.image}: {entry.reason}" for entry in self.dropped]
            lines += [f"  {escape(line)}" for line in _shortened(reasons)]
        return rich.console.Group(table.printed(), *lines)


def _shortened(lines: tuple[str, ...] | list[str]) -> list[str]:
    """The first lines and how many more there are."""
    more = len(lines) - _LINES_SHOWN
    return [*lines[:_LINES_SHOWN], f"… and {more:,} more"] if more > 0 else list(lines)


def single_images(catalog: Catalog) -> list[str]:
    """Which labels cannot be trained on because they have one image only."""
    training = catalog.take(catalog.has_role("train"))
    classes = training.class_ids()
    single = training.strings("label")[np.bincount(classes)[classes] == 1]
    if not len(single):
        return []
    examples = ", ".join(single[:3]) + (", …" if len(single) > 3 else "")
    return [f"labels with one image only, which cannot be trained on: {len(single)} ({examples})"]


def write_dropped(target: Path, dropped: tuple[Dropped, ...]) -> None:
    """Write the images left out beside the catalog, or remove the list of an earlier run."""
    path = Path(f"{target}{DROPPED_SUFFIX}")
    if not dropped:
        path.unlink(missing_ok=True)
        return
    write_csv(path, ["image", "reason"], [(entry.image, entry.reason) for entry in dropped])
