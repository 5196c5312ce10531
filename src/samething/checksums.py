"""What is read is what was written: every artefact is compared with its checksums when it is opened for use.

A folder's manifest lists the SHA-256 of its files. A catalog, which is one file, holds its own, and so does a
checkpoint. A large file is read through once: a mark in the user's cache folder then spares that until its
size, its times or its inode change. :func:`damages` reads everything whatever the marks say.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from samething.errors import ArtefactError, SamethingError
from samething.files import (
    MANIFEST_NAME,
    Json,
    Manifest,
    atomic_path,
    file_sha256,
    read_manifest,
    user_cache,
)

CATALOG_KEY: Final = "samething.sha256"
"""Name of a catalog's checksum in the file's metadata."""
NO_DIGEST: Final = "0" * 64
"""What stands in a catalog in place of its checksum while that is computed."""
_MARKED_FROM_BYTES: Final = 16 << 20
"""Smaller files are always read: that takes no longer than looking for a mark."""


def checksums_of(folder: Path, names: Iterable[str] | None = None) -> dict[str, Json]:
    """Checksum and size of an artefact's files, for the content of its manifest.

    Args:
        folder: the artefact.
        names: paths below it; by default of every file but hidden ones and those of artefacts inside it.
    """
    found = sorted(_files(folder)) if names is None else list(names)
    return {
        "sha256": {name: file_sha256(folder / name) for name in found},
        "bytes": {name: (folder / name).stat().st_size for name in found},
    }


def _files(folder: Path) -> Iterable[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not Path(parent, name, MANIFEST_NAME).exists()
        ]
        for name in files:
            if name != MANIFEST_NAME and not name.startswith("."):
                yield Path(parent, name).relative_to(folder).as_posix()


def require_whole(
    folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, once: bool = True
) -> None:
    """Check files of an artefact: one wrong bit in a weight or a feature would give wrong vectors.

    Args:
        folder: the artefact.
        manifest: its manifest; one of an earlier version, which lists no checksum, lets files pass that are
            there.
        names: paths below the folder; by default all that the manifest lists.
        once: trust the mark of an earlier look.

    Raises:
        ArtefactError: one is missing, cut short, or differs from what the manifest says.
    """
    listed = _listed(manifest)
    for name in listed if names is None else names:
        path = Path(folder) / name
        if not path.is_file():
            raise ArtefactError(
                f"{path} does not exist",
                expected=f"a whole {manifest.kind} folder",
                next_step=f"copy the whole folder again, or make the {manifest.kind} again",
            )
        size, wanted = path.stat().st_size, manifest.content.get("bytes", {}).get(name)
        if wanted is not None and size < wanted:
            raise ArtefactError(
                f"{path} is cut short: {size:,} of {wanted:,} bytes",
                expected="the whole file, as it was written",
                next_step="copy or download the file again; an interrupted copy leaves such files",
            )
        if listed and not _is_whole(path, listed.get(name), file_sha256, once=once):
            raise ArtefactError(
                f"{path} was changed or damaged since it was written",
                expected=f"the SHA-256 that {Path(folder) / MANIFEST_NAME} names",
                next_step=f"copy the folder again; or remove it and make the {manifest.kind} again",
            )


def _listed(manifest: Manifest) -> dict[str, str]:
    sha256 = manifest.content.get("sha256", {})
    # version 1 of features: the checksum of the one file
    return {f"{manifest.content['data']}/features.npy": sha256} if isinstance(sha256, str) else dict(sha256)


def _is_whole(path: Path, wanted: str | None, digest: Callable[[Path], str], *, once: bool) -> bool:
    """Whether a file has this checksum; with ``once`` its mark is believed where it has one."""
    try:
        before = path.stat()
        if not once or before.st_size < _MARKED_FROM_BYTES:
            return digest(path) == wanted
        mark = user_cache() / "checked" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
        times = f"{before.st_mtime_ns} {before.st_ctime_ns}"
        state = f"{before.st_dev} {before.st_ino} {before.st_size} {times} {wanted}".encode()
        with contextlib.suppress(OSError):
            if mark.read_bytes() == state:
                return True
        if digest(path) != wanted:
            return False
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read ({error.strerror})",
            expected="a readable file",
            next_step="check its permissions and the disk, or restore it from a copy",
        ) from error
    with contextlib.suppress(OSError, SamethingError), atomic_path(mark, durable=False) as partial:
        partial.write_bytes(state)
    return True


# ---- one file that holds its own checksum


def seal_catalog(path: Path) -> None:
    """Put the checksum of a Parquet file, whose metadata holds :data:`NO_DIGEST`, in that place."""
    with path.open("rb+") as stream, mmap.mmap(stream.fileno(), 0) as content:
        place = content.rfind(NO_DIGEST.encode())
        content[place : place + len(NO_DIGEST)] = hashlib.sha256(content).hexdigest().encode()


def require_whole_catalog(path: Path, stored: str, *, once: bool = True) -> None:
    """Compare a catalog with the checksum that it holds.

    Args:
        path: the file.
        stored: the checksum in its metadata.
        once: trust the mark of an earlier look.

    Raises:
        ArtefactError: it was changed.
    """

    def digest(path: Path) -> str:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = content.rfind(stored.encode())
            if place < 0:
                return NO_DIGEST
            with memoryview(content) as view:
                found = hashlib.sha256(view[:place])
                found.update(NO_DIGEST.encode())
                found.update(view[place + len(stored) :])
        return found.hexdigest()

    if not _is_whole(path, stored, digest, once=once):
        raise ArtefactError(
            f"{path} was changed or damaged since it was written",
            expected=f"the SHA-256 that it holds, {stored[:16]}…",
            next_step="copy the file again, or make the catalog again",
        )


def write_sealed(target: Path, content: memoryview) -> None:
    """Write bytes atomically, with their SHA-256 behind them."""
    with atomic_path(target) as partial, partial.open("wb") as stream:
        stream.write(content)
        stream.write(hashlib.sha256(content).digest())


def read_sealed(source: Path) -> memoryview:
    """The bytes that :func:`write_sealed` wrote.

    Raises:
        ArtefactError: they were changed, or have no checksum.
    """
    whole = memoryview(source.read_bytes())
    content = whole[:-32]
    if hashlib.sha256(content).digest() != whole[-32:]:
        raise ArtefactError(
            f"{source} was changed or damaged since it was written, or is of another version of the program",
            expected="the bytes whose SHA-256 stands at its end",
            next_step="restore it from a copy, or start over with --no-resume",
        )
    return content


# ---- a whole artefact


def damages(folder: Path) -> tuple[int, list[str]]:
    """Read all files of an artefact folder, and of those inside it.

    Returns:
        How many files were compared, and a sentence for each damage.

    Raises:
        ArtefactError: the folder is no finished artefact.
    """
    manifest = read_manifest(folder)
    listed = _listed(manifest)
    if not listed:
        raise ArtefactError(
            f"{folder} was made by an earlier version, whose manifests list no checksums",
            expected=f"a {manifest.kind} folder whose manifest lists the SHA-256 of its files",
            next_step=f"make the {manifest.kind} again where it has to be sure",
        )
    num_files, found = len(listed), []
    for name in listed:
        try:
            require_whole(folder, manifest, [name], once=False)
        except ArtefactError as error:
            found.append(error.given)
    for inner in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        try:
            num_inner, problems = damages(inner.parent)
        except ArtefactError as error:
            num_inner, problems = 0, [error.given]
        num_files, found = num_files + num_inner, found + problems
    return num_files, found
