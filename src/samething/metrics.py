"""Pure functions from ranks to numbers, one value per query, and how sure their means are.

Every metric takes what was retrieved as *ranked relevance* (``relevance[i, j]``: is the entry that query
``i`` found at rank ``j + 1`` the same thing?) or as the ranks of the relevant entries, and ``num_relevant``:
how many relevant entries the gallery holds for each query, the query's own image left out. Values are in
[0, 1]. A query without a relevant entry cannot be answered right or wrong: its value is NaN, and means and
intervals leave it out.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int

from samething.arrays import NumRelevant, PerQuery, Relevance
from samething.errors import InputError

# Draws held at a time while resampling: 2^21 row numbers and as many values, 32 MiB (or one resample).
_DRAWS_AT_A_TIME: Final = 2**21


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


def average_precision_at_k(relevance: Relevance, num_relevant: NumRelevant, *, k: int) -> PerQuery:
    """AP@k, whose mean over queries is mAP@k: precisions at the relevant ranks up to k, over ``min(k, n_q)``.

    ``AP@k = sum over j ≤ k of relevance[j] · P@j / min(k, n_q)``. It is divided by the most hits
    that k ranks can hold, so a perfect ranking reaches 1 (ILIAS, CVPR 2025, with k = 1000). Arguments and
    errors as in :func:`modified_mean_precision_at_k`.

    >>> average_precision_at_k(np.array([[True, False, True]]), np.array([2]), k=3)
    array([0.83333333])
    """
    first = _first_ranks(relevance, num_relevant, k)
    precisions = np.cumsum(first, axis=1) / np.arange(1, k + 1)
    return _share((precisions * first).sum(axis=1), np.minimum(num_relevant, k))


def average_precision(ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant) -> PerQuery:
    """AP over the whole ranking: the mean, over a query's relevant entries, of the precision at their ranks.

    ``AP = sum over i of i / rank_i / n_q``, where ``rank_i`` is the rank of the i-th relevant entry (Manning,
    Raghavan and Schütze, 2008, section 8.4).

    Args:
        ranks: rank of every relevant entry, counted from 1, one query after another, ascending in each.
        num_relevant: how many of the ranks belong to each query.

    Returns:
        One value in (0, 1] a query, NaN where ``num_relevant`` is 0.

    Raises:
        InputError: the ranks are not as many as ``num_relevant`` says, or do not ascend from 1.

    >>> average_precision(np.array([1, 3, 2]), np.array([2, 0, 1]))
    array([0.83333333,        nan, 0.5       ])
    """
    query, position = _owners(ranks, num_relevant)
    sums = np.bincount(query, weights=position / ranks, minlength=len(num_relevant))
    return _share(sums, num_relevant)


def truncated_average_precision(
    ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant, *, k: int
) -> PerQuery:
    """AP@k from ranks: what :func:`average_precision_at_k` gives, without a matrix of k columns.

    ``AP@k = sum over i with rank_i ≤ k of i / rank_i / min(k, n_q)``. Arguments and errors as in
    :func:`average_precision`.

    >>> truncated_average_precision(np.array([1, 3, 2]), np.array([2, 0, 1]), k=2)
    array([0.5, nan, 0.5])
    """
    query, position = _owners(ranks, num_relevant)
    gains = np.where(ranks <= k, position / ranks, 0.0)
    return _share(np.bincount(query, weights=gains, minlength=len(num_relevant)), np.minimum(num_relevant, k))


def average_precision_at_r(ranks: Int[np.ndarray, " p"], num_relevant: NumRelevant) -> PerQuery:
    """MAP@R: AP over the first ``R = n_q`` ranks, divided by R.

    ``MAP@R = sum over i with rank_i ≤ R of i / rank_i / R`` (Musgrave, Belongie and Lim, *A Metric Learning
    Reality Check*, ECCV 2020). Arguments and errors as in :func:`average_precision`.

    >>> average_precision_at_r(np.array([1, 3, 2]), np.array([2, 0, 1]))
    array([0.5, nan, 0. ])
    """
    query, position = _owners(ranks, num_relevant)
    gains = np.where(ranks <= num_relevant[query], position / ranks, 0.0)
    return _share(np.bincount(query, weights=gains, minlength=len(num_relevant)), num_relevant)


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


def domain_mean(values: PerQuery, domains: Int[np.ndarray, " q"]) -> float:
    """Plain mean over domains of the mean over each domain's queries.

    Every domain weighs the same however many queries it has (as in UnED, ICCV 2023). NaN values are left
    out, and so is a domain that has no other; NaN if nothing is left.

    >>> domain_mean(np.array([1.0, 0.0, np.nan, 1.0]), np.array([0, 0, 0, 1]))
    0.75
    """
    groups = _known_groups(values, domains)
    return float(np.mean([group.mean() for group in groups])) if groups else float("nan")


def bootstrap_interval(
    values: PerQuery, *, num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over queries; NaN values are left out.

    Queries are drawn with replacement as often as there are queries, and the interval holds the central
    ``level`` of the resampled means (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993). It
    answers how much the number would move with other queries of the same kind, not with another training
    seed.

    Args:
        values: one value per query.
        num_resamples: means drawn, at least 1.
        seed: the result is a pure function of values and seed.
        level: share of the resampled means inside, in (0, 1).

    Returns:
        Lower and upper end; both NaN when no value is known.

    Raises:
        InputError: ``num_resamples`` or ``level`` is out of its range.

    >>> bootstrap_interval(np.array([0.5, 0.5, np.nan]))
    (0.5, 0.5)
    """
    one_domain = np.zeros(len(values), dtype=np.int64)
    return domain_mean_interval(values, one_domain, num_resamples=num_resamples, seed=seed, level=level)


def domain_mean_interval(
    values: PerQuery,
    domains: Int[np.ndarray, " q"],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of :func:`domain_mean`: queries are drawn inside each domain.

    The set of domains is taken as given, so the interval says nothing of other domains. Arguments and errors
    as in :func:`bootstrap_interval`, which is the case of one domain.
    """
    means = _resampled_domain_means(values, domains, num_resamples=num_resamples, seed=seed)
    return _central(means, level)


def weighted_mean_interval(
    values: PerQuery,
    domains: Int[np.ndarray, " q"],
    weights: Float[np.ndarray, " m"],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean over domains with a weight each, and its percentile bootstrap interval.

    Args:
        values: one value per query, NaN for none.
        domains: domain of each query, a position in ``weights``.
        weights: not negative. They are divided by the sum of those whose domain has a value.
        num_resamples: means drawn, at least 1.
        seed: the result is a pure function of the arguments.
        level: share of the resampled means inside, in (0, 1).

    Returns:
        The mean, and the lower and upper end; NaN when no domain has both a value and a weight.

    >>> weighted_mean_interval(np.array([1.0, 0.0, 0.0]), np.array([0, 1, 1]), np.array([3.0, 1.0]))
    (0.75, 0.75, 0.75)
    """
    if num_resamples < 1:
        raise InputError(
            f"num_resamples={num_resamples}", expected="at least 1", next_step="leave it at 2000"
        )
    known = ~np.isnan(values)
    weighty = [number for number in np.unique(domains[known]) if weights[number] > 0]
    total = float(sum(weights[number] for number in weighty))
    if not weighty:
        return float("nan"), float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    mean, means = 0.0, np.zeros(num_resamples)
    for number in weighty:
        group = values[known & (domains == number)]
        share = float(weights[number]) / total
        mean += share * float(group.mean())
        means += share * _resampled_means(group, num_resamples, generator)
    low, high = _central(means, level)
    return mean, low, high


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How much the first of two systems is ahead of the second on the same queries."""

    difference: float
    """Mean of the first minus mean of the second."""
    low: float
    """Lower end of the bootstrap interval of the difference."""
    high: float
    """Upper end."""
    num_queries: int
    """Queries compared: those with a relevant entry."""
    p_value: float = float("nan")
    """Two-sided: how often a difference at least as large comes about when each query's two values are
    swapped at random."""


def paired_difference(
    first: PerQuery,
    second: PerQuery,
    domains: Int[np.ndarray, " q"],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Paired bootstrap and randomisation test of the plain mean over domains of ``first - second``.

    Each resample draws the same queries for both, so what makes a query hard for both cancels (Koehn,
    *Statistical Significance Tests for Machine Translation Evaluation*, EMNLP 2004). For the mean
    over all queries give one domain throughout. The p-value is that of Fisher's randomisation test (Smucker,
    Allan and Carterette, *A Comparison of Statistical Significance Tests for Information Retrieval
    Evaluation*, CIKM 2007) with ``num_resamples`` random assignments, the observed one counted among them.

    Args:
        first: one value per query.
        second: the other system's value of the same queries.
        domains: domain of each query, as integers.
        num_resamples: means drawn, at least 1.
        seed: the result is a pure function of the values and the seed.
        level: share of the resampled differences inside the interval, in (0, 1).

    Raises:
        InputError: one of the two has a value where the other has NaN: they are not of the same queries.

    >>> same = np.array([1.0, 0.0, np.nan])
    >>> paired_difference(same, same, np.array([0, 0, 0]))
    PairedDifference(difference=0.0, low=0.0, high=0.0, num_queries=2, p_value=1.0)
    """
    if not np.array_equal(np.isnan(first), np.isnan(second)):
        raise InputError(
            "two sets of values that are known for different queries",
            expected="values of the same queries against the same gallery",
            next_step="evaluate both on one catalog",
        )
    values = first - second
    means = _resampled_domain_means(values, domains, num_resamples=num_resamples, seed=seed)
    low, high = _central(means, level)
    return PairedDifference(
        difference=domain_mean(values, domains),
        low=low,
        high=high,
        num_queries=int(np.count_nonzero(~np.isnan(values))),
        p_value=_randomisation_p_value(values, domains, num_resamples=num_resamples, seed=seed),
    )


def _randomisation_p_value(
    values: PerQuery, domains: Int[np.ndarray, " q"], *, num_resamples: int, seed: int
) -> float:
    """Two-sided p-value of the mean over domains of paired differences under random signs."""
    groups = _known_groups(values, domains)
    if not groups:
        return float("nan")
    observed = abs(sum(float(group.mean()) for group in groups))
    generator = np.random.default_rng([seed, 1])
    totals = np.zeros(num_resamples)
    for group in groups:
        differing = group[group != 0]
        step = max(1, _DRAWS_AT_A_TIME // max(1, len(differing)))
        for start in range(0, num_resamples, step):
            stop = min(start + step, num_resamples)
            signs = 2.0 * generator.integers(2, size=(stop - start, len(differing))) - 1
            totals[start:stop] += signs @ differing / len(group)
    # sums in another order differ in the last digits
    as_large = int(np.count_nonzero(np.abs(totals) >= observed - 1e-12))
    return (as_large + 1) / (num_resamples + 1)


def _resampled_domain_means(
    values: PerQuery, domains: Int[np.ndarray, " q"], *, num_resamples: int, seed: int
) -> Float[np.ndarray, " r"]:
    """Resampled plain means over domains; all NaN when no value is known."""
    if num_resamples < 1:
        raise InputError(
            f"num_resamples={num_resamples}", expected="at least 1", next_step="leave it at 2000"
        )
    groups = _known_groups(values, domains)
    if not groups:
        return np.full(num_resamples, np.nan)
    generator = np.random.default_rng(seed)
    total = np.zeros(num_resamples)
    for group in groups:
        total += _resampled_means(group, num_resamples, generator)
    return total / len(groups)


def _resampled_means(
    values: PerQuery, num_resamples: int, generator: np.random.Generator
) -> Float[np.ndarray, " r"]:
    means = np.empty(num_resamples)
    step = max(1, _DRAWS_AT_A_TIME // len(values))
    for start in range(0, num_resamples, step):
        stop = min(start + step, num_resamples)
        drawn = generator.integers(len(values), size=(stop - start, len(values)))
        means[start:stop] = values[drawn].mean(axis=1)
    return means


def _known_groups(values: PerQuery, domains: Int[np.ndarray, " q"]) -> list[np.ndarray]:
    """The known values of each domain, by ascending domain number; domains without any are left out."""
    known = ~np.isnan(values)
    return [values[known & (domains == domain)] for domain in np.unique(domains[known])]


def _central(means: Float[np.ndarray, " r"], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise InputError(f"level={level}", expected="a share in (0, 1)", next_step="leave it at 0.95")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
            next_step="pass the result of positive_ranks unchanged",
        )
    return query, position
