"""The HTML report: one well-formed file that needs nothing beside it."""

import html.parser
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samething.catalog import Catalog
from samething.evaluation import Comparison, compare_embeddings
from samething.evaluation.run_report import NUM_HITS, Analysis, write_report
from scenes import photographs

pytestmark = pytest.mark.heavy

NASTY = '<script>alert("x")</script> & \'"é'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Every tag and the text between them; notes tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.mistakes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        self.mistakes += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.mistakes.append(f"</{tag}> while {self.open[-1:]} is open")
        else:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def comparison(*, domains=("art", "cars")) -> Comparison:
    rng = np.random.default_rng(0)
    rows = [
        {"image": f"{number}.jpg", "label": f"l{number % 7}", "domain": domains[number % 7 % len(domains)],
         "role": "query+index"}
        for number in range(28)
    ]  # fmt: skip
    images = Catalog.from_rows(rows, root=Path("/nowhere"))
    embeddings = {name: rng.normal(size=(28, 8)).astype(np.float32) for name in ("backbone", NASTY, "run")}
    return compare_embeddings(embeddings, images, num_resamples=20)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report é")
    images = []
    for number, image in enumerate(photographs()[:3]):
        images.append(folder / f"<b>{number}.png")
        image.save(images[-1])
    rows = [
        {"image": images[0].name, "label": NASTY, "domain": "<i>domain", "role": "query"},
        {"image": images[1].name, "label": "right one", "domain": "<i>domain", "role": "index"},
        {"image": images[2].name, "label": NASTY, "domain": "<i>domain", "role": "index"},
        {"image": "gone.png", "label": "gone", "domain": "<i>domain", "role": "index"},
    ]
    found = Analysis(
        catalog=Catalog.from_rows(rows, root=folder), embeddings=np.eye(4), queries=np.array([0]),
        found=np.array([[1, 2, 3]]), scores=np.array([[0.9, 0.8, 0.1]]),
        is_right=np.array([[True, False, False]]), same=np.array([0.9]), different=np.array([0.1]),
        best_wrong=np.array([]),
    )  # fmt: skip
    records = [{"step": s, "loss": 1 / (s + 1), "learning_rate": 0.1} for s in range(5)]
    target = write_report(
        folder / "report.html", title=NASTY, comparison=comparison(domains=("<i>domain", "$\\frac$ cars")),
        featured="run", records=[*records, {"step": 4, "val/mmp@5": 0.5}],
        facts={"a <b>fact": NASTY}, analysis=found,
    )  # fmt: skip
    return target.read_text(encoding="utf-8")


def test_well_formed(page):
    parsed = Page(page)
    assert page.startswith("<!doctype html>") and not parsed.mistakes
    assert len(parsed.all("h1")) == 1 and parsed.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in parsed.all("img"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "ids of the drawings clash, so clip paths of one cut another"


def test_self_contained(page):
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith(("data:image/", "#")), (tag, value)
    assert not re.search(r"@import|url\((?!#)", page)


def test_images_are_inlined_and_small(page):
    import base64
    import io

    every = [image["src"] for image in Page(page).all("img")]
    sources = [source for source in every if not source.startswith("data:image/svg+xml;base64,")]
    assert len(every) == 12 and len(sources) == 7  # bars, similarities, map, three curves, query, three hits
    sources = sources[3:]
    for source in sources[:3]:
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))
        assert image.format == "JPEG" and max(image.size) == 112
    gone = Image.open(io.BytesIO(base64.b64decode(sources[3].split(",", 1)[1])))
    assert gone.size == (1, 1)


def test_marks_and_texts(page):
    figures = re.findall(r'<figure class="(\w+)">(.*?)</figure>', page, re.S)
    assert [kind for kind, _ in figures] == ["asked", "right", "wrong", "wrong"]
    assert ["✓" in body for _, body in figures] == [False, True, False, False]
    assert ["✗" in body for _, body in figures] == [False, False, True, True]
    assert "0.900" in figures[1][1] and "right one" in figures[1][1]


def test_markup_in_names_is_text(page):
    parsed = Page(page)
    # the map's legend has an i with a colour
    assert "<script" not in page and not {"b", "i"} & {tag for tag, own in parsed.tags if not own}
    assert "".join(parsed.text).count(NASTY) >= 4  # title, heading, fact, table, labels


def test_the_table_holds_the_numbers(page):
    expected = comparison(domains=("<i>domain", "$\\frac$ cars"))
    for name, result in expected.results.items():
        value = f"{100 * result.value('mmp@5'):.1f}"
        row = next(
            row for row in re.findall(r"<tr.*?</tr>", page, re.S) if f"<td>{name}</td>" in html_unescaped(row)
        )
        assert value in row and ("featured" in row) == (name == "run")
    assert page.count("28 queries") == 1


def html_unescaped(text):
    import html

    return html.unescape(text)


def analysed() -> Analysis:
    """Of images that are nowhere."""
    rows = [
        {"image": f"{number}.jpg", "label": f"l{number % 7}", "role": "query+index"} for number in range(28)
    ]
    embeddings = np.random.default_rng(0).normal(size=(28, 8)).astype(np.float32)
    return Analysis.of(embeddings, Catalog.from_rows(rows, root=Path("/nowhere")))


def test_same_input_same_page(tmp_path):
    def write(name):
        return write_report(
            tmp_path / name, title="t", comparison=comparison(), featured="run",
            records=[{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}], facts={}, analysis=analysed(),
        ).read_bytes()  # fmt: skip

    assert write("a.html") == write("b.html")


def test_queries_without_a_positive_are_counted_and_no_number_reads_nan(tmp_path):
    rows = [
        {"image": f"{n}.jpg", "label": label, "domain": domain, "role": "query+index"}
        for n, (label, domain) in enumerate([("a", "x"), ("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")])
    ]
    embeddings = {"run": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}
    measured = compare_embeddings(embeddings, Catalog.from_rows(rows, root=Path("/nowhere")), num_resamples=5)
    text = write_report(
        tmp_path / "r.html",
        title="t",
        comparison=measured,
        featured="run",
        records=[],
        facts={},
        analysis=analysed(),
    ).read_text(encoding="utf-8")
    assert "without a positive left out" in text
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", text)) and "<td>–</td>" in text


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """A report with everything: 40 things of two domains with images, some mistakes among them."""
    folder = tmp_path_factory.mktemp("analysis")
    image = photographs()[0].resize((40, 30))
    rows = []
    for number in range(120):
        image.save(folder / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "label": f"l{number % 40} <b>",
             "domain": ["art", "cars & co"][number % 2],
             "role": "query" if number < 40 else "index"}
        )  # fmt: skip
    catalog = Catalog.from_rows(rows, root=folder)
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((40, 6))[np.arange(120) % 40]
    embeddings = (embeddings + 0.6 * generator.standard_normal((120, 6))).astype(np.float32)
    analysis = Analysis.of(embeddings, catalog)
    compared = compare_embeddings({"run": embeddings, "other": embeddings[:, :3]}, catalog, num_resamples=20)
    target = write_report(
        folder / "r.html", title="t", comparison=compared, featured="run", records=[],
        facts={}, analysis=analysis,
    )  # fmt: skip
    return target.read_text(encoding="utf-8"), analysis, catalog, embeddings


def test_similarities_map_confusions_and_failures_are_there(looked_at):
    text, analysis, _, _ = looked_at
    parsed = Page(text)
    assert not parsed.mistakes
    for heading in ("Similarities", "Map of the embeddings", "Confusions between domains", "Worst failures",
                    "Near-misses", "Queries and what they found"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    dots = [one for one in parsed.all("div") if one.get("class", "").startswith("dot")]
    assert len(dots) == 80 and all("left:" in one["style"] and "tabindex" in one for one in dots)
    names, counts, totals = analysis.confusions()
    assert names == ["art", "cars & co"] and totals.tolist() == [20, 20]
    assert counts.sum() == (~analysis.is_right[:, 0]).sum() > 0
    for count in counts.ravel():
        assert re.search(rf"<td style=[^>]*>{count}\b", text)


def test_everything_of_it_is_inside_the_file(looked_at):
    text, *_ = looked_at
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe")
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert not re.search(r"@import|url\((?!#)", text) and "<b>" not in re.sub(r"<b>[^<]*</b>: ", "", text)


def test_the_analysis_equals_sorting(looked_at):
    _, analysis, catalog, embeddings = looked_at
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    things = np.arange(120) % 40
    scores = unit[:40] @ unit[40:].T
    order = np.argsort(-scores, axis=1)
    np.testing.assert_array_equal(analysis.found[:, 0], 40 + order[:, 0])
    np.testing.assert_array_equal(analysis.is_right[:, 0], things[40 + order[:, 0]] == np.arange(40))
    same = things[40:] == np.arange(40)[:, None]
    np.testing.assert_allclose(np.sort(analysis.same), np.sort(scores[same]), atol=1e-5)
    np.testing.assert_allclose(analysis.best_wrong, np.where(same, -2, scores).max(axis=1), atol=1e-5)
    worst, near = analysis.worst(5), analysis.near_misses(5)
    assert not analysis.is_right[worst, :NUM_HITS].any()
    firsts = analysis.scores[worst, 0].tolist()
    assert firsts == sorted(firsts, reverse=True)
    assert len(near) and not analysis.is_right[near, 0].any()
    examples = analysis.queries[analysis.examples(4)]
    assert set(catalog.strings("domain")[examples]) == set(catalog.domains)
