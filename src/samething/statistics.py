"""Means over queries and domains, how sure they are, and whether two systems differ.

Values are one number per query, NaN for a query that cannot be answered; means and intervals leave those out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final, NamedTuple

import numpy as np

from samething.arrays import Bool, Float, Int, PerQuery
from samething.errors import InputError
from samething.files import Json

_DRAWS_AT_A_TIME: Final = 2**21
"""Draws held while resampling: as many row numbers and values, 32 MiB (or one resample)."""


class Estimate(NamedTuple):
    """A mean with its interval; NaN where no value is known."""

    value: float
    low: float
    high: float


def percent(value: float, low: float | None = None, high: float = math.nan, *, sign: bool = False) -> str:
    """A share in per cent, with the ends of its interval in brackets; with ``sign``, a difference of shares.

    >>> percent(0.5, 0.41, 0.6), percent(0.012, sign=True), percent(math.nan)
    ('50.0 (41.0–60.0)', '+1.2', '–')
    >>> percent(0.012, -0.001, 0.02, sign=True)
    '+1.2 (-0.1 to +2.0)'
    """
    if math.isnan(value):
        return "–"
    form, to = ("{:+.1f}", " to ") if sign else ("{:.1f}", "–")
    text = form.format(100 * value)
    return text if low is None else f"{text} ({form.format(100 * low)}{to}{form.format(100 * high)})"


def domain_mean(
    values: PerQuery, domains: Int[np.ndarray, " q"], weights: Float[np.ndarray, " m"] | None = None
) -> float:
    """Mean over domains of the mean over each domain's queries.

    Every domain weighs the same however many queries it has (as in UnED, ICCV 2023), or as much as it is
    given. NaN values are left out, and so is a domain that has no other; NaN if nothing is left.

    Args:
        values: one value per query, NaN for none.
        domains: domain of each query, as integers.
        weights: not negative, by domain. They are divided by the sum of those whose domain has a value.

    >>> domain_mean(np.array([1.0, 0.0, np.nan, 1.0]), np.array([0, 0, 0, 1]))
    0.75
    """
    groups = _known_groups(values, domains)
    shares = np.array([1.0 if weights is None else weights[domain] for domain in groups])
    means = np.array([group.mean() for group in groups.values()])
    return float(np.sum(shares * means) / np.sum(shares)) if shares.any() else math.nan


def bootstrap_interval(
    values: PerQuery,
    domains: Int[np.ndarray, " q"] | None = None,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over queries, or of :func:`domain_mean`; NaN is left out.

    Queries are drawn with replacement, inside each domain, as often as there are queries, and the interval
    holds the central ``level`` of the resampled means (Efron and Tibshirani, *An Introduction to the
    Bootstrap*, 1993). It answers how much the number would move with other queries of the same kind, not with
    another training seed. The set of domains is taken as given, so it says nothing of other domains.

    Args:
        values: one value per query.
        domains: domain of each query, as integers; by default all are of one.
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
    groups = np.zeros(len(values), dtype=np.int64) if domains is None else domains
    means = _resampled_means(values[None], groups, None, num_resamples, seed)
    return _central(means[0], level)


def mean_estimates(
    values: Float[np.ndarray, "m q"],
    domains: Int[np.ndarray, " q"],
    weights: Float[np.ndarray, " w"] | None = None,
    *,
    num_resamples: int = 2000,
) -> list[Estimate]:
    """Several metrics of the same queries: each one's :func:`domain_mean` and :func:`bootstrap_interval`.

    The queries are drawn once for all metrics.

    Args:
        values: a row per metric.
        domains: domain of each query, as integers.
        weights: of the domains, as in :func:`domain_mean`.
        num_resamples: means drawn, at least 1.

    >>> mean_estimates(np.array([[1.0, 0.0, 0.0]]), np.array([0, 1, 1]), np.array([3.0, 1.0]))
    [Estimate(value=0.75, low=0.75, high=0.75)]
    """
    means = _resampled_means(values, domains, weights, num_resamples, seed=0)
    return [
        Estimate(domain_mean(row, domains, weights), *_central(drawn, 0.95))
        for row, drawn in zip(values, means, strict=True)
    ]


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

    @property
    def estimate(self) -> Estimate:
        """The difference with its interval."""
        return Estimate(self.difference, self.low, self.high)

    @property
    def is_sure(self) -> bool:
        """Whether the interval does not hold 0."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> Json:
        """Plain values; null without a query."""
        if not self.num_queries:
            return None
        return {
            "difference": self.difference,
            "interval": [self.low, self.high],
            "p_value": self.p_value,
            "num_queries": self.num_queries,
        }


def paired_difference(
    first: PerQuery,
    second: PerQuery,
    domains: Int[np.ndarray, " q"],
    *,
    num_resamples: int = 2000,
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
    (found,) = mean_estimates(values[None], domains, num_resamples=num_resamples)
    groups = list(_known_groups(values, domains).values())
    observed = abs(sum(float(group.mean()) for group in groups))
    generator = np.random.default_rng([0, 1])
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
    return PairedDifference(
        difference=found.value,
        low=found.low,
        high=found.high,
        num_queries=int(np.count_nonzero(~np.isnan(values))),
        p_value=(as_large + 1) / (num_resamples + 1) if groups else float("nan"),
    )


def _resampled_means(
    values: Float[np.ndarray, "m q"],
    domains: Int[np.ndarray, " q"],
    weights: Float[np.ndarray, " w"] | None,
    num_resamples: int,
    seed: int,
) -> Float[np.ndarray, "m r"]:
    """Resampled means over domains of each metric; NaN where no value is known."""
    if num_resamples < 1:
        raise InputError(
            f"num_resamples={num_resamples}", expected="at least 1", next_step="leave it at 2000"
        )
    known = ~np.isnan(values)
    if (known != known[:1]).any():  # of other queries, so they cannot share draws
        rows = [_resampled_means(row[None], domains, weights, num_resamples, seed) for row in values]
        return np.concatenate(rows)
    generator = np.random.default_rng(seed)
    totals, whole = np.zeros((len(values), num_resamples)), 0.0
    for domain in np.unique(domains[known[0]]):
        weight = 1.0 if weights is None else float(weights[domain])
        if not weight:
            continue
        group = values[:, known[0] & (domains == domain)]
        step = max(1, _DRAWS_AT_A_TIME // group.shape[1])
        for start in range(0, num_resamples, step):
            stop = min(start + step, num_resamples)
            drawn = generator.integers(group.shape[1], size=(stop - start, group.shape[1]))
            for row, own in zip(totals, group, strict=True):
                row[start:stop] += weight * own[drawn].mean(axis=1)
        whole += weight
    return totals / whole if whole else np.full((len(values), 1), np.nan)


def _known_groups(values: PerQuery, domains: Int[np.ndarray, " q"]) -> dict[int, np.ndarray]:
    """The known values of each domain, by ascending domain number; domains without any are left out."""
    known = ~np.isnan(values)
    return {domain: values[known & (domains == domain)] for domain in np.unique(domains[known]).tolist()}


def _central(means: Float[np.ndarray, " r"], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise InputError(f"level={level}", expected="a share in (0, 1)", next_step="leave it at 0.95")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def logistic_weights(
    inputs: Float[np.ndarray, "p f"], is_right: Bool[np.ndarray, " p"]
) -> Float[np.ndarray, " f"]:
    """Weights of a logistic regression, by Newton's method, with Platt's smoothed targets.

    J. Platt, *Probabilistic Outputs for Support Vector Machines* (1999): targets (n+ + 1)/(n+ + 2) and
    1/(n- + 2) keep the weights finite where the inputs separate right from wrong.

    Args:
        inputs: a row for each pair, of about the same scale; a column of ones for the intercept.
        is_right: what is to be foretold.
    """
    num_right = int(is_right.sum())
    targets = np.where(is_right, (num_right + 1) / (num_right + 2), 1 / (len(inputs) - num_right + 2))
    weights: Float[np.ndarray, " f"] = np.zeros(inputs.shape[1])

    def loss(candidate: np.ndarray) -> float:
        odds = inputs @ candidate
        return float(np.sum(np.logaddexp(0, odds) - targets * odds))

    for _ in range(100):
        chances = 1 / (1 + np.exp(-np.clip(inputs @ weights, -700, 700)))
        gradient = inputs.T @ (chances - targets)
        curvature = (inputs * (chances * (1 - chances))[:, None]).T @ inputs + 1e-9 * np.eye(len(weights))
        step, before = np.linalg.solve(curvature, gradient), loss(weights)
        while loss(weights - step) > before and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return weights
