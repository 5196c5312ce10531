"""Bringing an index up to date with its images, with as little reading and embedding as can be.

A file whose size and time of change are as they were is not read. One that moved or was renamed is known by
its content and keeps its vector. New rows are stored before old ones go, so that a killed run leaves every
image findable, and the next run goes on after what was stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from samething.errors import ImageError, InputError
from samething.images import Source, checksum, in_threads
from samething.index import AbstractIndex
from samething.search.collection import FILE_COLUMNS, content_id, files_of


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a call did to an index."""

    num_added: int = 0
    """Images embedded and stored."""
    num_kept: int = 0
    """Files that were in the index already, unchanged."""
    num_moved: int = 0
    """Files found at a new place: renamed, moved or copied; nothing was embedded for them."""
    num_dropped: int = 0
    """Rows removed because none of their files is there any more."""
    num_read: int = 0
    """Files that were read to learn their content."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Path and reason of each image that could not be read."""
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Files that are no images, by suffix, and folders that were not looked into, by what they are."""
    blank: tuple[str, ...] = ()
    """Path of each new image that is of one colour all over."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What has to be done."""

    new: dict[str, list[Source]]
    """Content that has no row yet, with its files; it is embedded."""
    changed: dict[str, list[Source]]
    """Rows whose files are others than before; they keep their vectors."""
    gone: list[str]
    """Rows without a file."""
    changes: Changes
    """What is known of the changes before anything is embedded."""


def make_plan(index: AbstractIndex, found: Sequence[Source], *, drop: bool) -> Plan:
    """Compare the files that there are with those that the index knows.

    Args:
        index: the index.
        found: the files of all its collections.
        drop: whether files that were not found leave the index; otherwise they stay.

    Raises:
        InputError: an index of an earlier version, which does not know its files.
    """
    rows = _known_rows(index)
    content_of: dict[str, str] = {}
    known: dict[str, Source] = {}
    for name, files in rows.items():
        for file in files:
            known[file.key], content_of[file.key] = file, name
    present = {file.key: file for file in found}
    same = {
        place: None  # in the order of the files
        for place, file in present.items()
        if file.mark and place in known and file.mark == known[place].mark
    }
    after: dict[str, list[Source]] = {}
    for place in same:
        after.setdefault(content_of[place], []).append(present[place])
    if not drop:
        for place, file in known.items():
            if place not in present:
                after.setdefault(content_of[place], []).append(file)
    to_read = [file for place, file in present.items() if place not in same]
    unreadable: list[tuple[str, str]] = []
    num_moved = 0
    for file, found_out in zip(to_read, in_threads(checksum, to_read), strict=True):
        if isinstance(found_out, ImageError):
            unreadable.append((file.location, found_out.reason))
            if file.key in known:  # it may be readable again tomorrow
                after.setdefault(content_of[file.key], []).append(known[file.key])
            continue
        content = content_id(found_out, file.box)
        num_moved += content in rows and content_of.get(file.key) != content
        after.setdefault(content, []).append(file)
    changed = {name: files for name, files in after.items() if name in rows and _differ(files, rows[name])}
    gone = [name for name in rows if name not in after]
    return Plan(
        new={name: files for name, files in after.items() if name not in rows},
        changed=changed,
        gone=gone,
        changes=Changes(
            num_kept=len(same),
            num_moved=num_moved,
            num_dropped=len(gone),
            num_read=len(to_read),
            unreadable=tuple(unreadable),
        ),
    )


def _differ(files: list[Source], others: list[Source]) -> bool:
    if len(files) == len(others) == 1:
        return files != others
    return {file.key: file for file in files} != {file.key: file for file in others}


def known_files(index: AbstractIndex) -> list[Source]:
    """Every file that an index knows.

    Raises:
        InputError: an index of an earlier version, which does not know its files.
    """
    return [file for files in _known_rows(index).values() for file in files]


def _known_rows(index: AbstractIndex) -> dict[str, list[Source]]:
    if not FILE_COLUMNS.keys() <= index.description.extra_columns.keys():
        raise InputError(
            f"the index {index.location} was made by an earlier version and does not know its files",
            expected="an index that keeps the size and time of each file",
            next_step="it can be searched as it is; to let it grow, make it again in another folder",
        )
    return {
        row["id"]: files_of(row["files"])
        for batch in index.items(columns=["files"])
        for row in batch.to_pylist()
    }
