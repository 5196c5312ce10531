"""Queries of many people at once, embedded together: one model, one thread, small batches, a short queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from samething.arrays import Float, Pixels
from samething.embedder import Embedder
from samething.errors import SamethingError
from samething.index import Where
from samething.search import Searcher

MAX_BATCH: Final = 8
"""Images embedded together at most."""


class BusyError(SamethingError):
    """More queries wait than the server lets wait."""

    def __init__(self, num_waiting: int) -> None:
        super().__init__(
            f"{num_waiting} images are waiting already",
            expected="fewer at a time",
            next_step="try again in a second",
        )


class Question(NamedTuple):
    """What is asked with the vector of an image."""

    searcher: Searcher
    k: int
    where: Where


_Item: TypeAlias = tuple[Pixels, Future[Any], Question | None]
_Embedded: TypeAlias = tuple[Float[np.ndarray, " d"], Future[Any], Question]


class Batcher:
    """Embeds prepared images in one thread; whatever waits is embedded together, and searched for together.

    Nothing is held back to fill a batch: an idle server answers at once, and under load batches grow by
    themselves while the one before is computed.

    Args:
        embedder: the model.
        max_waiting: images that may wait; more are refused.
        on_batch: told the size of each batch that was computed.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        max_waiting: int = 64,
        on_batch: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._embedder = embedder
        self._max_waiting = max_waiting
        self._on_batch = on_batch
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._embedded: queue.SimpleQueue[list[_Embedded] | None] = queue.SimpleQueue()
        self._count = 0
        self._closed = False
        self._guard = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name="embedder", daemon=True),
            threading.Thread(target=self._search, name="search", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Images that were given and are not embedded yet."""
        return self._count

    def submit(self, images: Sequence[Pixels], question: Question | None = None) -> list[Future[Any]]:
        """Ask for the embeddings of prepared images, or with a question for the matches of each.

        Raises:
            BusyError: too many wait already, or the server is about to stop; none of these was taken.
        """
        futures: list[Future[Any]] = [Future() for _ in images]
        with self._guard:
            if self._closed or self._count + len(images) > self._max_waiting:
                raise BusyError(self._count)
            self._count += len(images)
            for item in zip(images, futures, strict=True):
                self._waiting.put((*item, question))
        return futures

    def close(self) -> None:
        """Finish what waits, then stop."""
        with self._guard:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        for thread in self._threads:
            thread.join(timeout=30)

    def _work(self) -> None:
        is_last = False
        while not is_last:
            item = self._waiting.get()
            batch = []
            while item is not None:
                batch.append(item)
                if len(batch) == MAX_BATCH:
                    break
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
            is_last = item is None
            if batch:
                self._embed(batch)
        self._embedded.put(None)

    def _embed(self, batch: list[_Item]) -> None:
        by_size: dict[tuple[int, ...], list[_Item]] = {}
        for item in batch:
            if item[1].set_running_or_notify_cancel():  # nobody waits for the others any more
                by_size.setdefault(item[0].shape, []).append(item)
        for same in by_size.values():
            try:
                vectors = self._embedder.embed_pixels(np.stack([pixels for pixels, _, _ in same]))
            except Exception as error:
                for _, future, _ in same:
                    future.set_exception(error)
            else:
                asked = []
                for (_, future, question), vector in zip(same, vectors, strict=True):
                    if question is None:
                        future.set_result(vector)
                    else:
                        asked.append((vector, future, question))
                if asked:
                    self._embedded.put(asked)
            self._on_batch(len(same))
        with self._guard:
            self._count -= len(batch)

    def _search(self) -> None:
        while (batch := self._embedded.get()) is not None:
            alike: dict[tuple[int, int, str], list[_Embedded]] = {}
            for item in batch:
                question = item[2]
                alike.setdefault((id(question.searcher), question.k, repr(question.where)), []).append(item)
            for same in alike.values():
                searcher, k, where = same[0][2]
                vectors = np.stack([vector for vector, _, _ in same])
                try:
                    hits = searcher.index.search(vectors, k, where=where)
                    found = searcher.matches([hits.of(place) for place in range(len(same))], name="upload")
                except Exception as error:
                    for _, future, _ in same:
                        future.set_exception(error)
                else:
                    for (_, future, _), matches in zip(same, found, strict=True):
                        future.set_result(matches)
