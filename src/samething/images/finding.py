"""Image files in a folder."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from samething.errors import InputError
from samething.images.formats import IMAGE_SUFFIXES, kind_of

# What systems and storage devices keep beside people's files (Synology, QNAP, Windows, macOS, Linux):
# thumbnails, bins, snapshots. In small letters.
_SYSTEM_FOLDERS: Final = frozenset({
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "@tmp", "__macosx",
    "lost+found", "network trash folder", "recycler", "system volume information", "temporary items",
})  # fmt: skip

LINKED_FOLDER: Final = "link to a folder"
SYSTEM_FOLDER: Final = "folder of the system"
HIDDEN: Final = "hidden"
EXCLUDED: Final = "excluded"
NO_SUFFIX: Final = "without suffix"


class FoundFile(NamedTuple):
    """A file that a folder holds, or a folder in it that is not looked into."""

    path: str
    status: os.stat_result | None
    """What the disk says of it; None for a broken link."""
    is_image: bool
    """Whether it looks like an image."""
    passed_over: str = ""
    """What it is where it is no image: its suffix, or one of the words above."""


def is_excluded(path: str, exclude: Sequence[str]) -> bool:
    """Whether a path below a folder, or a name in it, is like one of the patterns of ``--exclude``.

    >>> is_excluded("a/old/1.jpg", ["old"]), is_excluded("a/1.jpg", ["b/*"])
    (True, False)
    """
    names = path.split("/")
    return any(
        fnmatch.fnmatchcase(path, pattern) or any(fnmatch.fnmatchcase(name, pattern) for name in names)
        for pattern in exclude
    )


def find_files(folder: Path, exclude: Sequence[str] = ()) -> Iterator[FoundFile]:
    """Walk a folder in sorted order and yield every file.

    A file looks like an image by its suffix, or for other names by its first bytes. A broken link named like
    an image counts, so that it is listed; pipes and devices do not.

    Not looked into, and yielded as files that are no images: hidden files and folders (names starting with a
    dot), folders of systems and storage devices, links to folders, and what is excluded.

    Args:
        folder: where to look.
        exclude: patterns of names, or of paths below the folder, such as ``old`` or ``*/drafts/*``.

    Raises:
        InputError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"cannot list the folder {error.filename}: {error.strerror}",
            expected="folders that this user may read",
            next_step="change the folder's permissions, or move it elsewhere",
        ) from error

    start = len(os.path.join(folder, ""))  # noqa: PTH118 - a Path takes five times as long
    for parent, folders, names in os.walk(folder, onerror=refuse):
        passed_over: dict[str, str] = {}
        for name in (*folders, *names):
            if name.startswith("."):
                passed_over[name] = HIDDEN
            elif exclude and is_excluded(os.path.join(parent, name)[start:], exclude):  # noqa: PTH118
                passed_over[name] = EXCLUDED
        for name in folders:
            if name.lower() in _SYSTEM_FOLDERS:
                passed_over[name] = SYSTEM_FOLDER
            elif name not in passed_over and Path(parent, name).is_symlink():
                passed_over[name] = LINKED_FOLDER
        folders[:] = sorted(name for name in folders if name not in passed_over)
        for name in sorted({*names, *passed_over}):
            path = os.path.join(parent, name)  # noqa: PTH118
            yield FoundFile(path, None, False, passed_over[name]) if name in passed_over else _found(path)


def _found(path: str) -> FoundFile:
    """A file, asked for once, because a sync does this for every file there is."""
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
    is_named_so = suffix in IMAGE_SUFFIXES
    try:
        status = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode):
            return FoundFile(path, status, False, suffix or NO_SUFFIX)
        if is_named_so:
            return FoundFile(path, status, True)
        with Path(path).open("rb") as stream:
            head = stream.read(16)
    except OSError:
        return FoundFile(path, None, is_named_so, "" if is_named_so else suffix or NO_SUFFIX)
    is_image = kind_of(head) is not None
    return FoundFile(path, status, is_image, "" if is_image else suffix or NO_SUFFIX)
