"""Where an image is: a file, a URL, or a member of a shard; and which part of it is meant.

A location is one of

======================================  ====================================================
``/path/to/image.jpg``                a file
``s3://…``, ``gs://…``, ``https://…``    any URL that fsspec can open
``tar://MEMBER::SHARD``                 a member of an uncompressed tar file (WebDataset)
``parquet://COLUMN/ROW::TABLE``         a cell of a Parquet file: bytes, or a struct with bytes
``arrow://COLUMN/ROW::TABLE``           a cell of an Arrow stream (Hugging Face ``save_to_disk``)
======================================  ====================================================

where SHARD and TABLE are paths or URLs again.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from samething.errors import ImageError, MissingExtraError, SamethingError

MAX_BYTES: Final = 1 << 30
"""Larger image files are refused: they would be held in memory whole."""

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

# A network fails for a moment more often than for good; waits of 0.2 and 0.8 s lie between the attempts.
_WAITS_S: Final = (0.2, 0.8)

# What the file systems of fsspec call size, checksum and time of change.
_MARKS: Final = (
    "size", "ETag", "etag", "Content-MD5", "md5Hash", "generation", "mtime", "LastModified",
    "Last-Modified", "last_modified", "created",
)  # fmt: skip

_EXTRAS: Final = dict.fromkeys(("aiohttp", "s3fs", "gcsfs", "adlfs"), "remote")


class Box(NamedTuple):
    """A part of an upright image, in pixels; ``right`` and ``bottom`` are the first that are left out."""

    left: int
    top: int
    right: int
    bottom: int


@dataclasses.dataclass(frozen=True)
class Source:
    """One image of a catalog."""

    location: str
    """A path, a URL or a member of a shard; see the module."""
    box: Box | None = None
    """The part to look at; None for the whole image."""

    def __str__(self) -> str:
        return self.location

    @property
    def is_remote(self) -> bool:
        """Whether it is anything else than a file of its own on this disk."""
        return is_url(self.location)

    @property
    def container(self) -> str:
        """The file that the image is in: the shard of a member, else its own."""
        return container_of(self.location)

    def read(self, *, max_bytes: int = MAX_BYTES) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: missing, empty, too large, not readable or not a file.
            MissingExtraError: a package that this kind of URL needs is not installed.
        """
        if not self.is_remote:
            return _read_file(Path(self.location), max_bytes)
        return _fetch(self.location, max_bytes)

    def version(self) -> str:
        """What changes when the content behind a URL does: size, ETag, time of change; empty if unknown."""
        try:
            found = _info(self.container)
        except Exception:  # it is listed with its reason when it is read
            return ""
        return ";".join(f"{name}={found[name]}" for name in _MARKS if found.get(name) is not None)


def is_url(location: str) -> bool:
    """Whether a location is a URL or a member of a shard, and no path.

    >>> is_url("https://example.org/a.jpg"), is_url("tar://a.jpg::shard.tar"), is_url("a/b.jpg")
    (True, True, False)
    """
    return _URL.match(location) is not None


def located(root: Path, image: str) -> str:
    """A location as a catalog writes it, made independent of where the catalog is.

    >>> located(Path("/data"), "tar://a.jpg::shards/0.tar")
    'tar://a.jpg::/data/shards/0.tar'
    """
    if not is_url(image):
        return str(root / image)
    member, separator, container = image.partition("::")
    if not separator or is_url(container):
        return image
    return f"{member}::{root / container}"


def container_of(location: str) -> str:
    """The file that a location is in: the shard of a member, else the location itself."""
    return location.partition("::")[2] or location


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path} is not a file", expected="an image file", next_step="check the path")
        _check_bytes(str(path), status.st_size, max_bytes)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ImageError(
            f"{path}: {getattr(error, 'strerror', None) or error}",
            expected="a readable image file",
            next_step="check the path and its permissions",
        ) from error


def _check_bytes(name: str, num_bytes: int, max_bytes: int) -> None:
    if num_bytes == 0:
        raise ImageError(f"{name} is empty", expected="an image", next_step="replace or remove the file")
    if num_bytes > max_bytes:
        raise ImageError(
            f"{name} has {num_bytes:,} bytes",
            expected=f"at most {max_bytes:,} bytes",
            next_step="scale the image down",
        )


def _fetch(location: str, max_bytes: int) -> bytes:
    for wait_s in (*_WAITS_S, None):
        try:
            content = _open_and_read(location, max_bytes)
            _check_bytes(location, len(content), max_bytes)
            return content
        except SamethingError:
            raise
        except ImportError as error:
            module = (error.name or str(error)).split(".")[0]
            raise MissingExtraError(module, extra=_EXTRAS.get(module, "remote")) from error
        except (FileNotFoundError, KeyError, IndexError, PermissionError, ValueError) as error:
            raise _unreachable(location, error) from error
        except Exception as error:  # every file system of fsspec has kinds of its own
            if wait_s is None:
                raise _unreachable(location, error) from error
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _unreachable(location: str, error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError):
        reason = "does not exist"
    else:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return ImageError(
        f"{location}: {reason}",
        expected="an image that can be fetched",
        next_step="check the URL and the permissions, then run the same command again",
    )


def _open_and_read(location: str, max_bytes: int) -> bytes:
    from samething.images import shards

    kind = location.partition("://")[0]
    member, separator, container = location.partition("::")
    if separator and kind in shards.KINDS:
        return shards.read_member(kind, member.partition("://")[2], container, max_bytes)
    import fsspec

    with fsspec.open(location, "rb") as stream:
        content: bytes = stream.read(max_bytes + 1)
        return content


def _info(location: str) -> dict[str, Any]:
    if not is_url(location):
        status = os.stat(location)  # noqa: PTH116 (a string, as everywhere here)
        return {"size": status.st_size, "mtime": status.st_mtime_ns}
    import fsspec

    files, path = fsspec.url_to_fs(location)
    found: dict[str, Any] = files.info(path)
    return found
