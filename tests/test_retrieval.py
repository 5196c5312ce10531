"""Exact search against sorting in plain Python, with ties, duplicates and every block size."""

import contextlib
import importlib.util
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samething.errors import InputError
from samething.retrieval import (
    RankCounter,
    Relevant,
    exact_topk,
    nearest,
    require_directions,
    scores,
    tiles,
)


def cosine(left, right):
    """By a correctly rounded sum."""
    dot = math.fsum(float(x) * float(y) for x, y in zip(left, right, strict=True))
    return dot / (math.hypot(*map(float, left)) * math.hypot(*map(float, right)))


def relevant_of(query_labels, gallery_labels, leave_out=None):
    """Entries that bear the query's label."""
    asked, offered = ((np.arange(len(labels)), labels) for labels in (query_labels, gallery_labels))
    return Relevant.by_labels(asked, offered, num_queries=len(query_labels), leave_out=leave_out)


def positive_ranks(queries, gallery, query_labels, gallery_labels, *, leave_out=None, **options):
    """The ranks of all entries with the query's label, and how many each query has."""
    relevant = relevant_of(query_labels, gallery_labels, leave_out)
    counter = RankCounter(queries, gallery, relevant, leave_out=leave_out, **options)
    counter.count(gallery)
    return counter.ranks(), relevant.counts


def brute_ranking(query, gallery, left_out):
    """Gallery rows with their scores to 10 decimals, best first, of equal ones the lower row."""
    scores = [cosine(query, row) for row in gallery]
    # a cosine on the edge between two decimals may go either way
    assume(all(abs(score * 1e10 % 1 - 0.5) > 0.01 for score in scores))
    scored = [(-round(score, 10), number) for number, score in enumerate(scores) if number != left_out]
    return [(number, -negative) for negative, number in sorted(scored)]


def ranks_against(ranking, is_relevant):
    """Ranks of the relevant rows, where of equal scores they come behind the others."""
    order = sorted(ranking, key=lambda entry: (-entry[1], is_relevant[entry[0]]))
    return [rank for rank, (number, _) in enumerate(order, 1) if is_relevant[number]]


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
    """The given numbers of queries and gallery rows per block, or those that the memory allows."""
    with pytest.MonkeyPatch.context() as patch:
        if sizes:
            patch.setattr(scores, "_tile_sizes", lambda *_: sizes)
        yield


# on a card torch multiplies and answers; the same lines run on its device "cpu"
NEEDS_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no torch here")
EVERY_BLOCK = pytest.mark.parametrize(
    ("sizes", "device"),
    [
        *((sizes, None) for sizes in (None, (1, 1), (1, 3), (2, 1), (3, 2))),
        pytest.param((2, 3), "cpu", marks=NEEDS_TORCH),
    ],
)


@EVERY_BLOCK
@settings(max_examples=20, deadline=None)
@given(case=searches(), k=st.integers(1, 12))
def test_topk_equals_sorting(device, sizes, case, k):
    with blocks_of(sizes):
        found = exact_topk(case["queries"], case["gallery"], k, leave_out=case["leave_out"], device=device)
    for query, row in enumerate(case["queries"]):
        expected = brute_ranking(row, case["gallery"], case["leave_out"][query])[:k]
        padding = k - len(expected)
        assert found.indices[query].tolist() == [number for number, _ in expected] + [-1] * padding
        np.testing.assert_allclose(
            found.scores[query], [score for _, score in expected] + [-np.inf] * padding, rtol=0, atol=1e-12
        )


@EVERY_BLOCK
@settings(max_examples=20, deadline=None)
@given(case=searches())
def test_ranks_equal_sorting(device, sizes, case):
    with blocks_of(sizes):
        found, counts = positive_ranks(**case, device=device)
    expected = []
    for query, row in enumerate(case["queries"]):
        ranking = brute_ranking(row, case["gallery"], case["leave_out"][query])
        expected.append(ranks_against(ranking, case["gallery_labels"] == case["query_labels"][query]))
    assert counts.tolist() == [len(own) for own in expected]
    assert found.tolist() == list(itertools.chain(*expected))


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


def best_columns(row, k):
    found = nearest._reaching(row, k)
    return found[np.argsort(-row[found], kind="stable")[:k]].tolist()


@pytest.mark.parametrize("k", [1, 3, 7, 8, 200, 600])
def test_the_best_of_many_columns_equal_sorting(k):
    # 500 columns make 7 groups of 64 and a rest; few different scores make many ties
    row = np.random.default_rng(k).integers(-9, 10, size=500) / 10
    row[[7, 499]] = 1.0, -np.inf
    expected = sorted(range(500), key=lambda column: (-row[column], column))[:k]
    assert best_columns(row, k) == expected


def test_the_best_may_lie_in_groups_of_their_own():
    # each of the 4 best has a group for itself: a threshold one group too high would miss the last
    row = np.arange(512) / -1000 - 1
    row[[3, 2, 1, 0]] = 0.9, 0.8, 0.7, 0.6
    assert best_columns(row, 4) == [3, 2, 1, 0]


@pytest.mark.parametrize("precision", [pytest.param("float64", marks=pytest.mark.slow), "float32"])
@pytest.mark.parametrize("memory_mib", [8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("collapsed", [False, True])
def test_the_ceiling_holds(precision, memory_mib, collapsed):
    gallery = np.random.default_rng(3).standard_normal((10_000, 64)).astype(np.float16)
    if collapsed:
        gallery[:] = gallery[0]
    labels = np.arange(10_000) // 4
    options = {"memory_mib": memory_mib, "precision": precision}
    some = 220 if memory_mib == 8 else 440
    for search in (
        lambda: exact_topk(gallery[:some], gallery, 5, **options),
        lambda: positive_ranks(gallery[:some], gallery, labels[:some], labels, **options),
    ):
        tracemalloc.start()
        search()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < memory_mib * 2**20  # in float64 all pairs would take 17 and 34 MiB


def test_no_queries_and_no_gallery():
    rows, none = np.ones((3, 2)), np.ones((0, 2))
    assert exact_topk(none, rows, 2).indices.shape == (0, 2)
    assert exact_topk(rows, none, 2).indices.tolist() == [[-1, -1]] * 3
    found, counts = positive_ranks(rows, none, np.zeros(3, dtype=int), np.zeros(0, dtype=int))
    assert len(found) == 0
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


# ---- Euclidean distance


def brute_euclidean(query, gallery, left_out, scale):
    """Gallery rows with minus their squared distances, nearest first, to 10 decimals of the squared scale."""
    scored = []
    for number, row in enumerate(gallery):
        square = math.fsum((float(x) - float(y)) ** 2 for x, y in zip(query, row, strict=True)) / scale**2
        if number != left_out:
            scored.append((round(square, 10), number))
    return [(number, -square * scale**2) for square, number in sorted(scored)]


@EVERY_BLOCK
@settings(max_examples=12, deadline=None)
@given(case=searches(), k=st.integers(1, 12))
def test_euclidean_topk_and_ranks_equal_sorting(device, sizes, case, k):
    lengths = [math.hypot(*map(float, row)) for side in ("queries", "gallery") for row in case[side]]
    scale = 2.0 ** math.ceil(math.log2(max(lengths)))
    rows = {"queries": case["queries"], "gallery": case["gallery"], "leave_out": case["leave_out"]}
    with blocks_of(sizes):
        found = exact_topk(**rows, k=k, distance="euclidean", device=device)
        own_ranks, counts = positive_ranks(**case, distance="euclidean", device=device)
    expected_ranks = []
    for query, row in enumerate(case["queries"]):
        ranking = brute_euclidean(row, case["gallery"], case["leave_out"][query], scale)
        assert found.indices[query].tolist() == ([number for number, _ in ranking] + [-1] * k)[:k]
        np.testing.assert_allclose(
            found.scores[query],
            ([score for _, score in ranking] + [-np.inf] * k)[:k],
            rtol=0,
            atol=1e-12 * scale**2,
        )
        expected_ranks += ranks_against(ranking, case["gallery_labels"] == case["query_labels"][query])
    assert own_ranks.tolist() == expected_ranks and counts.sum() == len(expected_ranks)


def test_euclidean_search_knows_lengths_and_zeros():
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0]])
    found = exact_topk(np.array([[2.0, 0.0]]), rows, 3, distance="euclidean")
    assert found.indices.tolist() == [[1, 0, 2]] and found.scores.tolist() == [[-1.0, -4.0, -64.0]]
    with pytest.raises(InputError, match=r"row 1 of the gallery .*not finite"):
        exact_topk(rows, np.array([[1.0, 0.0], [np.nan, 0.0]]), 1, distance="euclidean")
    with pytest.raises(InputError, match="squares are finite"):
        exact_topk(rows, rows * 1e200, 1, distance="euclidean")


# ---- float32 by groups


@pytest.mark.parametrize("multiplication", ["numpy", "torch"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("memory_mib", [1, 64])
@pytest.mark.parametrize("ordered", [False, True])
def test_groups_find_what_float64_finds(monkeypatch, multiplication, distance, memory_mib, ordered):
    if multiplication == "numpy":
        monkeypatch.setattr(tiles, "_torch_if_it_pays", lambda _: None)
    else:
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(tiles, "_torch_if_it_pays", lambda _: torch)
    generator = np.random.default_rng(3)
    gallery = generator.standard_normal((5003, 24)).astype(np.float32)
    queries = gallery[:300] + 0.1 * generator.standard_normal((300, 24)).astype(np.float32)
    if ordered:  # every part of the gallery is nearer than the one before
        gallery = gallery[np.argsort(gallery @ queries[0])]
    leave_out = np.where(np.arange(300) % 2, np.arange(300), -1)
    options = {"leave_out": leave_out, "distance": distance}
    fast = exact_topk(queries, gallery, 5, precision="float32", memory_mib=memory_mib, **options)
    exact = exact_topk(queries, gallery, 5, **options)
    np.testing.assert_allclose(
        fast.scores, exact.scores, rtol=0, atol=3e-5 if distance == "euclidean" else 1e-6
    )
    assert np.mean(fast.indices == exact.indices) > 0.999
    assert not np.any(fast.indices == leave_out[:, None])


def test_groups_of_equal_rows_and_of_negative_scores(monkeypatch):
    monkeypatch.setattr(tiles, "_torch_if_it_pays", lambda _: None)
    equal = np.ones((2001, 3), dtype=np.float32)
    found = exact_topk(equal[:9], equal, 5, precision="float32", leave_out=np.arange(9))
    assert all(len(set(row)) == 5 and own not in row for own, row in enumerate(found.indices.tolist()))
    # padding of the last group scores 0, above everything here, and must not be found
    opposite = exact_topk(-equal[:2], equal, 5, precision="float32")
    assert np.all((opposite.indices >= 0) & (opposite.indices < 2001))
    np.testing.assert_allclose(opposite.scores, -1, atol=1e-6)


def test_torch_is_left_as_it_was_and_not_imported_for_small_jobs(monkeypatch):
    torch = pytest.importorskip("torch")
    before = torch.get_float32_matmul_precision()
    rows = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32)
    exact_topk(rows[:3], rows, 2, precision="float32")
    assert torch.get_float32_matmul_precision() == before
    monkeypatch.delitem(__import__("sys").modules, "torch")
    assert tiles._torch_if_it_pays(1e6) is None


# ---- on a device


@NEEDS_TORCH
@pytest.mark.parametrize(("distance", "memory_mib"), [("cosine", 1), ("euclidean", 64)])
def test_a_device_finds_the_same_to_the_bit(memory_mib, distance):
    """Of 3,000 rows, many are equal, so many that ties alone outnumber what groups can hold."""
    rng = np.random.default_rng(5)
    few = rng.standard_normal((30, 24)).astype(np.float32)
    gallery = np.concatenate([few[rng.integers(0, 30, 2000)], np.tile(few[0], (1000, 1))])
    queries = np.concatenate([few[:9], rng.standard_normal((50, 24)).astype(np.float32)])
    labels = rng.integers(0, 40, 59), rng.integers(0, 40, 3000)
    leave_out = rng.integers(-1, 3000, 59)
    options = {"memory_mib": memory_mib, "distance": distance}
    for k in (1, 5, 60):
        ours, theirs = (
            exact_topk(queries, gallery, k, leave_out=leave_out, device=device, **options)
            for device in (None, "cpu")
        )
        assert ours.indices.tobytes() == theirs.indices.tobytes()
        assert ours.scores.tobytes() == theirs.scores.tobytes()
    ours, theirs = (
        positive_ranks(queries, gallery, *labels, leave_out=leave_out, device=device, **options)[0]
        for device in (None, "cpu")
    )
    assert ours.tolist() == theirs.tolist()
    fast = exact_topk(queries[9:], gallery, 5, device="cpu", precision="float32", **options)
    exact = exact_topk(queries[9:], gallery, 5, **options)
    assert np.array_equal(gallery[fast.indices], gallery[exact.indices])  # of equal rows any may come first
    np.testing.assert_allclose(fast.scores, exact.scores, rtol=0, atol=1e-6 if distance == "cosine" else 3e-5)


def test_a_card_is_taken_for_big_jobs_alone_where_torch_is_loaded(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small, big = np.ones((10, 64)), np.broadcast_to(np.float32(1), (1_000_000, 64))
    options = {"precision": "float64", "distance": "cosine", "normalised": False}
    assert scores.Scorer.of(small, big, **options).device is None
    assert scores.Scorer.of(big, big, **options).device.type == "cuda"
    monkeypatch.delitem(__import__("sys").modules, "torch")
    assert scores.Scorer.of(big, big, **options).device is None


# ---- relevance and streams


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_relevance_of_several_labels_is_their_intersection(data):
    label_sets = st.lists(st.sets(st.integers(0, 4), max_size=3), min_size=1, max_size=6)
    asked, offered = data.draw(label_sets), data.draw(label_sets)
    hidden = data.draw(st.lists(st.integers(-1, len(offered) - 1), min_size=len(asked), max_size=len(asked)))

    def pairs(sets):
        flat = [(row, label) for row, labels in enumerate(sets) for label in labels]
        return tuple(np.array([pair[side] for pair in flat], dtype=np.int64) for side in (0, 1))

    found = Relevant.by_labels(
        pairs(asked), pairs(offered), num_queries=len(asked), leave_out=np.array(hidden)
    )
    expected = [
        [row for row, labels in enumerate(offered) if labels & wanted and row != out]
        for wanted, out in zip(asked, hidden, strict=True)
    ]
    assert found.counts.tolist() == [len(rows) for rows in expected]
    assert found.rows.tolist() == list(itertools.chain(*expected))


@settings(max_examples=40, deadline=None)
@given(case=searches(), cut=st.integers(0, 9))
def test_ranks_of_a_stream_are_those_of_the_whole(case, cut):
    gallery, labels = case["gallery"], case["gallery_labels"].copy()
    labels[cut:] = 9  # what comes later holds nothing relevant
    case = {**case, "gallery_labels": labels}
    expected, counts = positive_ranks(**case)
    relevant = relevant_of(case["query_labels"], labels, case["leave_out"])
    counter = RankCounter(case["queries"], gallery, relevant, leave_out=case["leave_out"])
    for part in (gallery[:cut], gallery[cut : cut + 1], gallery[cut + 1 :]):
        counter.count(part)
    assert counter.ranks().tolist() == expected.tolist() and relevant.counts.tolist() == counts.tolist()


def test_ties_over_many_groups_go_to_the_lower_row_in_float32():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 16)).astype(np.float32)
    gallery = vectors[rng.integers(0, 7, 3000)]
    found = exact_topk(vectors, gallery, 5, precision="float32").indices
    for query, rows in enumerate(found):
        assert rows.tolist() == np.flatnonzero((gallery == vectors[query]).all(axis=1))[:5].tolist()
