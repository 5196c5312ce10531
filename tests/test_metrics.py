"""Metrics against plain Python, and intervals against their definition."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samething.errors import InputError
from samething.metrics import (
    average_precision,
    measure,
    modified_mean_precision_at_k,
    precision_at_k,
    recall_at_k,
    relevance_from_ranks,
)
from samething.statistics import (
    bootstrap_interval,
    domain_mean,
    mean_estimates,
    paired_difference,
)


@st.composite
def rankings(draw):
    """Whole rankings of one length as lists of booleans, and a k."""
    length = draw(st.integers(1, 12))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return draw(st.lists(row, min_size=1, max_size=5)), draw(st.integers(1, length))


def brute_force(ranking, k):
    """The five metrics of one query by counting, in the order of the test below."""
    positives = sum(ranking)
    if positives == 0:
        return [math.nan] * 5
    depth = min(positives, k)
    precisions = [
        sum(ranking[:rank]) / rank for rank, hit in enumerate(ranking, start=1) if hit
    ]  # of the whole ranking
    hits_in_k = sum(ranking[:k])
    return [
        sum(1 for hit in ranking[:depth] if hit) / depth,
        1.0 if hits_in_k else 0.0,
        hits_in_k / k,
        math.fsum(precisions[:hits_in_k]) / depth,
        math.fsum(precisions) / positives,
    ]


@given(rankings())
def test_metrics_equal_counting(case):
    rows, k = case
    relevance = np.array(rows)
    counts = relevance.sum(axis=1)
    ranks = np.nonzero(relevance)[1] + 1
    found = [
        modified_mean_precision_at_k(relevance, counts, k=k),
        recall_at_k(relevance, counts, k=k),
        precision_at_k(relevance, counts, k=k),
        average_precision(ranks, counts, k=k),
        average_precision(ranks, counts),
    ]
    expected = np.array([brute_force(row, k) for row in rows]).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(relevance_from_ranks(ranks, counts, k=k), relevance[:, :k])


def revisited_precision(ranking):
    """AP as the revisited benchmarks' own program takes it, from rank 0 on; and 1 over the first rank."""
    places = [rank for rank, hit in enumerate(ranking) if hit]
    total = 0.0
    for number, rank in enumerate(places):
        before = 1.0 if rank == 0 else number / rank
        total += (before + (number + 1) / (rank + 1)) / 2 / len(places)
    return total if places else math.nan, 1 / (places[0] + 1) if places else math.nan


@given(rankings())
def test_the_boards_metrics_equal_their_programs(case):
    rows, k = case
    relevance = np.array(rows)
    found = measure(["map-trapezoid", f"mrr@{k}"], np.nonzero(relevance)[1] + 1, relevance.sum(axis=1))
    expected = np.array([revisited_precision(row) for row in rows])
    np.testing.assert_allclose(found["map-trapezoid"], expected[:, 0])
    in_k = np.where(expected[:, 1] < 1 / k, 0.0, expected[:, 1])
    np.testing.assert_allclose(found[f"mrr@{k}"], in_k)


def test_a_hit_behind_the_number_of_relevant_entries_does_not_count_for_mmp():
    relevance = np.array([[False, True, False, False, False]])
    assert modified_mean_precision_at_k(relevance, np.array([1]), k=5) == 0
    assert modified_mean_precision_at_k(relevance, np.array([2]), k=5) == 0.5


@pytest.mark.parametrize("k", [0, 3])
def test_k_outside_the_columns_is_refused(k):
    with pytest.raises(InputError, match=f"k={k} with 2 ranked columns"):
        recall_at_k(np.array([[True, False]]), np.array([1]), k=k)


def test_more_hits_than_relevant_entries_are_refused():
    with pytest.raises(InputError, match="query 1 has 2 hits but num_relevant=1"):
        precision_at_k(np.array([[True, False], [True, True]]), np.array([1, 1]), k=1)


@pytest.mark.parametrize("ranks", [[1], [2, 1], [0, 1], [2, 2], [1, 2, 3]])
def test_ranks_that_are_none_are_refused(ranks):
    with pytest.raises(InputError, match="ascending"):
        average_precision(np.array(ranks), np.array([2]))


def test_domains_weigh_the_same_and_an_empty_one_is_left_out():
    values = np.array([1.0, 1.0, 1.0, 0.0, np.nan])
    assert domain_mean(values, np.array([0, 0, 0, 1, 2])) == 0.5
    assert math.isnan(domain_mean(values[4:], np.array([2])))


def test_interval_equals_the_normal_approximation_for_many_queries():
    values = (np.random.default_rng(1).random(2000) < 0.3).astype(float)
    low, high = bootstrap_interval(values, num_resamples=4000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_of_two_queries_is_that_of_the_binomial():
    # the mean of two draws from {0, 1} is 0, 0.5 or 1 with probability 1/4, 1/2, 1/4
    assert bootstrap_interval(np.array([0.0, 1.0]), level=0.4) == (0.5, 0.5)
    assert bootstrap_interval(np.array([0.0, 1.0]), level=0.6) == (0.0, 1.0)


def test_interval_leaves_nan_out_and_repeats_with_its_seed():
    values = np.random.default_rng(0).random(50)
    with_nan = np.concatenate([values, [np.nan] * 7])
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(with_nan, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([np.nan])))
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([])))


def test_interval_of_the_domain_mean_keeps_the_domains_apart():
    # each domain is constant, so nothing can vary; drawn from all queries the mean would
    values = np.array([1.0, 1.0, 1.0, 0.0])
    assert bootstrap_interval(values, np.array([0, 0, 0, 1])) == (0.5, 0.5)
    low, high = bootstrap_interval(values)
    assert low < 0.5 < high


def test_metrics_that_share_their_draws_have_the_intervals_they_have_alone():
    generator = np.random.default_rng(2)
    values, domains = generator.uniform(size=(3, 60)), np.repeat([0, 1, 2], [10, 20, 30])
    values[:, [3, 25]] = np.nan
    other_queries = values.copy()
    other_queries[1, 4] = np.nan
    for rows in (values, other_queries):
        for chosen in (np.ones(60, dtype=bool), domains == 1):
            estimates = mean_estimates(rows[:, chosen], domains[chosen])
            for found, own in zip(estimates, rows[:, chosen], strict=True):
                interval = bootstrap_interval(own, domains[chosen])
                assert found == (domain_mean(own, domains[chosen]), *interval)
    assert np.isnan(mean_estimates(np.full((2, 3), np.nan), np.zeros(3, dtype=int))).all()


def test_intervals_do_not_depend_on_how_many_draws_are_held(monkeypatch):
    values = np.random.default_rng(0).random(100)
    whole = bootstrap_interval(values, num_resamples=300)
    monkeypatch.setattr("samething.statistics._DRAWS_AT_A_TIME", 700)
    assert bootstrap_interval(values, num_resamples=300) == whole


def test_paired_difference_is_sharper_than_two_intervals():
    generator = np.random.default_rng(0)
    second = generator.random(300)
    first = second + 0.01 + 0.01 * generator.standard_normal(300)
    first[0] = second[0] = np.nan
    found = paired_difference(first, second, np.zeros(300, dtype=int))
    assert found.low < found.difference < found.high
    assert found.low > 0
    assert found.num_queries == 299
    assert found.difference == pytest.approx(np.nanmean(first - second))
    assert bootstrap_interval(first)[0] < bootstrap_interval(second)[1]


def test_values_of_other_queries_are_not_compared():
    with pytest.raises(InputError, match="different queries"):
        paired_difference(np.array([1.0, np.nan]), np.array([1.0, 0.0]), np.array([0, 0]))


@pytest.mark.parametrize("wrong", [{"num_resamples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_bootstrap_options_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        bootstrap_interval(np.array([1.0]), **wrong)


# ---- weights and randomisation


def test_the_p_value_is_that_of_all_assignments():
    """Fisher's test written out: every one of the 2^n swaps, two domains of different sizes."""
    first = np.array([1.0, 0.8, 0.6, 1.0, 0.5, 0.9, 0.4, np.nan])
    second = np.array([0.2, 0.9, 0.1, 0.6, 0.5, 0.3, 0.1, np.nan])
    domains = np.array([0, 0, 0, 1, 1, 1, 1, 1])

    def mean_difference(signs):
        differences = [s * (a - b) for s, a, b in zip(signs, first[:7], second[:7], strict=True)]
        return (sum(differences[:3]) / 3 + sum(differences[3:]) / 4) / 2

    observed = abs(mean_difference([1] * 7))
    swaps = [abs(mean_difference(signs)) for signs in itertools.product([-1, 1], repeat=7)]
    exact = sum(swap >= observed - 1e-12 for swap in swaps) / len(swaps)
    found = paired_difference(first, second, domains, num_resamples=20_000)
    assert 0.01 < exact < 0.2 and found.p_value == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(mean_difference([1] * 7))
    assert paired_difference(second, first, domains, num_resamples=20_000).p_value == found.p_value
    assert paired_difference(first, second, domains, num_resamples=1).p_value in (0.5, 1.0)


def test_the_p_value_is_uniform_where_there_is_no_difference():
    generator = np.random.default_rng(0)
    values = []
    for _ in range(200):
        one, other = generator.uniform(size=(2, 30))
        values.append(paired_difference(one, other, np.zeros(30, dtype=int), num_resamples=199).p_value)
    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.09 and 0.42 < np.mean(values) < 0.58


def test_weighted_means_equal_their_definition():
    generator = np.random.default_rng(1)
    values, domains = generator.uniform(size=90), np.repeat([0, 1, 2], [10, 30, 50])
    values[[3, 50]] = np.nan
    weights = np.array([3.0, 1.0, 0.0])
    [(mean, low, high)] = mean_estimates(values[None], domains, weights, num_resamples=4000)
    own = [[v for v, d in zip(values, domains, strict=True) if d == n and v == v] for n in range(3)]
    assert mean == pytest.approx((3 * sum(own[0]) / len(own[0]) + sum(own[1]) / len(own[1])) / 4)
    draws = sorted(
        (3 * np.mean(generator.choice(own[0], len(own[0]))) + np.mean(generator.choice(own[1], len(own[1]))))
        / 4
        for _ in range(4000)
    )
    assert (low, high) == pytest.approx((draws[100], draws[3900]), abs=0.01)
    # domains that weigh the same are the plain mean, and one without a value gives its weight to the others
    [equal] = mean_estimates(values[None], domains, np.ones(3))
    assert equal.value == pytest.approx(domain_mean(values, domains))
    values[domains == 0] = np.nan
    assert mean_estimates(values[None], domains, weights)[0].value == pytest.approx(np.mean(own[1]))
    assert np.isnan(mean_estimates(values[None], domains, np.array([1.0, 0.0, 0.0]))).all()
    with pytest.raises(InputError, match="num_resamples=0"):
        mean_estimates(values[None], domains, weights, num_resamples=0)
