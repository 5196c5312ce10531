"""After-retrieval gains, smaller embeddings and "no match" against second, plain writings."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.evaluation import Calibration, compare_embeddings, evaluate_embeddings
from samething.evaluation.no_match import best_answers, fit_calibration, measure_no_match
from samething.rerank.gains import (
    GAINS,
    both_expansions,
    database_augmentation,
    query_expansion,
    reciprocal_reranking,
)


@st.composite
def searches(draw):
    """Queries, gallery and what each query leaves out: some queries are gallery rows, some are not."""
    seed = draw(st.integers(0, 10_000))
    entries, queries, width = draw(st.integers(2, 24)), draw(st.integers(1, 4)), draw(st.integers(3, 6))
    generator = np.random.default_rng(seed)
    # a few directions with noise, so that there are neighbourhoods
    centres = generator.standard_normal((4, width))
    gallery = centres[generator.integers(4, size=entries)] + 0.4 * generator.standard_normal((entries, width))
    asked = centres[generator.integers(4, size=queries)] + 0.4 * generator.standard_normal((queries, width))
    leave_out = np.full(queries, -1)
    for query in range(queries):
        if draw(st.booleans()):
            leave_out[query] = draw(st.integers(0, entries - 1))
            asked[query] = gallery[leave_out[query]]
    return asked.astype(np.float32), gallery.astype(np.float32), leave_out


def unit(vector):
    length = math.sqrt(sum(float(x) ** 2 for x in vector))
    return [float(x) / length for x in vector]


def dot(left, right):
    return sum(x * y for x, y in zip(left, right, strict=True))


def plain_expansion(vector, others, count, alpha):
    """The vector plus its nearest among (row, vector) by similarity to the power alpha."""
    near = sorted(others, key=lambda one: (-dot(vector, one[1]), one[0]))[:count]
    total = list(vector)
    for _, other in near:
        weight = max(dot(vector, other), 0.0) ** alpha
        total = [x + weight * y for x, y in zip(total, other, strict=True)]
    return unit(total)


def plain_augmented(gallery, count=3, alpha=3.0):
    rows = list(enumerate(map(unit, gallery)))
    return [plain_expansion(own, [one for one in rows if one[0] != row], count, alpha) for row, own in rows]


def plain_expanded(queries, gallery, leave_out, count=3, alpha=3.0):
    rows = list(enumerate(map(unit, gallery)))
    return [
        plain_expansion(unit(query), [one for one in rows if one[0] != out], count, alpha)
        for query, out in zip(queries, leave_out, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(searches(), st.integers(1, 5), st.sampled_from([0.0, 1.0, 3.0]))
def test_expansions_equal_their_description(case, count, alpha):
    queries, gallery, leave_out = case
    options = {"num_neighbours": count, "alpha": alpha}
    expanded = query_expansion(queries, gallery, leave_out, **options)
    assert expanded.gallery is gallery and expanded.scores is None
    expected = plain_expanded(queries, gallery, leave_out, count, alpha)
    np.testing.assert_allclose(expanded.queries, expected, atol=2e-5)
    augmented = database_augmentation(queries, gallery, leave_out, **options)
    assert augmented.queries is queries
    np.testing.assert_allclose(augmented.gallery, plain_augmented(gallery, count, alpha), atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(searches())
def test_both_is_one_after_the_other(case):
    queries, gallery, leave_out = case
    both = both_expansions(queries, gallery, leave_out)
    augmented = plain_augmented(gallery)
    np.testing.assert_allclose(both.gallery, augmented, atol=2e-5)
    np.testing.assert_allclose(both.queries, plain_expanded(queries, augmented, leave_out), atol=5e-5)


def apart(queries, gallery):
    """Whether no two entries are so near in a ranking that float32 cannot tell which is first."""
    g, q = np.array([unit(row) for row in gallery]), np.array([unit(row) for row in queries])
    ranked = np.sort(np.concatenate([q, g]) @ g.T, axis=1)
    return bool((np.diff(ranked, axis=1) > 2e-6).all())


def plain_reranking(query, gallery, out, k1, k2, own_share):
    """Zhong et al. for one query that nobody else sees; sets, dictionaries and no matrices."""
    g = [unit(row) for row in gallery]
    q = unit(query)
    n = len(g)

    def nearest(row, count):
        others = sorted((o for o in range(n) if o != row), key=lambda o: (-dot(g[row], g[o]), o))
        return [row, *others[:count]]

    full = {row: nearest(row, k1) for row in range(n)}
    half = {row: nearest(row, k1 // 2) for row in range(n)}

    def mutual_half(row):
        return {other for other in half[row] if row in half[other]}

    def widened(members):
        wide = set(members)
        for member in members:
            candidates = mutual_half(member)
            if 3 * len(candidates & set(members)) >= 2 * len(candidates):
                wide |= candidates
        return wide

    def normalised(weights):
        total = sum(weights.values())
        return {row: weight / total for row, weight in weights.items()}

    def mean(features):
        return {row: sum(f.get(row, 0.0) for f in features) / len(features) for row in set().union(*features)}

    first = {}
    for row in range(n):
        wide = widened({other for other in full[row] if row in full[other]})
        first[row] = normalised({other: math.exp(dot(g[row], g[other]) - 1) for other in wide})
    feature = {row: mean([first[other] for other in full[row][:k2]]) for row in range(n)}
    near = sorted((o for o in range(n) if o != out), key=lambda o: (-dot(q, g[o]), o))[:k1]
    # the query would be among an entry's k1 if it is nearer than the last of these
    members = {o for o in near if dot(q, g[o]) >= dot(g[o], g[full[o][-1]]) - 1e-6}
    asked = {}
    if members:
        wide = set(members)
        for member in members:
            candidates = mutual_half(member)
            if 3 * len(candidates & members) >= 2 * len(candidates):
                wide |= candidates
        wide.discard(out)
        asked = normalised({o: math.exp(dot(q, g[o]) - 1) for o in wide})
        asked = mean([asked, *(feature[o] for o in near[: k2 - 1])])
    scores = []
    for row in range(n):
        keys = set(asked) | set(feature[row])
        common = sum(min(asked.get(key, 0.0), feature[row].get(key, 0.0)) for key in keys)
        either = sum(max(asked.get(key, 0.0), feature[row].get(key, 0.0)) for key in keys)
        scores.append(own_share * dot(q, g[row]) + (1 - own_share) * common / either)
    return scores


@settings(max_examples=40, deadline=None)
@given(searches(), st.integers(2, 7), st.integers(1, 4))
def test_reranking_equals_its_description(case, k1, k2):
    queries, gallery, leave_out = case
    assume(apart(queries, gallery))
    found = reciprocal_reranking(queries, gallery, leave_out, k1=k1, k2=k2, own_share=0.3).scores
    for query in range(len(queries)):
        expected = plain_reranking(queries[query], gallery, int(leave_out[query]), k1, k2, 0.3)
        np.testing.assert_allclose(found[query], expected, atol=1e-4)


def catalog(folder, *, things=12, views=5, domains=("cars", "toys"), val=0):
    rows = [
        {
            "image": f"{thing}-{view}.jpg", "label": f"l{thing}", "domain": domains[thing % len(domains)],
            "role": "val" if thing < val else "query" if view == 0 else "index",
        }
        for thing in range(things) for view in range(views)
    ]  # fmt: skip
    return Catalog.from_rows(rows, root=folder)


def views_of(images, *, noise, seed=0, width=16):
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((len(np.unique(images.class_ids())), width))
    rows = centres[images.class_ids()] + noise * generator.standard_normal((len(images), width))
    return rows.astype(np.float32)


@pytest.mark.parametrize("name", GAINS)
def test_gains_are_applied_and_measured_against_the_run(tmp_path, name):
    images = catalog(tmp_path, things=40)
    rows = views_of(images, noise=0.7)
    plain = evaluate_embeddings(rows, images, num_resamples=5)
    gained = evaluate_embeddings(rows, images, num_resamples=5, gain=GAINS[name])
    assert gained.value("map") > plain.value("map") + 0.01  # neighbourhoods are informative here
    queries, index = images.has_role("query"), images.has_role("index")
    refined = GAINS[name](rows[queries], rows[index], np.full(queries.sum(), -1))
    scores = refined.scores
    if scores is None:
        scores = np.array([[dot(unit(q), unit(g)) for g in refined.gallery] for q in refined.queries])
    labels = images.class_ids()
    hits = labels[index][scores.argmax(axis=1)] == labels[queries]
    domains = images.strings("domain")[queries]
    assert gained.value("r@1") == pytest.approx(
        np.mean([hits[domains == domain].mean() for domain in np.unique(domains)])
    )


def test_a_job_too_large_for_reranking_is_refused():
    rows = np.ones((2**14 + 1, 2), dtype=np.float32)
    with pytest.raises(InputError, match="re-ranking of 1 queries"):
        reciprocal_reranking(rows[:1], rows, np.array([-1]))


# ---- no match


def plain_threshold(scores, right, target, growth=1.0):
    """The lowest score from which on the answers are right often enough."""
    good = []
    for threshold in sorted(set(scores)):
        answers = [r for s, r in zip(scores, right, strict=True) if s >= threshold]
        hits, wrong = sum(answers), len(answers) - sum(answers)
        if hits and hits / (hits + growth * wrong) >= target - 1e-12:
            good.append((threshold, hits / (hits + growth * wrong), hits / len(scores), wrong))
    return good[0] if good else (math.inf, math.nan, 0.0, 0)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=30),
    st.sampled_from([0.5, 0.75, 0.9, 1.0]),
    st.sampled_from([1.0, 2.0, 3.5]),
)
def test_the_threshold_equals_its_description(answers, target, growth):
    scores, right = np.array([s / 4 for s, _ in answers]), np.array([r for _, r in answers])
    if right.all() or not right.any():
        with pytest.raises(InputError):
            Calibration.fit(scores, right, target_precision=target)
        return
    fitted = Calibration.fit(scores, right, target_precision=target, growth=growth)
    threshold, precision, recall, wrong = plain_threshold(scores.tolist(), right.tolist(), target, growth)
    assert fitted.threshold == threshold and fitted.num_wrong == wrong
    assert fitted.precision == pytest.approx(precision, nan_ok=True)
    assert fitted.recall == pytest.approx(recall)
    assert fitted.is_match(scores).sum() == sum(s >= threshold for s in scores)
    assert Calibration.from_json(json.loads(json.dumps(fitted.to_json()))).to_json() == fitted.to_json()
    surer = Calibration.fit(scores, right, target_precision=target, growth=growth, sure=True)
    assert surer.threshold >= fitted.threshold


def test_probabilities_equal_platts_by_another_optimiser():
    import scipy.optimize

    generator = np.random.default_rng(5)
    scores = generator.uniform(-1, 1, 400)
    right = generator.uniform(size=400) < 1 / (1 + np.exp(-(6 * scores - 1)))
    fitted = Calibration.fit(scores, right)
    targets = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))

    def loss(weights):
        odds = weights[0] * scores + weights[1]
        return np.sum(np.logaddexp(0, odds) - targets * odds)

    best = scipy.optimize.minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-8})
    assert (fitted.slope, fitted.intercept) == pytest.approx(best.x, rel=1e-4, abs=1e-4)
    chances = fitted.probability(np.linspace(-1, 1, 50))
    assert (np.diff(chances) > 0).all() and 0 < chances[0] < chances[-1] < 1
    # twice the index: the odds of a wrong answer double
    larger = Calibration.fit(scores, right, growth=2.0).probability(np.array([0.3]))[0]
    same = fitted.probability(np.array([0.3]))[0]
    assert larger / (1 - larger) == pytest.approx(same / (1 - same) / 2)


def test_scores_that_separate_have_a_finite_slope():
    fitted = Calibration.fit(np.array([0.9, 0.9, 0.1, 0.1]), np.array([True, True, False, False]))
    assert 0 < fitted.slope < 1e4 and fitted.probability(np.array([0.9, 0.1])).round().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_precision": 0.0}, "target_precision"),
        ({"growth": 0.5}, "growth=0.5"),
        ({"growth": math.inf}, "growth"),
        ({"scores": np.array([0.1, math.nan])}, "finite"),
        ({"scores": np.zeros(0), "is_right": np.zeros(0, dtype=bool)}, "0 queries"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(change, message):
    arguments = {"scores": np.array([0.1, 0.2]), "is_right": np.array([True, False]), **change}
    with pytest.raises(InputError) as caught:
        Calibration.fit(arguments.pop("scores"), arguments.pop("is_right"), **arguments)
    assert message in str(caught.value)
    with pytest.raises(ArtefactError, match="calibration"):
        Calibration.from_json({"format_version": 99})


def test_best_answers_equal_their_description(tmp_path):
    images = catalog(tmp_path, things=9, views=3, val=4)
    rows = views_of(images, noise=1.5, width=3)
    roles, labels = images.strings("role").astype(str), images.class_ids()
    for role, asked, held in (("test", {"query"}, {"index"}), ("val", {"val"}, {"val"})):
        best, right, wrong = best_answers(rows, images, role=role)
        queries = [row for row in range(len(rows)) if roles[row] in asked]
        assert len(best) == len(queries)
        for place, query in enumerate(queries):
            found = [
                (dot(unit(rows[query]), unit(rows[other])), labels[other] == labels[query])
                for other in range(len(rows)) if roles[other] in held and other != query
            ]  # fmt: skip
            top = max(found)
            assert best[place] == pytest.approx(top[0]) and right[place] == top[1]
            assert wrong[place] == pytest.approx(max(score for score, same in found if not same))


def test_a_larger_index_raises_the_threshold_and_keeps_the_precision(tmp_path):
    # validation: 40 things; test: 360 things of the same kind, an index 8 times as large
    images = catalog(tmp_path, things=400, views=5, val=40, domains=("cars",))
    rows = views_of(images, noise=0.4, width=16, seed=1)
    measured = measure_no_match(rows, images, target_precision=0.8)
    growth = images.has_role("index").sum() / images.has_role("val").sum()
    assert measured.calibration.growth == pytest.approx(growth) and growth > 7
    small = fit_calibration(rows, images, target_precision=0.8, sure=False)
    assert small.growth == 1 and small.threshold < measured.calibration.threshold
    best, right, wrong = best_answers(rows, images, role="test")

    def precision(threshold):
        answers = (best >= threshold).sum() + (wrong >= threshold).sum()
        return ((best >= threshold) & right).sum() / answers

    assert precision(small.threshold) < 0.7  # what was asked of validation is missed where the index grows
    assert measured.precision == pytest.approx(precision(measured.calibration.threshold))
    assert measured.precision >= 0.8
    assert measured.recall == pytest.approx(((best >= measured.calibration.threshold) & right).mean())
    assert measured.false_alarms == pytest.approx((wrong >= measured.calibration.threshold).mean())
    low, high = measured.precision_interval
    assert low <= measured.precision <= high
    assert json.loads(json.dumps(measured.to_json()))["calibration"]["growth"] == pytest.approx(growth)
    assert "index 7.2 times as large" in measured.__rich__()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(1, 30), st.floats(0.3, 0.99), st.booleans())
def test_a_calibration_for_a_larger_index_is_the_one_fitted_for_it(seed, growth, target, sure):
    rng = np.random.default_rng(seed)
    scores = rng.random(60).round(2)
    right = rng.random(60) < scores
    if right.all() or not right.any():
        return
    options = {"target_precision": target, "sure": sure, "num_with_positive": 60}
    fitted = Calibration.fit(scores, right, index_size=1000, **options)
    larger = fitted.for_index(round(1000 * growth))
    asked = Calibration.fit(scores, right, growth=round(1000 * growth) / 1000, **options)
    for name in ("slope", "intercept", "threshold", "precision", "recall", "num_wrong", "growth"):
        assert getattr(larger, name) == pytest.approx(getattr(asked, name), nan_ok=True), name
    assert fitted.for_index(500) == fitted
    assert Calibration.from_json(json.loads(json.dumps(larger.to_json()))).for_index(
        10**6
    ) == larger.for_index(10**6)


def test_the_error_of_probabilities_is_that_of_its_bins():
    calibration = Calibration.fit(np.array([0.9, 0.8, 0.4, 0.3]), np.array([True, True, False, False]))
    rng = np.random.default_rng(0)
    scores, right = rng.random(500), rng.random(500) < 0.4
    chances = calibration.probability(scores)
    expected = 0.0
    for low in range(10):
        inside = (chances >= low / 10) & ((chances < (low + 1) / 10) | (low == 9))
        if inside.any():
            expected += inside.mean() * abs(chances[inside].mean() - right[inside].mean())
    assert calibration.error(scores, right) == pytest.approx(expected, abs=1e-12)


def test_a_precision_that_cannot_be_promised_is_not_promised(tmp_path):
    images = catalog(tmp_path, things=30, views=3, val=10)
    measured = measure_no_match(views_of(images, noise=3.0), images, target_precision=0.99)
    assert math.isinf(measured.calibration.threshold) and measured.recall == measured.false_alarms == 0
    assert math.isnan(measured.precision) and measured.to_json()["precision"] is None
    assert "for certain" in measured.__rich__()


def test_a_comparison_prints_and_writes_no_match(tmp_path):
    import dataclasses

    images = catalog(tmp_path, things=30, views=4, val=10)
    rows = views_of(images, noise=0.6)
    compared = compare_embeddings({"run": rows}, images, num_resamples=5)
    compared = dataclasses.replace(compared, no_match={"run": measure_no_match(rows, images)})
    assert compared.to_json()["run"]["no_match"]["num_queries"] == 20
