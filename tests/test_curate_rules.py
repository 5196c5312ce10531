"""Numbers of images and classes, budgets and draws, each against a plain second writing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samething.catalog import Catalog
from samething.curate.draws import draws_of
from samething.curate.rules import (
    Budget,
    Limit,
    Population,
    domain_quotas,
)
from samething.errors import InputError

ROWS = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.sampled_from(["x", "y", "z"])), min_size=1, max_size=60
)


def catalog_of(pairs) -> Catalog:
    """Labels and data sets, a domain for each data set."""
    rows = [
        {"image": f"{number}.jpg", "label": f"{dataset}{label}", "domain": f"d{dataset}", "dataset": dataset}
        for number, (label, dataset) in enumerate(pairs)
    ]
    return Catalog.from_rows(rows, root=Path())


def kept_by(rule: str, catalog: Catalog, limit, *, seed: int = 0) -> np.ndarray:
    """Rows of a catalog that stay by one rule of :class:`Population`."""
    population = Population.of(catalog, seed=seed)
    limit = Limit(limit) if isinstance(limit, int) else limit
    return getattr(population, rule)(population.rows, limit)


def naive_fnv1a(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def naive_mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


@given(st.lists(st.one_of(st.none(), st.text(max_size=40)), max_size=30), st.integers(0, 2**63 - 1))
def test_draws_are_their_formula(names, seed):
    column = pa.chunked_array([pa.array(names[:7], pa.string()), pa.array(names[7:], pa.string())])
    expected = [naive_mix(naive_fnv1a(name or "") ^ naive_mix(seed)) for name in names]
    assert draws_of(column, seed=seed).tolist() == expected


def test_draws_of_a_slice_and_of_nothing():
    column = pa.chunked_array([pa.array(["ab", "c", "ä", ""])])
    assert draws_of(column.slice(1, 2), seed=3).tolist() == draws_of(column, seed=3)[1:3].tolist()
    assert len(draws_of(pa.chunked_array([pa.array([], pa.string())]), seed=0)) == 0
    with pytest.raises(InputError):
        draws_of(column, seed=-1)


def test_draws_are_spread_evenly():
    names = pa.chunked_array([pa.array([f"images/{number:06d}.jpg" for number in range(20_000)])])
    shares = draws_of(names, seed=0).astype(float) / 2**64
    counts = np.histogram(shares, 20, (0, 1))[0]
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


@given(ROWS, st.integers(1, 6))
def test_enough_images(pairs, least):
    catalog = catalog_of(pairs)
    counts = Counter(pairs)
    expected = [row for row, pair in enumerate(pairs) if counts[pair] >= least]
    assert kept_by("with_enough_images", catalog, least).tolist() == expected
    expected = [row for row, pair in enumerate(pairs) if pair[1] != "x" or counts[pair] >= least]
    assert kept_by("with_enough_images", catalog, Limit(None, {"x": least})).tolist() == expected


@given(ROWS, st.integers(1, 6), st.integers(0, 9))
def test_capped_images_are_the_lowest_draws(pairs, most, seed):
    catalog = catalog_of(pairs)
    draws = draws_of(catalog.table["image"], seed=seed)
    expected = []
    for pair in set(pairs):
        own = [row for row, other in enumerate(pairs) if other == pair]
        expected += sorted(own, key=lambda row: int(draws[row]))[:most]
    assert kept_by("with_capped_images", catalog, most, seed=seed).tolist() == sorted(expected)


@given(ROWS, st.integers(1, 6), st.integers(0, 9))
def test_capped_classes_are_the_lowest_draws(pairs, most, seed):
    catalog = catalog_of(pairs)
    kept = set()
    for dataset in "xyz":
        own = sorted({label for label, other in pairs if other == dataset})
        names = pa.chunked_array(
            [pa.array([f"d{dataset}\x1f{dataset}{label}" for label in own], pa.string())]
        )
        order = np.argsort(draws_of(names, seed=seed), kind="stable")
        kept |= {(own[place], dataset) for place in order[:most]}
    expected = [row for row, pair in enumerate(pairs) if pair in kept]
    assert kept_by("with_capped_classes", catalog, most, seed=seed).tolist() == expected


@given(ROWS, st.integers(0, 9), st.randoms(use_true_random=False))
def test_what_is_kept_does_not_depend_on_other_rows_or_their_order(pairs, seed, random):
    catalog = catalog_of(pairs)
    kept = set(catalog.take(kept_by("with_capped_images", catalog, 2, seed=seed)).strings("image"))
    order = list(range(len(pairs)))
    random.shuffle(order)
    shuffled = catalog.take(np.asarray(order))
    assert set(shuffled.take(kept_by("with_capped_images", shuffled, 2, seed=seed)).strings("image")) == kept
    part = catalog.take(catalog.strings("dataset") == "x")
    own = set(part.take(kept_by("with_capped_images", part, 2, seed=seed)).strings("image"))
    assert own == kept & set(part.strings("image"))


@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=6),
    st.integers(1, 1500),
    st.sampled_from(["proportional", "equal", "temperature"]),
    st.floats(0.5, 20),
)
def test_quotas(available, budget, share, temperature):
    numbers = np.asarray(available)
    quotas = domain_quotas(numbers, budget, share=share, temperature=temperature)
    assert (quotas <= numbers).all() and (quotas >= 0).all()
    assert quotas.sum() == min(budget, numbers.sum())
    power = {"proportional": 1, "equal": 0, "temperature": 1 / temperature}[share]
    # water filling, by bisection: all that are not exhausted get the same multiple of their weight
    weights = np.where(numbers > 0, np.maximum(numbers, 1.0) ** power, 0)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.minimum(numbers, middle * weights).sum() < quotas.sum() else (low, middle)
        )
    assert np.abs(quotas - np.minimum(numbers, high * weights)).max() < 1 + 1e-6


@given(ROWS, st.integers(1, 70), st.sampled_from(["classes", "images"]), st.integers(1, 4), st.integers(0, 3))
def test_a_budget_of_images(pairs, budget, thin, least, seed):
    catalog = catalog_of(pairs)
    rows = kept_by("within_budget", catalog, Budget(images=budget, thin=thin, least=least), seed=seed)
    assert len(rows) <= budget and (np.diff(rows) > 0).all()
    kept, before = Counter(pairs[row] for row in rows), Counter(pairs)
    assert all(number >= min(least, before[pair]) for pair, number in kept.items())
    if budget >= len(pairs):
        assert len(rows) == len(pairs)
    if thin == "classes" and least == 1:
        assert len(rows) == min(budget, len(pairs))
        for dataset in "xyz":  # at most one class of a domain is cut
            assert sum(number < before[pair] for pair, number in kept.items() if pair[1] == dataset) <= 1
    if thin == "images":
        for dataset in "xyz":
            own = {pair: number for pair, number in kept.items() if pair[1] == dataset}
            cut = [number for pair, number in own.items() if number < before[pair]]
            if cut:  # no class that was cut has two more than another
                assert max(own.values()) - min(cut) <= 1


@given(ROWS, st.integers(1, 25), st.sampled_from(["proportional", "equal", "temperature"]))
def test_a_budget_of_classes_keeps_whole_classes(pairs, budget, share):
    catalog = catalog_of(pairs)
    rows = kept_by("within_budget", catalog, Budget(classes=budget, share=share))
    kept, before = Counter(pairs[row] for row in rows), Counter(pairs)
    assert kept == {pair: before[pair] for pair in kept}
    assert len(kept) == min(budget, len(before))


@pytest.mark.parametrize("texts", [["0"], ["-3"], ["a"], ["x="], ["3", "4"], ["x=1", "x=2"], ["1.5"], [""]])
def test_limits_that_are_none(texts):
    with pytest.raises(InputError) as error:
        Limit.parsed(texts, name="--max-images")
    assert "--max-images" in str(error.value)


def test_limits_of_a_data_set_with_an_equals_sign():
    assert Limit.parsed(["a=b=3"], name="--max").of("a=b", otherwise=0) == 3
    assert str(Limit.parsed(["3", "x=4"], name="--max")) == "3, 4 for x"


@pytest.mark.parametrize(
    "options", [{"images": 1, "classes": 1}, {"images": 0}, {"temperature": 0.0}, {"share": "half"}]
)
def test_budgets_that_cannot_be(options):
    with pytest.raises(Exception):  # noqa: B017  (beartype may be first)
        Budget(**options)
