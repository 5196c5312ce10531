"""All pairs of embeddings whose cosine reaches a threshold, found exactly and in bounded memory."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Final

import numpy as np
from jaxtyping import Float, Float32, Int

from samething.arrays import Embeddings
from samething.progress import progress_bar
from samething.retrieval.scores import Scorer, blocks

_MOST_ROWS: Final = 4096
"""Rows that are multiplied with as many others at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingPairs:
    """Pairs of near embeddings."""

    first: Int[np.ndarray, " p"]
    """The lower row."""
    second: Int[np.ndarray, " p"]
    cosine: Float32[np.ndarray, " p"]
    num_crowded: int
    """Rows that may have more near ones than were kept."""


def near_embeddings(
    embeddings: Embeddings, *, similarity: float, most: int = 160, memory_mib: int = 512
) -> EmbeddingPairs:
    """Pairs with a cosine of at least ``similarity``; each row is compared with those after it, once.

    Args:
        embeddings: n rows, also memory-mapped ones.
        similarity: least cosine of a pair, in float32.
        most: pairs that a row keeps with each block of later rows, the nearest.
        memory_mib: ceiling in MiB of the working memory.

    Raises:
        InputError: a row is zero or not finite.

    >>> found = near_embeddings(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]], np.float32), similarity=0.9)
    >>> found.first, found.second, found.cosine.round(4)
    (array([0]), array([2]), array([0.9988], dtype=float32))
    """
    num_rows, width = embeddings.shape
    size = _block_rows(width, memory_mib)
    scorer = Scorer.of(embeddings, embeddings, precision="float32", distance="cosine", normalised=False)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    crowded = np.zeros(num_rows, bool)
    with progress_bar("million pairs") as progress:
        task = progress.add_task("near embeddings", total=round(num_rows**2 / 2e6))
        for block in blocks(num_rows, size):
            rows = scorer.prepare(embeddings[block], block.start, "embeddings").parts[0]
            for later in blocks(num_rows - block.start, size):
                start = block.start + later.start
                others = rows
                if later.start:
                    others = scorer.prepare(embeddings[start : start + size], start, "embeddings").parts[0]
                cosines = _product(rows, others)
                near = cosines >= similarity
                if not later.start:
                    near &= ~np.tri(len(rows), dtype=bool)
                if near.any():
                    many = near.sum(axis=1) > most
                    crowded[block] |= many
                    _keep_nearest(near, cosines, np.flatnonzero(many), most)
                    first, second = np.nonzero(near)
                    found.append((first + block.start, second + start, cosines[first, second]))
                progress.advance(task, len(rows) * len(others) / (1e6 if later.start else 2e6))
    first, second, cosine = (
        (np.concatenate(column) for column in zip(*found, strict=True))
        if found
        else (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    )
    return EmbeddingPairs(first, second, cosine, int(crowded.sum()))


def _block_rows(width: int, memory_mib: int) -> int:
    """Rows a block: two blocks, each also as it is widened, and of each pair a cosine and two marks."""
    budget = memory_mib * 2**20
    size = _MOST_ROWS
    while size > 64 and 4 * size * width * 4 + 6 * size * size > budget:
        size //= 2
    return size


def _keep_nearest(
    near: np.ndarray, cosines: Float32[np.ndarray, "b c"], rows: Int[np.ndarray, " r"], most: int
) -> None:
    """Unmark all but the nearest of some rows."""
    for row in rows:
        columns = np.flatnonzero(near[row])
        order = np.argsort(-cosines[row, columns], kind="stable")
        near[row, columns[order[most:]]] = False


def _product(rows: Float[np.ndarray, "b d"], others: Float[np.ndarray, "c d"]) -> Float[np.ndarray, "b c"]:
    """Products of all rows with all others; torch's kernels are the faster ones on many machines."""
    product: np.ndarray
    if importlib.util.find_spec("torch") is None:
        product = rows @ others.T
    else:
        import torch

        product = (torch.from_numpy(rows) @ torch.from_numpy(others).T).numpy()
    return product
