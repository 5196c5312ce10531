"""One image of a collection: where it is, which part is meant, what it shows, and which version it is."""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from samething.errors import ImageError, MissingExtraError, SamethingError
from samething.images.addresses import container_of, download, file_status, is_url, local_path, scheme_of
from samething.images.shards import KINDS, read_member

MAX_BYTES: Final = 1 << 30
"""Larger image files are refused: they would be held in memory whole."""

# A network fails for a moment more often than for good; waits of 0.2 and 0.8 s lie between the attempts.
_WAITS_S: Final = (0.2, 0.8)

# What file systems and servers call size, checksum and time of change.
_MARKS: Final = (
    "size", "ETag", "etag", "Content-MD5", "md5Hash", "generation", "mtime", "LastModified",
    "Last-Modified", "last_modified", "created",
)  # fmt: skip


class Box(NamedTuple):
    """A part of an upright image, in pixels; ``right`` and ``bottom`` are the first that are left out."""

    left: int
    top: int
    right: int
    bottom: int


@dataclasses.dataclass(frozen=True)
class Source:
    """One image of a catalog, a folder or an index."""

    location: str
    """A path, a URL or a member of a shard; see :mod:`samething.images.addresses`."""
    box: Box | None = None
    """The part to look at; None for the whole image."""
    label: str = ""
    """The instance that it shows."""
    domain: str = "default"
    mark: str = ""
    """Changes when the content does: size and time of change, or what a server says; empty: unknown."""
    size_bytes: int | None = None
    modified: float | None = None
    """Seconds since 1970."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Further columns of a catalog."""
    collection: str = ""
    """Of an image in an index: the folder or catalog that brought it, as the index names it."""
    region: Box | None = None
    """The part that the label is of, where the whole image is looked at all the same."""

    def __str__(self) -> str:
        return self.location

    @property
    def key(self) -> str:
        """Identity of what is meant: the location, and the box where there is one."""
        return keyed(self.location, self.box or self.region)

    @property
    def container(self) -> str:
        """The file that the image is in: the shard of a member, else its own."""
        return container_of(self.location)

    @property
    def is_remote(self) -> bool:
        """Whether it is anything else than a file of its own on this disk, named by its path."""
        return is_url(self.location)

    def read(self, *, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: missing, empty, too large, not readable or not a file.
            MissingExtraError: a package that this kind of URL needs is not installed.
        """
        path = local_path(self.location)
        if path is None:
            return _fetch(self.location, max_bytes)
        try:
            with open_image_file(path, max_bytes=max_bytes) as stream:
                return stream.read()
        except OSError as error:
            raise unreadable(path, error) from error

    def version(self) -> str:
        """What changes when the content behind a URL does: size, ETag, time of change; empty if unknown."""
        try:
            found = file_status(self.container)
        except Exception:  # it is listed with its reason when it is read
            return ""
        return ";".join(f"{name}={found[name]}" for name in _MARKS if found.get(name) is not None)


def disk_state(path: str, status: os.stat_result | None = None) -> dict[str, Any]:
    """``size_bytes``, ``modified`` and ``mark`` of a file, for a source; nothing for one that is not there.

    Args:
        path: the file.
        status: what the disk says of it, where it was asked already.
    """
    try:
        status = status or os.stat(path)  # noqa: PTH116 (a million times)
    except OSError:  # it is listed with its reason when it is read
        return {}
    mark = f"{status.st_size}:{status.st_mtime_ns}"
    return {"size_bytes": status.st_size, "modified": status.st_mtime, "mark": mark}


def keyed(name: str, box: Box | None) -> str:
    """A name of an image, with the box behind it where only a part is meant.

    >>> keyed("a.jpg", None), keyed("a.jpg", Box(1, 2, 3, 4))
    ('a.jpg', 'a.jpg\\x1f1,2,3,4')
    """
    return name if box is None else f"{name}\x1f{','.join(map(str, box))}"


def open_image_file(path: str | Path, *, max_bytes: int = MAX_BYTES) -> io.BufferedReader:
    """A file on this disk, opened; not one that is empty, missing or a pipe, which would never end.

    Raises:
        ImageError: says which; or it has too many bytes.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError.of(
                str(path), "is not a file", expected="an image file", next_step="check the path"
            )
        check_bytes(str(path), status.st_size, max_bytes)
        return Path(path).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: Exception) -> ImageError:
    """The error of a file on this disk that the system does not let one read."""
    return ImageError.of(
        str(path),
        f": {getattr(error, 'strerror', None) or error}",
        expected="a readable image file",
        next_step="check the path and its permissions",
    )


def check_bytes(name: str, num_bytes: int, max_bytes: int = MAX_BYTES) -> None:
    """Refuse an image file that is empty, or too large to be held in memory.

    Raises:
        ImageError: says which.
    """
    if num_bytes == 0:
        raise ImageError.of(name, "is empty", expected="an image", next_step="replace or remove the file")
    if num_bytes > max_bytes:
        raise ImageError.of(
            name,
            f"has {num_bytes:,} bytes",
            expected=f"at most {max_bytes:,} bytes",
            next_step="scale the image down",
        )


def check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    """Refuse an image that has no pixels, or more than are to be unpacked.

    Raises:
        ImageError: says which.
    """
    if width * height == 0:
        raise ImageError.of(name, "has no pixels", expected="an image", next_step="remove the file")
    if width * height > max_pixels:
        raise ImageError.of(
            name,
            f"has {width:,} × {height:,} = {width * height:,} pixels",
            expected=f"at most {max_pixels:,} pixels",
            next_step="scale the image down",
        )


def _fetch(location: str, max_bytes: int) -> bytes:
    for wait_s in (*_WAITS_S, None):
        try:
            content = _open_and_read(location, max_bytes)
            check_bytes(location, len(content), max_bytes)
            return content
        except SamethingError:
            raise
        except ImportError as error:
            module = (error.name or str(error)).split(".")[0]
            raise MissingExtraError(module, extra="remote") from error
        except (FileNotFoundError, KeyError, IndexError, PermissionError, ValueError) as error:
            raise _unreachable(location, error) from error
        except Exception as error:  # every file system of fsspec has kinds of its own
            if wait_s is None:
                raise _unreachable(location, error) from error
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _open_and_read(location: str, max_bytes: int) -> bytes:
    member, separator, container = location.partition("::")
    if separator and scheme_of(location) in KINDS:
        return read_member(scheme_of(location), member.partition("://")[2], container, max_bytes)
    return download(location, max_bytes)


def _unreachable(location: str, error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError):
        reason = "does not exist"
    else:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ImageError.of(
        location,
        f": {reason}",
        expected="an image that can be fetched",
        next_step="check the address and the permissions, then run the same command again",
    )
