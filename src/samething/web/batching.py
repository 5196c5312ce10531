"""Queries of many people at once, embedded together: one model, one thread, small batches, a bounded queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from PIL import Image

from samething.embedder import Embedder
from samething.errors import SamethingError

MAX_BATCH: Final = 16
"""Pictures embedded together at most."""


class BusyError(SamethingError):
    """More queries wait than the server lets wait."""

    def __init__(self, num_waiting: int) -> None:
        super().__init__(
            f"{num_waiting} pictures are waiting already",
            expected="fewer at a time",
            next_step="try again in a second",
        )


class Batcher:
    """Embeds pictures in one thread; whatever waits is embedded together.

    Nothing is held back to fill a batch: an idle server answers at once, and under load batches grow by
    themselves while the one before is computed.
    """

    def __init__(self, embedder: Embedder, *, max_waiting: int = 64) -> None:
        self._embedder = embedder
        self._max_waiting = max_waiting
        self._waiting: queue.SimpleQueue[tuple[Image.Image, Future[Any]] | None] = queue.SimpleQueue()
        self._count = 0
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="embedder", daemon=True)
        self._thread.start()
        self.num_batches = 0
        """Batches computed so far."""

    @property
    def num_waiting(self) -> int:
        """Pictures that were given and are not embedded yet."""
        return self._count

    def submit(self, pictures: Sequence[Image.Image]) -> list[Future[Float[np.ndarray, " d"]]]:
        """Ask for the embeddings of decoded pictures.

        Raises:
            BusyError: too many wait already; none of these was taken.
        """
        with self._guard:
            if self._count + len(pictures) > self._max_waiting:
                raise BusyError(self._count)
            self._count += len(pictures)
        futures: list[Future[Any]] = [Future() for _ in pictures]
        for item in zip(pictures, futures, strict=True):
            self._waiting.put(item)
        return futures

    def close(self) -> None:
        """Finish what waits, then stop."""
        self._waiting.put(None)
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while True:
            first = self._waiting.get()
            if first is None:
                return
            batch = [first]
            is_last = False
            while len(batch) < MAX_BATCH:
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    is_last = True
                    break
                batch.append(item)
            self._embed(batch)
            if is_last:
                return

    def _embed(self, batch: list[tuple[Image.Image, Future[Any]]]) -> None:
        try:
            vectors = self._embedder.embed([image for image, _ in batch], batch_size=MAX_BATCH)
            for (_, future), vector in zip(batch, vectors, strict=True):
                future.set_result(vector)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        finally:
            self.num_batches += 1
            with self._guard:
                self._count -= len(batch)
