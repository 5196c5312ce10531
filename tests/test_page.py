"""The page in a real Chromium: what a person does with a mouse, a keyboard, a phone."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from samething.calibration import Calibration
from samething.search import Searcher, index
from samething.search.collection import Collection
from samething.web import Limits, create_app
from scenes import overlap, write_things
from web_server import asked, running

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
expect = playwright.expect
expect.set_options(timeout=60_000)  # a busy machine is no fault of the page

TOKEN = "a secret of some length"
SCRIPT = "<img src=x onerror=alert(1)>"


CLOSE = re.compile(r"0\.9[89]\d|1\.000")
"""The score of an image that the index has: its row is a code."""


ALL_LOADED = "[...document.querySelectorAll('.tile img')].every(one => one.naturalWidth > 0)"


def chromium() -> str | None:
    """Chromium's program: CHROMIUM, Debian's, or Chrome's."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


if chromium() is None:
    pytest.skip("no Chromium here: apt-get install chromium, or name it in CHROMIUM", allow_module_level=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_things(tmp_path_factory.mktemp("page") / "images", num_things=3)


@pytest.fixture(scope="module")
def address(line, images):
    """A server with three things of two domains, and one image whose label and name are script."""
    folder = images.parent / "index"
    searcher = index(images, model=line / "model", output=folder, domain="things")
    Image.new("RGB", (200, 100), "orange").save(images.parent / "orange.png")
    evil = images.parent / "evil" / SCRIPT.replace("/", "") / f"{SCRIPT}.png"
    evil.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64), "purple").save(evil)
    searcher.sync([Collection(evil.parent.parent, domain=SCRIPT)])
    with running(create_app(searcher, token=TOKEN, limits=Limits(max_bytes=2**20))) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as runner:
        quiet = [
            "--no-sandbox",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
        ]
        opened = runner.chromium.launch(executable_path=chromium(), args=quiet)
        yield opened
        opened.close()


@contextlib.contextmanager
def new_page(browser, address, **options):
    """A page of its own; it must ask nobody else for anything, and its script must not fail."""
    context = browser.new_context(**options)
    page = context.new_page()
    problems, foreign = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "console",
        lambda message: problems.append(message.text) if "Content Security" in message.text else None,
    )
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((address, "blob:", "data:")) else foreign.append(request.url)
        ),
    )
    page.set_default_timeout(30_000)
    yield page
    context.close()
    assert not problems and not foreign


@pytest.fixture
def page(browser, address):
    with new_page(browser, address, viewport={"width": 1280, "height": 850}) as opened:
        opened.goto(address)
        yield opened


def look_for(page, image: Path) -> None:
    page.set_input_files("#file", str(image))
    page.locator(".tile").first.wait_for()


def drag(page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag over the query's image, from and to places given as shares of its size."""
    box = page.locator("#query").bounding_box()
    (x, y), (to_x, to_y) = [
        (box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in (start, end)
    ]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(to_x, to_y, steps=4)
    page.mouse.up()


def test_a_image_is_chosen_and_its_thing_found(page, images):
    expect(page.locator("#about")).to_contain_text("13 pictures")
    look_for(page, images / "thing 01 é" / "view 0.jpg")
    tiles = page.locator(".tile")
    expect(tiles).to_have_count(13)
    expect(tiles.first).to_contain_text("thing 01 é")
    expect(tiles.first.locator(".score")).to_have_text(CLOSE)
    expect(page.locator("#count")).to_have_text("13 pictures")
    page.wait_for_function(ALL_LOADED)


@pytest.mark.slow
def test_a_result_leads_to_what_is_like_it_and_back(page, images):
    look_for(page, images / "thing 00 é" / "view 0.jpg")
    row = page.locator(".go").nth(1).get_attribute("data-id")
    page.locator(".go").nth(1).click()
    page.wait_for_url(f"**#similar={row}")
    expect(page.locator(".tile")).to_have_count(12)
    expect(page.locator(f'[data-id="{row}"]')).to_have_count(0)
    page.go_back()
    expect(page.locator(".tile")).to_have_count(13)
    expect(page.locator("#query-name")).to_have_text("view 0.jpg")
    page.reload()  # an upload is not kept, and its place is empty rather than broken
    expect(page.locator("#drop")).to_be_visible()


@pytest.mark.slow
def test_a_second_look_shows_why(page, images):
    """The points that agree, in words on the tile and as lines in the closer view."""
    look_for(page, images / "thing 01 é" / "view 0.jpg")
    page.locator("#rerank").select_option("geometry")
    first = page.locator(".tile").first
    expect(first).to_contain_text("points agree")
    first.locator(".more").click()
    expect(page.locator("#closer-why")).to_be_visible()
    expect(page.locator("#closer-picture")).to_be_hidden()
    expect(page.locator("#closer-why image")).to_have_count(2)  # drawn once both are decoded
    assert page.locator("#closer-why line").count() > 8
    page.keyboard.press("Escape")
    page.locator("#rerank").select_option("")
    expect(first).not_to_contain_text("points agree")
    first.locator(".more").click()
    expect(page.locator("#closer-why")).to_be_hidden()
    expect(page.locator("#closer-picture")).to_be_visible()


@pytest.mark.slow
def test_start_from_a_image_of_the_collection(page):
    page.locator("#samples a").first.click()
    expect(page.locator(".tile")).to_have_count(12)


@pytest.mark.slow
def test_a_label_is_looked_for(page, images):
    page.fill("#look-label", "thing 02 é")
    page.keyboard.press("Enter")
    expect(page.locator("#query-name")).to_have_text("thing 02 é")
    expect(page.locator("#looked-for img")).to_have_count(4)
    expect(page.locator("#stage")).to_be_hidden()
    expect(page.locator(".tile")).to_have_count(9)
    expect(page.locator("#results")).not_to_contain_text("thing 02 é")
    page.locator("a.name", has_text="thing 00 é").first.click()  # the label of a result
    expect(page.locator("#query-name")).to_have_text("thing 00 é")
    expect(page.locator("#results")).to_contain_text("thing 02 é")
    page.go_back()
    expect(page.locator("#query-name")).to_have_text("thing 02 é")
    page.locator(".tile").first.hover()
    page.locator(".tile .more").first.click()
    label = page.text_content("#closer-label")
    page.click("#closer-all")
    expect(page.locator("#query-name")).to_have_text(label)
    page.locator("#looked-for a").first.click()  # one of its images alone
    expect(page.locator(".tile")).to_have_count(12)
    expect(page.locator("#stage")).to_be_visible()
    page.goto(page.url.partition("#")[0] + "#label=no%20such")
    expect(page.locator("#message")).to_contain_text("no such")


@pytest.mark.slow
def test_filters_narrow_the_results(page, images):
    look_for(page, images / "thing 00 é" / "view 0.jpg")
    chip = page.locator("#domains .chip", has_text="things")
    chip.click()
    expect(page.locator(".tile")).to_have_count(12)
    expect(chip).to_have_attribute("aria-pressed", "true")
    page.fill("#label", "thing 02 é")
    expect(page.locator(".tile")).to_have_count(4)
    page.fill("#label", "")
    page.fill("#where", "width=97..")
    expect(page.locator("#count")).to_have_text("Nothing found")
    page.fill("#where", "colour=red")
    expect(page.locator("#message")).to_contain_text("colour=red")
    page.fill("#where", "")
    expect(page.locator(".tile")).to_have_count(12)
    expect(page.locator("#message")).to_be_hidden()
    page.select_option("#k", "12")
    chip.click()
    expect(page.locator(".tile")).to_have_count(12)


@pytest.mark.slow
def test_a_calibrated_model_gives_bands_and_hides_nothing(browser, address, line, images):
    """A slider hid what was below the threshold: one card, or an empty box with the right thing second."""
    plain = Searcher.open(images.parent / "index")
    query = images / "thing 01 é" / "view 0.jpg"
    scores = np.array([match.score for match in plain.find(query, k=12).matches])
    middle = float(0.9 * scores[0] + 0.1 * scores[1])  # two coded rows are nearer than an image and a row
    slope = 8 / (float(scores[0]) - middle)  # sure of the best, sure that the others are wrong
    fitted = dataclasses.replace(
        Calibration.fit(scores, scores >= middle), slope=slope, intercept=-slope * middle
    )
    config = {**plain.embedder.config, "calibration": json.loads(json.dumps(fitted.to_json()))}
    calibrated = dataclasses.replace(plain, embedder=dataclasses.replace(plain.embedder, config=config))
    with running(create_app(calibrated)) as address:
        answer = asked(address, query, k=12).json()
        expected = fitted.probability(scores)
        assert [match["probability"] for match in answer["matches"]] == pytest.approx(expected, abs=1e-4)
        bands = list(dict.fromkeys(match["band"] for match in answer["matches"]))
        assert len(bands) > 1 and answer["band"] == bands[0] and answer["calibrated_by"] == "labels"
        best = answer["matches"][0]["id"]
        rest = httpx.get(f"{address}/similar/{best}").json()
        assert rest["no_match"] is True and rest["matches"]
        for width in (1200, 400):
            with new_page(browser, address, viewport={"width": width, "height": 850}) as page:
                page.goto(address)
                look_for(page, query)
                expect(page.locator(".tile .score").first).to_have_text(f"{round(100 * expected[0])} %")
                expect(page.locator(".results .band")).to_have_count(len(bands))
                expect(page.locator("#advice")).to_have_text(answer["advice"])
                assert page.locator(".keys").is_visible() == (width == 1200)
                if shots := os.environ.get("SAMETHING_SHOTS"):
                    page.screenshot(path=f"{shots}/bands-{width}.png")
                page.locator(".go").first.click()  # itself left out, nothing is likely to be the same thing
                expect(page.locator("#advice")).to_have_text(rest["advice"])
                expect(page.locator(".tile")).to_have_count(12)
                expect(page.locator(".results .band")).to_have_text(["No match: only the nearest"])


@pytest.mark.slow
def test_a_part_of_the_image(page, images):
    look_for(page, images / "thing 01 é" / "view 0.jpg")
    page.evaluate("""() => {
        const real = window.fetch;
        window.crops = [];
        window.fetch = (path, options) => {
            if (options && options.body instanceof FormData) window.crops.push(options.body.get("crop"));
            return real(path, options);
        };
    }""")
    drag(page, (0.25, 0.25), (0.75, 0.5))
    crop = [int(number) for number in page.evaluate("crops[0]").split(",")]
    np.testing.assert_allclose(crop, (24, 24, 72, 48), atol=1)
    expect(page.locator("#uncrop")).to_be_visible()
    page.click("#uncrop")
    expect(page.locator(".tile .score").first).to_have_text(CLOSE)
    page.locator(".go").first.click()  # also of an image of the index
    expect(page.locator(".tile")).to_have_count(12)
    page.wait_for_load_state("networkidle")
    with page.expect_response("**/search") as answered:
        drag(page, (0.1, 0.1), (0.9, 0.9))
    assert answered.value.status == 200


@pytest.mark.slow
def test_dropped_and_pasted(page, images):
    content = list((images / "thing 02 é" / "view 0.jpg").read_bytes())
    make = """([content, kind]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(content)], "a.jpg", { type: "image/jpeg" }));
        const options = { bubbles: true, cancelable: true };
        const event = kind === "paste" ? new ClipboardEvent(kind, { ...options, clipboardData: transfer })
            : new DragEvent(kind, { ...options, dataTransfer: transfer });
        document.body.dispatchEvent(event);
    }"""
    page.evaluate(make, [content, "dragenter"])
    assert page.locator("body.over-page").count() == 1
    page.evaluate(make, [content, "drop"])
    expect(page.locator(".tile").first).to_contain_text("thing 02 é")
    assert page.locator("body.over-page").count() == 0
    page.click("#clear")
    expect(page.locator("#drop")).to_be_visible()
    page.evaluate(make, [content, "paste"])
    expect(page.locator(".tile").first).to_contain_text("thing 02 é")


@pytest.mark.slow
def test_what_goes_wrong_is_said(page, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image at all")
    page.set_input_files("#file", str(broken))
    expect(page.locator("#message")).to_contain_text("not an image in a known format")
    look_for(page, images / "thing 00 é" / "view 0.jpg")  # and it goes on
    expect(page.locator("#message")).to_be_hidden()
    page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"})
    expect(page.locator("#message")).to_contain_text("not a picture")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"x" * 2**20})
    expect(page.locator("#message")).to_contain_text("too large")
    page.route("**/search", lambda route: route.abort())
    page.set_input_files("#file", str(images / "thing 00 é" / "view 0.jpg"))
    expect(page.locator("#message")).to_contain_text("does not answer")


def test_the_keyboard_alone(page, images):
    look_for(page, images / "thing 00 é" / "view 0.jpg")
    focused = "document.activeElement.dataset.id"
    rows = page.locator(".go").evaluate_all("tiles => tiles.map(tile => tile.dataset.id)")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == rows[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == rows[1]
    page.keyboard.press("End")
    assert page.evaluate(focused) == rows[-1]
    page.keyboard.press("Home")
    page.wait_for_timeout(300)  # the tile in focus is raised by then, and still in its row
    page.keyboard.press("ArrowDown")
    assert rows.index(page.evaluate(focused)) > 1
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == rows[0]
    page.keyboard.press("Space")
    expect(page.locator("#closer")).to_be_visible()
    expect(page.locator("#closer-facts")).to_contain_text("view")
    page.keyboard.press("Escape")
    expect(page.locator("#closer")).to_be_hidden()
    assert page.evaluate(focused) == rows[0]
    page.keyboard.press("Enter")
    page.wait_for_url(f"**#similar={rows[0]}")
    with page.expect_file_chooser():
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("/")


def test_script_in_names_and_labels_is_text(page, images):
    look_for(page, images / "thing 00 é" / "view 0.jpg")
    page.locator("#domains .chip", has_text="onerror").click()
    expect(page.locator(".tile")).to_have_count(1)
    expect(page.locator(".tile .name")).to_contain_text("onerror=alert(1)")
    page.locator(".tile").hover()
    page.locator(".tile .more").click()
    expect(page.locator("#closer-label")).to_contain_text("onerror=alert(1)")
    assert page.locator("img[src=x]").count() == 0
    page.keyboard.press("Escape")
    page.goto(page.url.partition("#")[0] + "#index")
    expect(page.locator("#bars")).to_contain_text("onerror=alert(1)")
    assert page.locator("img[src=x]").count() == 0  # and the page's fixture saw no dialog


@pytest.mark.slow
def test_a_map_that_is_being_made_shows_a_bar(page):
    """Nothing moved on the page for the minutes that a large map takes."""
    is_made = []
    page.route(
        "**/map?*", lambda route: route.continue_() if is_made else route.fulfill(json={"figure": None})
    )
    page.click("nav [data-view=map]")
    expect(page.locator("#map-message")).to_contain_text("being made")
    expect(page.locator("#map-progress")).to_be_visible()
    is_made.append(True)
    page.locator("#map-plot canvas").first.wait_for()
    expect(page.locator("#map-progress")).to_be_hidden()


@pytest.mark.slow
def test_the_map_shows_images_and_leads_to_them(page):
    page.click("nav [data-view=map]")
    page.locator("#map-plot canvas").first.wait_for()
    places = """() => {
        const view = Object.values(Bokeh.index)[0] || [...Bokeh.index][0];
        const plot = (view.model || view).document.roots()[0];
        const frame = Bokeh.index.get_by_id ? Bokeh.index.get_by_id(plot.id) : view;
        const box = document.querySelector("#map-plot").getBoundingClientRect();
        return plot.renderers.map((one) => {
            const data = one.data_source.data;
            return [...data.id].map((id, row) => {
                const inner = frame.frame.bbox;
                return [id, data.domain[row],
                    box.left + inner.left + frame.frame.x_scale.compute(data.x[row]) - inner.left,
                    box.top + inner.top + frame.frame.y_scale.compute(data.y[row]) - inner.top];
            });
        }).flat();
    }"""
    page.wait_for_timeout(300)
    points = page.evaluate(places)
    assert len(points) == 13
    for row, domain, x, y in points:
        if domain == SCRIPT:
            page.mouse.move(x - 3, y)
            page.mouse.move(x, y, steps=3)
            hover = page.locator(".map-hover").first
            expect(hover).to_contain_text("onerror=alert(1)")
            expect(hover.locator("img")).to_have_attribute("src", f"/thumbnails/{row}")
            assert page.locator("img[src=x]").count() == 0
            page.mouse.click(x, y)
            page.wait_for_url(f"**#similar={row}")
            expect(page.locator(".tile")).to_have_count(12)
            return
    raise AssertionError("the image is not on the map")


@pytest.mark.slow
def test_the_index_is_changed_with_the_token_alone(page, images):
    page.click("nav [data-view=index]")
    expect(page.locator("#facts")).to_contain_text("13")
    content = io.BytesIO()
    Image.effect_mandelbrot((80, 60), (-2, -1.5, 1, 1.5), 50).save(content, "PNG")
    one = {"name": "new.png", "mimeType": "image/png", "buffer": content.getvalue()}
    page.set_input_files("#add-file", one)
    page.fill("#add-label", "fractal")
    page.click("#add button")
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#token-message")).to_have_text("This is not the token.")
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#add-state")).to_contain_text("Added")
    expect(page.locator("#facts")).to_contain_text("14")
    page.set_input_files("#file", one)
    expect(page.locator(".tile").first).to_contain_text("fractal")
    page.evaluate("window.confirm = () => true")
    page.locator(".tile").first.hover()
    page.locator(".tile .more").first.click()
    page.click("#closer-delete")
    expect(page.locator(".tile")).to_have_count(13)
    expect(page.locator("#results")).not_to_contain_text("fractal")


def test_on_a_phone(browser, address, images):
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    with new_page(browser, address, **phone) as page:
        page.goto(address)
        expect(page.locator(".camera")).to_be_visible()
        assert page.get_attribute("#camera", "capture") == "environment"
        page.set_input_files("#camera", str(images / "thing 01 é" / "view 0.jpg"))
        page.locator(".tile").first.wait_for()
        for view in ("search", "map", "index"):
            page.click(f"nav [data-view={view}]") if view != "search" else None
            page.wait_for_timeout(200)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 390, f"{view} is {width} wide"
        page.go_back()
        page.go_back()
        expect(page.locator(".tile").first).to_contain_text("thing 01 é")
        # a result is seen without scrolling
        page.wait_for_function("(document.querySelector('.tile') || {}).getBoundingClientRect?.().y < 844")
        small = "tiles => tiles.filter(one => Math.min(one.offsetWidth, one.offsetHeight) < 30).length"
        assert page.locator("button:visible").evaluate_all(small) <= 1
        page.locator(".tile .more").first.tap()
        expect(page.locator("#closer")).to_be_visible()
        page.locator("#closer .close").tap()
        page.locator(".go").nth(1).tap()
        page.wait_for_url("**#similar=*")
        expect(page.locator(".tile")).to_have_count(12)


@pytest.mark.slow
def test_light_and_dark(browser, address):
    ground = "getComputedStyle(document.body).backgroundColor"
    with new_page(browser, address, color_scheme="dark") as page:
        page.goto(address)
        dark = page.evaluate(ground)
        page.click("#theme")
        light = page.evaluate(ground)
        assert dark != light
        page.reload()
        assert page.evaluate(ground) == light  # it is remembered


@pytest.mark.slow
def test_the_apis_page(browser, address):
    with new_page(browser, address) as page:
        page.goto(f"{address}/docs")
        page.locator(".opblock").first.wait_for()
        expect(page.locator("#documentation")).to_contain_text("/similar/{row_id}")


@pytest.mark.slow
def test_a_public_server_asks_for_its_token(browser, address, images):
    searcher = Searcher.open(images.parent / "index")
    app = create_app(searcher, token=TOKEN, is_public=True, host_names=None)
    with running(app) as public, new_page(browser, public) as page:
        page.goto(public)
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("#about")).to_contain_text("13 pictures")
        look_for(page, images / "thing 00 é" / "view 0.jpg")
        page.wait_for_function(ALL_LOADED)


@pytest.mark.slow
def test_a_thing_in_a_bigger_image_is_framed(browser, line, images, tmp_path):
    """A frame on the tile where the thing is, and in the closer view; none where the whole image is found."""
    ground = Image.new("RGB", (300, 200), "white")
    ground.paste(Image.open(images / "thing 01 é" / "view 0.jpg"), (180, 40))
    (tmp_path / "scenes").mkdir()
    ground.save(tmp_path / "scenes" / "scene.png")
    made = index(tmp_path / "scenes", model=line / "model", output=tmp_path / "index", regions="proposals")
    with (
        running(create_app(made)) as address,
        new_page(browser, address, viewport={"width": 1280, "height": 850}) as page,
    ):
        page.goto(address)
        look_for(page, images / "thing 01 é" / "view 0.jpg")
        frame = page.locator(".tile .place rect")
        expect(frame).to_have_count(1)
        found = asked(address, images / "thing 01 é" / "view 0.jpg").json()["matches"][0]["place"]
        assert float(frame.get_attribute("x")) == pytest.approx(300 * found[0])
        inner, outer = frame.bounding_box(), page.locator(".tile img").bounding_box()
        middle = (inner["x"] + inner["width"] / 2 - outer["x"]) / outer["width"]
        assert middle == pytest.approx((found[0] + found[2]) / 2, abs=0.02) and middle > 0.5
        page.locator(".tile .more").click()
        expect(page.locator("#closer-why rect")).to_have_count(1)
        expect(page.locator("#closer-why image")).to_have_count(1)
        expect(page.locator("#closer-facts")).to_contain_text("Found at")
        page.keyboard.press("Escape")
        look_for(page, tmp_path / "scenes" / "scene.png")
        expect(page.locator(".tile .score").first).to_have_text(CLOSE)
        expect(frame).to_have_count(0)
        page.locator("#propose").click()  # the thing in it is what stands out
        expect(page.locator("#uncrop")).to_be_visible()
        left, top, right, bottom = page.evaluate("state.crop")
        found = (float(left), float(top), float(right), float(bottom))
        assert overlap(found, (180.0, 40.0, 276.0, 136.0)) > 0.5
        expect(frame).to_have_count(1)
