"""One's own scorer of pairs as a re-ranker: a function, or an ONNX graph."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from samething.errors import InputError
from samething.files import Json, file_sha256
from samething.rerank.second_look import Evidence, Shown

_SIDE: Final = 512
_QUALITY: Final = 90

Score: TypeAlias = Callable[[Image.Image, Sequence[Image.Image]], Sequence[float]]
"""The query and some candidates -> how sure it is that each shows the same thing; below 0 counts as 0."""


@dataclasses.dataclass(frozen=True, eq=False)
class PairScorer:
    """A function that scores the query's image against others, each at most 512 pixels on its longer side."""

    score: Score
    name: str = "pair-scorer"
    weights: tuple[float, ...] = (0.1,)
    at_once: int = 8

    @property
    def made_from(self) -> Json:
        """What is kept is the image, whatever scores it."""
        return {"pixels": [_SIDE, _QUALITY]}

    def keep(self, image: Image.Image) -> bytes:
        """The image as JPEG, at most about 150 kB."""
        small, buffer = image.copy(), io.BytesIO()
        small.thumbnail((_SIDE, _SIDE))
        small.save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue()

    def compare(
        self, query: Shown, of_query: bytes, candidates: Sequence[Shown], of_each: Sequence[bytes]
    ) -> Iterator[Evidence]:
        """The scores as evidence."""
        del query, candidates
        asked, *others = (Image.open(io.BytesIO(content)).convert("RGB") for content in (of_query, *of_each))
        for score in self.score(asked, others) if others else ():
            yield Evidence((max(0.0, float(score)),))

    @classmethod
    def of_graph(cls, graph: Path, session: Any) -> PairScorer:
        """A graph of two inputs, uint8 or float32 (b, 3, height, width), and one output (b,) or (b, 1).

        Its first input is the query, its second the candidate. The images are squashed to the inputs' size,
        and scaled to [0, 1] where they are floats.

        Raises:
            InputError: it has other inputs.
        """
        inputs = session.get_inputs()
        sides = [tuple(given.shape[1:]) for given in inputs]
        is_image = [len(own) == 3 and all(isinstance(side, int) for side in own) for own in sides]
        if is_image != [True, True]:
            raise InputError(
                f"{graph} has the inputs {', '.join(f'{given.name} {given.shape}' for given in inputs)}",
                expected="two, each (b, 3, height, width) with a fixed height and width",
                next_step="export the scorer with these",
            )

        def filled(place: int, images: Sequence[Image.Image]) -> np.ndarray:
            _, height, width = sides[place]
            pixels = np.stack([np.asarray(image.resize((width, height))) for image in images])
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
            return pixels if "uint8" in inputs[place].type else (pixels / 255).astype(np.float32)

        def score(query: Image.Image, others: Sequence[Image.Image]) -> Sequence[float]:
            given = {inputs[0].name: filled(0, [query] * len(others)), inputs[1].name: filled(1, others)}
            found: list[float] = np.asarray(session.run(None, given)[0]).reshape(len(others)).tolist()
            return found

        return cls(score, f"{graph.name} {file_sha256(graph)[:8]}")
