"""From labelled images to an answer: every artefact in its place, the right thing exported, resumed."""

import html
import re

import pytest

from samething.embedder import Embedder
from samething.evaluation import MEAN
from samething.files import read_json
from samething.fit import fit
from samething.search import find
from samething.statistics import PairedDifference
from samething.study.verdict import advice_of, sentences_of
from scenes import write_things
from small_backbone import NAME


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_things(tmp_path_factory.mktemp("labelled") / "things é", num_things=30)


EMBEDDED = []
"""Images that went through the exported model."""


@pytest.fixture(scope="module")
def fitted(images):
    stream = Embedder.embed_stream

    def counted(self, files, **options):
        files = list(files)
        EMBEDDED.extend(files)
        return stream(self, files, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Embedder, "embed_stream", counted)
        return fit(images, domain="things", backbone=NAME, output=images.parent / "out")


def test_every_artefact_is_where_the_commands_put_it(fitted, images):
    folder = fitted.folder
    names = {path.name for path in folder.iterdir()}
    assert {"catalog.parquet", "features", "run", "model", "index", "evaluation.json", "report.html"} <= names
    query = images / "thing 03 é" / "view 1.jpg"
    assert find(query, index=folder / "index", k=1).matches[0].path == str(query)
    assert fitted.searcher.index.count() == 120  # all images of the folder, those trained on as well
    # what is exported is what the verdict says
    kind = read_json(folder / "model" / "config.json")["head"]["kind"]
    assert kind == {"head": "linear", "backbone": "none", "principal components": "pca"}[fitted.verdict.kept]


def test_the_index_takes_its_vectors_from_the_features(fitted):
    """Every image went through the backbone a second time, a fifth of the demo's time."""
    assert fitted.searcher.num_added == 120 and 0 < len(EMBEDDED) < 12
    [rows] = fitted.searcher.index.items(["path"])
    kept = fitted.searcher.index.vectors(rows["id"].to_pylist())
    own = fitted.searcher.embedder.embed(rows["path"].to_pylist())
    assert ((kept * own).sum(axis=1) > 0.97).all()


def test_the_report_opens_with_the_answer(fitted):
    page = (fitted.folder / "report.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S))
    places = [text.index(sentence) for sentence in (*fitted.verdict.sentences, *fitted.verdict.advice)]
    assert places == sorted(places) and places[-1] < text.index("Retrieval on instances never seen")
    shown = fitted.__rich__()
    assert all(sentence in shown for sentence in fitted.verdict.sentences)
    # the answer is the paired difference of the evaluation, and the curve ends at the run itself
    measured = read_json(fitted.folder / "evaluation.json")
    ahead = measured["run"]["merged"]["mean"]["mmp@5"] - measured["backbone"]["merged"]["mean"]["mmp@5"]
    assert f"{100 * ahead:+.1f} points" in fitted.verdict.sentences[0]
    points = read_json(fitted.folder / "learning_curve.json")["points"]
    numbers = [point[0] for point in points]
    assert numbers == sorted(set(numbers)) and len(numbers) > 1
    assert points[-1][1] == pytest.approx(measured["run"]["merged"]["mean"]["mmp@5"], abs=1e-6)
    assert all(low <= value <= high for _, value, low, high in points)


@pytest.mark.slow
def test_the_same_again_computes_nothing_and_more_labels_stand_beside(fitted, images, monkeypatch):
    with monkeypatch.context() as patched:
        for place in ("study.verdict.trained_head", "study.verdict.learning_curve"):
            patched.setattr(f"samething.{place}", None)
        again = fit(images, domain="things", backbone=NAME, output=fitted.folder)
    assert again.verdict.sentences == fitted.verdict.sentences and again.searcher.num_added == 0
    before = (fitted.folder / "run" / "manifest.json").read_bytes()
    write_things(images, num_things=34)
    grown = fit(images, domain="things", backbone=NAME, output=fitted.folder)
    assert (fitted.folder / "run" / "manifest.json").read_bytes() == before
    assert (fitted.folder / "run-2" / "manifest.json").exists()
    assert grown.searcher.index.count() == 136
    assert Embedder.load(fitted.folder / "model-2").fingerprint == grown.searcher.embedder.fingerprint


def difference(value: float, half: float, count: int = 100) -> PairedDifference:
    return PairedDifference(difference=value, low=value - half, high=value + half, num_queries=count)


CURVE = [(10.0, 0.4, 0.3, 0.5), (20.0, 0.5, 0.4, 0.6)]


@pytest.mark.parametrize(
    ("mean", "kept", "said"),
    [
        (difference(0.1, 0.02), "head", "is better than"),
        (difference(-0.1, 0.02), "backbone", "is worse than"),
        (difference(0.01, 0.02), "principal components", "neither surely better"),
    ],
)
def test_the_sentences_say_what_the_numbers_say(mean, kept, said):
    ahead = {MEAN: mean, "mugs": difference(0.2, 0.01), "maps": difference(-0.3, 0.1, 7)}
    sentences = " ".join(sentences_of(kept, ahead, CURVE))
    assert said in sentences and ("is exported" in sentences) == (kept != "head")
    assert "Better: mugs +20.0 points (95 % " in sentences and "Worse: maps -30.0 points" in sentences
    advice = " ".join(advice_of(ahead, CURVE, "siglip"))
    assert "from 10 to 20 brought +10.0 points" in advice and "Label more of maps" in advice
    assert "Few queries in maps" in advice
    flat = [CURVE[0], (20.0, 0.401, 0.3, 0.5)]
    assert "change little" in " ".join(advice_of(ahead, flat, "siglip"))


@pytest.mark.parametrize("num", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_with_few_labels_the_backbone_is_exported_and_fit_says_so(tmp_path, num):
    """Of two things none is kept for the test; the head was exported then, though nobody had measured it."""
    images = write_things(tmp_path / "few", num_things=num)
    done = fit(images, backbone=NAME, output=tmp_path / "out")
    assert done.verdict.kept == "backbone" and "feature as it is is exported" in done.verdict.sentences[-1]
    assert read_json(tmp_path / "out" / "model" / "config.json")["head"]["kind"] == "none"
    assert done.searcher.index.count() == 4 * num and done.verdict.advice
