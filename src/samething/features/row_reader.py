"""Rows of a feature file in any order, as fast as memory or the disk allows.

A file in the page cache is read well through a memory map. A file larger than memory is not: every row of
a shuffled batch is then a read of its own. When the order is known in advance and takes rows in blocks
(sampling ``block-shuffled``), a group of rows is read with few long reads while the one before is in use.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np

from samething.arrays import FeatureRows, Float, Int
from samething.errors import ArtefactError

GROUP_ROWS: Final = 8192
"""Rows that are read ahead together; two such groups are held: 38 MB for float16 rows of 1152."""
# All 32 blocks of a group are asked for at once, which keeps the disk's queue full while the cores are busy
# with other work: 1.03 of sequential reading, against 0.78 with 16 threads. The threads only wait.
NUM_THREADS: Final = 32
ROWS_A_READ: Final = 256
# Reading 64 rows of 2 KB that nobody wants takes less time than a read of its own.
LARGEST_GAP: Final = 64


@dataclasses.dataclass
class _Group:
    rows: Int[np.ndarray, " g"]
    """Row numbers, ascending."""
    buffer: FeatureRows
    """Room for their features; whole when the reads are done."""
    reads: list[Future[None]]

    def fill(
        self, result: FeatureRows, indices: Int[np.ndarray, " b"], missing: Int[np.ndarray, " m"]
    ) -> Int[np.ndarray, " l"]:
        """Copy the missing rows that are here into the result; returns those that are still missing."""
        for read in self.reads:
            read.result()
        self.reads.clear()
        wanted = indices[missing]
        places = np.minimum(np.searchsorted(self.rows, wanted), len(self.rows) - 1)
        found = self.rows[places] == wanted
        if found.all() and len(missing) == len(result):
            np.take(self.buffer, places, axis=0, out=result, mode="clip")
        else:
            result[missing[found]] = self.buffer[places[found]]
        return np.asarray(missing[~found])


class RowReader:
    """Reads rows of a feature file.

    Without a plan, and for rows outside of it, rows come through the memory map. With :meth:`plan`, they come
    from two buffers of :data:`GROUP_ROWS` rows; one is filled by threads while the other is in use. A forked
    child uses the memory map.

    Args:
        features: of a feature set, memory-mapped or in memory.
    """

    def __init__(self, features: FeatureRows) -> None:
        # a slice of a memory map, or an array in memory, has no file of its own to read from
        is_whole = not isinstance(features.base, np.ndarray) and features.flags.c_contiguous
        self._file = features if isinstance(features, np.memmap) and is_whole else None
        self._array = np.asarray(features)
        self._process = os.getpid()
        self._descriptor: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._buffers: list[FeatureRows] = []
        self._held: list[_Group] = []
        self._coming: Iterator[Int[np.ndarray, " g"]] = iter(())

    def rows(self, indices: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b w"]:
        """Features of some rows, in the file's own type, as a new array.

        Raises:
            ArtefactError: the file was cut short or cannot be read.
        """
        if not self._held or os.getpid() != self._process:
            return self._array.take(indices, axis=0)
        result = np.empty((len(indices), self._array.shape[1]), self._array.dtype)
        missing = self._held[0].fill(result, indices, np.arange(len(indices)))
        while len(missing) and len(self._held) > 1 and np.isin(indices[missing], self._held[1].rows).any():
            self._read_ahead(self._held.pop(0).buffer)
            missing = self._held[0].fill(result, indices, missing)
        if len(missing):
            result[missing] = self._array[indices[missing]]
        return result

    def plan(self, order: Int[np.ndarray, " n"], *, start: int = 0) -> None:
        """Say in which order rows will be asked for; reading ahead begins.

        It changes the speed, never the values. Where the system has no ``preadv`` or
        ``posix_fadvise`` (Windows, macOS), or the features
        are in memory anyhow, it does nothing.

        Args:
            order: rows of the whole epoch; blocks and groups as of sampling ``block-shuffled`` are fast.
            start: place in the order to begin at, when a run resumes in the middle of an epoch.

        Raises:
            ArtefactError: the file was cut short or removed.
        """
        if self._file is None or not (hasattr(os, "preadv") and hasattr(os, "posix_fadvise")):
            return
        self.close()
        self._process = os.getpid()
        try:
            self._descriptor = os.open(str(self._file.filename), os.O_RDONLY)
        except OSError as error:
            raise _damaged(self._file.filename, str(error)) from error
        if os.fstat(self._descriptor).st_size < self._file.offset + self._file.nbytes:
            self.close()
            raise _damaged(self._file.filename, "it ends early")
        # lengths of reads are ours: the kernel's own guesses read megabytes that nobody wants
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="rows")
        self._buffers = self._buffers or [
            np.empty((GROUP_ROWS, self._array.shape[1]), self._array.dtype) for _ in range(2)
        ]
        first = start // GROUP_ROWS * GROUP_ROWS  # whole groups, or blocks would be read in shreds
        self._coming = (order[at : at + GROUP_ROWS] for at in range(first, len(order), GROUP_ROWS))
        for buffer in self._buffers:
            self._read_ahead(buffer)

    def _read_ahead(self, buffer: FeatureRows) -> None:
        """Begin to read the next group of the plan, if there is one, into a buffer that is free."""
        rows = np.unique(next(self._coming, np.empty(0, np.int64)))
        if len(rows) == 0 or self._pool is None:
            return
        jumps = np.flatnonzero(np.diff(rows) > LARGEST_GAP) + 1
        edges = np.unique(np.concatenate([jumps, np.arange(0, len(rows), ROWS_A_READ), [len(rows)]]))
        reads = [
            self._pool.submit(self._read, rows[begin:end], buffer[begin:end])
            for begin, end in itertools.pairwise(edges.tolist())
        ]
        self._held.append(_Group(rows, buffer, reads))

    def _read(self, rows: Int[np.ndarray, " r"], target: FeatureRows) -> None:
        """Read ascending rows that lie close together; runs in a thread."""
        assert self._file is not None and self._descriptor is not None
        size, offset = target.strides[0], self._file.offset
        edges = [0, *(np.flatnonzero(np.diff(rows) > 1) + 1).tolist(), len(rows)]
        try:
            if len(edges) > 2:  # one long read from the disk, then many short ones from the page cache
                length = int(rows[-1] + 1 - rows[0]) * size
                os.posix_fadvise(
                    self._descriptor, offset + int(rows[0]) * size, length, os.POSIX_FADV_WILLNEED
                )
            for begin, end in itertools.pairwise(edges):
                left = target[begin:end].data.cast("B")
                at = offset + int(rows[begin]) * size
                while left:
                    count = os.preadv(self._descriptor, [left], at)
                    if count == 0:
                        raise _damaged(self._file.filename, "it ends early")
                    left, at = left[count:], at + count
        except OSError as error:
            raise _damaged(self._file.filename, str(error)) from error

    def close(self) -> None:
        """Wait for reads under way, end the threads and close the file; the memory map still serves."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._pool, self._descriptor, self._held, self._coming = None, None, [], iter(())


def _damaged(path: object, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{path} cannot be read ({reason})",
        expected="a whole .npy file of features",
        next_step="check the disk, remove the feature folder and compute the features again",
    )
