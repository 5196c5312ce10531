"""Bringing an index up to date with its images, with as little reading and embedding as can be.

A file whose size and time of change are as they were is not read. One that moved or was renamed is known by
its content and keeps its vector. New rows are stored before old ones go, so that a killed run leaves every
image findable, and the next run goes on after what was stored.

Every file of a row is noted with the folder or catalog that brought it, and only those of the collections
that are synced may go. What a sync found is a change of the row as it is when it is written: files that
another process added meanwhile stay.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from samething.errors import ImageError, InputError
from samething.images import Source, checksum, in_threads
from samething.index import AbstractIndex
from samething.search.collection import (
    CAPTURE_COLUMNS,
    FILE_COLUMNS,
    Collection,
    content_id,
    files_of,
    folders_above,
    place_of,
    row_of,
)

_LOOKS: Final = ("width", "height", "thumbnail", *CAPTURE_COLUMNS)
_LARGE_SHARE: Final = 0.25
_MANY: Final = 10
_SEVERAL: Final = 3
"""Images of a sub-folder that are gone together: it may be a disk that is not mounted."""


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
    held: tuple[str, ...] = ()
    """What was left as it was since a disk may not be mounted: a sentence for each place."""

    @property
    def has_news(self) -> bool:
        """Whether there is more to say than what was there already."""
        return self != Changes(num_kept=self.num_kept, passed_over=self.passed_over)


@dataclasses.dataclass
class FileChange:
    """What becomes of the files of a row."""

    found: list[Source] = dataclasses.field(default_factory=list)
    gone: list[Source] = dataclasses.field(default_factory=list)
    """As they were noted; one that is noted otherwise by now stays."""

    def of(
        self, name: str, row: Mapping[str, Any] | None, looks: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """The row as it is to be; None where no file of it is left.

        Args:
            name: its id.
            row: as it is; None: there is none.
            looks: columns that say what the image shows; by default as they are.
        """
        row = row or {}
        before = files_of(row.get("files") or "[]")
        files = self.files(before)
        if looks is None:
            of_tables = {name for file in before for name in file.metadata}
            looks = {name: row[name] for name in _LOOKS if name in row and name not in of_tables}
        return {**looks, **row_of(name, files)} if files else None

    def files(self, before: Sequence[Source]) -> list[Source]:
        """The files of a row as they are to be."""
        files = {place_of(file): file for file in before}
        for file in self.gone:
            if files.get(place_of(file)) == file:
                del files[place_of(file)]
        return list((files | {place_of(file): file for file in self.found}).values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What has to be done."""

    new: dict[str, FileChange]
    """Content that has no row yet; it is embedded."""
    changed: dict[str, FileChange]
    """Rows whose files are others than before; they keep their vectors. Those that lose files come last."""
    changes: Changes
    """What is known of the changes before anything is embedded."""


Rows: TypeAlias = dict[str, list[Source]]
"""The files of each row, by its id."""


def make_plan(
    rows: Rows,
    found: Sequence[Source],
    *,
    may_go: Callable[[Source], bool],
    hold: Mapping[str, Collection] | None = None,
) -> Plan:
    """Compare the files that there are with those that an index knows.

    Args:
        rows: the index's rows, read before the files were listed: what another process added in between
            must not look as if it were gone.
        found: the files.
        may_go: whether a file that was not found leaves the index.
        hold: collections, as the index names them, that keep their files where a large share of them, or
            several of one folder, are gone.
    """
    known: dict[str, tuple[str, Source]] = {}
    doubled: list[tuple[str, Source]] = []  # two processes saw one file change at the same time
    for name, file in ((name, file) for name, files in rows.items() for file in files):
        if place_of(file) in known:
            doubled.append((name, file))
        else:
            known[place_of(file)] = name, file
    present = {place_of(file): file for file in found}
    content_of = {
        place: known[place][0]  # in the order of the files
        for place, file in present.items()
        if file.mark and place in known and file.mark == known[place][1].mark
    }
    num_kept = len(content_of)
    to_read = [file for place, file in present.items() if place not in content_of]
    unreadable: list[tuple[str, str]] = []
    for file, found_out in zip(to_read, in_threads(checksum, to_read), strict=True):
        if isinstance(found_out, ImageError):
            unreadable.append((file.location, found_out.reason))
        else:
            content_of[place_of(file)] = content_id(found_out, file.box)
    changes: defaultdict[str, FileChange] = defaultdict(FileChange)
    num_moved = 0
    for place, content in content_of.items():
        row, before = known.get(place, ("", None))
        num_moved += content in rows and row != content
        if row != content or before != present[place]:
            changes[content].found.append(present[place])
    gone = []
    for name, file in [*known.values(), *doubled]:
        place = place_of(file)
        if content_of.get(place, name) != name:
            changes[name].gone.append(file)
        elif place not in present and may_go(file):  # what cannot be read may be readable again tomorrow
            if (part := (hold or {}).get(file.collection)) and part.excludes(file):
                changes[name].gone.append(file)  # it was said to go
            else:
                gone.append((name, file))
    held = _held(gone, rows, content_of, present, hold) if hold else {}
    for name, file in gone:
        if not any((file.collection, folder) in held for folder in ["", *folders_above(file.location)]):
            changes[name].gone.append(file)
    changed = {name: change for name, change in changes.items() if name in rows}
    new = {name: change for name, change in changes.items() if name not in rows}
    for name, change in list(changed.items()):
        files = change.files(rows[name])
        if files and {file.region for file in files} != {file.region for file in rows[name]}:
            new[name] = FileChange(files, change.gone)  # other parts of it are to be embedded
            del changed[name]
    return Plan(
        new=new,
        changed=dict(sorted(changed.items(), key=lambda entry: not entry[1].found)),
        changes=Changes(
            num_kept=num_kept,
            num_moved=num_moved,
            num_dropped=sum(
                not change.found and len(change.gone) == len(rows[name]) for name, change in changed.items()
            ),
            num_read=len(to_read),
            unreadable=tuple(unreadable),
            held=tuple(held.values()),
        ),
    )


def _held(
    gone: Sequence[tuple[str, Source]],
    rows: Rows,
    content_of: Mapping[str, str],
    present: Mapping[str, Source],
    hold: Mapping[str, Collection],
) -> dict[tuple[str, str], str]:
    """Why files that are gone stay: by the collection's name, and the folder or "" for the whole."""
    held: dict[tuple[str, str], str] = {}
    num_gone = Counter(name for name, _ in gone)
    alive = {*content_of.values(), *(name for name, number in num_gone.items() if number < len(rows[name]))}
    for key, part in hold.items():
        lost = [file for name, file in gone if file.collection == key and name not in alive]
        if not lost:
            continue
        total = sum(file.collection == key for files in rows.values() for file in files)
        if len(lost) > max(_MANY, _LARGE_SHARE * total):
            held[key, ""] = f"{len(lost):,} of the {total:,} images of {part.location} are gone"
            continue
        top = os.path.abspath(part.location)  # noqa: PTH100 - as the files are named
        parents = {
            folder
            for file in present.values()
            if file.collection == key
            for folder in folders_above(file.location)[:1]
        }
        living = {folder for parent in parents for folder in [parent, *folders_above(parent)]}
        counts = Counter(
            folder
            for file in lost
            for folder in folders_above(file.location)
            if folder not in living and (folder == top or folder.startswith(f"{top}/"))
        )
        for folder, number in sorted(counts.items()):
            if number >= (1 if folder == top else _SEVERAL) and not any(
                (key, above) in held for above in folders_above(folder)
            ):
                held[key, folder] = f"all {number:,} images that were in {folder} are gone"
    return held


def known_rows(index: AbstractIndex) -> Rows:
    """Every file that an index knows, by its row.

    Raises:
        InputError: an index of an earlier version, which does not know its files.
    """
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
