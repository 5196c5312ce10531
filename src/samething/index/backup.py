"""Copies of an index folder while it is searched and written to, and their way back."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sqlite3
from pathlib import Path

from samething.errors import ArtefactError
from samething.files import PARTIAL_SUFFIX, disk_errors, sync_to_disk, write_manifest
from samething.index.generation import Generation
from samething.index.sqlite import SqliteIndex
from samething.index.sqlite_folder import graph_path, new_manifest, require_free

_INSIDE = "uploads"
"""Notes whose keys are files; those inside the index folder belong to it."""


def back_up(index: SqliteIndex, target: Path) -> int:
    """Copy one state of an index, and the images that were uploaded into it, to a new folder.

    The copy is an index itself. It is compared with its checksums and has its name only when it is whole; a
    killed process leaves a hidden folder beside it.

    Returns:
        The number of rows.

    Raises:
        InputError: the target holds something, or cannot be written to.
        ArtefactError: the index is damaged.
    """
    require_free(target)
    partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}")
    try:
        with disk_errors(target):
            partial.mkdir(parents=True)
        with contextlib.closing(Generation(partial, 1, index.description)) as copy:
            num_rows = _copy(index, copy)
        with disk_errors(target):
            write_manifest(partial, new_manifest(copy.description, 1))
            partial.replace(target)
            sync_to_disk(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_rows


def restore(backup: SqliteIndex, index: SqliteIndex) -> int:
    """Let the content of a copy take the place of an index in one step; open handles and servers follow.

    Returns:
        The number of rows.

    Raises:
        InputError: the index cannot be written to.
        ArtefactError: the copy is damaged.
    """
    with (
        index.in_use(Generation.transaction) as (db, old),
        index.successor(db, old, backup.description) as copy,
    ):
        num_rows = _copy(backup, copy)
        with copy.transaction() as theirs:
            copy.set_notes(theirs, "generations", {"last": copy.number})
        index.take_over(copy)
    return num_rows


def _copy(index: SqliteIndex, copy: Generation) -> int:
    """One state of an index into another generation's files, all on disk and verified."""
    copy.unlink()
    with index.in_use(Generation.reading) as ((db, view), generation), disk_errors(copy.folder):
        copy.description = generation.description
        copy.vectors_file.write_bytes(generation.checked(db, view).kept.data)
        with contextlib.closing(sqlite3.connect(copy.database, isolation_level=None)) as theirs:
            db.backup(theirs)
            theirs.execute("UPDATE spaces SET file = ? WHERE space = 0", (copy.vectors_file.name,))
            theirs.execute("DELETE FROM notes WHERE kind = 'next'")
        sync_to_disk(copy.vectors_file, copy.database, copy.folder)
        graph = graph_path(generation.folder, generation.number)
        files = [(graph, graph_path(copy.folder, copy.number))]
        files += [
            (generation.folder / name, copy.folder / name)
            for name in generation.notes(db, _INSIDE)
            if not Path(name).is_absolute() and ".." not in Path(name).parts
        ]
    for path, other in files:
        with disk_errors(copy.folder), contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            other.parent.mkdir(parents=True, exist_ok=True)
            if not other.exists():
                shutil.copyfile(path, other)
            sync_to_disk(other, other.parent)
    num_rows, problems = copy.problems()
    if problems:
        raise ArtefactError(
            f"{index.location} was not copied, since it is damaged: {problems[0]}",
            expected="an index that is as it was written",
            next_step=f"samething index verify {index.location} names every damage",
        )
    return num_rows
