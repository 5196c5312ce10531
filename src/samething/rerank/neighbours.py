"""What the candidates say of each other: gains of evaluation as re-rankers, on vectors alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from samething.files import Json
from samething.rerank.gains import Gain
from samething.rerank.second_look import NUM_CANDIDATES, Evidence, Shown


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """A gain among the candidates of one search.

    Its one number is by how much it changes the cosine, so it may be below 0: a weight of 1 gives the gain's
    own ranking.
    """

    name: str
    gain: Gain
    weights: tuple[float, ...] = (1.0,)
    made_from: Json = None
    at_once: int = NUM_CANDIDATES

    def keep(self, image: Image.Image) -> bytes:
        """Nothing is needed but the vectors."""
        del image
        return b""

    def compare(
        self, query: Shown, of_query: bytes, candidates: Sequence[Shown], of_each: Sequence[bytes]
    ) -> Iterator[Evidence]:
        """The change of each candidate's score."""
        del of_query, of_each
        if not candidates:
            return
        asked, entries = query.vector[None], np.stack([image.vector for image in candidates])
        found = self.gain(asked, entries, np.array([-1]))
        scores = found.queries @ found.gallery.T if found.scores is None else found.scores
        for change in (scores - asked @ entries.T)[0].tolist():
            yield Evidence((change,))
