"""Every protocol against plain Python writings that share nothing with the package."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.evaluation import PROTOCOLS, evaluate, evaluate_embeddings
from samething.evaluation.embedding_files import read_descriptors, write_descriptors
from samething.evaluation.protocols import Protocol, challenge_domain, composite_weights

DOMAINS = ["cars", "toys", "birds"]


@st.composite
def cases(draw):
    """Few labels and few directions: ties, duplicates, negative scores, several labels, no positives."""
    row = st.fixed_dictionaries(
        {
            "label": st.sampled_from(["x", "y", "z"]),
            "labels": st.lists(st.sampled_from(["x", "y", "w"]), max_size=2),
            "domain": st.sampled_from(DOMAINS),
            "role": st.sampled_from(["query", "index", "query+index", "train"]),
        }
    )
    rows = draw(st.lists(row, min_size=2, max_size=13))
    rows.append({"label": "x", "labels": [], "domain": "cars", "role": "query"})
    rows.append({"label": "y", "labels": ["x"], "domain": "toys", "role": "index"})
    rows = draw(st.permutations(rows))
    direction = st.tuples(st.integers(-1, 1), st.integers(-1, 1)).filter(any)
    vectors = draw(st.lists(direction, min_size=len(rows), max_size=len(rows)))
    lengths = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=len(rows), max_size=len(rows)))
    distractors = draw(st.lists(direction, max_size=5))
    return (
        rows,
        np.array(vectors, dtype=np.float32) * np.array(lengths, dtype=np.float32)[:, None],
        np.array(distractors, dtype=np.float32).reshape(-1, 2),
    )


def catalog_of(rows, root):
    return Catalog.from_rows([{"image": f"{n}.jpg", **row} for n, row in enumerate(rows)], root=root)


def similarity(rule, left, right):
    if rule == "euclidean":
        return -round(sum((float(x) - float(y)) ** 2 for x, y in zip(left, right, strict=True)), 6)
    dot = math.fsum(float(x) * float(y) for x, y in zip(left, right, strict=True))
    return round(dot / math.hypot(*map(float, left)) / math.hypot(*map(float, right)), 10)


def rankings(rows, vectors, distractors, *, rule, per_domain):
    """Each query's domain and its whole ranking as booleans."""
    for query, asked in enumerate(rows):
        if "query" not in asked["role"]:
            continue
        wanted = {asked["label"], *asked["labels"]}
        entries = []
        for other, row in enumerate(rows):
            if (
                "index" not in row["role"]
                or other == query
                or (per_domain and row["domain"] != asked["domain"])
            ):
                continue
            hit = row["domain"] == asked["domain"] and bool(wanted & {row["label"], *row["labels"]})
            entries.append((-similarity(rule, vectors[query], vectors[other]), hit, other))
        if not per_domain:
            for number, vector in enumerate(distractors):
                entries.append((-similarity(rule, vectors[query], vector), False, len(rows) + number))
        yield asked["domain"], [hit for _, hit, _ in sorted(entries)]  # ties count against the model


def score(metric, ranking):
    """One metric of one ranking by its definition."""
    positives = sum(ranking)
    if metric.startswith("mmp@"):
        depth = min(int(metric[4:]), positives)
        return sum(ranking[:depth]) / depth
    if metric.startswith("r@"):
        return float(any(ranking[: int(metric[2:])]))
    if metric.startswith("p@"):
        return sum(ranking[: int(metric[2:])]) / int(metric[2:])
    if metric.startswith("mrr@"):
        first = ranking.index(True)
        return 1 / (first + 1) if first < int(metric[4:]) else 0.0
    if metric == "map-trapezoid":
        places = [place for place, hit in enumerate(ranking) if hit]
        heights = [(n / p if p else 1.0, (n + 1) / (p + 1)) for n, p in enumerate(places)]
        return sum(left + right for left, right in heights) / 2 / positives
    if metric == "r-precision":
        return sum(ranking[:positives]) / positives
    if metric == "map":
        depth, divisor = len(ranking), positives
    elif metric == "map@r":
        depth, divisor = positives, positives
    else:
        depth = int(metric[4:])
        divisor = min(depth, positives)
    total = 0.0
    for place in range(min(depth, len(ranking))):
        if ranking[place]:
            total += sum(ranking[: place + 1]) / (place + 1)
    return total / divisor


def expected_numbers(protocol, rows, vectors, distractors, scope):
    """Domain or mean -> metric -> value or None; and the number of queries without a positive."""
    found, alone = {}, 0
    own = list(rankings(rows, vectors, distractors, rule=protocol.distance, per_domain=scope == "per_domain"))
    for domain, ranking in own:
        found.setdefault(domain, [])
        if any(ranking):
            found[domain].append({metric: score(metric, ranking) for metric in protocol.metrics})
        else:
            alone += 1
    table = {
        domain: {m: sum(one[m] for one in own) / len(own) if own else None for m in protocol.metrics}
        for domain, own in found.items()
    }
    flat = [one for own in found.values() for one in own]
    groups = [own for own in found.values() if own] if protocol.mean == "domains" else [flat] if flat else []
    table["mean"] = {
        m: sum(sum(one[m] for one in own) / len(own) for own in groups) / len(groups) if groups else None
        for m in protocol.metrics
    }
    return table, alone


EVERY_METRIC = tuple(
    dict.fromkeys(
        [metric for protocol in PROTOCOLS.values() for metric in protocol.metrics]
        + ["map@2", "map@3", "p@2", "r@3", "mmp@2", "mrr@2"]
    )
)


@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(
            name="custom", metrics=EVERY_METRIC, decimals=3, domain_shares=PROTOCOLS["guiec"].domain_shares
        ),
        Protocol(name="custom", metrics=EVERY_METRIC, distance="euclidean", mean="queries"),
    ],
    ids=["cosine, mean of domains", "euclidean, mean of queries"],
)
@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_protocols_equal_their_description(tmp_path_factory, protocol, case):
    """Every metric of every protocol, in both scopes; which ones a protocol has is a table."""
    rows, vectors, distractors = case
    folder = tmp_path_factory.getbasetemp()
    files = []
    if len(distractors) and protocol.distance == "cosine" and "merged" in protocol.scopes:
        files = [folder / "d1.npy", folder / "d2.npy"]
        np.save(files[0], distractors[:1])
        np.save(files[1], distractors[1:])
    else:
        distractors = distractors[:0]
    result = evaluate_embeddings(
        vectors, catalog_of(rows, folder), protocol=protocol, num_resamples=2, distractors=files
    )
    content = result.to_json()
    for scope in protocol.scopes:
        expected, alone = expected_numbers(protocol, rows, vectors, distractors, scope)
        assert set(content[scope]) == set(expected)
        assert content[scope]["mean"]["num_queries_without_positive"] == alone
        for domain, numbers in expected.items():
            for metric, number in numbers.items():
                measured = content[scope][domain][metric]
                assert measured is number is None or abs(measured - number) <= 1e-12
                if protocol.decimals and domain != "mean" and number is not None:
                    assert content["rounded"][scope][domain][metric] == pytest.approx(number, abs=5.01e-4)
    if protocol.domain_shares:
        check_composite(content, expected_numbers(protocol, rows, vectors, distractors, "merged")[0])


def check_composite(content, expected):
    """The shares of the challenge written out for the domains of the cases."""
    shares = {"cars": 5.2, "toys": 2.3}
    known = {
        domain: share
        for domain, share in shares.items()
        if (expected.get(domain) or {}).get("mmp@5") is not None
    }
    if not known:
        assert content["composite"]["mmp@5"] is None
        return
    total = sum(share * expected[domain]["mmp@5"] for domain, share in known.items()) / sum(known.values())
    assert abs(content["composite"]["mmp@5"] - total) <= 1e-12
    assert "apparel" in content["composite"]["missing"]


@pytest.mark.parametrize("protocol", list(PROTOCOLS.values()), ids=lambda protocol: protocol.name)
def test_self_is_left_out_by_row_where_it_is_not_rank_one(tmp_path, protocol):
    # rows 0 and 1 are copies of the query and stand before it in its own ranking
    rows = [
        {"label": label, "labels": [], "domain": "cars", "role": role}
        for label, role in (("y", "index"), ("y", "index"), ("x", "query+index"), ("x", "index"))
    ]
    result = evaluate_embeddings(np.ones((4, 2)), catalog_of(rows, tmp_path), protocol=protocol)
    place = {"r@1": 0.0, "r@2": 0.0, "mmp@5": 0.0, "map@r": 0.0, "r-precision": 0.0}
    place |= {"r@4": 1.0, "r@8": 1.0, "r@10": 1.0, "r@100": 1.0, "map-trapezoid": (0 / 2 + 1 / 3) / 2}
    for metric in protocol.metrics:
        expected = place.get(metric, 1 / 3)
        assert result.value(metric, domain="cars") == pytest.approx(expected, abs=1e-12)


def test_uned_rounds_domains_and_their_mean_as_its_authors_do(tmp_path):
    rows, vectors = [], []
    for domain, hits in (("cars", 1), ("toys", 2)):
        for number in range(3):
            direction = [np.cos(number), np.sin(number)]
            rows.append({"label": f"{domain}{number}", "labels": [], "domain": domain, "role": "query"})
            rows.append({"label": f"{domain}{number}", "labels": [], "domain": domain, "role": "index"})
            vectors += [direction, direction if number < hits else [-direction[0], -direction[1]]]
    result = evaluate_embeddings(np.array(vectors), catalog_of(rows, tmp_path), protocol="uned")
    content = result.to_json()["rounded"]["per_domain"]
    exact = [result.value("r@1", domain=d, scope="per_domain") for d in ("cars", "toys")]
    rounded = [float(np.round(value, 3)) for value in exact]
    assert content["mean"]["r@1"] == float(np.round(np.mean(rounded), 3))
    assert [content[domain]["r@1"] for domain in ("cars", "toys")] == rounded


def test_too_many_dimensions_are_against_the_challenges_rules(tmp_path):
    rows = [{"label": "x", "labels": [], "domain": "toys", "role": role} for role in ("query", "index")]
    with pytest.raises(InputError, match="65 dimensions"):
        evaluate_embeddings(np.ones((2, 65)), catalog_of(rows, tmp_path), protocol="guiec")
    evaluate_embeddings(np.ones((2, 64)), catalog_of(rows, tmp_path), protocol="guiec")


def test_weights_of_domains():
    assert sum(PROTOCOLS["guiec"].domain_shares.values()) == pytest.approx(99.9)
    weights = composite_weights(("cars", "memes", "gldv2", "weather"), PROTOCOLS["guiec"].domain_shares)
    assert weights["cars"] == weights["memes"] == pytest.approx(2.6 / 24.8)
    assert weights["gldv2"] == pytest.approx(19.6 / 24.8) and "weather" not in weights
    assert challenge_domain("In-shop") is None and challenge_domain("Food 2K") is None
    assert challenge_domain("food2k") == "dishes"


def test_a_label_that_two_domains_have_matches_within_its_own(tmp_path):
    rows = [
        {"label": "x", "labels": ["y"], "domain": "cars", "role": "query"},
        {"label": "x", "labels": [], "domain": "toys", "role": "index"},
        {"label": "x", "labels": [], "domain": "cars", "role": "index"},
        {"label": "y", "labels": [], "domain": "cars", "role": "index"},
    ]
    result = evaluate_embeddings(np.eye(4)[[0, 0, 1, 2]], catalog_of(rows, tmp_path), protocol="uned")
    # the toy is first, and no hit; both cars follow
    assert result.value("map@5") == pytest.approx((1 / 2 + 2 / 3) / 2)


# ---- distractors and files


def write_uned(folder):
    rows = [
        {"label": f"l{n % 4}", "domain": d, "role": r}
        for d, r, count in (("cars", "query+index", 12), ("met", "query", 4), ("met", "index", 9))
        for n in range(count)
    ]
    catalog = catalog_of(rows, folder)
    catalog.write(folder / "c.parquet")
    embeddings = np.random.default_rng(0).standard_normal((len(rows), 6)).astype(np.float32)
    np.save(folder / "e.npy", embeddings)
    return catalog, embeddings


def test_descriptors_are_written_and_read_as_uned_does(tmp_path):
    catalog, embeddings = write_uned(tmp_path)
    write_descriptors(tmp_path / "d.json", embeddings, catalog)
    content = json.loads((tmp_path / "d.json").read_text())
    assert {domain: sorted(splits) for domain, splits in content.items()} == {
        "cars": ["test"],
        "met": ["index", "test"],
    }
    # their program takes the first element of a split
    np.testing.assert_array_equal(np.array(content["met"]["test"][0], np.float32), embeddings[12:16])
    np.testing.assert_array_equal(read_descriptors(tmp_path / "d.json", catalog), embeddings)
    plain = {domain: {name: rows[0] for name, rows in splits.items()} for domain, splits in content.items()}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    results = [
        evaluate(embeddings=tmp_path / name, catalog=tmp_path / "c.parquet", protocol="uned").to_json()
        for name in ("e.npy", "d.json", "plain.json")
    ]
    assert results[0] == results[1] == results[2]
    again = tmp_path / "again.json"
    evaluate(
        embeddings=tmp_path / "e.npy", catalog=tmp_path / "c.parquet", protocol="uned", descriptors=again
    )
    assert again.read_bytes() == (tmp_path / "d.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "object of objects"),
        ({"cars": {"test": [[1, 2], [3]]}}, "different lengths"),
        ({"cars": {"test": [1, 2]}}, r"shape \(2,\)"),
        ({"cars": {"test": [[1, 2]]}}, "1 descriptors of cars/test"),
        ({"cars": {"test": [[1, 2]] * 12}}, "0 descriptors of met/test"),
        ({"cars": {"test": [[1, 2]] * 12}, "met": {"test": [[1]] * 4}}, "dimensions"),
    ],
)
def test_descriptors_that_do_not_fit_are_refused(tmp_path, content, message):
    write_uned(tmp_path)
    (tmp_path / "d.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        evaluate(embeddings=tmp_path / "d.json", catalog=tmp_path / "c.parquet")


def test_distractors_that_do_not_fit_are_refused(tmp_path):
    write_uned(tmp_path)
    np.save(tmp_path / "wide.npy", np.ones((3, 7), np.float32))
    np.save(tmp_path / "zero.npy", np.zeros((3, 6), np.float32))
    files = {"embeddings": tmp_path / "e.npy", "catalog": tmp_path / "c.parquet"}
    for shard, protocol, message in (
        ("wide.npy", "ilias", "7 dimensions"),
        ("zero.npy", "ilias", "row 21 of the gallery is all zeros"),
        ("wide.npy", "guiec", "distractors with the protocol guiec"),
        ("wide.npy", "metric-learning", "distractors with the protocol metric-learning"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(**files, protocol=protocol, distractors=(tmp_path / shard,))
    with pytest.raises(ArtefactError, match="gone"):
        evaluate(**files, protocol="ilias", distractors=(tmp_path / "gone.npy",))


def test_protocols_and_metrics_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="protocol 'kaggle'"):
        evaluate_embeddings(np.ones((2, 2)), catalog_of([], tmp_path), protocol="kaggle")
    with pytest.raises(InputError, match="metric 'ndcg'"):
        evaluate(protocol="custom", metrics=("ndcg",))
    with pytest.raises(InputError, match="protocol 'uned' with the metrics"):
        evaluate(protocol="uned", metrics=("r@1",))
