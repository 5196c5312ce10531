"""A second look at what a search found: objects are verified, and found inside bigger images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from samething.errors import InputError, MissingExtraError, needed
from samething.files import Json
from samething.rerank.gains import query_expansion, reciprocal_reranking
from samething.rerank.geometry import Geometry
from samething.rerank.kept import Kept
from samething.rerank.neighbours import Neighbours
from samething.rerank.pair_scorer import PairScorer
from samething.rerank.regions import Regions
from samething.rerank.second_look import Embed, Evidence, Reranker, Shown, keep_all, second_look
from samething.rerank.trust import Trust

__all__ = [
    "RERANKERS",
    "Evidence",
    "Kept",
    "PairScorer",
    "Reranker",
    "Shown",
    "Trust",
    "available",
    "keep_all",
    "reranker_of",
    "second_look",
]

RERANKERS: Final[dict[str, Callable[[Embed, Json], Reranker]]] = {
    "geometry": lambda embed, model: needed("cv2", extra="rerank") and Geometry(),
    "regions": Regions,
    "query-expansion": lambda embed, model: Neighbours("query-expansion", query_expansion),
    "k-reciprocal": lambda embed, model: Neighbours("k-reciprocal", reciprocal_reranking),
}
"""Re-rankers by name: each is made from the model's way to embed images, and what identifies the model."""


def reranker_of(name: str, embed: Embed, model: Json) -> Reranker:
    """A re-ranker by its name.

    Args:
        name: a key of ``RERANKERS``, or the path of an ONNX graph that scores pairs (name.onnx).
        embed: images to vectors of the model whose search is looked at again.
        model: the model's fingerprint, or what else identifies it.

    Raises:
        InputError: there is none of this name.
        MissingExtraError: a package that it needs is not installed.
    """
    if name.endswith(".onnx"):
        return PairScorer.of_onnx(Path(name))
    require_known(name)
    return RERANKERS[name](embed, model)


def require_known(name: str) -> None:
    """Refuse a name that is none of ``RERANKERS``.

    Raises:
        InputError: says which there are.
    """
    if name not in RERANKERS:
        raise InputError(
            f"the re-ranker {name[:100]!r}",
            expected=f"one of {', '.join(RERANKERS)}",
            next_step="correct the name, or add your own to samething.rerank.RERANKERS",
        )


def available() -> list[str]:
    """Names of the re-rankers whose packages are installed."""
    found = []
    for name in RERANKERS:
        with contextlib.suppress(MissingExtraError):
            reranker_of(name, lambda images: np.empty((len(images), 0), np.float32), None)
            found.append(name)
    return found
