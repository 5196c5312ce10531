"""An embedder and an index together: grow it, keep it current, ask it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from rich.markup import escape

from samething.arrays import Float
from samething.calibration import Calibration, Calibrator
from samething.embedder import Embedder
from samething.errors import FingerprintError, InputError, SamethingError
from samething.images import Box, ImageLike, Source, decode
from samething.index import AbstractIndex, IndexDescription, Where, open_index
from samething.rerank import Kept, Trust, reranker_of
from samething.rerank.second_look import NUM_CANDIDATES
from samething.search.collection import (
    UPLOADED,
    Collection,
    fitted,
    uploaded_files,
)
from samething.search.feature_vectors import KnownVectors
from samething.search.looking_again import TRUST, Read, Rerank, SecondLook, trust_key
from samething.search.matches import Match, Matches
from samething.search.queries import mean_direction, query_images
from samething.search.region_choice import as_kept
from samething.search.remembered import (
    COLLECTIONS,
    model_beside,
    nearby,
    remembered_collections,
    remembered_decoding,
    remembered_model,
)
from samething.search.storing import carried_out
from samething.search.syncing import Changes, known_rows, make_plan
from samething.search.view_calibration import CALIBRATIONS

_MAX_LOOKED_FOR: Final = 24

Combine = Literal["mean", "max"]


@dataclasses.dataclass(frozen=True)
class Searcher:
    """An index with the model that made it."""

    embedder: Embedder
    index: AbstractIndex
    changes: Changes = dataclasses.field(default_factory=Changes)
    """What the call that made this object did to the index."""
    followed: IndexDescription | None = dataclasses.field(default=None, repr=False, compare=False)
    """That of the generation whose decoding is known to be the embedder's; None: not known yet."""

    @classmethod
    def open(
        cls, location: Path | str, *, model: Path | str | None = None, device: str | None = None
    ) -> Searcher:
        """Open an index and the model that made it.

        Args:
            location: the index folder, or the URL of a distributed engine.
            model: the model folder, or the name of a backbone whose model is beside the index; by default the
                one the index was made with, where it was then.
            device: what computes the model, as :meth:`samething.embedder.Embedder.load` takes it.

        Raises:
            ArtefactError: index or model are missing, unfinished or damaged.
            FingerprintError: the model is not the index's own.
        """
        location = nearby(location)
        index = open_index(location)  # says what is wrong with it before the model is looked for
        try:
            if model is not None and (beside := model_beside(location, str(model))).is_dir():
                model = beside  # a backbone by its name
            embedder = Embedder.load(remembered_model(index) if model is None else model, device=device)
            index.require_model(embedder.fingerprint, embedder.name)
            embedder = dataclasses.replace(embedder, decoding=remembered_decoding(index))
        except BaseException:
            index.close()
            raise
        return cls(embedder, index)

    def current(self) -> Searcher:
        """This searcher; or one with the model or the decoding with which the index was rebuilt."""
        found = self
        try:
            self.index.count()
            followed = self.index.description
            if followed is self.followed:
                return self
            decoding = remembered_decoding(self.index)
        except FingerprintError:
            found = Searcher.open(self.index.location)
            if self.embedder.is_forced:
                found = dataclasses.replace(found, embedder=found.embedder.on(self.embedder.device))
            followed, decoding = None, found.embedder.decoding
        embedder = dataclasses.replace(found.embedder, decoding=decoding, max_pixels=self.embedder.max_pixels)
        return dataclasses.replace(found, embedder=embedder, followed=followed)

    @property
    def calibration(self) -> tuple[Calibration | None, Calibrator | None]:
        """What the scores of this model mean in an index of this size, and what that was learned from.

        From labels, where the model was exported with that; else from views of the index's own images.
        """
        by: Calibrator = "labels"
        noted = self.embedder.config.get("calibration")
        if noted is None:
            by = "views"
            noted = (self.index.notes(CALIBRATIONS).get(self.embedder.fingerprint) or {}).get("calibration")
        if noted is None:
            return None, None
        return Calibration.from_json(noted).for_index(self.index.count()), by

    # ---- asking

    def find(
        self,
        *images: ImageLike,
        k: int = 5,
        where: Where | None = None,
        crop: Box | None = None,
        combine: Combine = "mean",
        rerank: Rerank | None = None,
    ) -> Matches:
        """The ``k`` images of the index that look most like the same thing.

        Args:
            images: a path, an address (:mod:`samething.images.addresses`), the word ``clipboard``, the
                bytes of a file, a Pillow image or a uint8 array; several of one thing are one query.
            k: number of matches.
            where: columns and what is allowed in them, such as ``{"domain": "cars"}``.
            crop: the part of the image to look for, in pixels of the upright image.
            combine: what several images ask for: what is like all of them (mean), or like any (max).
            rerank: look at the best again: a name of ``RERANKERS``, a re-ranker, or :meth:`second_look`.

        Raises:
            ImageError: an image cannot be read.
            InputError: an argument that does not fit.
        """
        asked = query_images(self.embedder, images, crop=crop)
        vectors = self.embedder.embed_prepared([self.embedder.prepare(image) for image in asked])
        look = None if rerank is None else self.second_look(rerank).asking(asked, vectors)
        names = [str(image) if isinstance(image, str | Path) else "the image given" for image in images]
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        return self.find_vectors(vectors, name=name, k=k, where=where, combine=combine, look=look)

    def second_look(
        self, rerank: Rerank, *, budget_ms: float | None = None, read: Read = decode
    ) -> SecondLook:
        """A second look with what was learned in this index, by the re-ranker's name or with one's own.

        Args:
            rerank: a name of ``RERANKERS``, ``tokens`` where the model's folder has its graph, the path of a
                graph, or a re-ranker; a second look stays as it is.
            budget_ms: begin to look at no further image after this time; None: look at all.
            read: how an image of the index is read.

        Raises:
            InputError: no such re-ranker, or a budget that is no time.
            MissingExtraError: a package that it needs is not installed.
        """
        if isinstance(rerank, SecondLook):
            return rerank
        index, embedder = self.index, self.embedder
        if budget_ms is not None and not budget_ms > 0:
            raise InputError(
                f"a budget of {budget_ms} ms", expected="more than 0", next_step="leave it out to look at all"
            )
        if rerank == "regions" and index.description.regions is not None:
            raise InputError(
                "the second look at regions in an index that has regions",
                expected="another second look: the search compares the regions already",
                next_step="leave it out, or take geometry",
            )
        if isinstance(rerank, str):
            rerank = reranker_of(rerank, embedder.embed, embedder.fingerprint, embedder.folder)
        noted = index.notes(TRUST).get(trust_key(index, rerank))
        trust = Trust.untaught(rerank.weights) if noted is None else Trust.from_json(noted)
        return SecondLook(rerank, index, trust, Kept.beside(index.location), budget_ms, read)

    def find_label(
        self,
        label: str,
        *,
        k: int = 5,
        where: Where | None = None,
        combine: Combine = "mean",
        rerank: Rerank | None = None,
    ) -> Matches:
        """What looks like the index's own images of a thing, those left out.

        Raises:
            InputError: the index has no such label.
        """
        column = "labels" if "labels" in self.index.description.extra_columns else "label"
        ids = [
            row["id"]
            for batch in self.index.items(columns=[column])
            for row in batch.to_pylist()
            if label in (row[column] if column == "labels" else [row[column]])
        ]
        if not ids:
            raise InputError(
                f"the label {label!r}",
                expected="a label of the index",
                next_step="see the labels of what a search finds",
            )
        look = None if rerank is None else self.second_look(rerank).asking_rows(ids[:_MAX_LOOKED_FOR])
        return self.find_vectors(
            self.index.vectors(ids), name=f"label {label}", k=k, where=where, combine=combine,
            leave_out=ids, look=look,
        )  # fmt: skip

    def find_row(
        self, row_id: str, *, k: int = 5, where: Where | None = None, rerank: Rerank | None = None
    ) -> Matches:
        """What looks like an image of the index, itself left out.

        Raises:
            InputError: the index has no such row.
        """
        vectors = self.index.vectors([row_id])
        look = None if rerank is None else self.second_look(rerank).asking_rows([row_id])
        return self.find_vectors(vectors, name=row_id, k=k, where=where, leave_out=[row_id], look=look)

    def find_vectors(
        self,
        vectors: Float[np.ndarray, "m d"],
        *,
        name: str,
        k: int = 5,
        where: Where | None = None,
        combine: Combine = "mean",
        leave_out: Sequence[str] = (),
        look: SecondLook | None = None,
    ) -> Matches:
        """The matches of one query that is embedded already, as one vector or several.

        ``leave_out`` are the ids of the images whose vectors they are, where these are the index's own;
        ``look`` knows the query's images.
        """
        left_out = set(leave_out)
        depth = k if look is None else max(k, NUM_CANDIDATES)
        asked = mean_direction(vectors) if combine == "mean" and len(vectors) > 1 else vectors
        hits = self.index.search(asked, depth + len(left_out), where=where)
        best: dict[str, dict[str, Any]] = {}
        for query in range(len(asked)):
            for hit in hits.of(query):
                if hit["id"] not in left_out and hit["score"] > best.get(hit["id"], {"score": -2})["score"]:
                    best[hit["id"]] = hit
        ranked = sorted(best.values(), key=lambda hit: (-hit["score"], hit["id"]))[:depth]
        if look is not None:
            ranked = look.at(ranked)[:k]
        [found] = self.matches([ranked], name=name, looked_for=tuple(leave_out[:_MAX_LOOKED_FOR]))
        return found

    def matches(
        self, queries: Sequence[Sequence[dict[str, Any]]], *, name: str, looked_for: tuple[str, ...] = ()
    ) -> list[Matches]:
        """Of each query its hits, best first, with what their scores mean."""
        calibration, calibrator = self.calibration
        found = []
        for ranked in queries:
            chances: list[float | None] = [None] * len(ranked)
            if calibration is not None:
                sums = np.array([hit["score"] + hit.get("added", 0.0) for hit in ranked])
                chances = calibration.probability(sums).tolist()
            own = [
                Match.of(hit, rank=rank, probability=chance)
                for rank, (hit, chance) in enumerate(zip(ranked, chances, strict=True), start=1)
            ]
            found.append(Matches(name, tuple(own), calibrated_by=calibrator, looked_for=looked_for))
        return found

    # ---- growing

    def sync(
        self,
        collections: Sequence[Collection] | None = None,
        *,
        drop: bool = False,
        forget: Sequence[str | Path] = (),
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Searcher:
        """Bring the rows of folders and catalogs up to date, and leave all others alone.

        What was stored stays stored if the process is killed; the next call goes on after it. A collection
        that is not there or not readable keeps its rows and is reported.

        Args:
            collections: which; by default all that the index follows by now, and what was uploaded.
            drop: whether images leave the index also where so many are gone that a disk may not be mounted.
            forget: folders and catalogs to follow no more; their images leave the index.
            on_progress: told how many images are embedded so far, and of how many.

        Returns:
            This searcher with the counts of what was done.

        Raises:
            InputError: the index does not follow what is to be forgotten.
        """
        location = self.index.location
        forgotten = {Collection(Path(place)).key(location): str(place) for place in forget}
        rows = known_rows(self.index)
        followed = set(self.index.notes(COLLECTIONS)) if forgotten else set()
        if not forgotten.keys() <= followed:  # what is followed no more may have brought rows
            followed |= {file.collection for files in rows.values() for file in files}
        for key, place in forgotten.items():
            if key not in followed:
                raise InputError(
                    f"the index {location} does not follow {place}",
                    expected="one of "
                    + ", ".join(str(part.location) for part in remembered_collections(self.index)),
                    next_step="correct the path",
                )
        self.index.set_notes(COLLECTIONS, dict.fromkeys(forgotten))
        listed: dict[str, Collection] = {}
        files, held = uploaded_files(self.index) if collections is None else [], []
        for part in remembered_collections(self.index) if collections is None else collections:
            try:
                files += part.files(location)
                listed[part.key(location)] = part
            except SamethingError as error:
                held.append(error.given)
        files, kinds = fitted(files, self.index.description.columns)
        self.index.add_columns(kinds)
        files = as_kept(files, self.index.description.regions)
        going = {*listed, *forgotten, *([UPLOADED] if collections is None else [])}
        plan = make_plan(
            rows, files, may_go=lambda file: file.collection in going, hold={} if drop else listed
        )
        changes = dataclasses.replace(plan.changes, held=(*held, *plan.changes.held))
        plan = dataclasses.replace(plan, changes=changes)
        done = carried_out(plan, self.index, self.embedder, on_progress=on_progress)
        return dataclasses.replace(self, changes=done).with_passed_over(list(listed.values()))

    def require_collections(self, given: Sequence[Collection] = ()) -> None:
        """Refuse to sync an index that follows nothing.

        Raises:
            InputError: none is given, none is noted, and nothing was uploaded.
        """
        if not given and not remembered_collections(self.index) and not uploaded_files(self.index):
            raise InputError(
                f"{self.index.location} does not say which folders it follows",
                expected="the folders and catalogs whose images it holds",
                next_step=f"name them: samething index sync {self.index.location} FOLDER …",
            )

    def update_files(
        self, files: Sequence[Source], *, drop: bool = False, known: Sequence[KnownVectors] = ()
    ) -> Searcher:
        """Store images that the index does not hold yet, and follow those that moved.

        Args:
            files: the images.
            drop: whether all others leave the index.
            known: where to take vectors from instead of embedding.
        """
        files = as_kept(files, self.index.description.regions)
        plan = make_plan(known_rows(self.index), files, may_go=lambda file: drop)
        changes = carried_out(plan, self.index, self.embedder, known=known)
        return dataclasses.replace(self, changes=changes)

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
        """0, or 3 when images were left out, or left as they were."""
        return 3 if self.unreadable or self.changes.held else 0

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
        if self.changes.held:
            lines.append("[yellow]left as it was, since a disk may not be mounted:[/yellow]")
            lines += [escape(f"  {reason}") for reason in self.changes.held]
            lines.append(
                f"to drop such images: samething index sync {escape(str(self.index.location))} --drop; "
                "to give up a folder or catalog: --forget PLACE"
            )
        return "\n".join(lines)
