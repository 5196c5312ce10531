"""Tokens of a backbone's patches: parts of the query looked for among the parts of each candidate.

An ONNX graph gives the tokens, so nothing here needs torch. ``samething tokens`` writes it, with or without a
small trained part. Each token has a direction and a weight. *Chamfer*: every token meets the nearest of the
other image. *Sinkhorn*: tokens are assigned to each other once, by optimal transport with a place for those
that belong nowhere, as ELViS (Suma et al., ICLR 2026) and SuperGlue (Sarlin et al., CVPR 2020) do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from PIL import Image

from samething.arrays import Float
from samething.errors import ArtefactError
from samething.files import Json, file_sha256
from samething.images import Preprocessing, prepare
from samething.rerank.four_bits import packed, unpacked
from samething.rerank.second_look import Evidence, Shown

GRAPH: Final = "tokens.onnx"
"""Name of the graph in the folder of a model or run."""
METADATA: Final = "samething.tokens"
"""Key of the graph's metadata under which :class:`TokenSettings` stand as JSON."""
NUM_DIMS: Final = 128
MOST_TOKENS: Final = 256
"""Of the largest weight: with 65 bytes a token an image takes 16,640 at most."""
BYTES_PER_TOKEN: Final = 1 + NUM_DIMS // 2
"""A weight in a byte, and a direction in 4 bits a number."""
SINKHORN_STEPS: Final = 10
_STEPS: Final = 32
"""Levels per unit: a number of a 128-dimensional direction is seldom beyond a quarter."""

Likeness: TypeAlias = Literal["chamfer", "sinkhorn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """What a graph of tokens brings along."""

    preprocessing: Json
    """How images are prepared for it."""
    likeness: Likeness
    """How two images' tokens are compared."""
    temperature: float
    """Of optimal transport, in units of the cosine."""
    nowhere: float
    """Cosine that a token which belongs nowhere is given."""
    baseline: float
    """Likeness up to which nothing is said: that of most pairs of different things."""


def likeness(
    query: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"], settings: TokenSettings
) -> float:
    """How alike two images are by their tokens, each a direction times its weight in [0, 1].

    ``chamfer``: mean over the query's tokens, by weight, of the largest cosine in the other image.
    ``sinkhorn``: the transported cosine, per transported weight that the lighter image has.
    """
    lengths = [np.linalg.norm(tokens, axis=1) for tokens in (query, other)]
    total = min(float(own.sum()) for own in lengths)
    if total <= 0:
        return 0.0
    directions = [
        tokens / np.maximum(own, 1e-12)[:, None] for tokens, own in zip((query, other), lengths, strict=True)
    ]
    cosines = directions[0] @ directions[1].T
    if settings.likeness == "chamfer":
        return float(cosines.max(axis=1) @ lengths[0] / lengths[0].sum())
    return float((transport(cosines, lengths[0], lengths[1], settings) * cosines).sum() / total)


def transport(
    cosines: Float[np.ndarray, "n m"],
    of_query: Float[np.ndarray, " n"],
    of_other: Float[np.ndarray, " m"],
    settings: TokenSettings,
) -> Float[np.ndarray, "n m"]:
    """How much of each token goes where, after ten steps of Sinkhorn's algorithm (Cuturi, NeurIPS 2013).

    A row and a column more, as heavy as the other side's whole weight, take what belongs nowhere.

    Args:
        cosines: of the tokens of both images.
        of_query: weights of the rows.
        of_other: weights of the columns.
        settings: temperature, and the cosine of what belongs nowhere.
    """
    kernel = np.full([side + 1 for side in cosines.shape], settings.nowhere, np.float64)
    kernel[:-1, :-1] = cosines
    kernel = np.exp((kernel - kernel.max()) / settings.temperature)
    rows = np.append(of_query, of_other.sum()).astype(np.float64)
    columns = np.append(of_other, of_query.sum()).astype(np.float64)
    right = np.ones(len(columns))
    for _ in range(SINKHORN_STEPS):
        left = rows / (kernel @ right)
        right = columns / (left @ kernel)
    return np.asarray((left[:, None] * kernel * right)[:-1, :-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of a graph.

    The one number of its evidence is by how much two images are more alike than most others are.
    """

    session: Any = dataclasses.field(repr=False)
    settings: TokenSettings
    name: str
    graph_sha256: str
    weights: tuple[float, ...] = (1.0,)
    at_once: int = 10

    @classmethod
    def of_graph(cls, path: Path, session: Any) -> Tokens:
        """The re-ranker of a graph that :func:`samething.export.token_graph.tokens` wrote.

        Raises:
            ArtefactError: its settings are not those of this version.
        """
        try:
            settings = TokenSettings(**json.loads(session.get_modelmeta().custom_metadata_map[METADATA]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{path} holds settings of tokens that this program does not know ({error!r})",
                expected="a graph that this version of samething tokens wrote",
                next_step="write it again: samething tokens",
            ) from error
        sha256 = file_sha256(path)
        return cls(session, settings, f"{path.name} {sha256[:8]}", sha256)

    @property
    def made_from(self) -> Json:
        """The graph, and how tokens are kept."""
        return {"tokens": [MOST_TOKENS, NUM_DIMS, _STEPS], "graph": self.graph_sha256}

    def keep(self, image: Image.Image) -> bytes:
        """The heaviest tokens: weights in a byte, directions in 4 bits a number; at most 16,640 bytes."""
        pixels = prepare(image, Preprocessing.from_json(self.settings.preprocessing))[None]
        [[tokens]] = self.session.run(None, {"pixels": pixels})
        return content_of(tokens)

    def compare(
        self, query: Shown, of_query: bytes, candidates: Sequence[Shown], of_each: Sequence[bytes]
    ) -> Iterator[Evidence]:
        """How alike each candidate is, above the baseline."""
        del query, candidates
        asked = tokens_of(of_query)
        for content in of_each:
            found = likeness(asked, tokens_of(content), self.settings)
            yield Evidence((max(0.0, found - self.settings.baseline),))


def content_of(tokens: Float[np.ndarray, "n 128"]) -> bytes:
    """What is kept of an image: its heaviest tokens, 65 bytes each."""
    lengths = np.linalg.norm(tokens, axis=1)
    chosen = np.sort(np.argsort(-lengths, kind="stable")[:MOST_TOKENS])
    directions = tokens[chosen] / np.maximum(lengths[chosen], 1e-12)[:, None]
    weights = np.round(lengths[chosen] * 255).clip(0, 255).astype(np.uint8)
    return b"".join((weights.tobytes(), packed(directions, steps=_STEPS)))


def tokens_of(content: bytes) -> Float[np.ndarray, "n 128"]:
    """The tokens again, as they are compared."""
    count = len(content) // BYTES_PER_TOKEN
    weights = np.frombuffer(content, np.uint8, count).astype(np.float32) / 255
    return unpacked(content[count:], NUM_DIMS) * weights[:, None]
