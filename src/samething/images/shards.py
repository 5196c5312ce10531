"""Images inside larger files: members of tar shards, cells of Parquet and Arrow tables.

A process keeps the last few files open with their lists of contents, so that reading one image after
another costs one read each.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
import tarfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

from samething.errors import ArtefactError
from samething.images.addresses import local_copy, local_path, open_file

KINDS: Final = ("tar", "parquet", "arrow")

_NUM_OPEN: Final = 8

_open: OrderedDict[tuple[int, str, str, str], _Tar | _Table] = OrderedDict()
_lock = threading.RLock()


def read_member(kind: str, member: str, container: str, max_bytes: int) -> bytes:
    """The bytes of one image.

    Args:
        kind: ``tar``, ``parquet`` or ``arrow``.
        member: name of a tar member, or ``COLUMN/ROW``.
        container: path or URL of the file.
        max_bytes: more is refused.

    Raises:
        KeyError, IndexError, ValueError: there is no such member.
        OSError: the file cannot be opened.
    """
    # what a process inherits when it is forked shares its place in the file with its parent
    path = local_path(container)
    stamp = "" if path is None else str(Path(path).stat().st_mtime_ns)
    key = (os.getpid(), kind, container, stamp)
    with _lock:
        if key not in _open:
            while len(_open) >= _NUM_OPEN:
                _, oldest = _open.popitem(last=False)
                oldest.close()
            _open[key] = _Tar(container) if kind == "tar" else _Table(container, kind=kind)
        _open.move_to_end(key)
        return _open[key].read(member, max_bytes)


def tar_members(container: str) -> list[str]:
    """Names of the files in a tar shard, in its order.

    Raises:
        ArtefactError: the shard cannot be read.
    """
    try:
        shard = _Tar(container)
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{container} cannot be read ({error})",
            expected="a whole, uncompressed tar file",
            next_step="check the path, or unpack the file",
        ) from error
    try:
        return list(shard.places)
    finally:
        shard.close()


class _Tar:
    """A tar file and where its members lie."""

    def __init__(self, container: str) -> None:
        self.stream = open_file(container)
        self.places: dict[str, tuple[int, int]] = {}
        # "r:" refuses compressed files, in which no member could be reached without reading all before it
        try:
            with tarfile.open(fileobj=self.stream, mode="r:") as archive:
                for member in archive:
                    if member.isfile():
                        self.places[member.name] = (member.offset_data, member.size)
                    archive.members = []  # type: ignore[attr-defined]  # or each of a million is kept
        except tarfile.TarError as error:
            if not self.places:
                self.stream.close()
                raise ValueError(f"{container} is no uncompressed tar file ({error})") from error
            # a shard that was cut off: what came before is whole
        except BaseException:
            self.stream.close()
            raise

    def read(self, member: str, max_bytes: int) -> bytes:
        if member not in self.places:
            raise ValueError("no such member")
        offset, size = self.places[member]
        if size > max_bytes:
            return b"\0" * (max_bytes + 1)  # refused by its length; the content is not read
        self.stream.seek(offset)
        content: bytes = self.stream.read(size)
        if len(content) < size:
            raise ValueError(f"{member} is cut off: the shard ends early")
        return content

    def close(self) -> None:
        self.stream.close()


class _Table:
    """A Parquet file, or an Arrow stream or file that is mapped into memory.

    Of a Parquet file one row group of one column is in memory at a time.
    """

    def __init__(self, container: str, *, kind: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if kind == "parquet":
            self.stream = open_file(container)
            table = pq.ParquetFile(self.stream)
            self.names = table.schema_arrow.names
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        else:
            self.stream = pa.memory_map(local_copy(container))
            try:
                table = pa.ipc.open_stream(self.stream).read_all()
            except pa.ArrowInvalid:
                self.stream.seek(0)
                table = pa.ipc.open_file(self.stream).read_all()
            self.names = table.column_names
            sizes = [table.num_rows]

        @functools.lru_cache(1)
        def cells(column: str, group: int) -> Any:
            return table.read_row_group(group, [column]).column(0) if kind == "parquet" else table[column]

        self.cells = cells
        self.starts = [0, *itertools.accumulate(sizes)]

    def read(self, member: str, max_bytes: int) -> bytes:
        """The bytes of the cell ``COLUMN/ROW``; Hugging Face keeps an image as a struct of bytes and path."""
        del max_bytes  # the length is checked by the caller
        column, _, number = member.rpartition("/")
        row = int(number)
        if column not in self.names:
            raise KeyError(f"no column {column} among {', '.join(self.names)}")
        if not 0 <= row < self.starts[-1]:
            raise IndexError(f"row {row} of a table with {self.starts[-1]} rows")
        group = bisect.bisect_right(self.starts, row) - 1
        value = self.cells(column, group)[row - self.starts[group]].as_py()
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes") or (Path(path).read_bytes() if path else b"")
        if isinstance(value, str):
            raise ValueError(f"the cell holds text ({value[:60]!r}) and no image")
        return bytes(value or b"")

    def close(self) -> None:
        self.stream.close()
