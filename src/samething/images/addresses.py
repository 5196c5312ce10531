"""Addresses of image files: paths, URLs and members of shards, as text; and how their files are opened.

======================================  ====================================================
``/path/to/image.jpg``                  a file
``file:///path/to/image.jpg``           the same
``http://…``, ``https://…``             a file on the web
``s3://…``, ``gs://…``, …               any other URL that fsspec can open
``tar://MEMBER::SHARD``                 a member of an uncompressed tar file (WebDataset)
``parquet://COLUMN/ROW::TABLE``         a cell of a Parquet file: bytes, or a struct with bytes
``arrow://COLUMN/ROW::TABLE``           a cell of an Arrow stream (Hugging Face ``save_to_disk``)
======================================  ====================================================

where SHARD and TABLE are paths or URLs again. Files on this disk and on the web need the standard library
alone; for all else fsspec is asked.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path
from typing import Any, Final

from samething.errors import needed

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_TIMEOUT_S: Final = 20.0


def is_url(location: object) -> bool:
    """Whether a location is a URL or a member of a shard, and no path.

    >>> is_url("https://example.org/a.jpg"), is_url("tar://a.jpg::shard.tar"), is_url("a/b.jpg")
    (True, True, False)
    """
    return isinstance(location, str) and _URL.match(location) is not None


def scheme_of(location: str) -> str:
    """What stands before ``://``, in small letters; empty for a path."""
    found = _URL.match(location)
    return found[1].lower() if found else ""


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


def local_path(location: str) -> str | None:
    """The path of a file on this disk, also where it is written as a ``file:`` URL; None for other URLs."""
    if not is_url(location):
        return location
    scheme, _, path = location.partition("://")
    if scheme.lower() != "file":
        return None
    return path if os.path.exists(path) else urllib.parse.unquote(path)  # noqa: PTH110 (as browsers write it)


def open_file(location: str) -> Any:
    """A file opened at its beginning, in which one can jump to any place; no member of a shard."""
    path = local_path(location)
    if path is not None:
        return Path(path).open("rb")
    files, place = _fsspec().url_to_fs(location)
    return files.open(place, "rb")


def download(location: str, max_bytes: int) -> bytes:
    """The first ``max_bytes + 1`` bytes of a file elsewhere.

    Raises:
        FileNotFoundError, PermissionError: asking again would not help.
        Exception: of any kind that fsspec's file systems have.
        MissingExtraError: fsspec, or its part for this kind of URL, is not installed.
    """
    if scheme_of(location) in ("http", "https"):
        with _ask(location, "GET") as answer:
            content: bytes = answer.read(max_bytes + 1)
            return content
    with _fsspec().open(location, "rb") as stream:
        found: bytes = stream.read(max_bytes + 1)
        return found


def file_status(location: str) -> dict[str, Any]:
    """What is known of a file without reading it: size, ETag, time of change, by the names of its system."""
    path = local_path(location)
    if path is not None:
        status = os.stat(path)  # noqa: PTH116 (a string, as everywhere here)
        return {"size": status.st_size, "mtime": status.st_mtime_ns}
    if scheme_of(location) in ("http", "https"):
        try:
            answer = _ask(location, "HEAD")
        except OSError:
            answer = _ask(location, "GET")  # some servers refuse the other; the content is not read
        with answer:
            told = {name: answer.headers.get(name) for name in ("ETag", "Content-MD5", "Last-Modified")}
            return {"size": answer.headers.get("Content-Length"), **told}
    files, place = _fsspec().url_to_fs(location)
    found: dict[str, Any] = files.info(place)
    return found


def local_copy(location: str) -> str:
    """The path of a file on this disk; a file elsewhere is copied here first."""
    return local_path(location) or str(_fsspec().open_local(f"simplecache::{location}", mode="rb"))


def _ask(url: str, method: str) -> Any:
    import urllib.request  # a tenth of what finding a file on this disk loads

    address = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters beyond ASCII
    request = urllib.request.Request(address, method=method, headers={"User-Agent": "samething"})
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()  # it is the answer itself, with an open connection
        if error.code in (404, 410):
            raise FileNotFoundError(url) from error
        if 400 <= error.code < 500:
            raise PermissionError(f"the server answered {error.code} {error.reason}") from error
        raise


def _fsspec() -> Any:
    return needed("fsspec", extra="remote")
