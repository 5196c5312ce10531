"""The folder of the embedded engine: what lies in it, who may write to it, and what its manifest says."""

from __future__ import annotations

import contextlib
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
    read_manifest,
)
from samething.index.description import IndexDescription

FORMAT_VERSION: Final = 1

TABLE: Final = "vectors"
CHECKSUMS: Final = "checksums.jsonl"
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


def new_manifest(description: IndexDescription) -> Manifest:
    """The manifest of a new index. Its rows change, so their number is not in it."""
    model = {"name": description.model_name, "fingerprint": description.model_fingerprint}
    made_from = {
        "engine": "lance",
        "model": model,
        "dim": description.dim,
        "extra_columns": dict(description.extra_columns),
    }
    return Manifest(
        kind="index", format_version=FORMAT_VERSION, made_from=made_from, content={"table": TABLE}
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
