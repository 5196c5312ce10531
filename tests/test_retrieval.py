"""Exact search against sorting in plain Python, with ties, duplicates and every block size."""

import contextlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samething import retrieval
from samething.errors import InputError
from samething.retrieval import exact_topk, positive_ranks, require_directions


def cosine(left, right):
    """By a correctly rounded sum."""
    dot = math.fsum(float(x) * float(y) for x, y in zip(left, right, strict=True))
    return dot / (math.hypot(*map(float, left)) * math.hypot(*map(float, right)))


def brute_ranking(query, gallery, left_out):
    """Gallery rows with their scores to 10 decimals, best first, of equal ones the lower row."""
    scores = [cosine(query, row) for row in gallery]
    # a cosine on the edge between two decimals may go either way
    assume(all(abs(score * 1e10 % 1 - 0.5) > 0.01 for score in scores))
    scored = [(-round(score, 10), number) for number, score in enumerate(scores) if number != left_out]
    return [(number, -negative) for negative, number in sorted(scored)]


@st.composite
def searches(draw):
    """Few directions in few dimensions, so that ties, duplicates and negative scores are common."""
    width = draw(st.integers(1, 4))
    coordinate = st.integers(-3, 3)
    row = st.lists(coordinate, min_size=width, max_size=width).filter(any)
    gallery = draw(st.lists(row, min_size=1, max_size=9))
    num_queries = draw(st.integers(1, 5))
    queries = draw(
        st.lists(st.one_of(row, st.sampled_from(gallery)), min_size=num_queries, max_size=num_queries)
    )
    per_query = {"min_size": num_queries, "max_size": num_queries}
    left_out = draw(st.lists(st.integers(-1, len(gallery) - 1), **per_query))
    labels = st.integers(0, 2)
    return {
        "queries": np.array(queries, dtype=draw(st.sampled_from(["f2", "f4", "f8"]))),
        "gallery": np.array(gallery, dtype=draw(st.sampled_from(["f2", "f4", "f8"]))),
        "leave_out": np.array(left_out),
        "query_labels": np.array(draw(st.lists(labels, **per_query))),
        "gallery_labels": np.array(draw(st.lists(labels, min_size=len(gallery), max_size=len(gallery)))),
    }


@contextlib.contextmanager
def blocks_of(sizes):
    """The given numbers of queries and gallery rows a block, or those that the memory allows."""
    with pytest.MonkeyPatch.context() as patch:
        if sizes:
            patch.setattr(retrieval, "_block_sizes", lambda *_: sizes)
        yield


EVERY_BLOCK = pytest.mark.parametrize("sizes", [None, (1, 1), (1, 3), (2, 1), (3, 2)])


@EVERY_BLOCK
@settings(max_examples=40, deadline=None)
@given(case=searches(), k=st.integers(1, 12))
def test_topk_equals_sorting(sizes, case, k):
    with blocks_of(sizes):
        found = exact_topk(case["queries"], case["gallery"], k, leave_out=case["leave_out"])
    for query, row in enumerate(case["queries"]):
        expected = brute_ranking(row, case["gallery"], case["leave_out"][query])[:k]
        padding = k - len(expected)
        assert found.indices[query].tolist() == [number for number, _ in expected] + [-1] * padding
        np.testing.assert_allclose(
            found.scores[query], [score for _, score in expected] + [-np.inf] * padding, rtol=0, atol=1e-12
        )


@EVERY_BLOCK
@settings(max_examples=40, deadline=None)
@given(case=searches())
def test_ranks_equal_sorting(sizes, case):
    with blocks_of(sizes):
        ranks, counts = positive_ranks(**case)
    expected = []
    for query, row in enumerate(case["queries"]):
        ranking = brute_ranking(row, case["gallery"], case["leave_out"][query])
        label = case["query_labels"][query]
        expected.append(
            [rank for rank, (number, _) in enumerate(ranking, 1) if case["gallery_labels"][number] == label]
        )
    assert counts.tolist() == [len(own) for own in expected]
    assert ranks.tolist() == list(itertools.chain(*expected))


@pytest.mark.parametrize("memory_mib", [1, 256])
def test_equal_rows_tie_to_the_bit_wherever_they_lie(memory_mib):
    generator = np.random.default_rng(0)
    few = generator.standard_normal((40, 64)).astype(np.float32)
    which = generator.integers(40, size=2000)
    found = exact_topk(few, few[which], 2000, memory_mib=memory_mib)
    for query in range(0, 40, 7):
        score_of = {}
        for row, score in zip(found.indices[query], found.scores[query], strict=True):
            assert score_of.setdefault(which[row], score) == score
        order = sorted(range(2000), key=lambda row: (-score_of[which[row]], row))
        assert found.indices[query].tolist() == order


def test_scores_do_not_depend_on_the_memory_and_are_right_to_ten_decimals():
    generator = np.random.default_rng(1)
    queries, gallery = generator.standard_normal((30, 300)), generator.standard_normal((400, 300))
    ample = exact_topk(queries, gallery, 400)
    tight = exact_topk(queries, gallery, 400, memory_mib=1)
    np.testing.assert_array_equal(ample.indices, tight.indices)
    np.testing.assert_array_equal(ample.scores, tight.scores)
    for query in (0, 17):
        for row, score in zip(ample.indices[query][:20], ample.scores[query], strict=False):
            assert score == pytest.approx(cosine(queries[query], gallery[row]), rel=0, abs=0.51e-10)


def test_float32_finds_the_same_where_scores_are_apart():
    generator = np.random.default_rng(2)
    queries, gallery = generator.standard_normal((20, 16)), generator.standard_normal((60, 16))
    exact, fast = exact_topk(queries, gallery, 5), exact_topk(queries, gallery, 5, precision="float32")
    np.testing.assert_array_equal(exact.indices, fast.indices)
    assert fast.scores.dtype == np.float32
    np.testing.assert_allclose(exact.scores, fast.scores, atol=1e-6)


def test_very_large_and_very_small_rows_have_a_direction_too():
    rows = np.array([[3e300, 4e300], [3e-300, 4e-300], [5e-324, 0.0]])
    assert exact_topk(rows, rows, 3).scores[0].tolist() == [1.0, 1.0, 0.6]
    half = np.array([[6e4, 6e4], [6e-8, 6e-8]], dtype=np.float16)
    assert exact_topk(half, half, 2).indices.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("k", [1, 3, 15, 16, 200, 600])
def test_the_best_of_many_columns_equal_sorting(k):
    # 500 columns make 15 groups of 32 and a rest; few different scores make many ties
    row = np.random.default_rng(k).integers(-9, 10, size=500) / 10
    row[[7, 499]] = 1.0, -np.inf
    expected = sorted(range(500), key=lambda column: (-row[column], column))[:k]
    assert retrieval._best_columns(row, k).tolist() == expected


def test_the_best_may_lie_in_groups_of_their_own():
    # each of the 4 best has a group for itself: a threshold one group too high would miss the last
    row = np.arange(512) / -1000 - 1
    row[[3, 2, 1, 0]] = 0.9, 0.8, 0.7, 0.6
    assert retrieval._best_columns(row, 4).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("memory_mib", [8, 32])
@pytest.mark.parametrize("collapsed", [False, True])
def test_the_ceiling_holds(precision, memory_mib, collapsed):
    gallery = np.random.default_rng(3).standard_normal((10_000, 64)).astype(np.float16)
    if collapsed:
        gallery[:] = gallery[0]
    labels = np.arange(10_000) // 4
    options = {"memory_mib": memory_mib, "precision": precision}
    for search in (
        lambda: exact_topk(gallery[:700], gallery, 5, **options),
        lambda: positive_ranks(gallery[:700], gallery, labels[:700], labels, **options),
    ):
        tracemalloc.start()
        search()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < memory_mib * 2**20  # all pairs would take 53 MiB, 27 in float32


def test_no_queries_and_no_gallery():
    rows, none = np.ones((3, 2)), np.ones((0, 2))
    assert exact_topk(none, rows, 2).indices.shape == (0, 2)
    assert exact_topk(rows, none, 2).indices.tolist() == [[-1, -1]] * 3
    ranks, counts = positive_ranks(rows, none, np.zeros(3, dtype=int), np.zeros(0, dtype=int))
    assert len(ranks) == 0
    assert counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    ("value", "problem"), [(0.0, "is all zeros"), (np.nan, "not finite"), (np.inf, "not finite")]
)
def test_rows_without_a_direction_are_named(value, problem, precision):
    rows = np.ones((5, 3), dtype=np.float32)
    rows[3] = value
    with pytest.raises(InputError, match=f"row 3 of the gallery .*{problem}"):
        exact_topk(rows[:2], rows, 1, precision=precision)
    with pytest.raises(InputError, match=f"row 3 of the queries .*{problem}"):
        exact_topk(rows, rows[:2], 1, precision=precision)
    with pytest.raises(InputError, match=f"row 3 of the embeddings .*{problem}"):
        require_directions(rows, np.array([0, 3]))
    require_directions(rows, np.array([0, 4]))


def test_rows_called_normalised_are_checked_and_taken_as_they_are():
    rows = np.array([[0.6, 0.8], [1.0, 0.0]])
    assert exact_topk(rows, rows, 2, normalised=True).scores.tolist() == [[1.0, 0.6], [1.0, 0.6]]
    with pytest.raises(InputError, match="row 1 of the gallery has norm 2"):
        exact_topk(rows, rows * [[1], [2]], 1, normalised=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"memory_mib": 0}, "memory_mib=0"),
        ({"leave_out": np.array([0, 2])}, r"leave_out\[1\]=2"),
        ({"leave_out": np.array([-2, 0])}, r"leave_out\[0\]=-2"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, message):
    rows = np.eye(2)
    with pytest.raises(InputError, match=message):
        exact_topk(rows, rows, **{"k": 1, **wrong})
