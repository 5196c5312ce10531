"""Image files in a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from samething.errors import InputError
from samething.images.formats import IMAGE_SUFFIXES, kind_of


class FoundFile(NamedTuple):
    """A file that a folder holds."""

    path: str
    status: os.stat_result | None
    """What the disk says of it; None for a broken link."""
    is_image: bool
    """Whether it looks like an image."""


def is_image_file(path: str | Path) -> bool:
    """Whether a file looks like an image: by its suffix, or for other names by its first bytes.

    A broken link named like an image counts, so that it is listed; pipes and devices do not.
    """
    return _found(str(path)).is_image


def find_files(folder: Path) -> Iterator[FoundFile]:
    """Walk a folder in sorted order and yield every file.

    Hidden files and folders (names starting with a dot) are passed over. Links to folders are not followed;
    they are yielded as files that are no images.

    Raises:
        InputError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"cannot list the folder {error.filename}: {error.strerror}",
            expected="folders that this user may read",
            next_step="change the folder's permissions, or move it elsewhere",
        ) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted([*names, *links]):
            if not name.startswith("."):
                yield _found(os.path.join(parent, name))  # noqa: PTH118 - a Path takes five times as long


def _found(path: str) -> FoundFile:
    """A file, asked for once, because a sync does this for every file there is."""
    is_named_so = os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122
    try:
        status = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode):
            return FoundFile(path, status, False)
        if is_named_so:
            return FoundFile(path, status, True)
        with Path(path).open("rb") as stream:
            head = stream.read(16)
    except OSError:
        return FoundFile(path, None, is_named_so)
    return FoundFile(path, status, kind_of(head) is not None)
