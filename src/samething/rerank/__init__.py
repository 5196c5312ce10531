"""A second look at what a search found: objects are verified, and found inside bigger images."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from samething.errors import InputError, MissingExtraError, needed
from samething.files import Json
from samething.rerank.gains import Neighbours, query_expansion, reciprocal_reranking
from samething.rerank.geometry import Geometry
from samething.rerank.kept import Kept
from samething.rerank.pair_scorer import PairScorer
from samething.rerank.regions import Regions
from samething.rerank.second_look import Embed, Evidence, Reranker, Shown, keep_all, second_look
from samething.rerank.tokens import GRAPH, METADATA, Tokens
from samething.rerank.trust import Trust
from samething.sessions import open_session

__all__ = [
    "RERANKERS",
    "Evidence",
    "Kept",
    "PairScorer",
    "Reranker",
    "Shown",
    "Tokens",
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


TOKENS: Final = "tokens"
"""Name of the re-ranker by the graph ``tokens.onnx`` in the folder of the model or run."""


def reranker_of(name: str, embed: Embed, model: Json, folder: Path | None = None) -> Reranker:
    """A re-ranker by its name.

    Args:
        name: a key of ``RERANKERS``; ``tokens``; or the path of an ONNX graph (name.onnx), of tokens or one
            that scores pairs.
        embed: images to vectors of the model whose search is looked at again.
        model: the model's fingerprint, or what else identifies it.
        folder: of the model or run, where its graph of tokens is.

    Raises:
        InputError: there is none of this name, or the model has no tokens.
        ArtefactError: a graph that cannot be read.
        MissingExtraError: a package that it needs is not installed.
    """
    if name == TOKENS:
        if folder is None or not (folder / GRAPH).is_file():
            raise InputError(
                "--rerank tokens, and a model without tokens",
                expected=f"the graph {(folder or Path('MODEL')) / GRAPH}, of a backbone that gives patches",
                next_step=f"samething tokens CATALOG --backbone NAME --output {folder or 'MODEL'}/{GRAPH}",
            )
        name = str(folder / GRAPH)
    if name.endswith(".onnx"):
        path = Path(name)
        state = path.stat() if path.is_file() else None
        return _of_graph(path, state and (state.st_mtime_ns, state.st_size, state.st_ino))
    require_known(name)
    return RERANKERS[name](embed, model)


@functools.lru_cache(maxsize=4)  # a server asks for it with every request
def _of_graph(path: Path, state: object) -> Reranker:
    """What an ONNX graph is: tokens of images, or a scorer of pairs.

    Raises:
        ArtefactError: it cannot be read.
        InputError: it has other inputs than these.
    """
    del state
    session = open_session(path)
    holds_tokens = METADATA in session.get_modelmeta().custom_metadata_map
    return (Tokens if holds_tokens else PairScorer).of_graph(path, session)


def require_known(name: str) -> None:
    """Refuse a name that is none of ``RERANKERS``, nor ``tokens``.

    Raises:
        InputError: says which there are.
    """
    if name not in (TOKENS, *RERANKERS):
        raise InputError(
            f"the re-ranker {name[:100]!r}",
            expected=f"one of {', '.join((*RERANKERS, TOKENS))}",
            next_step="correct the name, or add your own to samething.rerank.RERANKERS",
        )


def available(folder: Path | None = None) -> list[str]:
    """Re-rankers whose packages are installed; ``tokens`` where the folder of a model has its graph."""
    found = [TOKENS] if folder is not None and (folder / GRAPH).is_file() else []
    for name in RERANKERS:
        with contextlib.suppress(MissingExtraError):
            reranker_of(name, lambda images: np.empty((len(images), 0), np.float32), None)
            found.append(name)
    return found
