from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samething.errors import InputError
from samething.sampling import SamplingKind, epoch_batches
from samething.training import TrainConfig

LABELS = st.lists(st.integers(0, 6), min_size=2, max_size=60)


def batches(classes, domains, *, kind="shuffled", batch_size=8, seed=0, epoch=0, temperature=1.0):
    classes = np.unique(classes, return_inverse=True)[1].astype(np.int64)
    return epoch_batches(
        classes,
        np.asarray(domains, np.int64),
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        kind=kind,
        temperature=temperature,
    )


@given(LABELS, st.integers(2, 20), st.sampled_from(get_args(SamplingKind)), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_kind_is_a_pure_function_of_seed_and_epoch(labels, batch_size, kind, epoch):
    domains = np.asarray(labels) % 3
    one, two = (batches(labels, domains, kind=kind, batch_size=batch_size, epoch=epoch) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    rows = np.concatenate(one)
    assert rows.min() >= 0 and rows.max() < len(labels)
    assert all(2 <= len(batch) <= batch_size + 1 for batch in one)


@given(LABELS, st.integers(2, 20), st.sampled_from(["shuffled", "block-shuffled"]))
@settings(max_examples=50, deadline=None)
def test_shuffled_takes_every_row_once(labels, batch_size, kind):
    rows = np.concatenate(batches(labels, np.zeros(len(labels)), batch_size=batch_size, kind=kind))
    assert sorted(rows) == list(range(len(labels)))


@given(st.integers(2, 40_000), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_block_shuffled_groups_are_whole_blocks(num_rows, epoch):
    order = np.concatenate(
        batches(np.arange(num_rows), np.zeros(num_rows), kind="block-shuffled", batch_size=100, epoch=epoch)
    )
    assert np.array_equal(np.sort(order), np.arange(num_rows))
    for start in range(0, num_rows // 8192 * 8192, 8192):
        rows = np.sort(order[start : start + 8192])
        # 32 blocks of 256 rows on end; two more ends where a block runs over the last row to the first,
        # and where the block that is cut short lies in the last group
        runs = np.flatnonzero(np.diff(rows) != 1) + 1
        assert len(runs) + 1 <= 32 + 2
        # and shuffled within: neighbours in the order are rarely neighbours in the file
        assert (np.abs(np.diff(order[start : start + 8192])) == 1).mean() < 0.01


@given(LABELS)
@settings(max_examples=50, deadline=None)
def test_class_balanced_takes_classes_equally_often(labels):
    rows = np.concatenate(batches(labels, np.zeros(len(labels)), kind="class-balanced"))
    counts = np.bincount(np.asarray(labels)[rows], minlength=7)[np.unique(labels)]
    assert counts.max() - counts.min() <= 1
    # within a class no image is seen again before all were seen
    for label in np.unique(labels):
        seen = np.bincount(rows[np.asarray(labels)[rows] == label], minlength=len(labels))
        own = seen[np.asarray(labels) == label]
        assert own.max() - own.min() <= 1


def test_domain_balance_follows_the_temperature():
    domains = np.repeat([0, 1], [900, 100])
    shares = {}
    for temperature in (1.0, 2.0, 1e6):
        rows = np.concatenate(
            batches(np.arange(1000), domains, kind="domain-balanced", temperature=temperature)
        )
        shares[temperature] = (domains[rows] == 1).mean()
    assert abs(shares[1.0] - 0.1) < 0.01
    assert abs(shares[2.0] - 10 / 40) < 0.01  # sqrt(100) / (sqrt(900) + sqrt(100))
    assert abs(shares[1e6] - 0.5) < 0.01


def test_round_robin_batches_are_of_one_domain_in_turn():
    domains = np.repeat([0, 1, 2], [50, 30, 20])
    of_batch = [set(domains[batch]) for batch in batches(np.arange(100), domains, kind="domain-round-robin")]
    assert all(len(found) == 1 for found in of_batch)
    assert [of_batch[i] for i in range(3)] == [of_batch[i] for i in range(3, 6)]


def test_epochs_differ():
    labels = np.arange(100)
    one, two = (np.concatenate(batches(labels, labels * 0, epoch=epoch)) for epoch in (0, 1))
    assert not np.array_equal(one, two)


def test_temperature_below_one_is_refused():
    with pytest.raises(InputError, match="temperature"):
        TrainConfig(sampling="domain-balanced", sampling_temperature=0.5)
