"""Files that are whole or absent: atomic writes, folders finished by their manifest, fingerprints.

An artefact folder is finished when it holds ``manifest.json``, which is written last. Everything else
writes to a temporary name in the same folder and renames, so a killed process leaves either the old
content or the new, never half of it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from samething.errors import ArtefactError, FingerprintError, InputError

Json: TypeAlias = Any

MANIFEST_NAME = "manifest.json"
PARTIAL_SUFFIX = ".samething.tmp"


@contextlib.contextmanager
def atomic_path(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success flush it to disk and rename it into place.

    On an exception the temporary file is removed and ``target`` is untouched. A killed process leaves a
    hidden ``.NAME.….samething.tmp`` behind, which :func:`only_one_writer` clears away in artefact folders.

    Args:
        target: the file to write.
        durable: False leaves flushing to the system: the file survives a killed process, but after a loss of
            power it may be empty, which its reader has to notice.

    Raises:
        InputError: the folder is read-only, the disk is full, or ``target`` is a folder or a device;
            nothing was changed.
    """
    target = Path(target)
    with disk_errors(target):
        # renaming over a device such as /dev/null would replace it
        if target.exists() and not target.is_file():
            raise InputError(
                f"{target} is not a file",
                expected="the path of a file, new or to be replaced",
                next_step="choose another output with -o",
            )
        _make_folder(target.parent)
        # not tempfile.mkstemp: its files are readable by their owner only, and what is made here is for
        # others too; cut, so that a target of the longest legal length still has room for the suffix
        partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}")
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield partial
            if durable:
                sync_to_disk(partial)
            partial.replace(target)
            if durable:
                sync_to_disk(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def require_writable(target: Path) -> None:
    """Try at the start of a long job whether its result can be written at its end.

    Raises:
        InputError: as :func:`atomic_path`.
    """
    with contextlib.suppress(_NothingWrittenError), atomic_path(target):
        raise _NothingWrittenError


class _NothingWrittenError(Exception):
    """Leaves an atomic write without writing."""


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, a read-only target or a missing permission into an error that says what to do.

    Errors about other files (a source that cannot be read) pass through as they are.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(target, error):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            what = "the disk failed" if error.errno == errno.EIO else "no space left"
            raise InputError(
                f"{what} while writing {target}",
                expected="a disk that works, with free space; what was finished before is kept",
                next_step="free some space (or change the disk) and run the same command again: it resumes",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise InputError(
                f"cannot write {target}: {error.strerror}",
                expected="a folder that this user may write to",
                next_step="choose another output with -o, or change the folder's permissions",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise InputError(
                f"cannot write {target}: {error.strerror}",
                expected="a path whose parents are folders and whose names the file system allows",
                next_step="choose another output with -o",
            ) from error
        raise


def _concerns(target: Path, error: OSError) -> bool:
    """Whether an error is about writing ``target``: a failed write names no file, a failed open names one."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return True
    named, folder = Path(os.fsdecode(error.filename)).resolve(), Path(target).parent.resolve()
    return named.is_relative_to(folder) or folder.is_relative_to(named)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it; their names survive a loss of power."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    sync_to_disk(*(path.parent for path in new))


def sync_to_disk(*paths: Path) -> None:
    """Wait until files, and the names in folders, survive a loss of power."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
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


def finite(value: Json) -> Json:
    """The value as JSON has it: null for numbers that are not finite, and lists for tuples.

    >>> finite({"low": (0.5, math.nan)})
    {'low': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


FORMULA: Final = "^('*[=+@\t\r-])"
"""How a cell begins that a spreadsheet would compute, or that has got an apostrophe against that."""


def plain_cell(value: object) -> object:
    """A cell of a table for people: a text that a spreadsheet would compute gets an apostrophe first.

    >>> plain_cell("=1+1"), plain_cell("'=1+1"), plain_cell("'tis"), plain_cell(-1)
    ("'=1+1", "''=1+1", "'tis", -1)
    """
    return re.sub(FORMULA, r"'\1", value) if isinstance(value, str) else value


def write_csv(target: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table for people atomically, its cells as :func:`plain_cell` makes them."""
    with atomic_path(target) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(map(plain_cell, row) for row in rows)


def read_csv(source: Path) -> list[dict[str, str]]:
    """The rows that :func:`write_csv` wrote, as they were given."""
    with source.open(newline="", encoding="utf-8") as stream:
        rows = csv.DictReader(stream)
        return [{k: re.sub(f"^'(?={FORMULA[1:]})", "", text) for k, text in row.items()} for row in rows]


def read_json(source: Path) -> Json:
    """Read JSON.

    Raises:
        ArtefactError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(
            f"{source} cannot be read: {error.strerror}",
            expected="a readable JSON file",
            next_step="check the path and its permissions",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(
            f"{source} is not valid JSON ({error})",
            expected="a file written by samething",
            next_step="make the artefact again, or restore the file",
        ) from error


def user_cache() -> Path:
    """This program's folder in the user's cache (XDG base directories); may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samething"


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
        return fingerprint(
            {"kind": self.kind, "format_version": self.format_version, "made_from": dict(self.made_from)}
        )


_FIELDS: Final = tuple(field.name for field in dataclasses.fields(Manifest))
_MANIFEST_KEYS: Final = frozenset({*_FIELDS, "fingerprint", "content_fingerprint"})
"""What a manifest holds; a further key is one whose name was damaged."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish an artefact folder. Call it last."""
    stored = {
        "kind": manifest.kind,
        "format_version": manifest.format_version,
        "made_from": dict(manifest.made_from),
        "content": dict(manifest.content),
        "fingerprint": manifest.fingerprint,
        "content_fingerprint": fingerprint(dict(manifest.content)),
    }
    write_json(Path(folder) / MANIFEST_NAME, stored)


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a manifest."""
    return (Path(folder) / MANIFEST_NAME).is_file()


def read_manifest(folder: Path, *, kind: str | None = None, format_version: int | None = None) -> Manifest:
    """Read and check the manifest of a finished artefact.

    Args:
        folder: the artefact.
        kind: what it has to be; by default it may be any.
        format_version: the newest that the caller reads.

    Raises:
        ArtefactError: no such folder, unfinished, another kind, a newer format, or changed by hand.
    """
    folder, called = Path(folder), "artefact" if kind is None else kind
    if not folder.is_dir():
        raise ArtefactError(
            f"{folder} does not exist",
            expected=f"a finished {called} folder",
            next_step="check the path, or make one first: "
            + ("samething index FOLDER" if kind == "index" else "samething --help lists the commands"),
        )
    if not is_finished(folder):
        raise ArtefactError(
            f"{folder} holds no {MANIFEST_NAME}: it is not a finished {called} folder",
            expected=f"a {called} folder whose making ran to its end",
            next_step="run the command that makes it again: it resumes where it stopped",
        )
    noted = read_json(folder / MANIFEST_NAME)
    types = {"kind": str, "format_version": int, "made_from": dict, "content": dict, "fingerprint": str}
    known = noted if isinstance(noted, dict) else {}
    wrong = [name for name, type_ in types.items() if not isinstance(known.get(name), type_)]
    if wrong:
        raise ArtefactError(
            f"{folder / MANIFEST_NAME} lacks {', '.join(wrong)}",
            expected="a manifest written by samething",
            next_step="make the artefact again",
        )
    manifest = Manifest(**{name: noted[name] for name in _FIELDS})
    if kind is not None and manifest.kind != kind:
        raise ArtefactError(
            f"{folder} is a {manifest.kind} folder",
            expected=f"a {kind} folder",
            next_step="check the order of the arguments",
        )
    if format_version is not None and manifest.format_version > format_version:
        raise ArtefactError(
            f"{folder} has format version {manifest.format_version}",
            expected=f"version {format_version} or older, which this installation reads",
            next_step="pip install --upgrade samething",
        )
    # manifests of earlier versions have no fingerprint of the content
    of_content = fingerprint(dict(manifest.content))
    ours = (manifest.fingerprint, of_content)
    theirs = (noted["fingerprint"], noted.get("content_fingerprint", of_content))
    if ours != theirs or not _MANIFEST_KEYS.issuperset(noted):
        raise ArtefactError(
            f"{folder / MANIFEST_NAME} was changed: its content has the fingerprints {', '.join(ours)}",
            expected=f"the fingerprints it names, {', '.join(map(str, theirs))}",
            next_step="make the artefact again, or restore the manifest",
        )
    return manifest


def differences(ours: Mapping[str, Json], theirs: Mapping[str, Json]) -> list[tuple[str, Json, Json]]:
    """The entries in which two ``made_from`` descriptions differ: name, our value, their value.

    Names of nested ones have dots. Values are compared as they look in JSON, so a tuple equals the list it is
    read back as. A missing entry equals one that is null.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    [('b.c', 2, 3)]
    """
    found: list[tuple[str, Json, Json]] = []
    for key in sorted({*ours, *theirs}):
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += [(f"{key}.{name}", mine, other) for name, mine, other in differences(left, right)]
        elif fingerprint(left) != fingerprint(right):
            found.append((key, left, right))
    return found


def require_same(ours: Mapping[str, Json], theirs: Mapping[str, Json], *, what: str, next_step: str) -> None:
    """Refuse an artefact made from something else.

    Raises:
        FingerprintError: says which entries differ, with both values.
    """
    differing = differences(ours, theirs)
    if differing:
        found = "; ".join(f"{name} is {other!r}" for name, _, other in differing)
        wanted = "; ".join(f"{name} {mine!r}" for name, mine, _ in differing)
        raise FingerprintError(f"{what}: {found}", expected=wanted, next_step=next_step)


def claim_folder(
    folder: Path, record_name: str, made_from: Mapping[str, Json], *, kind: str, next_step: str
) -> None:
    """Write down what an artefact folder is for, or check that it is for the same.

    Args:
        folder: an existing folder.
        record_name: name of the JSON file that says what the folder is for; written first of all.
        made_from: what it is for.
        kind: kind of the artefact, for messages.
        next_step: what to do when the folder is for something else.

    Raises:
        FingerprintError: it is for something else; says which entries differ.
        ArtefactError: it holds other files.
    """
    record = folder / record_name
    if record.exists():
        require_same(
            made_from, read_json(record), what=f"{folder} is made from something else", next_step=next_step
        )
        return
    strangers = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if strangers:
        raise ArtefactError(
            f"{folder} is not a {kind} folder and holds {', '.join(strangers[:3])}",
            expected=f"a {kind} folder, or a new or empty one",
            next_step="choose another folder with -o",
        )
    write_json(record, made_from)


@contextlib.contextmanager
def only_one_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for writing; the lock goes away with the process, however it ends.

    Temporary files that a killed writer left in the folder are removed. Writers that share a folder
    (workers of one job) are started by the one process that holds it.

    Raises:
        ArtefactError: another process is writing there now.
    """
    import filelock  # searching needs none

    folder = Path(folder)
    with disk_errors(folder):
        _make_folder(folder)
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
        for leftover in folder.rglob(f".*{PARTIAL_SUFFIX}"):
            with disk_errors(leftover):
                leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
