"""A second look at what a search found: the interface, and the call that every user of it makes.

A re-ranker compares the query's image with those of the candidates and says what speaks for "the same
thing". What it needs of an image is computed once and kept (:mod:`samething.rerank.kept`). What its evidence
is worth, in units of the first search's cosine, is learned (:mod:`samething.rerank.trust`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
from PIL import Image

from samething.arrays import Embeddings, Float
from samething.errors import ImageError
from samething.files import Json
from samething.images import in_threads
from samething.rerank.kept import Kept

NUM_CANDIDATES: Final = 100
"""Results of the first search that are looked at again."""

Embed: TypeAlias = Callable[[Sequence[Image.Image]], Embeddings]
"""Images -> unit-length vectors of the model whose search is looked at again."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """An image that takes part: the query, or a candidate."""

    key: str
    """Identity of the image's content, under which something is kept of it; empty: nothing is kept."""
    image: Callable[[], Image.Image]
    """Decodes it; raises ImageError."""
    vector: Float[np.ndarray, " d"]
    """Its embedding."""
    domain: str = ""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a second look at a candidate found."""

    numbers: tuple[float, ...]
    """What speaks for "the same thing"; zeros where nothing can be said."""
    points: tuple[tuple[float, float, float, float], ...] = ()
    """Places that agree: x and y in the query, x and y in the candidate, as shares of the images' sides."""
    place: tuple[float, float, float, float] | None = None
    """Where in the candidate: left, top, right, bottom as shares of its sides."""
    num_agreeing: int = 0
    """Places that agree, of which ``points`` are the clearest."""


@runtime_checkable
class Reranker(Protocol):
    """What looks a second time. ``RERANKERS`` names those that there are."""

    @property
    def name(self) -> str:
        """Its name, for people."""

    @property
    def weights(self) -> tuple[float, ...]:
        """What each number of its evidence is worth where nothing was learned, in units of the cosine."""

    @property
    def at_once(self) -> int:
        """Candidates that it compares in one call; the budget is looked at in between."""

    @property
    def made_from(self) -> Json:
        """Everything that decides what is kept of an image: settings, versions, the model.

        None where nothing is kept, and the evidence for a candidate depends on the others.
        """

    def keep(self, image: Image.Image) -> bytes:
        """What is needed of an image, of a bounded size; empty where nothing is."""

    def compare(
        self, query: Shown, of_query: bytes, candidates: Sequence[Shown], of_each: Sequence[bytes]
    ) -> Iterator[Evidence]:
        """What speaks for each candidate, in their order, from what was kept of it and of the query."""


def second_look(
    reranker: Reranker,
    query: Shown,
    candidates: Sequence[Shown],
    kept: Kept,
    *,
    budget_ms: float | None = None,
) -> list[Evidence | None]:
    """Look at the candidates of a search again, the best first.

    Args:
        reranker: what looks.
        query: the image that is looked for.
        candidates: what the first search found, best first.
        kept: where to keep what is computed of an image.
        budget_ms: begin with no further image after this time; None: look at all.

    Returns:
        The evidence for each candidate; None for one that was not looked at, because the time was over or
        its image cannot be read.

    Raises:
        ImageError: the query's image cannot be read.
    """
    deadline = float("inf") if budget_ms is None else time.monotonic() + budget_ms / 1000
    found: list[Evidence | None] = [None] * len(candidates)
    [of_query] = keep_all(reranker, [query], kept)  # whatever the time
    if isinstance(of_query, ImageError):
        raise of_query
    for start in range(0, len(candidates), reranker.at_once):
        if time.monotonic() > deadline:
            break
        part = candidates[start : start + reranker.at_once]
        contents = {
            place: content
            for place, content in enumerate(keep_all(reranker, part, kept, deadline=deadline))
            if isinstance(content, bytes)
        }
        evidence = reranker.compare(
            query, of_query or b"", [part[place] for place in contents], list(contents.values())
        )
        for place, one in zip(contents, evidence, strict=True):
            found[start + place] = one
    return found


def keep_all(
    reranker: Reranker, images: Sequence[Shown], kept: Kept, *, deadline: float = float("inf")
) -> list[bytes | ImageError | None]:
    """What a re-ranker needs of images: as it was kept, or computed now and kept.

    Args:
        reranker: whose.
        images: of which.
        kept: where it is looked for and kept.
        deadline: of the monotonic clock; nothing is begun after it.

    Returns:
        The content for each image, the error of one that cannot be read; None for what was not begun in time.
    """
    made_from = reranker.made_from
    if made_from is None:
        return [b""] * len(images)
    known = kept.get(made_from, [image.key for image in images if image.key])
    new = [place for place, image in enumerate(images) if image.key not in known]

    def made(place: int) -> bytes | None:
        return None if time.monotonic() > deadline else reranker.keep(images[place].image())

    computed = dict(zip(new, in_threads(made, new), strict=True))
    kept.put(
        made_from,
        {
            images[place].key: one
            for place, one in computed.items()
            if images[place].key and isinstance(one, bytes)
        },
    )
    return [known.get(image.key, computed.get(place)) for place, image in enumerate(images)]
