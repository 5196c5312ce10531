import contextlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samething.errors import ArtefactError
from samething.features import FeatureSet, row_reader
from samething.features.row_reader import GROUP_ROWS, RowReader
from samething.sampling import epoch_batches
from scenes import feature_folder

WIDTH = 6


def stored(folder, num_rows):
    """A file of random float16 rows, and the same rows in memory."""
    rows = np.random.default_rng(num_rows).normal(size=(num_rows, WIDTH)).astype(np.float16)
    np.save(folder / "features.npy", rows)
    return folder / "features.npy", rows


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def stored_rows(path):
    return np.load(path, mmap_mode="r")


def block_batches(num_rows, *, batch_size, epoch=0):
    zeros = np.zeros(num_rows, np.int64)
    return epoch_batches(zeros, zeros, batch_size=batch_size, seed=3, epoch=epoch, kind="block-shuffled")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Three groups and a bit."""
    return stored(tmp_path_factory.mktemp("with space é"), 3 * GROUP_ROWS + 700)


@given(batch_size=st.integers(2, 20_000), skipped=st.floats(0, 1), share=st.sampled_from([1.0, 0.3]))
@settings(max_examples=30, deadline=None)
def test_planned_batches_are_bit_equal_to_a_gather(large, batch_size, skipped, share):
    path, rows = large
    # training rows with holes, small and large, as where other images have other roles
    chosen = np.flatnonzero(np.random.default_rng(0).random(len(rows)) < share)
    chosen = chosen[(chosen < 5000) | (chosen > 9000)]
    batches = block_batches(len(chosen), batch_size=batch_size)
    first = int(skipped * len(batches))
    with contextlib.closing(RowReader(stored_rows(path))) as reader:
        reader.plan(chosen[np.concatenate(batches)], start=sum(map(len, batches[:first])))
        for batch in batches[first:]:
            got = reader.rows(chosen[batch])
            assert got.dtype == np.float16 and np.array_equal(got, rows[chosen[batch]])


def test_planned_rows_do_not_touch_the_memory_map(large):
    """The plan serves them: the map is replaced by zeros, and the rows are still right."""
    path, rows = large
    batches = block_batches(len(rows), batch_size=100)  # batches that lie across two groups, too
    with contextlib.closing(RowReader(stored_rows(path))) as reader:
        for epoch in (0, 1):
            batches = block_batches(len(rows), batch_size=100, epoch=epoch)
            reader.plan(np.concatenate(batches))
            reader._array = np.zeros_like(rows)
            assert all(np.array_equal(reader.rows(batch), rows[batch]) for batch in batches)


def test_rows_outside_the_plan_come_from_the_memory_map(large):
    path, rows = large
    order = np.concatenate(block_batches(len(rows), batch_size=128))
    with contextlib.closing(RowReader(stored_rows(path))) as reader:
        reader.plan(order[: GROUP_ROWS * 2])
        outside = np.concatenate([order[-50:], order[:3], order[-50:]])  # and twice the same
        assert np.array_equal(reader.rows(outside), rows[outside])
        assert np.array_equal(reader.rows(order[:128]), rows[order[:128]])


def test_any_order_and_a_share_of_it(large):
    """What is asked for decides the values, whatever the plan said."""
    path, rows = large
    order = np.random.default_rng(1).permutation(len(rows))
    with contextlib.closing(RowReader(stored_rows(path))) as reader:
        reader.plan(order)
        for start in range(0, len(order), 1000):
            mine = order[start : start + 300]
            assert np.array_equal(reader.rows(mine), rows[mine])
        assert np.array_equal(reader.rows(order[:500]), rows[order[:500]])


def test_memory_is_two_groups_and_nothing_is_left_behind(large):
    path, rows = large
    files, threads = open_files(), threading.active_count()
    reader = RowReader(stored_rows(path))
    mapped = open_files()
    for epoch in range(3):
        reader.plan(np.concatenate(block_batches(len(rows), batch_size=128, epoch=epoch)))
        assert sum(buffer.nbytes for buffer in reader._buffers) == 2 * GROUP_ROWS * WIDTH * 2
        assert threading.active_count() <= threads + row_reader.NUM_THREADS
    reader.close()
    reader.close()
    assert threading.active_count() == threads and open_files() == mapped
    assert np.array_equal(reader.rows(np.arange(5)), rows[:5])
    del reader
    assert open_files() == files


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_reads_on(large):
    path, rows = large
    batches = block_batches(len(rows), batch_size=128)
    with contextlib.closing(RowReader(stored_rows(path))) as reader:
        reader.plan(np.concatenate(batches))
        child = os.fork()
        if child == 0:
            right = all(np.array_equal(reader.rows(batch), rows[batch]) for batch in batches)
            reader.close()
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(np.array_equal(reader.rows(batch), rows[batch]) for batch in batches)


def test_feature_sets_on_disk_and_in_memory(tmp_path):
    features = feature_folder(tmp_path / "features")
    chosen = np.random.default_rng(0).permutation(len(features.rows))
    for source in (features, features.subset(features.catalog.has_role("train"))):
        order = chosen[chosen < len(source.rows)]
        with contextlib.closing(RowReader(source.rows)) as reader:
            reader.plan(order)
            assert bool(reader._held) == isinstance(source.rows, np.memmap)
            assert np.array_equal(reader.rows(order), source.rows[order])


def test_truncated_and_missing_files(tmp_path):
    path, rows = stored(tmp_path, 2 * GROUP_ROWS)
    whole = path.stat().st_size
    order = np.concatenate(block_batches(len(rows), batch_size=128))
    reader = RowReader(stored_rows(path))
    os.truncate(path, whole - 1000)
    with pytest.raises(ArtefactError, match="ends early"):
        reader.plan(order)
    path.unlink()
    with pytest.raises(ArtefactError, match="No such file"):
        reader.plan(order)
    features = feature_folder(tmp_path / "features")
    [file] = features.folder.glob("*/features.npy")
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ArtefactError, match="is not whole"):
        FeatureSet.open(features.folder)


def test_a_file_cut_short_while_it_is_read(tmp_path, monkeypatch):
    """Read up to the new end, then say so; without the check, rows of an old buffer would be served."""
    path, rows = stored(tmp_path, 2 * GROUP_ROWS)
    whole, original = path.stat().st_size, os.preadv

    def shorter(descriptor, buffers, offset):
        os.truncate(path, whole - 1000)
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", shorter)
    order = np.concatenate(block_batches(len(rows), batch_size=128))
    with (
        contextlib.closing(RowReader(stored_rows(path))) as reader,
        pytest.raises(ArtefactError, match="ends early"),
    ):
        reader.plan(order)
        for start in range(0, len(order), 128):
            reader.rows(order[start : start + 128])
