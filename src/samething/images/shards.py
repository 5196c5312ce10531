"""Images inside larger files: members of tar shards, cells of Parquet and Arrow tables.

A process keeps the last few files open with their lists of contents, so that reading one image after
another costs one read each.
"""

from __future__ import annotations

import dataclasses
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from samething.errors import ArtefactError
from samething.images.addresses import local_copy, local_path, open_file

KINDS: Final = ("tar", "parquet", "arrow")

_NUM_OPEN: Final = 8

_open: OrderedDict[tuple[int, str, str, str], _Shard] = OrderedDict()
_lock = threading.RLock()


class _Shard(Protocol):
    """An open file with images in it."""

    def read(self, member: str, max_bytes: int) -> bytes: ...

    def close(self) -> None: ...


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
            _open[key] = _OPENERS[kind](container)
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


@dataclasses.dataclass
class _Rows:
    """Rows of a table, read a group at a time; the last group of a column is kept."""

    starts: list[int]
    """First row of each group, and the number of rows."""
    column: str = ""
    group: int = -1
    cells: Any = None

    def find(self, member: str) -> tuple[str, int, int]:
        """Column, group and row within the group that ``COLUMN/ROW`` names."""
        column, _, number = member.rpartition("/")
        row = int(number)
        if not 0 <= row < self.starts[-1]:
            raise IndexError(f"row {row} of a table with {self.starts[-1]} rows")
        group = next(at for at in range(len(self.starts)) if self.starts[at + 1] > row)
        return column, group, row - self.starts[group]


def _cell_bytes(cell: Any) -> bytes:
    """Bytes of a cell; Hugging Face keeps an image as a struct of bytes and path."""
    value = cell.as_py()
    if isinstance(value, dict):
        value = value.get("bytes") or _path_bytes(value.get("path"))
    if isinstance(value, str):
        raise ValueError(f"the cell holds text ({value[:60]!r}) and no image")
    return bytes(value or b"")


def _path_bytes(path: str | None) -> bytes:
    return Path(path).read_bytes() if path else b""


class _Parquet:
    """A Parquet file; one row group of one column is in memory at a time."""

    def __init__(self, container: str) -> None:
        import pyarrow.parquet as pq

        self.stream = open_file(container)
        self.table = pq.ParquetFile(self.stream)
        sizes = [self.table.metadata.row_group(at).num_rows for at in range(self.table.num_row_groups)]
        self.rows = _Rows([0, *_running_sums(sizes)])

    def read(self, member: str, max_bytes: int) -> bytes:
        del max_bytes  # the length is checked by the caller; a row group is read whole
        column, group, row = self.rows.find(member)
        if (column, group) != (self.rows.column, self.rows.group):
            names = self.table.schema_arrow.names
            if column not in names:
                raise KeyError(f"no column {column} among {', '.join(names)}")
            cells = self.table.read_row_group(group, columns=[column]).column(0)
            self.rows.column, self.rows.group, self.rows.cells = column, group, cells
        return _cell_bytes(self.rows.cells[row])

    def close(self) -> None:
        self.table.close()
        self.stream.close()


class _Arrow:
    """An Arrow stream or file, mapped into memory; from a URL it is copied to this disk first."""

    def __init__(self, container: str) -> None:
        import pyarrow as pa

        self.stream = pa.memory_map(local_copy(container))
        try:
            self.table = pa.ipc.open_stream(self.stream).read_all()
        except pa.ArrowInvalid:
            self.stream.seek(0)
            self.table = pa.ipc.open_file(self.stream).read_all()
        self.rows = _Rows([0, self.table.num_rows])

    def read(self, member: str, max_bytes: int) -> bytes:
        del max_bytes  # the length is checked by the caller; the cell is mapped anyhow
        column, _, row = self.rows.find(member)
        if column not in self.table.column_names:
            raise KeyError(f"no column {column} among {', '.join(self.table.column_names)}")
        return _cell_bytes(self.table[column][row])

    def close(self) -> None:
        self.stream.close()


def _running_sums(sizes: list[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        yield total


_OPENERS: Final[dict[str, Callable[[str], _Shard]]] = {"tar": _Tar, "parquet": _Parquet, "arrow": _Arrow}
