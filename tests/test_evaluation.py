"""Evaluation against a plain Python writing of the protocol, from the files to the JSON."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.evaluation import compare_embeddings, evaluate, evaluate_embeddings
from scenes import printed

HEADER = "img_path,label,domain,role"


def catalog_of(rows, root):
    """A catalog of (label, domain, role) rows whose images do not exist."""
    return Catalog.from_rows(
        [
            {"image": f"{number}.jpg", "label": label, "domain": domain, "role": role}
            for number, (label, domain, role) in enumerate(rows)
        ],
        root=root,
    )


def brute_force(embeddings, rows):
    """The numbers of both protocols, straight from their description."""

    def cosine(left, right):
        return round(
            math.fsum(float(x) * float(y) for x, y in zip(left, right, strict=True))
            / math.sqrt(math.fsum(float(x) ** 2 for x in left))
            / math.sqrt(math.fsum(float(y) ** 2 for y in right)),
            10,
        )

    def mean(values):
        return math.fsum(values) / len(values) if values else None

    answer = {}
    for protocol in ("merged", "per_domain"):
        scores = {}
        for query, (label, domain, role) in enumerate(rows):
            if role not in ("query", "query+index"):
                continue
            entries = [
                other
                for other, (_, its_domain, its_role) in enumerate(rows)
                if its_role in ("index", "query+index")
                and other != query
                and (protocol == "merged" or its_domain == domain)
            ]
            entries.sort(  # ties count against the model
                key=lambda other: (
                    -cosine(embeddings[query], embeddings[other]),
                    rows[other][:2] == (label, domain),
                )
            )
            hits = [rows[other][:2] == (label, domain) for other in entries]
            own = scores.setdefault(domain, {"none": 0, "mmp@5": [], "r@1": [], "map": []})
            if not any(hits):
                own["none"] += 1
                continue
            depth = min(sum(hits), 5)
            own["mmp@5"].append(sum(hits[:depth]) / depth)
            own["r@1"].append(float(hits[0]))
            own["map"].append(mean([sum(hits[: at + 1]) / (at + 1) for at, hit in enumerate(hits) if hit]))
        table = {
            domain: {
                "num_queries": len(own["map"]),
                "num_queries_without_positive": own["none"],
                **{metric: mean(own[metric]) for metric in ("mmp@5", "r@1", "map")},
            }
            for domain, own in sorted(scores.items())
        }
        counts = ("num_queries", "num_queries_without_positive")
        table["mean"] = {name: sum(row[name] for row in table.values()) for name in counts} | {
            metric: mean([row[metric] for name, row in table.items() if row[metric] is not None])
            for metric in ("mmp@5", "r@1", "map")
        }
        answer[protocol] = table
    return answer


def assert_same(found, expected):
    assert list(found) == list(expected)
    for protocol, table in expected.items():
        assert list(found[protocol]) == list(table)
        for domain, numbers in table.items():
            assert list(found[protocol][domain]) == list(numbers)
            for name, number in numbers.items():
                measured = found[protocol][domain][name]
                assert measured is number is None or abs(measured - number) <= 1e-12


@st.composite
def evaluations(draw):
    """Rows of few labels that recur across domains, and embeddings of few directions.

    Coordinates are 0 and ±1 in two dimensions, whose cosines are 0, ±1 and ±sqrt(1/2): many ties, and none of
    them on the edge between two decimals.
    """
    row = st.tuples(
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from(["art", "cars"]),
        st.sampled_from(["query", "index", "query+index", "train"]),
    )
    rows = draw(st.lists(row, min_size=2, max_size=14))
    rows += [("x", "art", "query"), ("y", "cars", "index")]
    rows = draw(st.permutations(rows))
    direction = st.tuples(st.integers(-1, 1), st.integers(-1, 1)).filter(any)
    embeddings = draw(st.lists(direction, min_size=len(rows), max_size=len(rows)))
    lengths = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=len(rows), max_size=len(rows)))
    kind = draw(st.sampled_from(["f2", "f4", "f8"]))
    return rows, np.array(embeddings, dtype=kind) * np.array(lengths, dtype=kind)[:, None]


@settings(max_examples=50, deadline=None)
@given(evaluations())
def test_both_protocols_equal_their_description(tmp_path_factory, case):
    rows, embeddings = case
    catalog = catalog_of(rows, tmp_path_factory.getbasetemp())
    result = evaluate_embeddings(embeddings, catalog, num_resamples=2)
    assert_same(result.to_json(), brute_force(embeddings, rows))


def test_random_embeddings_equal_the_description(tmp_path):
    generator = np.random.default_rng(0)
    roles = ["query", "index", "query+index", "train", "val"]
    rows = [
        (f"l{generator.integers(8)}", f"d{generator.integers(3)}", roles[generator.integers(5)])
        for _ in range(120)
    ]
    embeddings = generator.standard_normal((120, 7)).astype(np.float32)
    embeddings[5:40:5] = embeddings[4]  # duplicates, some of them ranked before the query itself
    result = evaluate_embeddings(embeddings, catalog_of(rows, tmp_path))
    assert_same(result.to_json(), brute_force(embeddings, rows))
    for scope in ("merged", "per_domain"):
        _, low, high = result.estimates(scope)["mean"]["map"]
        assert low < result.value("map", scope=scope) < high


def test_a_query_never_finds_itself_even_behind_its_duplicates(tmp_path):
    # all rows are equal, so the right one comes last of the three that are not the query
    rows = [("other", "d", "index"), ("other", "d", "index"), ("x", "d", "query+index"), ("x", "d", "index")]
    result = evaluate_embeddings(np.ones((4, 3)), catalog_of(rows, tmp_path))
    assert result.merged["map"].tolist() == [1 / 3]
    assert result.merged["r@1"].tolist() == [0]


@pytest.mark.parametrize("where", ["first", "last", "distractors"])
def test_an_embedding_that_is_constant_scores_the_least_there_is(where, tmp_path):
    """Ties went by row: one positive before 99 other entries, or beside 99 distractors, had a mAP of 1."""
    own, others = [("x", "d", "index")], [("y", "d", "index")] * 99
    rows = [("x", "d", "query"), *(others + own if where == "last" else own)]
    rows += others if where == "first" else []
    shard = tmp_path / "shard.npy"
    np.save(shard, np.ones((99, 4), np.float32))
    result = evaluate_embeddings(
        np.ones((len(rows), 4), np.float32),
        catalog_of(rows, tmp_path),
        protocol="ilias",
        distractors=[shard] if where == "distractors" else [],
    )
    assert result.merged["map@1000"].tolist() == [0.01]


def test_a_positive_with_a_negative_score_counts(tmp_path):
    rows = [("x", "d", "query"), ("x", "d", "index"), ("y", "d", "index")]
    embeddings = np.array([[1.0, 0.0], [-0.5, 0.1], [-1.0, 0.0]])
    assert evaluate_embeddings(embeddings, catalog_of(rows, tmp_path)).value("map") == 1.0


def test_the_same_label_in_another_domain_is_no_hit(tmp_path):
    rows = [("x", "a", "query"), ("x", "b", "index"), ("x", "a", "index"), ("x", "b", "query")]
    result = evaluate_embeddings(np.array([[1, 0], [1, 0], [1, 1], [1, 0.0]]), catalog_of(rows, tmp_path))
    assert result.to_json()["merged"]["a"]["map"] == 0.5
    assert result.to_json()["per_domain"]["a"]["map"] == 1.0
    assert result.query_rows.tolist() == [0, 3]


def test_domains_without_an_answer_are_left_out_of_the_mean(tmp_path):
    rows = [("x", "a", "query"), ("x", "a", "index"), ("y", "b", "query"), ("z", "c", "index")]
    numbers = evaluate_embeddings(np.eye(4), catalog_of(rows, tmp_path)).to_json()["merged"]
    assert numbers["b"] == {
        "num_queries": 0,
        "num_queries_without_positive": 1,
        "mmp@5": None,
        "r@1": None,
        "map": None,
    }
    assert numbers["mean"]["num_queries"] == numbers["mean"]["num_queries_without_positive"] == 1
    assert numbers["mean"]["map"] == numbers["a"]["map"]
    assert "c" not in numbers


def test_validation_images_are_searched_among_themselves(tmp_path):
    rows = [("x", "d", "val"), ("x", "d", "train"), ("x", "d", "val"), ("y", "d", "val"), ("y", "d", "query")]
    embeddings = np.array([[1, 0], [1, 0], [0.9, 0.1], [0, 1], [0, 1.0]])
    result = evaluate_embeddings(embeddings, catalog_of(rows, tmp_path), role="val")
    assert result.query_rows.tolist() == [0, 2, 3]
    assert result.merged["r@1"].tolist()[:2] == [1, 1]
    assert result.num_queries_without_positive() == 1


# ---- files


def write_case(folder, *, num_rows=4):
    rng = np.random.default_rng(0)
    rows = ["é 1.jpg,x,dom,query+index", "2.jpg,x,dom,index", "3.jpg,x,other,index", "4.jpg,x,other,query"]
    (folder / "c.csv").write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    np.save(folder / "e.npy", rng.standard_normal((num_rows, 8)).astype(np.float16))
    return folder / "e.npy", folder / "c.csv"


def test_files_in_and_exactly_the_agreed_json_out(tmp_path):
    embeddings, catalog = write_case(tmp_path)
    result = evaluate(embeddings=embeddings, catalog=catalog, json=tmp_path / "out.json", merged=False)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == result.to_json()
    assert list(written) == ["merged", "per_domain"]
    assert list(written["merged"]) == ["dom", "other", "mean"]
    names = ["num_queries", "num_queries_without_positive", "mmp@5", "r@1", "map"]
    assert all(list(row) == names for table in written.values() for row in table.values())
    assert written["per_domain"]["dom"]["map"] == 1.0
    assert result.shown == "per_domain"
    rows = np.load(embeddings)
    assert evaluate_embeddings(rows, Catalog.read(catalog)).to_json() == written
    Catalog.read(catalog).write(tmp_path / "c.parquet")
    assert evaluate(embeddings=embeddings, catalog=tmp_path / "c.parquet").to_json() == written


def test_files_that_do_not_fit_are_both_named(tmp_path):
    embeddings, catalog = write_case(tmp_path, num_rows=5)
    with pytest.raises(InputError, match=r"e\.npy has 5 rows and .*c\.csv has 4"):
        evaluate(embeddings=embeddings, catalog=catalog)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(4), r"float64 of shape \(4,\)"),
        (np.ones((4, 2), dtype=np.int64), "int64 of shape"),
        (np.array([[{}]] * 4), "cannot be read"),
    ],
)
def test_arrays_that_are_no_embeddings_are_refused(tmp_path, content, message):
    embeddings, catalog = write_case(tmp_path)
    np.save(embeddings, content, allow_pickle=True)
    with pytest.raises((InputError, ArtefactError), match=message):
        evaluate(embeddings=embeddings, catalog=catalog)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "npz"])
def test_damaged_files_are_refused(tmp_path, damage):
    embeddings, catalog = write_case(tmp_path)
    whole = embeddings.read_bytes()
    embeddings.unlink()
    if damage == "npz":
        np.savez(tmp_path / "two.npz", a=np.ones(2))
        (tmp_path / "two.npz").rename(embeddings)
    elif damage != "missing":
        embeddings.write_bytes({"empty": b"", "cut": whole[:-9], "text": b"1,2\n3,4\n"}[damage])
    with pytest.raises((InputError, ArtefactError), match=r"e\.npy"):
        evaluate(embeddings=embeddings, catalog=catalog)


# ---- what is refused


def test_a_bad_row_is_named_by_its_catalog_row_if_it_is_used(tmp_path):
    rows = [("x", "d", "train"), ("x", "d", "query"), ("y", "d", "train"), ("x", "d", "index")]
    embeddings = np.ones((4, 2))
    embeddings[2] = np.nan
    evaluate_embeddings(embeddings, catalog_of(rows, tmp_path))
    embeddings[3] = 0
    with pytest.raises(InputError, match="row 3 of the embeddings is all zeros"):
        evaluate_embeddings(embeddings, catalog_of(rows, tmp_path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("x", "mean", "query"), ("x", "d", "index")], "a domain called 'mean'"),
        ([("x", "d", "query"), ("x", "d", "train")], "1 query images and 0 index"),
        ([("x", "d", "index"), ("x", "d", "train")], "0 query images and 1 index"),
        ([("x", "d", "index"), ("", "d", "query")], "row 1 .*empty label"),
    ],
)
def test_catalogs_that_cannot_be_evaluated(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        evaluate_embeddings(np.ones((2, 2)), catalog_of(rows, tmp_path))


def test_other_arguments_that_are_refused(tmp_path):
    catalog = catalog_of([("x", "d", "query"), ("x", "d", "index")], tmp_path)
    with pytest.raises(InputError, match="3 embeddings for a catalog of 2"):
        evaluate_embeddings(np.ones((3, 2)), catalog)
    with pytest.raises(InputError, match="num_resamples=0"):
        evaluate_embeddings(np.ones((2, 2)), catalog, num_resamples=0)
    with pytest.raises(InputError, match="domain 'cats'"):
        evaluate_embeddings(np.ones((2, 2)), catalog).value("map", domain="cats")


# ---- printing and comparing


@pytest.fixture
def noisy(tmp_path):
    """100 things with 4 images each in two domains, and embeddings of two qualities."""
    generator = np.random.default_rng(0)
    labels = np.arange(400) // 4
    rows = [(f"thing {label}", "art [x]" if label < 30 else "cars", "query+index") for label in labels]
    centres = generator.standard_normal((100, 16))[labels]
    noise = generator.standard_normal((400, 16))
    good = (centres + 0.8 * noise).astype(np.float32)
    poor = (centres + 1.4 * noise)[:, :8].astype(np.float32)
    return {"good": good, "poor": poor}, catalog_of(rows, tmp_path)


def test_the_table_shows_domains_mean_and_intervals(noisy):
    embeddings, catalog = noisy
    result = evaluate_embeddings(embeddings["good"], catalog)
    text = printed(result)
    _, low, high = result.estimates("merged")["mean"]["mmp@5"]
    assert f"{100 * result.value('mmp@5'):.1f} ({100 * low:.1f}–{100 * high:.1f})" in text
    for word in ("art [x]", "cars", "mean", "400", "mMP@5", "R@1", "mAP", "one index over all domains"):
        assert word in text


def test_a_comparison_says_which_is_ahead(noisy):
    embeddings, catalog = noisy
    comparison = compare_embeddings(embeddings, catalog)
    ahead = comparison.difference("good", "poor", metric="map")
    values = [comparison.results[name].value("map") for name in ("good", "poor")]
    assert ahead.difference == pytest.approx(values[0] - values[1])
    assert 0 < ahead.low < ahead.difference < ahead.high
    assert ahead.num_queries == 400
    back = comparison.difference("poor", "good", metric="map")
    assert back.difference == pytest.approx(-ahead.difference)
    content = comparison.to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["poor"]["dimension"] == 8
    assert content["good"]["merged"] == comparison.results["good"].to_json()["merged"]
    low, high = content["good"]["intervals"]["per_domain"]["cars"]["r@1"]
    assert low <= content["good"]["per_domain"]["cars"]["r@1"] <= high
    text = printed(comparison)
    for word in ("good", "poor", "16", "art [x]", "Mean of 2 domains", f"{100 * values[0]:.1f} ("):
        assert word in text
    with pytest.raises(InputError, match="'best'"):
        comparison.difference("best", "good")
    with pytest.raises(InputError, match="no embeddings"):
        compare_embeddings({}, catalog)


def test_a_thousand_queries_take_seconds(tmp_path):
    generator = np.random.default_rng(0)
    rows = [(f"{i % 300}", f"d{i % 3}", "query" if i < 1000 else "index") for i in range(4000)]
    embeddings = generator.standard_normal((4000, 1280)).astype(np.float16)
    catalog = catalog_of(rows, tmp_path)
    start = time.process_time()
    result = evaluate_embeddings(embeddings, catalog)
    result.intervals()
    # processor time, because machines are busy; loose, but it refuses a loop over pairs
    assert time.process_time() - start < 10
    assert result.num_queries() == 1000
