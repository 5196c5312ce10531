"""What the server does, without HTTP: queries, changes, a sync and a map in the background."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from samething.arrays import Embeddings
from samething.embedder.devices import SAMPLE
from samething.errors import FingerprintError, ImageError, InputError
from samething.files import Json
from samething.images import Box, Source
from samething.images.addresses import scheme_of
from samething.images.apart import Decoders
from samething.images.decoding import decoded_to
from samething.images.parts import cut_out, standing_out
from samething.index import Regions, Where
from samething.index.sqlite_rows import chunks
from samething.rerank import available, require_known
from samething.search import Matches, Searcher
from samething.search.collection import FILE_COLUMNS, THUMBNAIL_SIDE, files_of, looks_of
from samething.search.looking_again import SecondLook
from samething.search.queries import require_one_to_crop
from samething.search.region_choice import chooser
from samething.search.searcher import Combine
from samething.search.syncing import FileChange
from samething.web.batching import MAX_BATCH, Batcher, BusyError, Question
from samething.web.fetching import fetch_public
from samething.web.first_view import first_thumbnails, overview_of
from samething.web.guards import Limits
from samething.web.jobs import Job, Jobs
from samething.web.projection import ImageMap, image_map
from samething.web.schemas import UnknownImageError
from samething.web.uploads import Uploads, sendable

_DECODER_BYTES: Final = 3 << 29
"""What decoding one image may take: an image of 50 megapixels, several times."""

_OVERVIEW_S: Final = 60.0
"""How long counts of domains and labels are believed while another process may change the index."""


class Service:
    """An index being served.

    Args:
        searcher: the index and its model.
        limits: how much a request may take.
        uploads: folder of the images that are added; by default one inside the index folder.
        allow_urls: whether a query may be the address of an image on the public internet.
        on_batch: told the size of each batch of queries.
    """

    def __init__(
        self,
        searcher: Searcher,
        *,
        limits: Limits,
        uploads: Path | None = None,
        allow_urls: bool = False,
        on_batch: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._searcher = searcher = searcher.current()
        self._following = threading.Lock()
        self._seeks_fastest = False
        self.limits = limits
        self.allow_urls = allow_urls
        self.jobs = Jobs("sync", "map")
        folder = Path(searcher.index.location)
        if uploads is None and folder.is_dir():
            uploads = folder / "uploads"
        self.uploads = None if uploads is None else Uploads(uploads, str(folder))
        self._new_batcher = functools.partial(Batcher, max_waiting=limits.max_waiting, on_batch=on_batch)
        self.batcher = self._new_batcher(searcher.embedder)
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decoder")
        self._apart = Decoders(
            os.cpu_count() or 1, deadline_s=limits.timeout_s / 2, memory_bytes=_DECODER_BYTES
        )
        self._overview: tuple[float, dict[str, Json]] | None = None
        self._map: ImageMap | None = None

    @property
    def searcher(self) -> Searcher:
        """The index as it is now; where it was rebuilt with another model, with that."""
        return self._serving()[0]

    def _serving(self) -> tuple[Searcher, Batcher]:
        with self._following:
            current = self._searcher.current()
            if current is not self._searcher:
                self._take(current)
                self._forget()
                if self._seeks_fastest:
                    self.seek_fastest()
            return current, self.batcher

    def _take(self, searcher: Searcher) -> None:
        old, self.batcher = self.batcher, self._new_batcher(searcher.embedder)
        self._searcher = searcher
        threading.Thread(target=old.close, name="embedder", daemon=True).start()

    def seek_fastest(self) -> None:
        """Find the fastest device for the model in the background, and go over to it."""
        self._seeks_fastest = True
        # no daemon: a library that is cut off while it opens a model aborts the whole process
        threading.Thread(target=self._go_fastest, args=[self._searcher]).start()

    def _go_fastest(self, searcher: Searcher) -> None:
        embedder = searcher.embedder.fastest(lambda: first_thumbnails(searcher.index, SAMPLE))
        with self._following:
            if embedder is not searcher.embedder and self._searcher is searcher:
                self._take(dataclasses.replace(searcher, embedder=embedder))

    def require_answers(self) -> None:
        """Look at the index as a search does; its vectors are compared once.

        Raises:
            SamethingError: it cannot be used.
        """
        index = self.searcher.index
        index.count()
        index.vectors([])

    def close(self) -> None:
        """Finish what waits and stop."""
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._apart.close()
        self.batcher.close()

    async def find(
        self,
        contents: Sequence[bytes],
        *,
        k: int,
        where: Where,
        crop: Box | None = None,
        combine: Combine = "mean",
        rerank: str | None = None,
    ) -> Matches:
        """What looks like the same thing as in the images, given as the bytes of their files.

        Raises:
            ImageError: one of them is no image, or too large.
            BusyError: too many others wait, or it took too long.
        """
        require_one_to_crop(crop, len(contents))
        loop = asyncio.get_running_loop()
        is_alone = len(contents) == 1 and not rerank
        jobs: list[Any] = [(self._decoders, self._prepared, content, crop, is_alone) for content in contents]
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                while True:
                    prepared = await asyncio.gather(*(loop.run_in_executor(*job) for job in jobs))
                    searcher, batcher, *_ = prepared[0]
                    if any(other[0] is not searcher for other in prepared):
                        continue  # the index was rebuilt between two images
                    images, pixels = zip(*(own[2:] for own in prepared), strict=True)
                    try:
                        if is_alone:
                            [future] = batcher.submit(pixels, Question(searcher, k, where))
                            found: Matches = await asyncio.wrap_future(future)
                            return found
                        futures = batcher.submit(pixels)
                        vectors = np.stack(await asyncio.gather(*map(asyncio.wrap_future, futures)))
                        return await asyncio.to_thread(
                            self._found, searcher, vectors, images, rerank, k=k, where=where, combine=combine
                        )
                    except (BusyError, FingerprintError):  # another model, or device, came meanwhile
                        if searcher is await asyncio.to_thread(lambda: self.searcher):
                            raise
        except TimeoutError:
            raise BusyError(self.batcher.num_waiting) from None

    def _found(
        self,
        searcher: Searcher,
        vectors: Embeddings,
        images: Sequence[Image.Image],
        rerank: str | None,
        **options: Any,
    ) -> Matches:
        look = self.second_look(searcher, rerank)
        asking = None if look is None else look.asking(images, vectors)
        return searcher.find_vectors(vectors, name="upload", look=asking, **options)

    def _prepared(self, content: bytes, crop: Box | None, is_alone: bool = False) -> tuple[Any, ...]:
        """What serves now, its batcher, the image (None where its pixels alone are asked for), its pixels."""
        searcher, batcher = self._serving()
        embedder = searcher.embedder
        make = embedder.prepare if is_alone else None
        found = self._decoded(content, "the upload", make=make, box=crop, least_side=embedder.least_side)
        return searcher, batcher, *((None, found) if is_alone else (found, embedder.prepare(found)))

    def standing_out(self, content: bytes) -> list[Box]:
        """Parts of an image that stand out, the clearest first, in pixels of the upright image.

        Raises:
            ImageError: it is no image, or too large.
        """
        image = self._decoded(content, "the upload", least_side=THUMBNAIL_SIDE)
        width, height = image.info.get("full_size", image.size)
        return [
            Box(int(left * width), int(top * height), int(right * width), int(bottom * height))
            for left, top, right, bottom in standing_out(image)
        ]

    def second_look(self, searcher: Searcher, rerank: str | None) -> SecondLook | None:
        """A second look of half the time of a request, at images that this server may read; None: none.

        Raises:
            InputError: no such re-ranker.
        """
        if not rerank:
            return None
        require_known(rerank)  # a path is for who may read this machine's files

        def read(file: Source) -> Any:
            return self._decoded(self._content(file), file.location, box=file.box)

        return searcher.second_look(rerank, budget_ms=500 * self.limits.timeout_s, read=read)

    def _decoded(self, content: bytes, name: str, **options: Any) -> Any:
        """An image, or what is made of it, in a process of its own: a hostile one fills or ends no other."""
        options = {"max_pixels": self.limits.max_pixels, "box": None, "make": None, **options, "costly": True}
        return self._apart.call(name, decoded_to, content, name, **options)

    def fetched(self, url: str) -> bytes:
        """The image behind an address.

        Raises:
            InputError: the server does not fetch addresses.
            ImageError: it cannot be fetched.
        """
        if not self.allow_urls:
            raise InputError(
                "the address of an image",
                expected="an upload: this server fetches no addresses",
                next_step="upload the image, or start the server with --allow-urls",
            )
        return self._fetch(url)

    def _fetch(self, url: str) -> bytes:
        return fetch_public(url, max_bytes=self.limits.max_bytes, timeout_s=self.limits.timeout_s / 2)

    def similar(self, row_id: str, *, k: int, where: Where, rerank: str | None = None) -> Matches:
        """What looks like an image of the index.

        Raises:
            UnknownImageError: there is none of this id.
        """
        self.row(row_id, [])
        searcher = self.searcher
        return searcher.find_row(row_id, k=k, where=where, rerank=self.second_look(searcher, rerank))

    def row(self, row_id: str, columns: list[str]) -> dict[str, Any]:
        """Columns of an image of the index.

        Raises:
            UnknownImageError: there is none of this id.
        """
        try:
            found: dict[str, Any] = self.searcher.index.rows([row_id], columns).to_pylist()[0]
        except InputError as error:
            raise UnknownImageError(row_id) from error
        return found

    def image(self, row_id: str, *, side: int | None) -> tuple[bytes, str]:
        """Bytes and media type of an image of the index.

        Raises:
            UnknownImageError: there is none of this id.
            ImageError: its file is gone or damaged.
        """
        knows_files = FILE_COLUMNS.keys() <= self.searcher.index.description.extra_columns.keys()
        row = self.row(row_id, ["path", "files"] if knows_files else ["path"])
        files = files_of(row["files"]) if row.get("files") else [Source(row["path"] or "")]
        error: InputError = UnknownImageError(row_id)
        for file in files:
            try:
                content = self._content(file)
                return sendable(
                    file, content, max_pixels=self.limits.max_pixels, side=side, decode=self._decoded
                )
            except InputError as problem:
                error = problem
        raise error

    def _content(self, file: Source) -> bytes:
        """The bytes of a file of the index. Who made the index may have written any address into it.

        Raises:
            ImageError: it is gone, or behind an address that this server does not ask.
        """
        scheme = scheme_of(file.container)
        if not scheme:
            return file.read()
        if not self.allow_urls or (scheme in ("http", "https") and file.container != file.location):
            raise ImageError.of(
                file.location,
                "is behind an address, which this server does not ask",
                expected="a file on this machine" if not self.allow_urls else "no shard on the web",
                next_step="start the server with --allow-urls, or make the index of files on this machine",
            )
        if scheme in ("http", "https"):
            return self._fetch(file.location)
        return file.read()

    def overview(self) -> dict[str, Json]:
        """Domains and labels with their counts, columns, model: what a page needs to begin."""
        now = time.monotonic()
        known = self._overview
        if known is not None and now - known[0] < _OVERVIEW_S:
            return known[1]
        index = self.searcher.index
        hidden = set() if index.description.regions is None else {"regions"}
        found = {
            **overview_of(index),
            "allow_urls": self.allow_urls,
            "rerankers": [name for name in available(self.searcher.embedder.folder) if name not in hidden],
            "limits": dataclasses.asdict(self.limits),
        }
        self._overview = (now, found)
        return found

    # ---- changing

    def add(self, content: bytes, *, label: str, domain: str) -> str:
        """Keep an image, embed it and store it; its id.

        Raises:
            ImageError: not an image.
            InputError: an index or place that cannot take it.
        """
        searcher, batcher = self._serving()
        index = searcher.index
        if self.uploads is None or not FILE_COLUMNS.keys() <= index.description.extra_columns.keys():
            raise InputError(
                f"an upload for the index {index.location}",
                expected="an index folder of this version, or a server started with --uploads FOLDER",
                next_step="start the server with --uploads FOLDER, or make the index again",
            )
        image = self._decoded(content, "the upload", least_side=searcher.embedder.least_side)
        noted = index.description.regions
        places = () if noted is None else chooser(noted)(image, [])
        vectors = self._embedded(searcher, batcher, [image, *cut_out(image, places)])
        row_id, file = self.uploads.keep(index, content, label=label, domain=domain)
        index.require_model(searcher.embedder.fingerprint)
        index.amend(
            [row_id],
            lambda name, row: FileChange([file]).of(name, row, looks_of(image, index.description.columns)),
            vectors=vectors[:1],
            regions=None if noted is None else [Regions(places, vectors[1:])],
        )
        self._forget()
        return row_id

    def _embedded(self, searcher: Searcher, batcher: Batcher, images: Sequence[Image.Image]) -> Embeddings:
        """Vectors of some images, a few at a time among the queries that wait."""
        deadline = time.monotonic() + self.limits.timeout_s
        vectors = []
        for part in chunks(images, min(MAX_BATCH, self.limits.max_waiting)):
            futures = batcher.submit([searcher.embedder.prepare(image) for image in part])
            try:
                vectors += [future.result(timeout=deadline - time.monotonic()) for future in futures]
            except TimeoutError:
                for future in futures:
                    future.cancel()
                raise BusyError(batcher.num_waiting) from None
        return np.stack(vectors)

    def delete(self, ids: Sequence[str]) -> list[str]:
        """Delete images from the index; the ids of those that were there.

        Uploaded files are deleted too. Files of a followed folder stay where they are, and the next sync
        finds them again.
        """
        index = self.searcher.index
        files: dict[str, list[Source]] = {}

        def seen(name: str, row: Mapping[str, Any] | None) -> None:
            files[name] = files_of((row or {}).get("files") or "[]")

        index.amend(list(dict.fromkeys(ids)), seen)
        if self.uploads is not None:
            self.uploads.drop(index, [file for own in files.values() for file in own])
        self._forget()
        return list(files)

    def start_sync(self) -> Job:
        """Bring the index up to date with its folders in the background; a running sync goes on.

        Raises:
            InputError: the index does not say which folders it follows.
        """
        searcher = self.searcher
        searcher.require_collections()

        def work(job: Job) -> str:
            def progressed(done: int, total: int) -> None:
                job.done, job.total = done, total

            done = searcher.sync(on_progress=progressed).changes
            self._forget()
            counts = {"new": done.num_added, "moved": done.num_moved, "dropped": done.num_dropped}
            parts = [f"{count:,} {name}" for name, count in counts.items()]
            if done.unreadable:
                parts.append(f"{len(done.unreadable):,} could not be read")
            return ", ".join([*parts, *done.held])

        return self.jobs.start("sync", work)

    def _forget(self) -> None:
        self._overview = self._map = None

    # ---- the map

    def map_when_ready(self) -> ImageMap | None:
        """The map, or None while it is being made.

        Raises:
            InputError: it could not be made.
        """
        found = self._map
        if found is None:
            if self.jobs["map"].state == "failed":
                message, self.jobs["map"] = self.jobs["map"].message, Job()
                raise InputError(message, expected="a map", next_step="try again")

            def work(job: Job) -> str:
                del job
                self._map = image_map(self.searcher.index)
                return f"{len(self._map.ids):,} images"

            self.jobs.start("map", work)
        return found
