"""``samething datasets``: which public data sets there are, and which of them are on this disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import rich.console
import rich.markup
import rich.table

from samething.datasets.dataset import Dataset
from samething.datasets.public import DATASETS, find_dataset
from samething.errors import ArtefactError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Presence:
    """What of a data set is on the disk."""

    dataset: Dataset
    missing: tuple[str, ...] | None
    """Promised files and folders that are not there; None where no data root was given."""

    @property
    def state(self) -> str:
        """``present``, ``in part`` or ``absent``; a question mark where it was not looked for."""
        if self.missing is None:
            return "?"
        if not self.missing:
            return "present"
        return "absent" if len(self.missing) == len(self.dataset.files) else "in part"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetsReport:
    """The data sets asked for; shows itself as a table, or one of them in full."""

    data_root: Path | None
    rows: tuple[Presence, ...]
    in_full: bool
    """Whether each is described in full."""

    def __rich__(self) -> rich.console.Group:
        if self.in_full:
            return rich.console.Group(*(_description(row, self.data_root) for row in self.rows))
        where = "" if self.data_root is None else f" below {self.data_root}"
        head = _columns("key", "domain", "classes", "images", "GB")
        lines = [f"[bold]{head}  on disk[/bold]{rich.markup.escape(where)}"]
        for row in self.rows:
            dataset = row.dataset
            numbers = map(_number, (dataset.classes, dataset.images, dataset.gigabytes))
            lines.append(f"{_columns(dataset.key, dataset.domain, *numbers)}  {_coloured(row.state)}")
            lines.append(f"  [dim]{rich.markup.escape(dataset.licence)}[/dim]")
            lines.append(f"  [dim]{rich.markup.escape(dataset.source)}[/dim]")
        lines += ["", "samething datasets KEY tells everything about one."]
        lines.append("samething catalog --dataset KEY --data-root FOLDER reads it.")
        if self.data_root is None:
            lines.append("samething datasets --data-root FOLDER says which are there.")
        return rich.console.Group(*lines)


def datasets(*keys: str, data_root: Path | None = None) -> DatasetsReport:
    """Say which public data sets can be read: domain, size, licence, where to get them, which are here.

    The paper's fifteen and M4D-35k, which is made of four of them, and benchmarks to measure on. Numbers are
    the published ones. With KEY, everything about those data sets: the files that must be there, what to run
    to get them, and what to know.

    Args:
        keys: data sets to describe in full; without any, a table of all.
        data_root: folder that holds the folders of all data sets; says which are there, and which files are
            missing.

    Raises:
        InputError: there is no data set of that name.
        ArtefactError: the data root is not a folder.
    """
    if data_root is not None and not Path(data_root).is_dir():
        raise ArtefactError(
            f"{data_root} is not a folder",
            expected="the folder that holds the folders of all data sets",
            next_step="check the path, or leave --data-root away",
        )
    asked: Sequence[Dataset] = [find_dataset(key) for key in keys] or list(DATASETS.values())
    rows = tuple(
        Presence(
            dataset=dataset,
            missing=None if data_root is None else tuple(dataset.missing(Path(data_root))),
        )
        for dataset in asked
    )
    return DatasetsReport(data_root=data_root, rows=rows, in_full=bool(keys))


def _columns(key: str, domain: str, classes: str, images: str, gigabytes: str) -> str:
    return f"{key:<22} {domain:<15} {classes:>8} {images:>12} {gigabytes:>7}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,}".removesuffix(".0")


def _coloured(state: str) -> str:
    colour = {"present": "green", "in part": "yellow"}.get(state, "dim")
    return f"[{colour}]{state}[/{colour}]"


def _description(row: Presence, data_root: Path | None) -> rich.table.Table:
    dataset = row.dataset
    escape = rich.markup.escape
    table = rich.table.Table(title=f"{dataset.key}: {escape(dataset.title)}", box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        ("domain", dataset.domain),
        ("classes", _number(dataset.classes)),
        ("images", _number(dataset.images)),
        *(("", escape(published.describe())) for published in dataset.published),
        ("gigabytes", _number(dataset.gigabytes)),
        ("licence", escape(dataset.licence)),
        ("from", escape(dataset.source)),
        ("to get it", escape(dataset.get)),
    ]
    for place, name in enumerate(dataset.files):
        absent = row.missing is not None and name in row.missing
        rows.append(("files" if not place else "", escape(name) + (" [red]missing[/red]" if absent else "")))
    if data_root is not None:
        rows.append(("on disk", f"{_coloured(row.state)} below {escape(str(data_root))}"))
    division = "training and test as published" if dataset.has_roles else "none: made when it is read"
    rows.append(("division", division))
    if dataset.margin_percent is not None:
        rows.append(("boxes", f"with a margin of {dataset.margin_percent:g} % at each side"))
    rows.append(("layout from", escape(dataset.layout)))
    if dataset.note:
        rows.append(("note", escape(dataset.note)))
    for both in rows:
        table.add_row(*both)
    return table
