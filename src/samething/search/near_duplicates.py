"""Near-duplicates of a whole index: groups of images that look alike, whatever their files are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import rich.table
from rich.text import Text

from samething.errors import InputError
from samething.files import Json
from samething.index import AbstractIndex
from samething.progress import progress_bar
from samething.rerank import Shown
from samething.search.looking_again import SecondLook

Link: TypeAlias = tuple[str, str, float]
"""Two ids and their similarity."""
_NEIGHBOURS: Final = 20
_QUERIES_AT_A_TIME: Final = 512
_SAME_PIXELS: Final = 0.95
"""Correlation that makes two images one without any look at places, as in curation."""


@dataclasses.dataclass(frozen=True)
class DuplicateGroup:
    """Images of which each is as similar to another of the group as was asked for."""

    items: tuple[Mapping[str, Any], ...]
    """Metadata of each, by path."""
    lowest: float
    """Lowest similarity of the links that hold the group together."""
    verified: tuple[Mapping[str, Json], ...] = ()
    """Of links that were verified: ids of both images, similarity, correlation of the pixels, and where that
    was not enough how many places agree, and which (``points``, as in a match's evidence)."""


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """All groups of an index."""

    groups: tuple[DuplicateGroup, ...]
    """Largest first."""
    min_score: float
    num_images: int
    """Images that were compared."""
    verify: str | None = None
    """What verified the links."""

    def to_json(self) -> dict[str, Json]:
        """Plain values."""
        return {
            "min_score": self.min_score,
            "num_images": self.num_images,
            "verify": self.verify,
            "groups": [
                {
                    "lowest": group.lowest,
                    "items": [dict(item) for item in group.items],
                    "verified": [dict(link) for link in group.verified],
                }
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


def verified_links(look: SecondLook, links: Sequence[Link]) -> Iterator[Mapping[str, Json] | None]:
    """What is told of each link whose images have the same pixels, or of which one was made of the other.

    None for the others: images of two things, or two photographs of one.

    Args:
        look: of an index; what it keeps of images is used and added to.
        links: of that index.

    Raises:
        MissingExtraError: OpenCV is not installed.
    """
    from samething.curate.same_image import pair_similarities
    from samething.rerank.laid_over import copy_check

    ids = sorted({name for link in links for name in link[:2]})
    numbers = {name: number for number, name in enumerate(ids)}

    def shown(number: int) -> Shown:
        return look.shown(look.index.rows([ids[number]]).to_pylist())[0]

    check = copy_check(shown, look.kept)
    pairs = [(numbers[one], numbers[other]) for one, other, _ in links]
    closeness = pair_similarities(
        lambda number: shown(number).image(), [(*pair, False) for pair in pairs], least=_SAME_PIXELS
    )
    for pair, (one, other, score), pixels in zip(pairs, links, closeness.tolist(), strict=True):
        told = {"first": one, "second": other, "score": score}
        if pixels >= _SAME_PIXELS:
            yield {**told, "closeness": pixels, "agreeing": 0, "points": []}
        elif (copy := check(*pair)) is not None:
            points = [list(point) for point in copy.evidence.points]
            agreeing = copy.evidence.num_agreeing
            yield {**told, "closeness": copy.closeness, "agreeing": agreeing, "points": points}
        else:
            yield None


def near_duplicates(index: AbstractIndex, *, min_score: float, look: SecondLook | None = None) -> Duplicates:
    """Group the images of an index whose similarity is at least ``min_score``.

    Each image is linked with its 20 nearest; the groups are what the links connect. Files of equal
    content are one row of the index and are listed with it.

    Args:
        index: the index.
        min_score: similarity of a link.
        look: count only links that it verifies; None: all.

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
    links = _links(index, sorted(items), min_score)
    told: list[Mapping[str, Json]] = []
    if look is not None:
        found = list(verified_links(look, links))
        links = [link for link, one in zip(links, found, strict=True) if one is not None]
        told = [one for one in found if one is not None]
    parent = {name: name for name in items}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for one, other, _ in links:
        first, second = sorted((root(one), root(other)))
        parent[second] = first
    lowest: dict[str, float] = {}
    for one, _, score in links:
        lowest[root(one)] = min(lowest.get(root(one), 1.0), score)
    verified: dict[str, list[Mapping[str, Json]]] = {}
    for (one, _, _), link in zip(links, told, strict=False):
        verified.setdefault(root(one), []).append(link)
    members: dict[str, list[str]] = {}
    for name in sorted(items):
        members.setdefault(root(name), []).append(name)
    groups = [
        DuplicateGroup(
            tuple(sorted((items[name] for name in names), key=lambda item: item["path"] or "")),
            lowest.get(top, 1.0),
            tuple(verified.get(top, ())),
        )
        for top, names in members.items()
        if len(names) > 1 or len(items[top].get("paths") or []) > 1
    ]
    order = np.argsort(
        [-sum(len(item.get("paths") or [0]) for item in group.items) for group in groups], kind="stable"
    )
    verify = None if look is None else look.reranker.name
    return Duplicates(tuple(groups[place] for place in order), min_score, len(items), verify)


def _links(index: AbstractIndex, ids: Sequence[str], min_score: float) -> list[Link]:
    """Each pair of ids once that are near each other, the lower id first, in the order of the ids."""
    found: dict[tuple[str, str], float] = {}
    known = set(ids)
    with progress_bar("images") as progress:
        task = progress.add_task("compare", total=len(ids))
        for start in range(0, len(ids), _QUERIES_AT_A_TIME):
            part = ids[start : start + _QUERIES_AT_A_TIME]
            hits = index.search(index.vectors(part), _NEIGHBOURS + 1, columns=[])
            for name, others, scores in zip(part, hits.ids, hits.scores, strict=True):
                for other, score in zip(others, scores, strict=True):
                    if other != name and score >= min_score - 1e-9 and other in known:
                        pair = (min(name, other), max(name, other))
                        found[pair] = min(found.get(pair, 1.0), float(score))
            progress.advance(task, len(part))
    return [(*pair, score) for pair, score in sorted(found.items())]
