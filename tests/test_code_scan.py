"""Exact search among codes, against float64 search among the vectors that come back of them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import samething.retrieval.code_scan as code_scan
from samething.retrieval import CodeScan, FewCodes, TopK, exact_topk, nearest_units
from samething.retrieval.codes import CodedRows, Coder


def unit_rows(random: np.random.Generator, num_rows: int, dim: int) -> np.ndarray:
    rows = random.standard_normal((num_rows, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def shortest(coder: Coder, codes: np.ndarray) -> float:
    return float(coder.lengths(codes).min())


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["int4", "int8"]),
    dim=st.integers(1, 40),
    num_rows=st.integers(65, 1500),
    num_distinct=st.integers(1, 1500),
    k=st.integers(1, 40),
    fitted_to=st.sampled_from(["the rows", "others", "one axis"]),
    seed=st.integers(0, 1000),
)
def test_the_scan_finds_what_float64_finds(kind, dim, num_rows, num_distinct, k, fitted_to, seed) -> None:
    """With copies, ties, several parts, and coders that cut many numbers off, so that lengths differ much."""
    random = np.random.default_rng(seed)
    rows = unit_rows(random, num_distinct, dim)[random.integers(0, num_distinct, num_rows)]
    others = unit_rows(random, 50, dim)
    coder = Coder.fit(
        {"the rows": rows, "others": others, "one axis": np.eye(1, dim, dtype=np.float32)}[fitted_to], kind
    )
    codes = coder.encode(rows)
    flat = np.sign(random.standard_normal((2, dim))).astype(np.float32) / np.float32(dim**0.5)
    queries = np.concatenate([rows[:2], coder.decode(codes[:2]), flat])
    scan = CodeScan(CodedRows(codes, coder), shortest=shortest(coder, codes))
    scan._rows_a_part = 416
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_scan, "_LEAST_ASKED", 64)
        found = [scan.nearest(queries, k) for _ in range(2)]  # lengths are known the second time
        for query in queries:  # the first search, of one query, has a way of its own
            fresh = CodeScan(CodedRows(codes, coder), shortest=shortest(coder, codes))
            found.append(fresh.nearest(query[None], k))
    truth = exact_topk(queries, coder.decode(codes), k, normalised=True)
    ones = [TopK(truth.indices[row : row + 1], truth.scores[row : row + 1]) for row in range(len(queries))]
    for top, wanted in zip(found, [truth, truth, *ones], strict=True):
        np.testing.assert_array_equal(top.scores, wanted.scores)
        np.testing.assert_array_equal(top.indices, wanted.indices)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_first_search_is_done_without_faiss(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it and bringing 100,000 rows into its order was a sixth of what ``find`` took."""
    random = np.random.default_rng(0)
    rows = unit_rows(random, 20_000, 512)
    codes = (coder := Coder.fit(rows[:1000], kind)).encode(rows)
    monkeypatch.setitem(sys.modules, "faiss", None)
    scan = CodeScan(CodedRows(codes, coder), shortest=shortest(coder, codes))
    assert len(codes) > scan._rows_a_part
    query = unit_rows(random, 1, 512)
    found, truth = scan.nearest(query, 5), nearest_units(query, scan.gallery, 5)
    assert (found.indices == truth.indices).all() and (found.scores == truth.scores).all()
    with pytest.raises(ImportError):
        scan.nearest(query, 5)


def test_rows_are_ruled_out_by_their_own_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short row made a search decode every row within its length of the nearest: most of its time."""
    random = np.random.default_rng(0)
    rows = unit_rows(random, 4000, 128)
    codes = (coder := Coder.fit(rows, "int4")).encode(rows)
    codes[7] = coder.encode(0.4 * rows[7:8])
    scan = CodeScan(CodedRows(codes, coder), shortest=shortest(coder, codes))
    decoded: list[int] = []
    decode = Coder.decode
    monkeypatch.setattr(Coder, "decode", lambda own, some: (decoded.append(len(some)), decode(own, some))[1])
    for query in unit_rows(random, 20, 128):
        scan.nearest(query[None], 5)
    monkeypatch.undo()
    assert sum(decoded[-20:]) < 10 * 400, decoded


@pytest.mark.parametrize("dim", [7, 64, 512, 2000])
def test_no_score_of_the_scan_is_off_by_more_than_is_said(dim: int) -> None:
    """Sums of bytes of many equal numbers would pass 2^16 and come back small: the nearest would be lost."""
    random = np.random.default_rng(dim)
    rows = unit_rows(random, 700, dim)
    rows[5] = np.sign(rows[5]) / dim**0.5
    coder = Coder.fit(rows, "int4")
    codes = coder.encode(rows)
    queries = np.concatenate([rows[5:6], -rows[5:6], rows[:3]])
    asked, errors = code_scan._asked(coder, queries)
    part = code_scan._part(codes, coder)
    scores, places = part.search(asked, 700)
    expected = queries.astype(np.float64) @ coder.decode(codes).T * coder.lengths(codes)
    off = np.abs(scores - np.take_along_axis(expected, places, axis=1)).max(axis=1)
    assert (off <= errors).all(), (off, errors)
    assert (errors < 0.1).all(), "so much that all rows would be looked at"
    assert places[0, 0] == 5


@pytest.mark.parametrize("is_searched", [True, False])
def test_few_rows_are_decoded_once_also_when_others_come(
    monkeypatch: pytest.MonkeyPatch, is_searched: bool
) -> None:
    """The server of 3,853 images took 8 ms of a processor for each query, most of it to scan and decode."""
    random = np.random.default_rng(0)
    rows = unit_rows(random, 300, 16)
    coder = Coder.fit(rows, "int4")
    codes = coder.encode(rows)
    truth = exact_topk(rows, coder.decode(codes), 3, normalised=True)
    decoded: list[int] = []
    decode = Coder.decode
    monkeypatch.setattr(Coder, "decode", lambda own, some: (decoded.append(len(some)), decode(own, some))[1])
    first = FewCodes(CodedRows(codes[:290], coder))
    if is_searched:
        first.nearest(rows[:2], 3)
    second = FewCodes(CodedRows(codes[:295], coder), before=first)  # never searched
    third = FewCodes(CodedRows(codes, coder), before=second)
    for _ in range(2):
        found = third.nearest(rows, 3)
        np.testing.assert_array_equal(found.scores, truth.scores)
        np.testing.assert_array_equal(found.indices, truth.indices)
    assert decoded == ([290, 10] if is_searched else [300])
    assert third.among(np.array([4, 7])).nearest(rows[7:8], 1).indices[0, 0] == 1


def test_a_later_scan_takes_over_what_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that adds ten rows would have cost bringing all rows into order."""
    random = np.random.default_rng(0)
    rows = unit_rows(random, 1000, 16)
    coder = Coder.fit(rows, "int4")
    codes = coder.encode(rows)
    monkeypatch.setattr(code_scan, "_PART_BYTES", 8 * 320)
    monkeypatch.setattr(code_scan, "_LEAST_ASKED", 64)
    made = []
    part = code_scan._part
    monkeypatch.setattr(code_scan, "_part", lambda *given: made.append(len(given[0])) or part(*given))
    least = shortest(coder, codes)
    before = CodeScan(CodedRows(codes[:990], coder), shortest=least)
    before.nearest(rows[:2], 3)
    assert made == [320, 320, 320, 30]
    later = CodeScan(CodedRows(codes, coder), shortest=least, before=before)
    found = later.nearest(rows[990:], 3)
    assert made[4:] == [40]
    truth = nearest_units(rows[990:], coder.decode(codes), 3)
    np.testing.assert_array_equal(found.indices, truth.indices)
    assert len(before.nearest(rows[:1], 3).indices[0]) == 3, "the earlier view is searched on"
