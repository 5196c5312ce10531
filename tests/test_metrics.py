"""Metrics against loops over lists, and bootstrap intervals against their theory."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samething import metrics
from samething.errors import InputError


@st.composite
def rankings(draw):
    """A few queries: which ranks of a gallery are relevant (all ranks, so the count is known), and k."""
    num_entries = draw(st.integers(1, 9))
    rows = draw(
        st.lists(st.lists(st.booleans(), min_size=num_entries, max_size=num_entries), min_size=1, max_size=6)
    )
    return rows, draw(st.integers(1, num_entries))


def modified_precision(row, k):
    depth = min(sum(row), k)
    return sum(row[:depth]) / depth if depth else math.nan


def recall(row, k):
    return float(True in row[:k]) if any(row) else math.nan


def precision(row, k):
    return sum(row[:k]) / k if any(row) else math.nan


def average_precision(row, k):
    if not any(row):
        return math.nan
    total, hits = 0.0, 0
    for rank, hit in enumerate(row[:k], start=1):
        if hit:
            hits += 1
            total += hits / rank
    return total / min(k, sum(row))


@given(rankings())
def test_metrics_at_k_equal_their_definitions(case):
    rows, k = case
    relevance, num_relevant = np.array(rows), np.array([sum(row) for row in rows])
    for ours, definition in (
        (metrics.modified_mean_precision_at_k, modified_precision),
        (metrics.recall_at_k, recall),
        (metrics.precision_at_k, precision),
        (metrics.average_precision_at_k, average_precision),
    ):
        expected = [definition(row, k) for row in rows]
        np.testing.assert_allclose(ours(relevance, num_relevant, k=k), expected, rtol=0, atol=1e-12)
        # the columns behind k must not matter
        short = relevance[:, :k]
        np.testing.assert_array_equal(
            ours(short, num_relevant, k=k), ours(relevance, num_relevant, k=k), strict=True
        )


@given(rankings())
def test_average_precision_from_ranks_equals_its_definition(case):
    rows, k = case
    ranks = np.array([rank for row in rows for rank, hit in enumerate(row, start=1) if hit], dtype=np.int64)
    num_relevant = np.array([sum(row) for row in rows])
    expected = [average_precision(row, len(row)) for row in rows]
    np.testing.assert_allclose(
        metrics.average_precision(ranks, num_relevant), expected, rtol=0, atol=1e-12
    )
    np.testing.assert_array_equal(
        metrics.relevance_from_ranks(ranks, num_relevant, k=k), np.array(rows)[:, :k]
    )


def test_hits_behind_the_number_of_relevant_entries_do_not_count():
    # two relevant entries at ranks 2 and 5: the first min(2, 5) ranks hold one of them
    relevance = np.array([[False, True, False, False, True]])
    assert metrics.modified_mean_precision_at_k(relevance, np.array([2]), k=5) == [0.5]


def test_relevance_from_ranks_pads_a_short_gallery():
    relevance = metrics.relevance_from_ranks(np.array([1]), np.array([1]), k=5)
    assert relevance.tolist() == [[True, False, False, False, False]]


@pytest.mark.parametrize("k", [0, 3])
def test_k_outside_the_columns_is_refused(k):
    with pytest.raises(InputError, match=f"k={k} with 2 ranked columns"):
        metrics.recall_at_k(np.ones((1, 2), dtype=bool), np.array([2]), k=k)


def test_more_hits_than_relevant_entries_are_refused():
    with pytest.raises(InputError, match="query 1 has 2 hits but num_relevant=1"):
        metrics.precision_at_k(np.array([[True, False], [True, True]]), np.array([1, 1]), k=1)


@pytest.mark.parametrize(
    ("ranks", "num_relevant"),
    [([1, 2], [1]), ([0, 1], [2]), ([2, 1], [2]), ([3, 3], [2]), ([1, 0], [1, 1])],
)
def test_impossible_ranks_are_refused(ranks, num_relevant):
    with pytest.raises(InputError, match="ranks"):
        metrics.average_precision(np.array(ranks), np.array(num_relevant))


def test_domain_mean_weighs_domains_alike_and_leaves_unknown_ones_out():
    values = np.array([1.0, 0.0, 0.0, 0.0, 1.0, np.nan, np.nan])
    domains = np.array([0, 0, 0, 0, 2, 2, 1])
    assert metrics.domain_mean(values, domains) == (0.25 + 1.0) / 2
    assert math.isnan(metrics.domain_mean(np.array([np.nan]), np.array([0])))


def bootstrap_by_loops(values, domains, num_resamples, seed, level):
    """The definition, resample by resample, from the same random numbers."""
    generator = np.random.default_rng(seed)
    means = [0.0] * num_resamples
    groups = [
        [value for value, other in zip(values, domains, strict=True) if other == domain and value == value]
        for domain in sorted(set(domains))
    ]
    groups = [group for group in groups if group]
    for group in groups:
        for resample in range(num_resamples):
            drawn = [group[generator.integers(len(group))] for _ in group]
            means[resample] += math.fsum(drawn) / len(group) / len(groups)
    means.sort()

    def percentile(share):
        place = share * (num_resamples - 1)
        below = math.floor(place)
        above = min(below + 1, num_resamples - 1)
        return means[below] + (place - below) * (means[above] - means[below])

    return percentile((1 - level) / 2), percentile((1 + level) / 2)


@given(
    st.lists(
        st.tuples(st.floats(0, 1) | st.just(math.nan), st.integers(0, 2)), min_size=1, max_size=12
    ).filter(lambda pairs: any(value == value for value, _ in pairs)),
    st.integers(0, 5),
    st.sampled_from([0.5, 0.9, 0.95]),
)
def test_intervals_equal_resampling_by_hand(pairs, seed, level):
    values, domains = np.array([value for value, _ in pairs]), np.array([domain for _, domain in pairs])
    options = {"num_resamples": 30, "seed": seed, "level": level}
    expected = bootstrap_by_loops(values.tolist(), domains.tolist(), 30, seed, level)
    interval = metrics.domain_mean_interval(values, domains, **options)
    np.testing.assert_allclose(interval, expected, rtol=0, atol=1e-12)
    alone = metrics.bootstrap_interval(values, **options)
    expected = bootstrap_by_loops(values.tolist(), [0] * len(values), 30, seed, level)
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-12)


def test_interval_is_as_wide_as_the_central_limit_says():
    values = np.random.default_rng(0).random(2000)
    low, high = metrics.bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        low, high = metrics.bootstrap_interval(
            (generator.random(80) < 0.3).astype(float), num_resamples=400, seed=seed
        )
        covered += low <= 0.3 <= high
    assert 0.90 < covered / 300 < 0.98


def test_resampling_in_steps_changes_nothing(monkeypatch):
    values = np.random.default_rng(2).random(50)
    whole = metrics.bootstrap_interval(values)
    monkeypatch.setattr(metrics, "_DRAWS_AT_A_TIME", 120)
    assert metrics.bootstrap_interval(values) == whole


def test_interval_of_nothing_is_unknown():
    low, high = metrics.bootstrap_interval(np.array([np.nan, np.nan]))
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize("wrong", [{"num_resamples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_bootstrap_options_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        metrics.bootstrap_interval(np.ones(3), **wrong)


def test_paired_difference_sees_what_unpaired_intervals_cannot():
    generator = np.random.default_rng(3)
    hardness = generator.random(400)
    second = np.append(hardness, np.nan)
    first = np.append(hardness + 0.02 + 0.01 * generator.normal(size=400), np.nan)
    domains = np.zeros(401, dtype=int)
    ahead = metrics.paired_difference(first, second, domains)
    assert ahead.num_queries == 400
    assert ahead.difference == pytest.approx(0.02, abs=0.002)
    assert 0.015 < ahead.low < ahead.difference < ahead.high < 0.025
    assert ahead.p_value == pytest.approx(2 / 2001)
    assert metrics.bootstrap_interval(first)[0] < metrics.bootstrap_interval(second)[1]
    behind = metrics.paired_difference(second, first, domains)
    assert (behind.low, behind.high) == pytest.approx((-ahead.high, -ahead.low))
    assert behind.p_value == ahead.p_value


def test_paired_difference_of_equals_is_no_difference():
    generator = np.random.default_rng(4)
    # the p-value of two systems that do not differ is uniform: about one in ten is below 0.1
    small = 0
    for seed in range(300):
        first, second = generator.random(60), generator.random(60)
        domains = np.repeat([0, 1], 30)
        small += metrics.paired_difference(first, second, domains, num_resamples=300, seed=seed).p_value < 0.1
    assert 0.05 < small / 300 < 0.17


def test_paired_difference_needs_the_same_queries():
    with pytest.raises(InputError, match="different queries"):
        metrics.paired_difference(np.array([1.0, np.nan]), np.array([1.0, 0.0]), np.array([0, 0]))
