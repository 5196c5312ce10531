"""Pure functions from ranks to numbers, one value per query.

Every metric takes what was retrieved as *ranked relevance* (``relevance[i, j]``: is the entry that query
``i`` found at rank ``j + 1`` the same thing?) or as the ranks of the relevant entries, and ``num_relevant``:
how many relevant entries the gallery holds for each query, the query's own image left out. Values are in
[0, 1]. A query without a relevant entry cannot be answered right or wrong: its value is NaN, and means and
intervals leave it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np

from samething.arrays import Bool, Int, NumRelevant, PerQuery, Relevance
from samething.errors import InputError

Metric: TypeAlias = str
"""One of ``mmp@K``, ``r@K``, ``p@K``, ``mrr@K``, ``map@K``, ``map``, ``map@r``, ``map-trapezoid`` and
``r-precision``."""


def modified_mean_precision_at_k(relevance: Relevance, num_relevant: NumRelevant, *, k: int) -> PerQuery:
    """mMP@k: of the first ``min(n_q, k)`` ranks, the share that is relevant; ``n_q`` is ``num_relevant``.

    ``mMP@k = sum(relevance[:m]) / m`` with ``m = min(n_q, k)``.

    With k = 5 the metric of the Google Universal Image Embedding Challenge (2022) and of UnED (Ypsilantis et
    al., ICCV 2023). A query with fewer than k relevant entries can still reach 1; a hit behind rank n_q does
    not count.

    Args:
        relevance: ranked relevance, best rank first, at least k columns.
        num_relevant: relevant gallery entries of each query.
        k: ranks looked at, at least 1.

    Returns:
        One value in [0, 1] a query, NaN where ``num_relevant`` is 0.

    Raises:
        InputError: k is below 1 or above the number of columns, or a count is impossible.

    >>> modified_mean_precision_at_k(np.array([[True, False, True]]), np.array([2]), k=3)
    array([0.5])
    """
    first = _first_ranks(relevance, num_relevant, k)
    depth = np.minimum(num_relevant, k)
    hits = (first & (np.arange(k) < depth[:, None])).sum(axis=1)
    return _share(hits, depth)


def recall_at_k(relevance: Relevance, num_relevant: NumRelevant, *, k: int) -> PerQuery:
    """R@k as retrieval uses the word: 1 if any of the first k ranks is relevant, else 0.

    The Recall@K of Oh Song et al., *Deep Metric Learning via Lifted Structured Feature Embedding* (CVPR
    2016); elsewhere called hit rate. It is not the share of the relevant entries that was found. Arguments
    and errors as in :func:`modified_mean_precision_at_k`.

    >>> recall_at_k(np.array([[False, True], [False, False]]), np.array([4, 1]), k=2)
    array([1., 0.])
    """
    first = _first_ranks(relevance, num_relevant, k)
    return np.where(num_relevant > 0, first.any(axis=1), np.nan)


def precision_at_k(relevance: Relevance, num_relevant: NumRelevant, *, k: int) -> PerQuery:
    """P@k, whose mean over queries is MP@k: of the first k ranks, the share that is relevant.

    A query with fewer than k relevant entries cannot reach 1 (Manning, Raghavan and Schütze, *Introduction to
    Information Retrieval*, 2008, section 8.4). Arguments and errors as in
    :func:`modified_mean_precision_at_k`.

    >>> precision_at_k(np.array([[True, False, True, False]]), np.array([2]), k=4)
    array([0.5])
    """
    first = _first_ranks(relevance, num_relevant, k)
    return np.where(num_relevant > 0, first.sum(axis=1) / k, np.nan)


def reciprocal_rank_at_k(relevance: Relevance, num_relevant: NumRelevant, *, k: int) -> PerQuery:
    """RR@k, whose mean over queries is MRR@k: 1 over the rank of the first hit, 0 without one in k ranks.

    Voorhees, *The TREC-8 Question Answering Track Report*, 1999. Arguments and errors as in
    :func:`modified_mean_precision_at_k`.

    >>> reciprocal_rank_at_k(np.array([[False, True, True], [False, False, False]]), np.array([2, 1]), k=3)
    array([0.5, 0. ])
    """
    first = _first_ranks(relevance, num_relevant, k)
    best = np.where(first.any(axis=1), 1 / (first.argmax(axis=1) + 1), 0.0)
    return np.where(num_relevant > 0, best, np.nan)


def average_precision(
    ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant, *, k: int | NumRelevant | None = None
) -> PerQuery:
    """AP, or AP@k: the precisions at the ranks of a query's relevant entries up to k, over ``min(k, n_q)``.

    ``AP@k = sum over i with rank_i ≤ k of i / rank_i / min(k, n_q)``, where ``rank_i`` is the rank of the
    i-th relevant entry (Manning, Raghavan and Schütze, 2008, section 8.4). It is divided by the most hits
    that k ranks can hold, so a perfect ranking reaches 1 (ILIAS, CVPR 2025, with k = 1000). With ``k = n_q``
    the mean is MAP@R (Musgrave, Belongie and Lim, *A Metric Learning Reality Check*, ECCV 2020).

    Args:
        ranks: rank of every relevant entry, counted from 1, one query after another, ascending in each.
        num_relevant: how many of the ranks belong to each query.
        k: ranks looked at, of all queries or of each; None for the whole ranking.

    Returns:
        One value in [0, 1] a query, NaN where ``num_relevant`` is 0.

    Raises:
        InputError: the ranks are not as many as ``num_relevant`` says, or do not ascend from 1.

    >>> average_precision(np.array([1, 3, 2]), np.array([2, 0, 1]))
    array([0.83333333,        nan, 0.5       ])
    >>> average_precision(np.array([1, 3, 2]), np.array([2, 0, 1]), k=2)
    array([0.5, nan, 0.5])
    """
    query, position = _owners(ranks, num_relevant)
    deepest = np.broadcast_to(np.iinfo(np.int64).max if k is None else k, len(num_relevant))
    gains = np.where(ranks <= deepest[query], position / ranks, 0.0)
    sums = np.bincount(query, weights=gains, minlength=len(num_relevant))
    return _share(sums, np.minimum(num_relevant, deepest))


def trapezoid_precision(ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant) -> PerQuery:
    """AP as the Oxford and Paris benchmarks take it: the area below precision over recall, by trapezoids.

    Of the relevant entry at rank ``r``, the i-th of n, the trapezoid is ``((i - 1) / (r - 1) + i / r) / 2n``;
    the first quotient is 1 at rank 1. Philbin et al., *Object Retrieval with Large Vocabularies and Fast
    Spatial Matching*, CVPR 2007; kept by Radenović et al., *Revisiting Oxford and Paris*, CVPR 2018. Other
    arguments and errors as in :func:`average_precision`, whose values are higher unless the ranking is
    perfect.

    >>> trapezoid_precision(np.array([1, 3, 2]), np.array([2, 0, 1]))
    array([0.79166667,        nan, 0.25      ])
    """
    query, position = _owners(ranks, num_relevant)
    before = np.where(ranks > 1, (position - 1) / np.maximum(ranks - 1, 1), 1.0)
    sums = np.bincount(query, weights=(before + position / ranks) / 2, minlength=len(num_relevant))
    return _share(sums, num_relevant)


def r_precision(ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant) -> PerQuery:
    """R-precision: of the first ``R = n_q`` ranks, the share that is relevant.

    Manning, Raghavan and Schütze, 2008, section 8.4. Arguments and errors as in :func:`average_precision`.

    >>> r_precision(np.array([1, 3, 2]), np.array([2, 0, 1]))
    array([0.5, nan, 0. ])
    """
    query, _ = _owners(ranks, num_relevant)
    hits = np.bincount(query[ranks <= num_relevant[query]], minlength=len(num_relevant))
    return _share(hits, num_relevant)


def relevance_from_ranks(ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant, *, k: int) -> Relevance:
    """Ranked relevance of the first k ranks; arguments as in :func:`average_precision`.

    >>> relevance_from_ranks(np.array([1, 3, 2]), np.array([2, 0, 1]), k=2)
    array([[ True, False],
           [False, False],
           [False,  True]])
    """
    query, _ = _owners(ranks, num_relevant)
    relevance = np.zeros((len(num_relevant), k), dtype=bool)
    near = ranks <= k
    relevance[query[near], ranks[near] - 1] = True
    return relevance


def _share(part: np.ndarray, whole: np.ndarray) -> PerQuery:
    """``part / whole``, NaN where ``whole`` is 0."""
    quotient: PerQuery = np.full(len(whole), np.nan)
    np.divide(part, whole, out=quotient, where=whole > 0)
    return quotient


def _first_ranks(relevance: Relevance, num_relevant: NumRelevant, k: int) -> Bool[np.ndarray, "q first"]:
    """The first k columns, checked."""
    columns = relevance.shape[1]
    if not 1 <= k <= columns:
        raise InputError(
            f"k={k} with {columns} ranked columns",
            expected=f"k from 1 to {columns}",
            next_step="retrieve at least k neighbours; exact_topk pads a small gallery to k columns",
        )
    impossible = np.flatnonzero(relevance.sum(axis=1) > num_relevant)
    if len(impossible):
        row = int(impossible[0])
        raise InputError(
            f"query {row} has {int(relevance[row].sum())} hits but num_relevant={int(num_relevant[row])}",
            expected="no more hits than relevant entries in the gallery",
            next_step="count the relevant entries over the whole gallery, without the query itself",
        )
    return relevance[:, :k]


def _owners(
    ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """For every rank the query it belongs to and its position among that query's ranks, counted from 1."""
    query = np.repeat(np.arange(len(num_relevant)), num_relevant)
    starts = np.cumsum(num_relevant) - num_relevant
    position = np.arange(len(query)) - np.repeat(starts, num_relevant) + 1
    ascending = (
        (np.diff(ranks) > 0) | (np.diff(query) != 0) if len(query) == len(ranks) else np.array([False])
    )
    if not ascending.all() or np.any(ranks < 1):
        raise InputError(
            f"{len(ranks)} ranks that are not {num_relevant.sum()} numbers from 1, ascending in each query",
            expected="the ranks of each query's relevant entries",
            next_step="pass the result of RankCounter.ranks unchanged",
        )
    return query, position


# ---- by name

_SHAPE: Final = re.compile(r"(mmp|r|p|mrr|map)@([1-9][0-9]{0,5})")
_OF_RANKS: Final = {"map-trapezoid": trapezoid_precision, "r-precision": r_precision}


def require_metric(metric: str) -> None:
    """Refuse a name that is no metric.

    Raises:
        InputError: it is none.
    """
    if metric not in ("map", "map@r", *_OF_RANKS) and not _SHAPE.fullmatch(metric):
        raise InputError(
            f"metric {metric!r}",
            expected="mmp@K, r@K, p@K, mrr@K or map@K with a number of ranks K, map, map@r, map-trapezoid or "
            "r-precision",
            next_step="for instance --metrics mmp@5 r@1 map@100",
        )


def measure(
    metrics: Iterable[Metric], ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant
) -> dict[Metric, PerQuery]:
    """Metrics whose names :func:`require_metric` lets pass, a value per query; NaN where nothing is relevant.

    >>> measure(["r@2"], np.array([2, 5]), np.array([2]))
    {'r@2': array([1.])}
    """
    of_nearest = {"mmp": modified_mean_precision_at_k, "r": recall_at_k, "p": precision_at_k,
                  "mrr": reciprocal_rank_at_k}  # fmt: skip
    found: dict[Metric, PerQuery] = {}
    for metric in metrics:
        name, _, depth = metric.partition("@")
        if metric in _OF_RANKS:
            found[metric] = _OF_RANKS[metric](ranks, num_relevant)
        elif name == "map":
            k = num_relevant if depth == "r" else int(depth) if depth else None
            found[metric] = average_precision(ranks, num_relevant, k=k)
        else:
            nearest = relevance_from_ranks(ranks, num_relevant, k=int(depth))
            found[metric] = of_nearest[name](nearest, num_relevant, k=int(depth))
    return found


def title_of(metric: Metric) -> str:
    """How a metric is written.

    >>> [title_of(metric) for metric in ("mmp@5", "r@1", "map@1000", "map@r", "r-precision")]
    ['mMP@5', 'R@1', 'mAP@1000', 'MAP@R', 'R-precision']
    """
    whole = {"map@r": "MAP@R", "r-precision": "R-precision", "map-trapezoid": "mAP (trapezoids)"}
    name, sign, depth = metric.partition("@")
    parts = {"mmp": "mMP", "r": "R", "p": "MP", "mrr": "MRR", "map": "mAP"}
    return whole[metric] if metric in whole else parts[name] + sign + depth
