"""What is asked of a tile of scores that a card holds, answered there: the tile itself never leaves it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from samething.arrays import Float, Int
from samething.retrieval.tiles import GROUP


def reaching(
    tile: Any, k: int, least: Float[np.ndarray, " q"]
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Query, column and score of entries among which are a tile's k best of each query, in order.

    Args:
        tile: scores (q, c), a tensor.
        k: entries per query.
        least: lowest score that counts for each query.
    """
    torch = sys.modules["torch"]
    bounds = torch.from_numpy(least).to(tile.device)
    num_groups = tile.shape[1] // GROUP
    if num_groups >= k:  # as in nearest
        maxima = tile[:, : num_groups * GROUP].unflatten(1, (GROUP, num_groups)).amax(1)
        bounds = torch.maximum(bounds, maxima.topk(k).values[:, -1])
    chosen = tile >= bounds[:, None]
    crowded = (chosen.sum(1) > GROUP * k).nonzero()[:, 0]
    if len(crowded):  # by ties: only k groups can reach their bound otherwise
        some = tile[crowded]
        last = some.topk(k).values[:, -1:]
        tied = some == last
        tied &= tied.cumsum(1) <= k - (some > last).sum(1, keepdim=True)
        chosen[crowded] &= tied | (some > last)
    found = chosen.nonzero()
    scores = tile[found[:, 0], found[:, 1]].cpu().numpy()
    query, column = found.T.cpu().numpy()
    return query, column, scores


def num_ahead(tile: Any, relevant: Float[np.ndarray, "q p"]) -> Int[np.ndarray, "q p"]:
    """How many entries of a tile are ahead of each relevant one or tie with it.

    Args:
        tile: scores (q, c), a tensor; -inf for entries that do not count.
        relevant: scores of each query's relevant entries, worst first, filled up with inf.
    """
    torch = sys.modules["torch"]
    bounds = torch.from_numpy(relevant).to(tile.device)
    # an entry is ahead of as many of the relevant ones, counted from the worst
    beaten = torch.searchsorted(bounds, tile, right=True)
    counts = torch.zeros(len(bounds), bounds.shape[1] + 1, dtype=torch.int64, device=tile.device)
    counts.scatter_add_(1, beaten, torch.ones(1, 1, dtype=torch.int64, device=tile.device).expand_as(beaten))
    ahead: np.ndarray = counts.flip(1).cumsum(1).flip(1)[:, 1:].cpu().numpy()
    return ahead
