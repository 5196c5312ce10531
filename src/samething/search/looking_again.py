"""The second look in an index: which images it compares, what its evidence is worth there, what it adds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from PIL import Image

from samething.arrays import Embeddings
from samething.embedder import Embedder
from samething.errors import ImageError
from samething.files import Json, fingerprint
from samething.images import Source, decode, in_threads
from samething.index import AbstractIndex
from samething.rerank import Kept, Reranker, Shown, Trust, reranker_of, second_look
from samething.rerank.second_look import NUM_CANDIDATES
from samething.search.collection import files_of
from samething.search.view_calibration import NEAR_DUPLICATE, NUM_VIEWS, some_rows, view_of

TRUST: Final = "second-look"
"""Notes of an index: model and re-ranker -> what its evidence is worth."""
_VERIFIED: Final = 20
"""Places that agree from which a match is called verified."""
_NUM_QUERIES: Final = 256
_NEIGHBOURS: Final = 20
_MORE_THAN_OWN: Final = 2.0
"""How far weights learned from views may be above the re-ranker's own: views are easier than photographs."""

Read = Callable[[Source], Image.Image]


@dataclasses.dataclass(frozen=True)
class SecondLook:
    """A re-ranker in an index, and the query's images that it compares with what a search found.

    :meth:`samething.search.Searcher.second_look` makes one.

    Uploads and files are compared as they are; of the index's own images what the re-ranker needs is kept in
    the index folder.
    """

    reranker: Reranker
    index: AbstractIndex
    trust: Trust
    kept: Kept
    budget_ms: float | None = None
    read: Read = decode
    """How an image of the index is read."""
    asked: tuple[Shown, ...] = ()
    """The query's images."""

    @classmethod
    def without_model(cls, index: AbstractIndex, name: str) -> SecondLook:
        """A second look that embeds nothing, and compares the index's own images.

        Raises:
            MissingExtraError: a package that it needs is not installed.
        """
        reranker = reranker_of(name, lambda images: np.empty((len(images), 0), np.float32), None)
        return cls(reranker, index, Trust.untaught(reranker.weights), Kept.beside(index.location))

    def asking(self, images: Sequence[Image.Image], vectors: Embeddings) -> SecondLook:
        """This for a query of some images, with their vectors."""
        asked = [Shown("", image.copy, vector) for image, vector in zip(images, vectors, strict=True)]
        return dataclasses.replace(self, asked=tuple(asked))

    def asking_rows(self, ids: Sequence[str]) -> SecondLook:
        """This for a query that is some of the index's own images."""
        return dataclasses.replace(self, asked=tuple(self.shown(self.index.rows(ids).to_pylist())))

    def shown(self, rows: Sequence[Mapping[str, Any]]) -> list[Shown]:
        """Images of the index, by their rows."""
        vectors = self.index.vectors([row["id"] for row in rows])
        return [
            Shown(row["id"], functools.partial(self._image, row), vector, row["domain"] or "")
            for row, vector in zip(rows, vectors, strict=True)
        ]

    def _image(self, row: Mapping[str, Any]) -> Image.Image:
        """The first of a row's files that can be read."""
        files = files_of(row["files"]) if row.get("files") else [Source(row["path"] or "")]
        for file in files[:-1]:
            with contextlib.suppress(ImageError):
                return self.read(file)
        return self.read(files[-1])

    def at(self, hits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The hits of a search in a new order, by their score and what the second look adds to it.

        Of several images of one thing the one that says most about a hit counts.

        Returns:
            The hits, each with ``added``, what its score was raised by, and ``evidence``, as
            :class:`~samething.search.Match` has it.

        Raises:
            ImageError: an image of the query cannot be read.
        """
        candidates = self.shown(hits)
        seen: list[dict[str, Any]] = [{**hit, "added": 0.0, "evidence": None} for hit in hits]
        budget = None if self.budget_ms is None else self.budget_ms / max(1, len(self.asked))
        for number, query in enumerate(self.asked):
            found = second_look(self.reranker, query, candidates, self.kept, budget_ms=budget)
            for hit, evidence in zip(seen, found, strict=True):
                if evidence is not None:
                    added = self.trust.added(np.array([evidence.numbers]), [hit["domain"] or ""]).item()
                    if hit["evidence"] is None or added > hit["added"]:
                        told: dict[str, Json] = {
                            "by": self.reranker.name,
                            "added": added,
                            "agreeing": evidence.num_agreeing,
                            "verified": evidence.num_agreeing >= _VERIFIED and added > 0,
                            "points": [list(point) for point in evidence.points],
                            "place": None if evidence.place is None else list(evidence.place),
                            "image": number,
                        }
                        hit |= {"added": added, "evidence": told}
        return sorted(seen, key=lambda hit: (-(hit["score"] + hit["added"]), -hit["score"], hit["id"]))


Rerank = str | Reranker | SecondLook


def trust_key(index: AbstractIndex, reranker: Reranker) -> str:
    """Under which an index notes what a re-ranker's evidence is worth."""
    return f"{index.description.model_fingerprint} {reranker.name} {fingerprint(reranker.made_from)}"


def learn(look: SecondLook, embedder: Embedder, *, labels: bool) -> Trust:
    """Learn in an index what evidence is worth, and note it there.

    Args:
        look: the re-ranker in the index.
        embedder: the index's model.
        labels: from pairs of images with one label, which must name things; else from views of images, as
            :mod:`samething.search.view_calibration` makes them.
    """
    pairs: list[tuple[float, bool, int, str]] = []
    numbers: list[tuple[float, ...]] = []
    asked = _labelled(look) if labels else _views(look, embedder)
    for number, (query, row, passed_over) in enumerate(asked):
        found = look.index.search(query.vector[None], _NEIGHBOURS + len(passed_over)).of(0)
        hits = [hit for hit in found if hit["id"] not in passed_over][:_NEIGHBOURS]
        evidence = second_look(look.reranker, query, look.shown(hits), look.kept)
        for hit, one in zip(hits, evidence, strict=True):
            if one is not None:
                same = all(hit[name] == row[name] for name in (("label", "domain") if labels else ("id",)))
                pairs.append((hit["score"], same, number, hit["domain"] or ""))
                numbers.append(one.numbers)
    scores, is_right, queries, domains = zip(*pairs, strict=True) if pairs else ((), (), (), ())
    width = len(look.reranker.weights)
    trust = Trust.fit(
        np.array(scores, float), np.array(numbers, float).reshape(-1, width), np.array(is_right, bool),
        np.array(queries, int), domains, otherwise=look.reranker.weights,
        taught_by="labels" if labels else "views",
    )  # fmt: skip
    if not labels:
        most = _MORE_THAN_OWN * np.array(look.reranker.weights)
        weights = {name: tuple(np.minimum(own, most).tolist()) for name, own in trust.weights.items()}
        trust = dataclasses.replace(trust, weights=weights)
    look.index.set_notes(TRUST, {trust_key(look.index, look.reranker): trust.to_json()})
    return trust


_Asked = tuple[Shown, Mapping[str, Any], set[str]]
"""A query, the row that it is of, and ids that do not count."""


def _labelled(look: SecondLook) -> Iterator[_Asked]:
    rows = some_rows(look.index, look.index.count(), _NUM_QUERIES)
    for row, query in zip(rows, look.shown(rows), strict=True):
        yield query, row, {row["id"]}


def _views(look: SecondLook, embedder: Embedder) -> Iterator[_Asked]:
    rows = some_rows(look.index, look.index.count(), NUM_VIEWS)
    originals = look.shown(rows)

    def made(number: int) -> Image.Image:
        return view_of(originals[number].image(), np.random.default_rng(number))

    for number, view in enumerate(in_threads(made, range(len(rows)), ahead=8)):
        if not isinstance(view, ImageError):
            near = look.index.search(originals[number].vector[None], NUM_CANDIDATES, columns=["id"]).of(0)
            copies = {hit["id"] for hit in near if hit["score"] >= NEAR_DUPLICATE} - {rows[number]["id"]}
            yield Shown("", view.copy, embedder.embed([view])[0]), rows[number], copies
