"""Catalog rows to prepared pixels, in worker processes that may die without ending the job."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Final

import numpy as np

from samething.arrays import UInt8
from samething.catalog import Catalog
from samething.errors import ImageError
from samething.images import Preprocessing, read_pixels
from samething.images.decoding import MAX_PIXELS

# Tasks handed to a worker at a time: with two, it decodes the next batch while its last one is described.
_TASKS_PER_WORKER: Final = 2

# An image that a worker died on twice is left out; once may have been chance, such as a lack of memory.
_DEATHS_PER_IMAGE: Final = 2


def num_decoders(num_workers: int | None) -> int:
    """Processes that decode: by default one less than the cores, at least one."""
    if num_workers is not None:
        return num_workers
    return max(1, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Prepares the images of a catalog's rows."""

    catalog: Catalog
    copies: Mapping[int, Sequence[int]]
    """Rows that show the same image as a row, itself included; only where there are several."""
    preprocessing: Preprocessing

    def read(self, row: int) -> UInt8[np.ndarray, "3 height width"] | dict[int, str]:
        """Pixels of a row's image, or the reasons why neither it nor a copy of it can be read."""
        reasons = {}
        for place in self.copies.get(row, (row,)):
            source = self.catalog.source(place)
            sha256, width, height = (
                self.catalog.table[name][place].as_py() for name in ("sha256", "width", "height")
            )
            max_pixels = max(MAX_PIXELS, (width or 0) * (height or 0))  # what was listed is read
            try:
                content = source.read()
                if not sha256 or hashlib.sha256(content).hexdigest() == sha256:
                    return read_pixels(content, self.preprocessing, max_pixels=max_pixels, box=source.box)
                reasons[place] = "changed since the catalog was made; make the catalog again"
            except ImageError as error:
                reasons[place] = error.reason
            except RecursionError as error:
                reasons[place] = f"cannot be decoded ({error})"
        return reasons

    def read_batch(
        self, rows: Sequence[int], pixels: UInt8[np.ndarray, "b 3 height width"], reasons: dict[int, str]
    ) -> Iterator[int]:
        """Fill the front of ``pixels`` with the images that can be read; yields each row before it is read.

        Rows that have a reason already are passed over.
        """
        num_filled = 0
        for row in rows:
            if row in reasons:
                continue
            yield row
            found = self.read(row)
            if isinstance(found, dict):
                reasons.update(found)
            else:
                pixels[num_filled] = found
                num_filled += 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of images, prepared."""

    number: int
    rows: list[int]
    """Catalog rows of the pixels."""
    pixels: UInt8[np.ndarray, "b 3 height width"]
    """Valid until the next batch is asked for: the memory is used again."""
    reasons: dict[int, str]
    """Catalog rows that cannot be read, and why."""


def read_one_batch(reader: ImageReader, number: int, rows: Sequence[int]) -> Batch:
    """Prepare one batch in this process."""
    pixels = np.empty((len(rows), 3, *reader.preprocessing.shape), np.uint8)
    reasons: dict[int, str] = {}
    asked = list(reader.read_batch(rows, pixels, reasons))
    good = [row for row in asked if row not in reasons]
    return Batch(number, good, pixels[: len(good)], reasons)


class ImageStream:
    """Prepares batches of images in worker processes, each written by its worker where it is used.

    Pixels lie in memory shared by all, of ``num_bytes`` bytes, however many images there are. A worker that
    dies (a decoder that crashes, memory that runs out) is replaced and its batch done again; the image it
    died on, twice, gets a reason like any other. Batches come in the order in which they are ready.

    Not torch's DataLoader: that copies each batch through a pipe twice, and ends the job with its worker.

    Args:
        reader: what prepares a row.
        batches: numbers of the batches, and the catalog rows of each.
        num_workers: 0 prepares in this process.
    """

    def __init__(
        self, reader: ImageReader, batches: Mapping[int, Sequence[int]], *, num_workers: int
    ) -> None:
        self.reader = reader
        self.batches = batches
        # where a process cannot be forked, memory could not be shared like this
        self.num_workers = min(num_workers, len(batches)) if sys.platform == "linux" else 0
        self._num_slots = self.num_workers * _TASKS_PER_WORKER + 1
        self._shape = (3, *reader.preprocessing.shape)
        self.batch_size = max(map(len, batches.values()), default=0)
        self._workers: list[_Worker] = []

    @property
    def num_bytes(self) -> int:
        """Memory for prepared images."""
        return self._num_slots * self.batch_size * math.prod(self._shape)

    def memory_bytes(self) -> int:
        """Memory that the workers hold now beside what they share with this process, in bytes."""
        total = 0
        for worker in self._workers:
            with contextlib.suppress(OSError, ValueError):
                status = Path(f"/proc/{worker.process.pid}/smaps_rollup").read_text()
                total += 1024 * sum(
                    int(line.split()[1]) for line in status.splitlines() if line.startswith("Private_Dirty:")
                )
        return total

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers == 0:
            for number, rows in self.batches.items():
                yield read_one_batch(self.reader, number, rows)
            return
        with contextlib.ExitStack() as stack:
            # not /dev/shm, of which containers have little
            memory = mmap.mmap(-1, max(1, self.num_bytes))
            shape = (self._num_slots, self.batch_size, *self._shape)
            slots = np.frombuffer(memory, np.uint8, count=math.prod(shape)).reshape(shape)
            stack.callback(self._stop)
            self._workers = [_Worker(self.reader, slots) for _ in range(self.num_workers)]
            yield from self._ready_batches(slots)

    def _ready_batches(self, slots: UInt8[np.ndarray, "s b 3 height width"]) -> Iterator[Batch]:
        waiting = deque(_Task(number, list(rows), {}) for number, rows in self.batches.items())
        free = list(range(self._num_slots))
        deaths: Counter[int] = Counter()
        while waiting or any(worker.tasks for worker in self._workers):
            for worker in sorted(self._workers, key=lambda worker: len(worker.tasks)):
                if waiting and free and len(worker.tasks) < _TASKS_PER_WORKER:
                    worker.give(waiting.popleft(), free.pop())
            if waiting and free and any(len(worker.tasks) < _TASKS_PER_WORKER for worker in self._workers):
                continue
            multiprocessing.connection.wait([worker.connection for worker in self._workers if worker.tasks])
            for at, worker in enumerate(self._workers):
                while worker.tasks and (answer := worker.answer()) is not None:
                    task, slot = worker.tasks.popleft()
                    rows, reasons = answer
                    yield Batch(task.number, rows, slots[slot, : len(rows)], reasons)
                    free.append(slot)
                    if waiting and len(worker.tasks) < _TASKS_PER_WORKER:
                        worker.give(waiting.popleft(), free.pop())
                if worker.tasks and worker.has_ended:
                    self._replace(at, worker, deaths, waiting, free, slots)

    def _replace(
        self,
        at: int,
        worker: _Worker,
        deaths: Counter[int],
        waiting: deque[_Task],
        free: list[int],
        slots: UInt8[np.ndarray, "s b 3 height width"],
    ) -> None:
        """Put a new worker in the place of a dead one, and its tasks back into the queue."""
        row = worker.current
        deaths[row] += 1
        for task, slot in reversed(worker.tasks):
            if row in task.rows and deaths[row] >= _DEATHS_PER_IMAGE:
                reason = f"the process that decoded it ended ({_ending(worker.process.exitcode)})"
                task.reasons.update(dict.fromkeys(self.reader.copies.get(row, (row,)), reason))
            waiting.appendleft(task)
            free.append(slot)
        if row < 0 and deaths[row] > 2 * self.num_workers:
            raise RuntimeError(f"worker processes end at once ({_ending(worker.process.exitcode)})")
        worker.stop()
        self._workers[at] = _Worker(self.reader, slots)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []


@dataclasses.dataclass
class _Task:
    number: int
    rows: list[int]
    reasons: dict[int, str]
    """Rows that are not to be tried, and why."""


class _Worker:
    """A process that prepares batches, as its parent sees it."""

    def __init__(self, reader: ImageReader, slots: UInt8[np.ndarray, "s b 3 height width"]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._current = np.frombuffer(mmap.mmap(-1, 8), np.int64)
        self._current[0] = -1
        self.tasks: deque[tuple[_Task, int]] = deque()
        self.has_ended = False
        self.process: ForkProcess = context.Process(
            target=_work, args=(theirs, self.connection, reader, slots, self._current), daemon=True
        )
        with warnings.catch_warnings():
            # Python warns of locks that other threads may hold: a worker touches none of theirs
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()

    @property
    def current(self) -> int:
        """The row being read; -1 between batches."""
        return int(self._current[0])

    def give(self, task: _Task, slot: int) -> None:
        self.tasks.append((task, slot))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed elsewhere
            self.connection.send((task.rows, task.reasons, slot))

    def answer(self) -> tuple[list[int], dict[int, str]] | None:
        """What the worker has sent of its first task, if it has; notices its end."""
        try:
            if self.connection.poll():
                answer: tuple[list[int], dict[int, str]] = self.connection.recv()
                return answer
        except (EOFError, OSError):
            self.process.join()
            self.has_ended = True
        return None

    def stop(self) -> None:
        self.process.kill()  # it holds nothing that must be put away
        self.process.join()
        self.connection.close()


def _work(
    connection: multiprocessing.connection.Connection,
    parents: multiprocessing.connection.Connection,
    reader: ImageReader,
    slots: UInt8[np.ndarray, "s b 3 height width"],
    current: np.ndarray,
) -> None:
    """What a worker process does until its parent is gone."""
    import torch

    parents.close()
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the work
    torch.set_num_threads(1)
    while True:
        try:
            rows, reasons, slot = connection.recv()
        except (EOFError, OSError):
            return
        asked = []
        for row in reader.read_batch(rows, slots[slot], reasons):
            current[0] = row
            asked.append(row)
            if os.getppid() != parent:
                return
        current[0] = -1
        try:
            connection.send(([row for row in asked if row not in reasons], reasons))
        except OSError:
            return


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-exitcode).name
    return f"status {exitcode}"
