"""Files that are whole or absent: atomic writes, folders finished by their manifest, fingerprints.

An artefact folder is finished when it holds ``manifest.json``, which is written last. Everything else
writes to a temporary name in the same folder and renames, so a killed process leaves either the old
content or the new, never half of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import filelock

from samething.errors import ArtefactError, FingerprintError, InputError

Json: TypeAlias = Any

MANIFEST_NAME = "manifest.json"
PARTIAL_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success flush it to disk and rename it into place.

    On an exception the temporary file is removed and ``target`` is untouched.

    Raises:
        InputError: the folder is read-only or the disk is full; nothing was changed.
    """
    target = Path(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PARTIAL_SUFFIX, dir=target.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            # mkstemp makes files that only their owner reads; give them the permissions of an ordinary file
            partial.chmod(0o666 & ~_umask())
            partial.replace(target)
            _sync_folder(target.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, a read-only target or a missing permission into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"no space left while writing {target}",
                expected="free disk space; what was finished before is kept",
                next_step="free some space and run the same command again: it resumes",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise InputError(
                f"cannot write {target}: {error.strerror}",
                expected="a folder that this user may write to",
                next_step="choose another output with -o, or change the folder's permissions",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise InputError(
                f"cannot write {target}: {error.strerror}",
                expected="a path whose parents are folders",
                next_step="choose another output with -o",
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Json) -> None:
    """Write JSON atomically: two-space indent, keys in the order given, non-ASCII kept readable."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(source: Path) -> Json:
    """Read JSON.

    Raises:
        ArtefactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(
            f"{source} does not exist", expected="a JSON file", next_step="check the path"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(
            f"{source} is not valid JSON ({error})",
            expected="a file written by samething",
            next_step="make the artefact again, or restore the file",
        ) from error


def fingerprint(value: Json) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a JSON value, independent of key order.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artefact is and what it was made from; its presence means that the artefact is finished."""

    kind: str
    """``features``, ``run``, ``model`` or ``index``."""
    format_version: int
    """Version of the folder's layout; a newer one than this program knows is refused."""
    made_from: Mapping[str, Json]
    """Everything that decides the content: names, options and the fingerprints of other artefacts."""
    content: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    """What came out: counts, sizes, checksums."""

    @property
    def fingerprint(self) -> str:
        """Identity of the artefact: 16 hexadecimal digits over kind, version and ``made_from``."""
        return fingerprint({"kind": self.kind, "format_version": self.format_version, **self.made_from})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish an artefact folder. Call it last."""
    write_json(folder / MANIFEST_NAME, {**dataclasses.asdict(manifest), "fingerprint": manifest.fingerprint})


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a manifest."""
    return (Path(folder) / MANIFEST_NAME).is_file()


def read_manifest(folder: Path, *, kind: str, format_version: int) -> Manifest:
    """Read and check the manifest of a finished artefact.

    Raises:
        ArtefactError: no such folder, unfinished, another kind, or a newer format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(
            f"{folder} does not exist",
            expected=f"a {kind} folder",
            next_step="check the path, or make one first: samething --help lists the commands",
        )
    if not is_finished(folder):
        raise ArtefactError(
            f"{folder} holds no {MANIFEST_NAME}: it is not a finished {kind} folder",
            expected=f"a {kind} folder whose making ran to its end",
            next_step="run the command that makes it again: it resumes where it stopped",
        )
    stored = read_json(folder / MANIFEST_NAME)
    try:
        manifest = Manifest(**{field.name: stored[field.name] for field in dataclasses.fields(Manifest)})
    except (KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder / MANIFEST_NAME} lacks {error}",
            expected="a manifest written by samething",
            next_step="make the artefact again",
        ) from error
    if manifest.kind != kind:
        raise ArtefactError(
            f"{folder} is a {manifest.kind} folder",
            expected=f"a {kind} folder",
            next_step="check the order of the arguments",
        )
    if manifest.format_version > format_version:
        raise ArtefactError(
            f"{folder} has format version {manifest.format_version}",
            expected=f"version {format_version} or older, which this installation reads",
            next_step="pip install --upgrade samething",
        )
    return manifest


def differences(ours: Mapping[str, Json], theirs: Mapping[str, Json]) -> list[str]:
    """Names of the entries in which two ``made_from`` descriptions differ, nested ones with dots.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c']
    """
    names: list[str] = []
    for key in sorted({*ours, *theirs}):
        left, right = ours.get(key), theirs.get(key)
        if left == right:
            continue
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += [f"{key}.{name}" for name in differences(left, right)]
        else:
            names.append(key)
    return names


def require_same(ours: Mapping[str, Json], theirs: Mapping[str, Json], *, what: str, next_step: str) -> None:
    """Refuse an artefact made from something else.

    Raises:
        FingerprintError: says which entries differ, with both values.
    """
    different = differences(ours, theirs)
    if different:
        found = "; ".join(f"{name} is {_at(theirs, name)!r}" for name in different)
        wanted = "; ".join(f"{name} {_at(ours, name)!r}" for name in different)
        raise FingerprintError(f"{what}: {found}", expected=wanted, next_step=next_step)


def _at(value: Mapping[str, Json], dotted: str) -> Json:
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None  # type: ignore[assignment]
    return value


@contextlib.contextmanager
def only_one_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for writing; the lock goes away with the process, however it ends.

    Raises:
        ArtefactError: another process is writing there now.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ArtefactError(
                f"another process is writing to {folder}",
                expected="one writer at a time",
                next_step="wait for it to end, or choose another output with -o",
            ) from error
    try:
        yield
    finally:
        lock.release()
