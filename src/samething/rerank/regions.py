"""Parts of the candidates, embedded by the model of the search: things inside bigger images.

One vector of a whole image is mostly of what covers most of it. So the model embeds overlapping windows too,
and the best of them may speak for the candidate (MaxSim over regions, as in Patchify, arXiv:2512.12610).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from samething.arrays import unit
from samething.files import Json
from samething.images.parts import WINDOWS, cut_out
from samething.rerank.second_look import Embed, Evidence, Shown


@dataclasses.dataclass(frozen=True, eq=False)
class Regions:
    """The best of 25 windows of a candidate against the query.

    Its one number is by how much that window is more like the query than the whole image is, at least 0.
    """

    embed: Embed
    model: Json
    """Identifies the model that embeds."""
    name: str = "regions"
    weights: tuple[float, ...] = (1.0,)
    at_once: int = 1

    @property
    def made_from(self) -> Json:
        """The windows and the model."""
        return {"regions": [list(window) for window in WINDOWS], "model": self.model}

    def keep(self, image: Image.Image) -> bytes:
        """The windows' vectors in int8, each with its scale: 25 · (d + 4) bytes."""
        vectors = self.embed(cut_out(image, WINDOWS))
        scales = np.abs(vectors).max(axis=1).astype("<f4") / 127
        levels = np.round(vectors / scales[:, None]).astype(np.int8)
        return b"".join((scales.tobytes(), levels.tobytes()))

    def compare(
        self, query: Shown, of_query: bytes, candidates: Sequence[Shown], of_each: Sequence[bytes]
    ) -> Iterator[Evidence]:
        """The best window of each candidate, and what it gains."""
        del of_query
        for candidate, content in zip(candidates, of_each, strict=True):
            count = len(WINDOWS)
            scales = np.frombuffer(content, "<f4", count)
            levels = np.frombuffer(content, np.int8, -1, 4 * count).reshape(count, -1)
            cosines = unit(levels * scales[:, None], np.float32) @ query.vector
            best = int(cosines.argmax())
            gain = float(cosines[best] - candidate.vector @ query.vector)
            yield Evidence((gain,), place=WINDOWS[best]) if gain > 0 else Evidence((0.0,))
