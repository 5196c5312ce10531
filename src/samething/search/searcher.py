"""An embedder and an index together: grow it, keep it current, ask it."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Float
from rich.markup import escape

from samething.arrays import Embeddings
from samething.embedder import Embedder
from samething.errors import ArtefactError, ImageError
from samething.evaluation.calibration import Calibration
from samething.files import read_json, write_json
from samething.images import Box, ImageLike, Source, decode, in_threads
from samething.index import AbstractIndex, Where, exists_index, open_index
from samething.progress import progress_bar
from samething.search.collection import Collection, is_blank, looks_of, row_of, uploaded_files
from samething.search.feature_vectors import KnownVectors
from samething.search.matches import Match, Matches
from samething.search.queries import query_vector, together, vectors_of_label
from samething.search.syncing import Changes, Plan, make_plan

MODEL_NAME: Final = "model.json"
"""File in an index folder that says where its model is."""
_FROM_HUB: Final = "hub:"
_COLLECTIONS: Final = "collections"
"""Notes of an index: the folders and catalogs that it follows."""
_MAX_LOOKED_FOR: Final = 24
_ROWS_A_WRITE: Final = 256

Combine = Literal["mean", "max"]


@dataclasses.dataclass(frozen=True)
class Searcher:
    """An index with the model that made it."""

    embedder: Embedder
    index: AbstractIndex
    changes: Changes = dataclasses.field(default_factory=Changes)
    """What the call that made this object did to the index."""

    @classmethod
    def open(cls, location: Path | str, *, model: Path | str | None = None) -> Searcher:
        """Open an index and the model that made it.

        Args:
            location: the index folder, or the URL of a distributed engine.
            model: the model folder; by default the one the index was made with, where it was then.

        Raises:
            ArtefactError: index or model are missing, unfinished or damaged.
            FingerprintError: the model is not the index's own.
        """
        location = nearby(location)
        index = open_index(location)  # says what is wrong with it before the model is looked for
        try:
            embedder = Embedder.load(remembered_model(location) if model is None else model)
            index.require_model(embedder.fingerprint, embedder.name)
        except BaseException:
            index.close()
            raise
        return cls(embedder, index)

    @property
    def calibration(self) -> Calibration | None:
        """What the scores of this model mean in an index of this size, where it was exported with that."""
        content = self.embedder.config.get("calibration")
        return None if content is None else Calibration.from_json(content).for_index(self.index.count())

    # ---- asking

    def find(
        self,
        *images: ImageLike,
        k: int = 5,
        where: Where | None = None,
        crop: Box | None = None,
        combine: Combine = "mean",
    ) -> Matches:
        """The ``k`` images of the index that look most like the same thing.

        Args:
            images: a path, an address (:mod:`samething.images.addresses`), the word ``clipboard``, the
                bytes of a file, a Pillow image or a uint8 array; several of one thing are one query.
            k: number of matches.
            where: columns and what is allowed in them, such as ``{"domain": "cars"}``.
            crop: the part of the image to look for, in pixels of the upright image.
            combine: what several images ask for: what is like all of them (mean), or like any (max).

        Raises:
            ImageError: an image cannot be read.
            InputError: an argument that does not fit.
        """
        vectors = query_vector(self.embedder, images, crop=crop)
        return self.find_vectors(vectors, name=_shown(images), k=k, where=where, combine=combine)

    def find_label(
        self, label: str, *, k: int = 5, where: Where | None = None, combine: Combine = "mean"
    ) -> Matches:
        """What looks like the index's own images of a thing, those left out.

        Raises:
            InputError: the index has no such label.
        """
        ids, vectors = vectors_of_label(self.index, label)
        return self.find_vectors(
            vectors, name=f"label {label}", k=k, where=where, combine=combine, leave_out=ids
        )

    def find_row(self, row_id: str, *, k: int = 5, where: Where | None = None) -> Matches:
        """What looks like an image of the index, itself left out.

        Raises:
            InputError: the index has no such row.
        """
        return self.find_vectors(
            self.index.vectors([row_id]), name=row_id, k=k, where=where, leave_out=[row_id]
        )

    def find_vectors(
        self,
        vectors: Float[np.ndarray, "m d"],
        *,
        name: str,
        k: int = 5,
        where: Where | None = None,
        combine: Combine = "mean",
        leave_out: Sequence[str] = (),
    ) -> Matches:
        """The matches of one query that is embedded already, as one vector or several.

        ``leave_out`` are the ids of the images whose vectors they are, where these are the index's own.
        """
        left_out = set(leave_out)
        hits = self.index.search(together(vectors, combine=combine), k + len(left_out), where=where)
        best: dict[str, dict[str, Any]] = {}
        for query in range(len(hits)):
            for hit in hits.of(query):
                if hit["id"] not in left_out and hit["score"] > best.get(hit["id"], {"score": -2})["score"]:
                    best[hit["id"]] = hit
        ranked = sorted(best.values(), key=lambda hit: (-hit["score"], hit["id"]))[:k]
        calibration = self.calibration
        chances: list[float | None] = [None] * len(ranked)
        if calibration is not None:
            chances = calibration.probability(np.array([hit["score"] for hit in ranked])).tolist()
        found = [
            Match.of(hit, rank=rank, probability=chance)
            for rank, (hit, chance) in enumerate(zip(ranked, chances, strict=True), start=1)
        ]
        return Matches(
            name,
            tuple(found),
            calibrated_by=None if calibration is None else "labels",
            looked_for=tuple(leave_out[:_MAX_LOOKED_FOR]),
        )

    # ---- growing

    def update(
        self,
        collections: Sequence[Collection],
        *,
        drop: bool = False,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Searcher:
        """Store the images of folders and catalogs that the index does not hold yet, and follow moved ones.

        What was stored stays stored if the process is killed; the next call goes on after it.

        Args:
            collections: where the images are.
            drop: whether rows without a file leave the index: then ``collections`` must be all there are, but
                for what was uploaded.
            on_progress: told how many images are embedded so far, and of how many.

        Returns:
            This searcher with the counts of what was done.
        """
        files = [file for part in collections for file in part.files()]
        files += uploaded_files(self.index) if drop else []
        return self.update_files(files, drop=drop, on_progress=on_progress)

    def update_files(
        self,
        files: Sequence[Source],
        *,
        drop: bool = False,
        known: Sequence[KnownVectors] = (),
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Searcher:
        """As :meth:`update`, with the files themselves; those whose vectors are known are not embedded."""
        plan = make_plan(self.index, files, drop=drop)
        unreadable = list(plan.changes.unreadable)
        blank: list[str] = []
        num_added = self._embed(plan, unreadable, blank, known, on_progress or (lambda done, total: None))
        self._move(plan)
        self.index.delete(plan.gone)
        changes = dataclasses.replace(
            plan.changes, num_added=num_added, unreadable=tuple(unreadable), blank=tuple(blank)
        )
        return dataclasses.replace(self, changes=changes)

    def _embed(
        self,
        plan: Plan,
        unreadable: list[tuple[str, str]],
        blank: list[str],
        known: Sequence[KnownVectors],
        on_progress: Callable[[int, int], object],
    ) -> int:
        waiting = list(plan.new.items())
        num_added = 0
        if not waiting:
            return num_added
        with progress_bar("images") as progress:
            task = progress.add_task("index", total=len(waiting))
            for start in range(0, len(waiting), _ROWS_A_WRITE):
                part = waiting[start : start + _ROWS_A_WRITE]
                on_progress(start, len(waiting))
                vectors, rows = self._embedded(part, unreadable, known)
                if rows:
                    fingerprint = self.embedder.fingerprint
                    self.index.add(np.concatenate(vectors), rows, model_fingerprint=fingerprint)
                num_added += len(rows)
                blank += [row["path"] for row in rows if is_blank(row)]
                progress.advance(task, len(part))
        on_progress(len(waiting), len(waiting))
        return num_added

    def _embedded(
        self,
        part: list[tuple[str, list[Source]]],
        unreadable: list[tuple[str, str]],
        known: Sequence[KnownVectors],
    ) -> tuple[list[Embeddings], list[dict[str, Any]]]:
        """Vectors and rows of images; from features where there are any."""
        vectors: list[Embeddings] = []
        rows: list[dict[str, Any]] = []

        for source in known:
            here = [(name, files) for name, files in part if name in source]
            part = [(name, files) for name, files in part if name not in source]
            made = []
            seen = in_threads(
                lambda entry: looks_of(decode(entry[1][0], max_pixels=self.embedder.max_pixels)), here
            )
            for (name, files), looks in zip(here, seen, strict=True):
                if isinstance(looks, ImageError):
                    unreadable.extend((file.location, looks.reason) for file in files)
                else:
                    made.append({**row_of(name, files), **looks})
            if made:
                vectors.append(source.vectors([row["id"] for row in made]))
                rows += made
        sources = [files[0] for _, files in part]
        for batch in self.embedder.embed_stream(sources, keep=looks_of):
            for position, error in batch.unreadable.items():
                unreadable += [(file.location, error.reason) for file in part[position][1]]
            for position, looks in zip(batch.positions, batch.kept, strict=True):
                rows.append({**row_of(*part[position]), **looks})
            vectors.append(batch.vectors)
        return vectors, rows

    def _move(self, plan: Plan) -> None:
        """Write the new files of rows whose content is known; vectors and thumbnails are taken over."""
        names = list(plan.changed)
        for start in range(0, len(names), _ROWS_A_WRITE):
            part = names[start : start + _ROWS_A_WRITE]
            old = self.index.rows(part, list(self.index.description.columns)).to_pylist()
            rows = [{**row, **row_of(name, plan.changed[name])} for name, row in zip(part, old, strict=True)]
            self.index.add(self.index.vectors(part), rows, model_fingerprint=self.embedder.fingerprint)

    # ---- what it says of itself

    def with_passed_over(self, collections: Sequence[Collection]) -> Searcher:
        """This searcher, which also says what its collections passed over when they were last listed."""
        total = sum((part.passed_over for part in collections), Counter())
        changes = dataclasses.replace(self.changes, passed_over=dict(sorted(total.items())))
        return dataclasses.replace(self, changes=changes)

    @property
    def num_added(self) -> int:
        """Images that the call that made this object embedded and stored."""
        return self.changes.num_added

    @property
    def num_kept(self) -> int:
        """Files that were in the index already, unchanged."""
        return self.changes.num_kept

    @property
    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """Path and reason of each image that could not be read."""
        return self.changes.unreadable

    @property
    def exit_status(self) -> int:
        """0, or 3 when images were left out."""
        return 3 if self.unreadable else 0

    def __rich__(self) -> str:
        """What a person wants to know of the index, in a few lines."""
        done = self.changes
        counts = [f"{done.num_added:,} new", f"{done.num_kept:,} were there already"]
        if done.num_moved:
            counts.append(f"{done.num_moved:,} moved or copied")
        if done.num_dropped:
            counts.append(f"{done.num_dropped:,} dropped")
        lines = [
            f"[bold]{self.index.count():,}[/bold] images in {escape(str(self.index.location))}, embedded "
            f"by {escape(self.embedder.name)} ({', '.join(counts)})"
        ]
        if self.unreadable:
            lines.append(f"[yellow]{len(self.unreadable):,} images could not be read:[/yellow]")
            lines += [escape(f"  {path}: {reason}") for path, reason in self.unreadable[:5]]
        if passed_over := ", ".join(f"{count:,} {what}" for what, count in done.passed_over.items()):
            lines.append(f"[dim]passed over: {escape(passed_over)}[/dim]")
        if done.blank:
            lines.append(f"[yellow]{len(done.blank):,} images are of one colour, and so all alike:[/yellow]")
            lines += [escape(f"  {path}") for path in done.blank[:5]]
        return "\n".join(lines)


def _shown(images: Sequence[ImageLike]) -> str:
    names = [str(image) if isinstance(image, str | Path) else "the image given" for image in images]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def nearby(location: Path | str) -> Path | str:
    """The index that a command means: without one at the default place, this folder or one above it."""
    if str(location) == "index" and not exists_index(location):
        here = Path.cwd()
        for place in (here, *(folder / "index" for folder in here.parents)):
            if exists_index(place):
                return place
    return location


# ---- what an index folder remembers


def remembered_model(location: Path | str) -> Path | str:
    """The model folder that an index was made with, or its hub id with the revision.

    Raises:
        ArtefactError: it is not known, or not there any more.
    """
    folder = Path(location)
    path = folder / MODEL_NAME
    if not path.exists():
        raise ArtefactError(
            f"{location} does not say where its model is",
            expected="the model folder that made it",
            next_step="give the model folder with --model",
        )
    named = str(read_json(path))
    if named.startswith(_FROM_HUB):
        return named.removeprefix(_FROM_HUB)
    model = folder / named
    if not model.is_dir():
        raise ArtefactError(
            f"the model of {folder} is not at {model} any more",
            expected="the model folder that made the index",
            next_step="give its new place with --model",
        )
    return model.resolve()


def remember_model(location: Path | str, model: Path | str, embedder: Embedder) -> None:
    """Note in an index folder where its model is; an engine elsewhere has no place for that."""
    folder = Path(location)
    if not folder.is_dir():
        return
    if Path(model).is_dir():
        named = os.path.relpath(Path(model).resolve(), folder.resolve())
    else:  # the folder that the hub's client keeps is named after the revision
        named = f"{_FROM_HUB}{str(model).partition('@')[0]}@{embedder.folder.name}"
    write_json(folder / MODEL_NAME, named)


def remembered_collections(index: AbstractIndex) -> list[Collection]:
    """The folders and catalogs that an index follows; an engine elsewhere keeps none."""
    folder = Path(index.location)
    return [Collection.from_json(value, folder) for value in index.notes(_COLLECTIONS).values()]


def remember_collections(index: AbstractIndex, collections: Sequence[Collection]) -> None:
    """Note further folders and catalogs that an index follows."""
    parts = [part.to_json(Path(index.location)) for part in collections]
    index.set_notes(_COLLECTIONS, {part["location"]: part for part in parts})
