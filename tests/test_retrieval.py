"""Exact search against loops over lists, whatever the block sizes, and under its memory ceiling."""

import math
import subprocess
import sys
import tracemalloc
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from samething import retrieval
from samething.errors import InputError
from samething.retrieval import Positives, exact_topk, positive_ranks, require_directions

STEP = 1e-10


def cosine(left, right):
    product = math.fsum(a * b for a, b in zip(left, right, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in left)) / math.sqrt(math.fsum(b * b for b in right))


def rankings_by_loops(queries, gallery, leave_out):
    """For each query the gallery rows by descending rounded cosine, then by row, and the cosines."""
    found = []
    for query, own in zip(queries.tolist(), leave_out.tolist(), strict=True):
        scores = {row: cosine(query, entry) for row, entry in enumerate(gallery.tolist()) if row != own}
        # a cosine on the very edge between two steps may be rounded either way
        assume(all(abs((score / STEP) % 1 - 0.5) > 1e-3 for score in scores.values()))
        found.append(
            [
                (row, scores[row])
                for row in sorted(scores, key=lambda row: (-round(scores[row] / STEP), row))
            ]
        )
    return found


@st.composite
def searches(draw):
    """Small whole coordinates make ties, opposite rows, duplicates and multiples common."""
    dim = draw(st.integers(1, 4))
    row = st.lists(st.integers(-3, 3), min_size=dim, max_size=dim).filter(any)
    dtypes = st.sampled_from([np.float16, np.float32, np.float64])
    queries = np.array(draw(st.lists(row, min_size=1, max_size=6)), dtype=draw(dtypes))
    gallery = np.array(draw(st.lists(row, min_size=1, max_size=9)), dtype=draw(dtypes))
    leave_out = np.array([draw(st.integers(-1, len(gallery) - 1)) for _ in queries])
    blocks = draw(st.tuples(st.integers(1, 6), st.integers(1, 9)))
    return queries, gallery, leave_out, blocks


@given(searches(), st.integers(1, 12))
def test_topk_equals_the_ranking_by_loops(search, k):
    queries, gallery, leave_out, blocks = search
    expected = rankings_by_loops(queries, gallery, leave_out)
    with patch.object(retrieval, "_block_sizes", return_value=blocks):
        top = exact_topk(queries, gallery, k, leave_out=leave_out)
    assert top.indices.shape == (len(queries), k)
    for indices, scores, ranking in zip(top.indices, top.scores, expected, strict=True):
        padding = k - len(ranking[:k])
        assert indices.tolist() == [row for row, _ in ranking[:k]] + [-1] * padding
        np.testing.assert_allclose(
            scores, [score for _, score in ranking[:k]] + [-math.inf] * padding, rtol=0, atol=0.51 * STEP
        )


@given(searches(), st.data())
def test_positive_ranks_equal_the_ranking_by_loops(search, data):
    queries, gallery, leave_out, blocks = search
    labels = st.integers(0, 2)
    query_labels = np.array([data.draw(labels) for _ in queries])
    gallery_labels = np.array([data.draw(labels) for _ in gallery])
    expected = [
        [
            rank
            for rank, (row, _) in enumerate(ranking, start=1)
            if gallery_labels[row] == query_labels[query]
        ]
        for query, ranking in enumerate(rankings_by_loops(queries, gallery, leave_out))
    ]
    positives = Positives.from_labels(query_labels, gallery_labels, leave_out=leave_out)
    assert positives.counts.tolist() == [len(ranks) for ranks in expected]
    with patch.object(retrieval, "_block_sizes", return_value=blocks):
        ranks = positive_ranks(queries, gallery, positives, leave_out=leave_out)
    assert ranks.tolist() == [rank for ranks in expected for rank in ranks]


def test_duplicates_of_the_query_come_before_itself_and_only_itself_is_left_out():
    gallery = np.array([[1.0, 1.0], [2.0, 2.0], [1.0, 1.0], [1.0, -1.0]])
    # row 2 searches for itself: by rank the first hit would be taken for it, which is row 0
    top = exact_topk(gallery[2:3], gallery, 3, leave_out=np.array([2]))
    assert top.indices.tolist() == [[0, 1, 3]]
    assert top.scores.tolist() == [[1.0, 1.0, 0.0]]


def test_a_relevant_entry_with_a_negative_cosine_has_its_rank():
    gallery = np.array([[1.0, 0.1], [-1.0, 0.0], [0.0, 1.0]])
    ranks = positive_ranks(np.array([[1.0, 0.0]]), gallery, Positives(np.array([1]), np.array([1])))
    assert ranks.tolist() == [3]


def clustered(num_queries, num_entries, dim, dtype, seed=0):
    """Queries and a gallery of few directions, so that labels mean something and many rows are equal."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(40, dim))
    labels = generator.integers(40, size=num_queries + num_entries)
    rows = centres[labels] + 0.7 * generator.normal(size=(len(labels), dim))
    repeats = generator.integers(len(rows), size=len(rows) // 3)
    rows[repeats] = rows[0]
    rows = rows.astype(dtype)
    return rows[:num_queries], rows[num_queries:], labels[:num_queries], labels[num_queries:]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_results_do_not_depend_on_the_memory_ceiling(dtype):
    queries, gallery, query_labels, gallery_labels = clustered(150, 700, 24, dtype)
    leave_out = np.arange(150) * 3
    positives = Positives.from_labels(query_labels, gallery_labels, leave_out=leave_out)
    tops, ranks = [], []
    for memory_mib in (1, 2, 64):
        options = {"leave_out": leave_out, "memory_mib": memory_mib}
        tops.append(exact_topk(queries, gallery, 20, **options))
        ranks.append(positive_ranks(queries, gallery, positives, **options))
    assert retrieval._block_sizes(queries, gallery, "float64", 1, 0) < (150, 700)
    for top, rank in zip(tops[1:], ranks[1:], strict=True):
        np.testing.assert_array_equal(top.indices, tops[0].indices)
        np.testing.assert_array_equal(top.scores, tops[0].scores)
        np.testing.assert_array_equal(rank, ranks[0])


def test_rows_too_long_for_the_ceiling_are_searched_one_by_one():
    queries, gallery, *_ = clustered(5, 9, 6000, np.float32)
    assert retrieval._block_sizes(queries, gallery, "float64", 1, 0) == (1, 1)
    one_by_one = exact_topk(queries, gallery, 4, memory_mib=1)
    at_once = exact_topk(queries, gallery, 4)
    np.testing.assert_array_equal(one_by_one.indices, at_once.indices)
    np.testing.assert_array_equal(one_by_one.scores, at_once.scores)


@pytest.mark.parametrize("dim", [3, 64, 1280])
def test_equal_rows_tie_exactly_wherever_they_lie(dim):
    generator = np.random.default_rng(dim)
    gallery = np.repeat(generator.normal(size=(7, dim)).astype(np.float32), 43, axis=0)
    gallery = gallery[generator.permutation(len(gallery))]
    queries = generator.normal(size=(11, dim)).astype(np.float32)
    top = exact_topk(queries, gallery, len(gallery))
    for indices, scores in zip(top.indices, top.scores, strict=True):
        assert len(set(scores.tolist())) == 7
        for score in set(scores.tolist()):
            assert np.all(np.diff(indices[scores == score]) > 0)


@pytest.mark.parametrize("dim", [2, 64, 1280])
def test_float64_scores_are_cosines_to_ten_decimals(dim):
    generator = np.random.default_rng(dim)
    queries, gallery = generator.normal(size=(6, dim)), generator.normal(size=(30, dim))
    gallery[0], gallery[1] = queries[0], -3 * queries[0]
    top = exact_topk(queries, gallery, 30)
    for query, indices, scores in zip(queries.tolist(), top.indices, top.scores, strict=True):
        exact = [cosine(query, gallery[row].tolist()) for row in indices]
        np.testing.assert_allclose(scores, exact, rtol=0, atol=0.51 * STEP)
    assert top.scores[0, 0] == 1.0
    assert top.scores[0, -1] == -1.0


@pytest.mark.parametrize("k", [1, 5, 70, 2000])
def test_float32_finds_the_best_up_to_its_accuracy(k):
    generator = np.random.default_rng(k)
    queries = generator.normal(size=(90, 48)).astype(np.float32)
    gallery = generator.normal(size=(1500, 48)).astype(np.float32)
    exact = exact_topk(queries, gallery, k)
    fast = exact_topk(queries, gallery, k, precision="float32", memory_mib=1)
    assert fast.scores.dtype == np.float32
    np.testing.assert_allclose(fast.scores, exact.scores, rtol=0, atol=2e-6)
    for indices in fast.indices:
        real = indices[indices >= 0]
        assert len(set(real.tolist())) == len(real) == min(k, 1500)
    # gaps of 2e-6 are rare in so small a gallery: nearly all places agree
    assert np.mean(fast.indices == exact.indices) > 0.99


def test_float32_ranks_agree_where_scores_are_apart():
    queries, gallery, query_labels, gallery_labels = clustered(60, 500, 48, np.float32)
    keep = np.unique(gallery, axis=0, return_index=True)[1]
    gallery, gallery_labels = gallery[keep], gallery_labels[keep]
    positives = Positives.from_labels(query_labels, gallery_labels)
    exact = positive_ranks(queries, gallery, positives)
    fast = positive_ranks(queries, gallery, positives, precision="float32", memory_mib=1)
    assert np.abs(exact - fast).max() <= 1
    assert np.mean(exact == fast) > 0.99


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("collapsed", [False, True])
def test_working_memory_stays_under_the_ceiling(precision, collapsed):
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(900, 64)).astype(np.float16)
    gallery = generator.normal(size=(9000, 64)).astype(np.float16)
    if collapsed:
        queries[:], gallery[:] = queries[0], queries[0]
    labels = np.arange(9000) % 300
    positives = Positives.from_labels(labels[:900], labels)
    for k in (5, 400):
        peak = _peak(lambda k=k: exact_topk(queries, gallery, k, precision=precision, memory_mib=8))
        assert peak - 900 * k * (8 + (8 if precision == "float64" else 4)) < 8 * 2**20
    # ties are counted one relevant entry at a time: fewer queries where all tie
    own = slice(0, 100 if collapsed else 900)
    positives = Positives.from_labels(labels[own], labels)
    peak = _peak(
        lambda: positive_ranks(queries[own], gallery, positives, precision=precision, memory_mib=8)
    )
    assert peak - 8 * len(positives.rows) < 8 * 2**20


def _peak(call):
    """Most bytes that numpy and Python held at a time during the call, its result included."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_extreme_magnitudes_neither_overflow_nor_vanish():
    tiny, huge = np.array([[1e-300, 2e-300]]), np.array([[1e300, 2e300], [2e300, -1e300]])
    for precision in ("float64", "float32"):
        top = exact_topk(tiny, huge, 2, precision=precision)
        assert top.indices.tolist() == [[0, 1]]
        np.testing.assert_allclose(top.scores, [[1.0, 0.0]], atol=1e-6)
    small = np.array([[6e-8, 0.0], [0.0, 6e4]], dtype=np.float16)
    assert exact_topk(small, small, 1).indices.tolist() == [[0], [1]]


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_normalised_rows_are_taken_as_they_are(precision):
    rows = np.random.default_rng(0).normal(size=(20, 8))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    taken = exact_topk(unit, unit, 3, normalised=True, precision=precision)
    found = exact_topk(rows, rows, 3, precision=precision)
    np.testing.assert_array_equal(taken.indices, found.indices)
    np.testing.assert_allclose(taken.scores, found.scores, atol=1e-6)
    unit[7] *= 1.01
    with pytest.raises(InputError, match="row 7 of the gallery has norm 1.01"):
        exact_topk(unit[:1], unit, 3, normalised=True, precision=precision)


@pytest.mark.parametrize(
    ("value", "problem"), [(0.0, "is all zeros"), (np.nan, "not finite"), (-np.inf, "not finite")]
)
def test_rows_without_a_direction_are_named(value, problem):
    good, bad = np.ones((6, 3), dtype=np.float32), np.ones((6, 3), dtype=np.float32)
    bad[4] = value
    with pytest.raises(InputError, match=f"row 4 of the queries .*{problem}"):
        exact_topk(bad, good, 1)
    with pytest.raises(InputError, match=f"row 4 of the gallery .*{problem}"):
        exact_topk(good, bad, 1, precision="float32")
    with pytest.raises(InputError, match=f"row 4 of the gallery .*{problem}"):
        positive_ranks(good, bad, Positives(np.array([4]), np.array([1, 0, 0, 0, 0, 0])))
    with pytest.raises(InputError, match=f"row 4 of the embeddings .*{problem}"):
        require_directions(bad, np.array([0, 4]))
    require_directions(bad, np.array([0, 5]))


def test_nothing_to_search_or_nothing_to_search_for():
    some, none = np.ones((2, 3)), np.ones((0, 3))
    top = exact_topk(some, none, 2)
    assert top.indices.tolist() == [[-1, -1], [-1, -1]]
    assert np.all(top.scores == -np.inf)
    assert not top.relevance(np.array([0, 1]), np.array([], dtype=int)).any()
    assert exact_topk(none, some, 2).indices.shape == (0, 2)
    nothing = Positives.from_labels(np.array([0, 1]), np.array([], dtype=int))
    assert positive_ranks(some, none, nothing).tolist() == []


def test_relevance_of_what_was_found():
    gallery = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    top = exact_topk(gallery[:1], gallery, 4, leave_out=np.array([0]))
    # the padding's index is -1, the last row, which bears the query's label: it must not count
    assert top.indices.tolist() == [[1, 2, -1, -1]]
    assert top.relevance(np.array([7]), np.array([7, 3, 7])).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"memory_mib": 0}, "memory_mib=0"),
        ({"leave_out": np.array([0, 3])}, r"leave_out\[1\]=3"),
        ({"leave_out": np.array([-2, 0])}, r"leave_out\[0\]=-2"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        exact_topk(np.ones((2, 3)), np.ones((3, 3)), **{"k": 1, **wrong})


@pytest.mark.parametrize(("rows", "counts"), [([0, 3], [1, 1]), ([-1], [1, 0]), ([0], [1, 1])])
def test_impossible_positives_are_refused(rows, counts):
    with pytest.raises(InputError, match="positives"):
        positive_ranks(np.ones((2, 3)), np.ones((3, 3)), Positives(np.array(rows), np.array(counts)))


def test_the_own_picture_among_the_positives_is_refused():
    positives = Positives(np.array([0]), np.array([1]))
    with pytest.raises(InputError, match="own picture among its positives"):
        positive_ranks(np.ones((1, 3)), np.ones((3, 3)), positives, leave_out=np.array([0]))


def test_searching_and_evaluating_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import samething.evaluation, samething.retrieval"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
