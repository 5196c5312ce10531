"""Checksums of write-once files, kept beside a store that has none of its own.

LanceDB serves a flipped byte of a data file as if nothing were wrong, and one in a deletion file can end
the whole process. Its files never change once written, so a list of their checksums says what is damaged,
by name, before the store gets to read it.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float, UInt

from samething.errors import ArtefactError
from samething.files import disk_errors, file_sha256

# Files of a Lance table that are written once; the rest (a hint at the newest version) may change.
_SUFFIXES: Final = (".lance", ".manifest", ".arrow", ".bin", ".txn")
_BULKY: Final = ".lance"


class Checksums:
    """A list of the files below a folder with size and SHA-256, one JSON object per line.

    Lines are only ever appended, by the one process that holds the index's lock. A line that a killed
    process left unfinished is dropped by the next writer; what it stood for was never acknowledged.
    """

    def __init__(self, listing: Path, folder: Path) -> None:
        self.listing = listing
        """The list."""
        self.folder = folder
        """The folder whose files are listed, by their path relative to it."""
        self.entries: dict[str, tuple[int, str]] = {}
        """Path -> (size in bytes, SHA-256), as read so far."""
        self._num_bytes_read = 0

    def size(self) -> int:
        """Bytes of the list now: it grows with every change of the store, and is quick to ask for.

        Raises:
            ArtefactError: the list is gone.
        """
        try:
            return self.listing.stat().st_size
        except FileNotFoundError as error:
            raise ArtefactError(
                f"{self.listing} does not exist",
                expected="the list of checksums that was written with the index",
                next_step="restore it from a copy, or make the index again",
            ) from error

    def read_on(self) -> list[str]:
        """Read the lines added since the last call; return the files they name.

        Raises:
            ArtefactError: the list is damaged.
        """
        self.size()
        with self.listing.open("rb") as stream:
            stream.seek(self._num_bytes_read)
            added = stream.read()
        added = added[: added.rfind(b"\n") + 1]
        names: list[str] = []
        try:
            for line in added.splitlines():
                entry = json.loads(line)
                name = str(entry["file"])
                self.entries[name] = (int(entry["size"]), str(entry["sha256"]))
                names.append(name)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{self.listing} is damaged ({error})",
                expected="one JSON object per line, as samething wrote them",
                next_step="restore it from a copy, or make the index again",
            ) from error
        self._num_bytes_read += len(added)
        return names

    def add_new_files(self) -> None:
        """List the files that are not listed yet, and flush them and the list to disk.

        The caller holds the index's lock, so that no file is still being written.
        """
        with disk_errors(self.listing):
            if self.listing.exists():
                self.read_on()
            lines: list[str] = []
            folders: set[Path] = set()
            for path in self._files():
                name = path.relative_to(self.folder).as_posix()
                if name in self.entries:
                    continue
                _flush(path)
                folders.add(path.parent)
                entry = {"file": name, "size": path.stat().st_size, "sha256": file_sha256(path)}
                lines.append(json.dumps(entry) + "\n")
            for folder in sorted(folders):
                _flush(folder)
            with self.listing.open("ab") as stream:
                stream.truncate(self._num_bytes_read)  # an unfinished line of a killed process
                stream.write("".join(lines).encode())
                stream.flush()
                os.fsync(stream.fileno())
            self.read_on()

    def _files(self) -> list[Path]:
        found: list[Path] = []
        for parent, _, names in os.walk(self.folder):
            found += [Path(parent, name) for name in names if name.endswith(_SUFFIXES)]
        return sorted(found)

    def damage(self, names: list[str] | None = None, *, all_content: bool = False) -> list[str]:
        """Listed files that are missing or other than they were written, a sentence each.

        Args:
            names: which files to look at; by default all listed ones.
            all_content: compare the content of the data files as well, not their size alone. Small files
                are always compared as a whole.
        """
        found: list[str] = []
        for name in self.entries if names is None else names:
            size, sha256 = self.entries[name]
            path = self.folder / name
            try:
                size_now = path.stat().st_size
                if size_now != size:
                    found.append(f"{path} has {size_now} bytes instead of {size}")
                elif (all_content or not name.endswith(_BULKY)) and file_sha256(path) != sha256:
                    found.append(f"{path} is not what was written: its SHA-256 differs")
            except OSError as error:
                found.append(f"{path}: {error.strerror}")
        return found


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def vector_crc32(ids: list[str], vectors: Float[np.ndarray, "n d"]) -> UInt[np.ndarray, " n"]:
    """CRC-32 over id and vector of each row; it changes with certainty when a single byte does."""
    checks = [
        zlib.crc32(row, zlib.crc32(name.encode()))
        for name, row in zip(ids, np.ascontiguousarray(vectors), strict=True)
    ]
    return np.asarray(checks, dtype=np.uint32)
