"""The folder of the embedded engine: what lies in it, who may write to it, and what its manifest says."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import filelock

from samething.errors import ArtefactError, InputError
from samething.files import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    Manifest,
    disk_errors,
    is_finished,
    read_json,
    read_manifest,
    write_json,
)
from samething.index.description import IndexDescription

FORMAT_VERSION: Final = 1

TABLE: Final = "vectors"
CHECKSUMS: Final = "checksums.jsonl"
NEXT: Final = "next.json"
"""Names the table that is being made to take the place of the one in use, and what it is bound to."""
_LOCK: Final = ".lock"
_LOCK_TIMEOUT_S: Final = 600.0
"""How long a writer waits for another one's batch."""


@contextlib.contextmanager
def turn_to_write(folder: Path) -> Iterator[None]:
    """Hold the folder for one change; others wait. The lock goes away with the process, however it ends.

    Raises:
        InputError: the folder cannot be written to.
        ArtefactError: another process has held it for too long.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S, poll_interval=0.01)
        except filelock.Timeout as error:
            raise ArtefactError(
                f"another process has been writing to {folder} for {_LOCK_TIMEOUT_S:.0f} s",
                expected="a batch that ends sooner",
                next_step="look for the process that holds it, and try again when it has ended",
            ) from error
    try:
        yield
    finally:
        lock.release()


def require_free(folder: Path) -> None:
    """Refuse a place that holds something else; what a killed ``create`` left behind is no obstacle."""
    if is_finished(folder):
        raise ArtefactError(
            f"{folder} holds a finished artefact already",
            expected="a new or empty folder",
            next_step="open the index that is there, or choose another output with -o",
        )
    with disk_errors(folder):
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    ours = (_LOCK, CHECKSUMS, f"{TABLE}.lance")
    foreign = [name for name in sorted(names) if name not in ours and not name.endswith(PARTIAL_SUFFIX)]
    if foreign:
        raise InputError(
            f"{folder} holds other files, such as {foreign[0]}",
            expected="a new or empty folder",
            next_step="choose another output with -o",
        )


def checksums_of(table: str) -> str:
    """Name of the list of a table's checksums.

    >>> checksums_of("vectors"), checksums_of("vectors-2")
    ('checksums.jsonl', 'checksums-2.jsonl')
    """
    return CHECKSUMS if table == TABLE else f"checksums{table.removeprefix(TABLE)}.jsonl"


def next_table(table: str) -> str:
    """Name of the table after a table.

    >>> next_table("vectors"), next_table("vectors-2")
    ('vectors-2', 'vectors-3')
    """
    return f"{TABLE}-{int(table.removeprefix(TABLE).removeprefix('-') or 1) + 1}"


def remove_tables(folder: Path, *, keep: str) -> None:
    """Remove all tables but one, with their checksums, and the note about the next one."""
    (folder / NEXT).unlink(missing_ok=True)
    for path in folder.glob(f"{TABLE}*.lance"):
        if path.name != f"{keep}.lance":
            (folder / checksums_of(path.name.removesuffix(".lance"))).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def noted_next(folder: Path, description: IndexDescription, *, instead_of: str) -> str:
    """Name of the table to be made beside the one in use; the one of a killed process where it fits."""
    wanted = {"instead_of": instead_of, "made_from": dict(new_manifest(description).made_from)}
    path = folder / NEXT
    with disk_errors(folder):
        if path.exists():
            note = read_json(path)
            if note.pop("table", None) == next_table(instead_of) and note == wanted:
                return next_table(instead_of)
        remove_tables(folder, keep=instead_of)
        write_json(path, {"table": next_table(instead_of), **wanted})
    return next_table(instead_of)


def is_noted_next(folder: Path, table: str) -> bool:
    """Whether a table is the one being made to take the place of the one in use."""
    path = folder / NEXT
    return path.exists() and read_json(path)["table"] == table


def manifest_stamp(folder: Path) -> tuple[int, int]:
    """Changes when the manifest is written anew; quick to ask for."""
    try:
        status = (folder / MANIFEST_NAME).stat()
    except OSError:
        return (0, 0)
    return (status.st_ino, status.st_mtime_ns)


def new_manifest(description: IndexDescription, table: str = TABLE) -> Manifest:
    """The manifest of a new index. Its rows change, so their number is not in it."""
    model = {"name": description.model_name, "fingerprint": description.model_fingerprint}
    made_from = {
        "engine": "lance",
        "model": model,
        "dim": description.dim,
        "extra_columns": dict(description.extra_columns),
    }
    return Manifest(
        kind="index", format_version=FORMAT_VERSION, made_from=made_from, content={"table": table}
    )


def read_description(folder: Path) -> tuple[IndexDescription, str]:
    """What an index is bound to, and the name of its table.

    Raises:
        ArtefactError: no index, unfinished, damaged or of a newer format.
    """
    manifest = read_manifest(folder, kind="index", format_version=FORMAT_VERSION)
    try:
        made_from = manifest.made_from
        description = IndexDescription(
            dim=int(made_from["dim"]),
            model_name=str(made_from["model"]["name"]),
            model_fingerprint=str(made_from["model"]["fingerprint"]),
            extra_columns=dict(made_from["extra_columns"]),
        )
        table_name = str(manifest.content["table"])
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise ArtefactError(
            f"{folder / MANIFEST_NAME} is damaged ({error})",
            expected="the manifest that was written with the index",
            next_step="restore it from a copy, or make the index again",
        ) from error
    return description, table_name
