"""Near-duplicates of a whole index: groups of images that look alike, whatever their files are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import rich.table
from rich.text import Text

from samething.errors import InputError
from samething.files import Json
from samething.index import AbstractIndex
from samething.progress import progress_bar

_QUERIES_AT_A_TIME = 512


@dataclasses.dataclass(frozen=True)
class DuplicateGroup:
    """Images of which each is as similar to another of the group as was asked for."""

    items: tuple[Mapping[str, Any], ...]
    """Metadata of each, by path."""
    lowest: float
    """Lowest similarity of the links that hold the group together."""


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """All groups of an index."""

    groups: tuple[DuplicateGroup, ...]
    """Largest first."""
    min_score: float
    num_images: int
    """Images that were compared."""

    def to_json(self) -> dict[str, Json]:
        """Plain values."""
        return {
            "min_score": self.min_score,
            "num_images": self.num_images,
            "groups": [
                {"lowest": group.lowest, "items": [dict(item) for item in group.items]}
                for group in self.groups
            ],
        }

    def __rich__(self) -> rich.table.Table:
        """A row per image, a line between groups."""
        table = rich.table.Table(
            title=Text(
                f"{len(self.groups):,} groups among {self.num_images:,} images, similarity ≥ {self.min_score}"
            ),
            title_justify="left",
        )
        for name in ("group", "lowest", "label", "image"):
            table.add_column(name, justify="left" if name in ("label", "image") else "right", overflow="fold")
        for number, group in enumerate(self.groups, start=1):
            for place, item in enumerate(group.items):
                first = (str(number), f"{group.lowest:.3f}") if place == 0 else ("", "")
                table.add_row(*first, Text(item.get("label") or ""), Text(item.get("path") or ""))
            table.add_section()
        return table


def near_duplicates(index: AbstractIndex, *, min_score: float, k: int = 20) -> Duplicates:
    """Group the images of an index whose similarity is at least ``min_score``.

    Each image is linked with its ``k`` nearest; the groups are what the links connect. Files of equal
    content are one row of the index and are listed with it.

    Raises:
        InputError: a similarity outside of (0, 1].
    """
    if not 0 < min_score <= 1:
        raise InputError(
            f"a similarity of {min_score}", expected="more than 0 and at most 1", next_step="0.95 is a start"
        )
    columns = ["path", "label", "domain"]
    if "paths" in index.description.extra_columns:
        columns.append("paths")
    items = {row["id"]: row for batch in index.items(columns=columns) for row in batch.to_pylist()}
    parent = {name: name for name in items}
    lowest: dict[str, float] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    ids = sorted(items)
    with progress_bar("images") as progress:
        task = progress.add_task("compare", total=len(ids))
        for start in range(0, len(ids), _QUERIES_AT_A_TIME):
            part = ids[start : start + _QUERIES_AT_A_TIME]
            hits = index.search(index.vectors(part), k + 1, columns=[])
            for name, others, scores in zip(part, hits.ids, hits.scores, strict=True):
                for other, score in zip(others, scores, strict=True):
                    if other == name or score < min_score - 1e-9 or other not in parent:
                        continue
                    one, two = sorted((root(name), root(other)))
                    parent[two] = one
                    lowest[one] = min(lowest.get(one, 1.0), lowest.get(two, 1.0), float(score))
            progress.advance(task, len(part))
    members: dict[str, list[str]] = {}
    for name in ids:
        members.setdefault(root(name), []).append(name)
    groups = [
        DuplicateGroup(
            tuple(sorted((items[name] for name in names), key=lambda item: item["path"] or "")),
            lowest.get(top, 1.0),
        )
        for top, names in members.items()
        if len(names) > 1 or len(items[top].get("paths") or []) > 1
    ]
    order = np.argsort(
        [-sum(len(item.get("paths") or [0]) for item in group.items) for group in groups], kind="stable"
    )
    return Duplicates(tuple(groups[place] for place in order), min_score, len(ids))
