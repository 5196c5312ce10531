"""The second look: what it compares, what it keeps, what its evidence is worth, and what it never does."""

import multiprocessing
import sqlite3
import time

import numpy as np
import onnx
import pytest
from PIL import Image, ImageEnhance

from samething.arrays import unit
from samething.catalog import Catalog
from samething.errors import ArtefactError, ImageError, InputError
from samething.evaluation import evaluate_embeddings
from samething.evaluation.looked_again import LookedAgain
from samething.rerank import RERANKERS, Evidence, Kept, PairScorer, Shown, Trust, reranker_of, second_look
from samething.rerank.gains import query_expansion, reciprocal_reranking
from samething.rerank.geometry import LEAST_POINTS, Geometry, _pairs, _Points, _points_of, agreeing
from scenes import photographs


def patch(number, side=220):
    photograph = photographs()[number]
    left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
    return photograph.crop((left, top, left + side, top + side))


def turned(image):
    """The same flat thing from elsewhere: in perspective, darker, inside a larger image."""
    corners = (10, -20, -30, 250, 260, 230, 210, 10)  # of the source, for each corner of the result
    view = image.transform(
        image.size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC, fillcolor="grey"
    )
    scene = Image.new("RGB", (500, 400), (90, 110, 100))
    scene.paste(ImageEnhance.Brightness(view).enhance(0.7), (200, 120))
    return scene


def shown(image, key="", score_direction=0.0, domain=""):
    vector = np.array([np.cos(score_direction), np.sin(score_direction)], np.float32)
    return Shown(key, lambda: image, vector, domain)


@pytest.fixture(scope="module")
def images():
    return [patch(number) for number in range(4)]


def test_geometry_finds_a_thing_inside_a_bigger_image_and_nothing_in_others(images, tmp_path):
    """A thing in perspective, dimmed, in a quarter of the area is verified, with its place; others not."""
    query = shown(images[0])
    candidates = [shown(turned(images[1])), shown(turned(images[0])), shown(images[2]), shown(images[3])]
    found = second_look(Geometry(), query, candidates, Kept(tmp_path / "kept"))
    assert [one.num_agreeing > 20 for one in found] == [False, True, False, False]
    right = found[1]
    assert all(number > 0 for number in right.numbers)
    left, top, width, height = 200 / 500, 120 / 400, 220 / 500, 220 / 400
    assert left <= right.place[0] < right.place[2] <= left + width
    assert top <= right.place[1] < right.place[3] <= top + height
    for _, _, x, y in right.points:
        assert left <= x <= left + width and top <= y <= top + height
    assert found[2].numbers == (0.0, 0.0, 0.0, 0.0) and found[2].points == ()


def test_what_geometry_keeps_of_an_image_is_bounded_and_the_same_each_time(images):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (900, 1200, 3), dtype=np.uint8))
    for image in (noise, images[0], Image.new("RGB", (1, 1)), Image.new("RGB", (3000, 2))):
        content = Geometry().keep(image)
        assert len(content) <= 20_000
        assert content == Geometry().keep(image)
    before = _points_of(images[0])
    after = _Points.from_bytes(before.to_bytes())
    assert np.abs(after.places - before.places).max() < 0.03
    assert (after.descriptors * before.descriptors).sum(axis=1).min() > 0.95


def test_bright_points_are_compared_with_bright_ones_alone(images):
    """All points were compared with all, which is twice the work, and a look took more than 150 ms."""
    one, other = _points_of(images[0]), _points_of(turned(images[0]))
    assert 0.2 < one.is_bright.mean() < 0.8
    assert (_Points.from_bytes(one.to_bytes()).is_bright == one.is_bright).all()
    ours, theirs = _pairs(one, other)
    assert len(ours) > 40 and (np.diff(ours) > 0).all()
    assert (one.is_bright[ours] == other.is_bright[theirs]).all()
    # each other's nearest of their kind, whatever else there is
    cosines = one.descriptors @ other.descriptors.T
    cosines[one.is_bright[:, None] != other.is_bright] = -1
    assert (cosines.argmax(axis=1)[ours] == theirs).all() and (cosines.argmax(axis=0)[theirs] == ours).all()
    # what the thing's own points say does not change with the view
    negative = _points_of(Image.eval(images[0], lambda value: 255 - value))
    assert len(_pairs(one, negative)[0]) < 20
    assert all(len(own) == 0 for own in _pairs(one, _points_of(Image.new("RGB", (50, 50)))))


def test_a_homography_that_mirrors_or_squashes_is_no_view(images):
    """Pairs of places that a mirrored or collapsed plane explains were counted as agreement."""
    rng = np.random.default_rng(0)
    places = rng.uniform(0, 200, (40, 2)).astype(np.float32)
    every = np.arange(40)
    for change, expected in (([1, 1], 40), ([-1, 1], 0), ([1 / 40, 1 / 40], 0), ([1, -1], 0)):
        ours, _ = agreeing(places, (places * change + 300).astype(np.float32), every, every)
        assert (len(ours) > 30) == (expected > 0), change
    # eight pairs of one place are one pair
    one = np.repeat(places[:2], 4, axis=0)
    assert len(agreeing(one, one, np.arange(8), np.arange(8))[0]) < LEAST_POINTS


def test_as_many_homographies_are_tried_as_eight_of_the_pairs_need(monkeypatch):
    """A thousand were tried of any two images that have eight pairs: a fifth of the time of a look.

    Eight that agree are found among any number of others as before.
    """
    import cv2

    draws, search = [], cv2.findHomography
    monkeypatch.setattr(
        cv2, "findHomography", lambda *given, **more: draws.append(more["maxIters"]) or search(*given, **more)
    )
    rng = np.random.default_rng(0)
    for count in (8, 9, 12, 16, 20):
        for _ in range(20):
            places, others = rng.uniform(0, 600, (2, count, 2)).astype(np.float32)
            others[:8] = places[:8] * 0.7 + 20
            every = rng.permutation(count)
            assert len(agreeing(places, others, every, every)[0]) >= LEAST_POINTS, count
    assert draws[0] == 1 and draws[20] < 10 and max(draws) < 1000


# ---- the budget, the query, what cannot be read


class Counting:
    """A re-ranker that counts."""

    name, weights, made_from, at_once = "counting", (1.0,), {"counting": 1}, 7

    def __init__(self, seconds=0.0):
        self.kept, self.seconds = [], seconds

    def keep(self, image):
        self.kept.append(image.size)
        time.sleep(self.seconds)
        return bytes(image.size)

    def compare(self, query, of_query, candidates, of_each):
        for content in of_each:
            yield Evidence((float(content == of_query),))


def broken():
    raise ImageError("x.jpg is empty", expected="an image", next_step="leave it out")


def test_what_was_kept_is_not_computed_again_and_a_bad_image_costs_only_itself(tmp_path):
    query = shown(Image.new("RGB", (5, 5)))
    candidates = [shown(Image.new("RGB", (side, side)), f"key {side}") for side in range(1, 46)]
    candidates[7] = Shown("bad", broken, candidates[7].vector)
    kept, first, again = Kept(tmp_path / "k"), Counting(), Counting()
    found = second_look(first, query, candidates, kept)
    assert second_look(again, query, candidates, kept) == found
    assert len(first.kept) == 45 and again.kept == [(5, 5)]
    assert [place for place, one in enumerate(found) if one is None] == [7]
    assert [place for place, one in enumerate(found) if one and one.numbers[0]] == [4]
    with pytest.raises(ImageError, match="empty"):
        second_look(first, Shown("", broken, query.vector), candidates, kept)
    # other settings: nothing that was kept is used
    other = Counting()
    other.made_from = {"counting": 2}
    second_look(other, query, candidates, kept)
    assert len(other.kept) == 45


def test_a_budget_ends_the_look_and_leaves_the_rest_as_it_was(tmp_path):
    """Candidates that there was no time for have no evidence, and nothing is begun once the time is over."""
    slow = Counting(seconds=0.05)
    candidates = [shown(Image.new("RGB", (9, 9)), str(place)) for place in range(100)]
    found = second_look(
        slow, shown(Image.new("RGB", (9, 9))), candidates, Kept(tmp_path / "k"), budget_ms=1.0
    )
    assert found == [None] * 100 and len(slow.kept) == 1
    query = shown(Image.new("RGB", (9, 9)))
    found = second_look(slow, query, candidates, Kept(tmp_path / "k"), budget_ms=200.0)
    assert found[0] is not None and found[-1] is None and found[:-1].count(None) > 50


# ---- what is kept


def test_a_damaged_entry_is_computed_again_and_a_damaged_file_begun_anew(tmp_path):
    """One wrong bit in what is kept would give wrong evidence for good."""
    kept = Kept(tmp_path / "kept.sqlite")
    kept.put("settings", {"a": b"first", "b": b"second"})
    with sqlite3.connect(kept.path) as db:
        db.execute("UPDATE kept SET content = x'00' WHERE key = 'a'")
    assert kept.get("settings", ["a", "b", "c"]) == {"b": b"second"}
    kept.put("settings", {"a": b"first"})
    assert kept.get("settings", ["a"]) == {"a": b"first"}
    kept.path.write_bytes(b"no database at all, but a text that is long enough to be read as one" * 20)
    assert kept.get("settings", ["a"]) == {}
    kept.put("settings", {"a": b"first"})
    assert kept.get("settings", ["a"]) == {"a": b"first"}
    assert kept.get("other settings", ["a"]) == {}


def keep_many(path, own):
    for start in range(0, 200, 10):
        Kept(path).put("s", {f"{own} {place}": b"x" * 500 for place in range(start, start + 10)})
        Kept(path).put("s", {f"shared {place}": b"y" * 500 for place in range(start, start + 10)})


def test_several_processes_keep_in_one_file(tmp_path):
    """Four processes that write at once, from the first moment on, lose nothing."""
    path = tmp_path / "kept.sqlite"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=keep_many, args=(path, own)) for own in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    keys = [f"{own} {place}" for own in (0, 1, 2, 3, "shared") for place in range(200)]
    assert len(Kept(path).get("s", keys)) == 1000
    assert Kept(path).keep_only(keys[:10]) == 990


def test_where_nothing_can_be_written_a_look_still_works(tmp_path):
    kept = Kept(tmp_path / "a file" / "kept.sqlite")
    kept.path.parent.write_text("in the way")
    candidates = [shown(Image.new("RGB", (5, 5)), "a")]
    assert second_look(Counting(), shown(Image.new("RGB", (5, 5))), candidates, kept) == [Evidence((1.0,))]


# ---- what evidence is worth


def pairs(rng, *, num_queries=200, helps=True):
    """Candidates of queries: cosines that tell right from wrong a little, a number that helps or misleads."""
    queries = np.repeat(np.arange(num_queries), 5)
    is_right = np.tile([True, False, False, False, False], num_queries)
    scores = 0.5 + 0.1 * is_right + 0.1 * rng.standard_normal(len(queries))
    speaks = rng.random(len(queries)) < np.where(is_right if helps else ~is_right, 0.6, 0.02)
    return scores, (speaks * rng.uniform(1, 2, len(queries)))[:, None], is_right, queries


def test_evidence_that_helps_is_trusted_and_evidence_that_misleads_is_not():
    """Per domain: in one it tells right from wrong, in the other it speaks for wrong candidates."""
    rng = np.random.default_rng(0)
    good, bad = pairs(rng), pairs(rng, helps=False)
    scores, numbers, is_right = (np.concatenate([good[place], bad[place]]) for place in range(3))
    queries = np.concatenate([good[3], bad[3] + 1000])
    domains = ["packages"] * len(good[0]) + ["logos"] * len(bad[0])
    trust = Trust.fit(scores, numbers, is_right, queries, domains, otherwise=(0.3,))
    assert trust.weights["packages"][0] > 0.05 and trust.weights["logos"] == (0.0,)
    assert trust.added(np.array([[1.0], [1.0]]), ["logos", "packages"])[0] == 0
    assert Trust.from_json(trust.to_json()) == trust
    # too few pairs: what was learned in all domains together
    few = Trust.fit(
        scores[:100], numbers[:100], is_right[:100], queries[:100], domains[:100], otherwise=(0.3,)
    )
    assert few.weights == {"": (0.3,)}


def test_more_evidence_never_lowers_a_score_and_none_leaves_it():
    rng = np.random.default_rng(1)
    for seed in range(5):
        scores, _, is_right, queries = pairs(rng)
        numbers = np.maximum(rng.standard_normal((len(scores), 3)) + is_right[:, None] * [1, 0, -1], 0)
        trust = Trust.fit(scores, numbers, is_right, queries, ["d"] * len(scores), otherwise=())
        assert min(trust.weights["d"]) >= 0, seed
        assert trust.added(np.zeros((1, 3)), ["d"]) == 0
        assert (
            trust.added(numbers + 1, ["d"] * len(numbers)) >= trust.added(numbers, ["d"] * len(numbers))
        ).all()


def test_an_unknown_re_ranker_says_which_there_are():
    with pytest.raises(InputError, match=", ".join(RERANKERS)):
        reranker_of("nonsense", lambda images: np.zeros((0, 2), np.float32), "model")


# ---- regions, and what candidates say of each other


def colours(images):
    """A model for tests: the mean colour, centred, of unit length."""
    means = np.array([np.asarray(image, float).mean(axis=(0, 1)) - 100 for image in images], np.float32)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def test_regions_find_a_small_thing_and_say_where(tmp_path):
    """A thing on a sixth of the area was lost in the mean of the whole image."""
    thing = Image.new("RGB", (50, 50), "red")
    scene, other = Image.new("RGB", (300, 200), (40, 90, 160)), Image.new("RGB", (300, 200), (60, 110, 180))
    scene.paste(thing.resize((110, 80)), (185, 115))
    query = Shown("", lambda: thing, colours([thing])[0])
    candidates = [
        Shown(name, lambda image=image: image, colours([image])[0])
        for name, image in {"other": other, "scene": scene}.items()
    ]
    regions = reranker_of("regions", colours, "a model")
    found = second_look(regions, query, candidates, Kept(tmp_path / "k"))
    assert found[0].numbers[0] < 0.3 < found[1].numbers[0]
    left, top, right, bottom = found[1].place
    assert left > 0.5 and top > 0.45 and right <= 1 and bottom <= 1
    # the number is by how much the best window is nearer than the whole, within the 8 bits that are kept
    width, height = scene.size
    window = scene.crop(
        (round(left * width), round(top * height), round(right * width), round(bottom * height))
    )
    gain = colours([window])[0] @ query.vector - candidates[1].vector @ query.vector
    assert found[1].numbers[0] == pytest.approx(float(gain), abs=0.01)
    assert len(regions.keep(scene)) == 25 * (3 + 4)
    # another model's windows are not used
    assert regions.made_from != reranker_of("regions", colours, "another model").made_from


@pytest.mark.parametrize("name", ["query-expansion", "k-reciprocal"])
def test_neighbours_give_the_order_of_the_gain_that_they_are(name, tmp_path):
    """One writing of each gain, for evaluation and for search: the sums are ordered as its scores are."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((6, 16))
    entries = unit(centres[rng.integers(6, size=100)] + 0.4 * rng.standard_normal((100, 16)), np.float32)
    asked = unit(centres[:1] + 0.4 * rng.standard_normal((1, 16)), np.float32)
    order = np.argsort(-(asked @ entries.T)[0])
    candidates = [Shown("", broken, vector) for vector in entries[order]]
    query = Shown("", broken, asked[0])
    found = second_look(reranker_of(name, colours, "m"), query, candidates, Kept(tmp_path / "k"))
    sums = (entries[order] @ asked[0]) + [one.numbers[0] for one in found]
    gain = {"query-expansion": query_expansion, "k-reciprocal": reciprocal_reranking}[name]
    refined = gain(asked, entries[order], np.array([-1]))
    scores = refined.queries @ refined.gallery.T if refined.scores is None else refined.scores
    np.testing.assert_allclose(sums, scores[0], atol=1e-5)
    assert not (tmp_path / "k").exists()


# ---- one's own


def write_scorer(path):
    """A graph that scores a pair by minus the mean difference of its pixels, plus a half."""
    kinds = [onnx.helper.make_tensor_value_info(name, 1, ["b", 3, 8, 8]) for name in ("query", "other")]
    half = onnx.helper.make_tensor("half", 1, [], [0.5])
    nodes = [
        onnx.helper.make_node("Sub", ["query", "other"], ["difference"]),
        onnx.helper.make_node("Abs", ["difference"], ["size"]),
        onnx.helper.make_node("ReduceMean", ["size"], ["mean"], axes=[1, 2, 3], keepdims=0),
        onnx.helper.make_node("Sub", ["half", "mean"], ["score"]),
    ]
    out = onnx.helper.make_tensor_value_info("score", 1, ["b"])
    graph = onnx.helper.make_graph(nodes, "scorer", kinds, [out], [half])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def test_a_graph_and_a_function_of_ones_own_score_pairs(images, tmp_path):
    query = shown(images[0])
    candidates = [shown(image) for image in (images[1], images[0], Image.new("RGB", (40, 700)))]
    graph = reranker_of(str(write_scorer(tmp_path / "scorer.onnx")), colours, "m")
    found = [one.numbers[0] for one in second_look(graph, query, candidates, Kept(tmp_path / "k"))]
    small = [np.asarray(image.resize((8, 8)), float) / 255 for image in (images[0], images[1])]
    assert found[0] == pytest.approx(0.5 - np.abs(small[0] - small[1]).mean(), abs=0.02)
    assert found[1] == pytest.approx(0.5, abs=0.01) and found[2] < found[1]

    def by_width(query, others):
        return [float(image.width - query.width) for image in others]

    own = PairScorer(by_width, name="wider")
    assert [one.numbers for one in second_look(own, query, candidates, Kept(tmp_path / "k"))] == [(0.0,)] * 3
    wide = [shown(Image.new("RGB", (300, 100)))]
    assert second_look(own, query, wide, Kept(tmp_path / "k")) == [Evidence((80.0,))]
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtefactError, match=r"damaged\.onnx"):
        reranker_of(str(tmp_path / "damaged.onnx"), colours, "m")


# ---- in an evaluation


def test_a_second_look_is_measured_as_it_is_used(tmp_path, monkeypatch):
    """R@1 of vectors that say nothing, before and after: taught on validation, measured on the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows, vectors = [], []
    for number in range(10):  # things that are parts of photographs, seen twice
        photograph = photographs()[number % 3].resize((640, 640))
        left, top = 190 * (number // 3 % 3) + 10, 190 * (number // 9) + 10
        part = photograph.crop((left, top, left + 240, top + 240))
        role = "val" if number < 5 else "query+index"
        for view in range(2):
            path = tmp_path / f"{number} {view}.png"
            part.rotate(12 * view, Image.Resampling.BILINEAR).save(path)
            rows.append({"image": path.name, "label": str(number), "domain": "parts", "role": role})
            vectors.append(rng.standard_normal(8))
    catalog = Catalog.from_rows(rows, root=tmp_path)
    embeddings = unit(np.array(vectors), np.float32)
    is_val = catalog.has_role("val")
    taught = LookedAgain.taught(Geometry(), catalog.take(is_val), embeddings[is_val])
    assert taught.trust.num_pairs == 10 * 9
    look = LookedAgain(Geometry(), catalog.take(~is_val), Trust.untaught((4.0, 0.0, 0.0, 0.0)))
    given = {"catalog": look.catalog, "protocol": "metric-learning"}
    before = evaluate_embeddings(embeddings[~is_val], **given).values("r@1")
    after = evaluate_embeddings(embeddings[~is_val], gain=look, **given).values("r@1")
    assert before.mean() < 0.5 and after.mean() > 0.6 and (after >= before).all()
    # each image was read once, and one that is damaged later has no evidence and costs no other query
    assert len(sqlite3.connect(Kept.of_user().path).execute("SELECT key FROM kept").fetchall()) == 20
    (tmp_path / "7 0.png").write_bytes(b"damaged")
    gone = LookedAgain(Geometry(), look.catalog, look.trust)
    again = evaluate_embeddings(embeddings[~is_val], gain=gone, **given).values("r@1")
    assert set(np.flatnonzero(again < after).tolist()) <= {4, 5}
