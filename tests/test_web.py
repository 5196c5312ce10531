"""The server: what it answers, what it changes, and how it behaves under load."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from line import samething
from samething.embedder import Embedder
from samething.errors import FingerprintError, InputError
from samething.images import decode
from samething.index import create_index
from samething.rerank import RERANKERS
from samething.search import Searcher, index, sync
from samething.web import Limits, create_app, serve
from samething.web.batching import MAX_BATCH, Batcher, BusyError, Question
from samething.web.projection import image_map, project
from samething.web.running import listen
from samething.web.service import Service
from scenes import write_things
from web_server import asked, running

TOKEN = "a secret of some length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def shared(line, tmp_path_factory):
    """A folder with images and their index; look, but leave it as it is."""
    folder = tmp_path_factory.mktemp("served")
    images = write_things(folder / "images", num_things=3)
    index(images, model=line / "model", output=folder / "index", domain="things")
    return folder


@pytest.fixture(scope="module")
def client(shared):
    with TestClient(create_app(Searcher.open(shared / "index")), base_url="http://localhost") as opened:
        yield opened


@pytest.fixture
def own(line, tmp_path):
    """Images and an index that the test may change, and a client that may change them."""
    images = write_things(tmp_path / "images", num_things=2)
    searcher = index(images, model=line / "model", output=tmp_path / "index")
    with TestClient(create_app(searcher, token=TOKEN), base_url="http://localhost", headers=BEARER) as opened:
        yield opened, images, tmp_path / "index"


def image_bytes(shared, thing: int = 0, view: int = 0) -> bytes:
    return (shared / "images" / f"thing {thing:02d} é" / f"view {view}.jpg").read_bytes()


def upload(content: bytes, name: str = "image"):
    return ("image", (name, content, "application/octet-stream"))


# ---- asking


def test_a_search_is_the_librarys(client, shared):
    content = image_bytes(shared)
    found = client.post("/search", files=[upload(content)], data={"k": 5}).json()
    expected = Searcher.open(shared / "index").find(content, k=5)
    assert [match["id"] for match in found["matches"]] == [match.id for match in expected.matches]
    np.testing.assert_allclose(
        [match["score"] for match in found["matches"]],
        [match.score for match in expected.matches],
        atol=1e-5,
    )
    assert found["matches"][0]["label"] == "thing 00 é" and found["no_match"] is False
    assert "thumbnail" not in found["matches"][0]["metadata"]


def test_crops_filters_and_several_images(client, shared):
    one, other = image_bytes(shared, 1, 0), image_bytes(shared, 1, 1)
    searcher = Searcher.open(shared / "index")
    crop = client.post("/search", files=[upload(one)], data={"crop": "10,10,60,60", "k": 1}).json()
    image = decode(one).crop((10, 10, 60, 60))
    assert crop["matches"][0]["score"] == pytest.approx(searcher.find(image, k=1).matches[0].score, abs=1e-5)
    for combine in ("mean", "max"):
        both = client.post("/search", files=[upload(one), upload(other)], data={"combine": combine}).json()
        expected = searcher.find(one, other, combine=combine, k=24)
        assert [match["id"] for match in both["matches"]] == [match.id for match in expected.matches]
    for data, number in (
        ({"label": ["thing 00 é", "thing 01 é"]}, 8),
        ({"domain": "no such domain"}, 0),
        ({"folder": str(shared / "images" / "thing 02 é")}, 4),
        ({"where": "width=97.."}, 0),
        ({"where": ["width=96", "height=..96"], "k": 5}, 5),
    ):
        answer = client.post("/search", files=[upload(one)], data=data)
        assert len(answer.json()["matches"]) == number, data


def test_similar_leaves_the_image_itself_out(client, shared):
    first = client.post("/search", files=[upload(image_bytes(shared))], data={"k": 1}).json()["matches"][0]
    found = client.get(f"/similar/{first['id']}", params={"k": 3}).json()["matches"]
    assert len(found) == 3 and first["id"] not in {match["id"] for match in found}
    assert (
        client.get(f"/similar/{first['id']}", params={"label": "thing 02 é"}).json()["matches"][0]["rank"]
        == 1
    )


def test_a_second_look_by_the_server_is_the_librarys(client, shared, tmp_path):
    """By upload, by row and by label; an unknown one says which there are."""
    assert client.get("/info").json()["rerankers"] == list(RERANKERS)
    searcher = Searcher.open(shared / "index")
    path = shared / "images" / "thing 01 é" / "view 2.jpg"
    again = {"k": 5, "rerank": "geometry"}
    by_upload = client.post("/search", files=[upload(path.read_bytes())], data=again).json()
    expected = searcher.find(path, k=5, rerank="geometry")
    row = expected.matches[0].id
    by_row = client.get(f"/similar/{row}", params=again).json()
    by_label = client.get("/similar", params={"to_label": "thing 01 é", **again}).json()
    for answer, found in (
        (by_upload, expected),
        (by_row, searcher.find_row(row, k=5, rerank="geometry")),
        (by_label, searcher.find_label("thing 01 é", k=5, rerank="geometry")),
    ):
        assert [match["id"] for match in answer["matches"]] == [match.id for match in found.matches]
        told = [match["evidence"] for match in answer["matches"]]
        assert told == [match.evidence for match in found.matches]
        assert all(match["evidence"]["by"] == "geometry" for match in answer["matches"])
    wrong = client.post("/search", files=[upload(path.read_bytes())], data={"rerank": "nonsense"})
    assert wrong.status_code == 400 and "geometry" in wrong.json()["expected"]
    (tmp_path / "x.onnx").write_bytes(b"a file of this machine")
    asked = {"rerank": str(tmp_path / "x.onnx")}
    wrong = client.post("/search", files=[upload(path.read_bytes())], data=asked)
    assert wrong.status_code == 400 and "geometry" in wrong.json()["expected"]
    assert client.post("/search", files=[upload(path.read_bytes())]).json()["matches"][0]["evidence"] is None


def test_a_second_look_reads_no_address_that_the_server_may_not_ask(shared, tmp_path):
    """Who made the index may have written any address into it; the second look must not fetch it."""
    shutil.copytree(shared / "index", tmp_path / "index", ignore=shutil.ignore_patterns("second-look*"))
    searcher = Searcher.open(tmp_path / "index")
    asked = []

    def moved(name, row):
        files = json.loads(row["files"])
        return {**row, "files": json.dumps([{**file, "path": "http://127.0.0.1:9/x.jpg"} for file in files])}

    ids = [row["id"] for batch in searcher.index.items() for row in batch.to_pylist()]
    searcher.index.amend(ids, moved)
    with TestClient(create_app(searcher), base_url="http://localhost") as client:
        service = client.app.app.state.service
        plain_content = service._content
        service._content = lambda file: asked.append(file.location) or plain_content(file)
        given = {"files": [upload(image_bytes(shared))], "data": {"rerank": "geometry", "k": 12}}
        found = client.post("/search", **given).json()["matches"]
    assert len(found) == 12 and len(asked) == 12
    assert all(match["evidence"] is None for match in found)


def test_similar_to_a_label_is_the_librarys(client, shared):
    searcher = Searcher.open(shared / "index")
    for combine in ("mean", "max"):
        asked = {"to_label": "thing 02 é", "k": 5, "combine": combine}
        found = client.get("/similar", params=asked).json()
        expected = searcher.find_label("thing 02 é", k=5, combine=combine)
        assert [match["id"] for match in found["matches"]] == [match.id for match in expected.matches]
        assert "thing 02 é" not in {match["label"] for match in found["matches"]}
        own = searcher.index.rows(found["looked_for"], ["label"])["label"].to_pylist()
        assert own == ["thing 02 é"] * 4
    filtered = client.get("/similar", params={"to_label": "thing 02 é", "label": "thing 00 é"}).json()
    assert [match["label"] for match in filtered["matches"]] == ["thing 00 é"] * 4
    unknown = client.get("/similar", params={"to_label": "no such thing"})
    assert unknown.status_code == 400 and "no such thing" in unknown.json()["error"]
    assert client.get("/similar").status_code == 422


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"crop": "1,2,3"}, "crop"),
        ({"crop": "1,2,nan,inf"}, "crop"),
        ({"crop": "500,500,600,600"}, "none of them"),
        ({"where": "colour=red"}, "colour"),
        ({"where": "width=wide"}, "width"),
        ({"k": "501"}, "501"),
        ({"domain": "a\0b"}, "null"),
        ({"url": "http://example.org/a.jpg"}, "--allow-urls"),
    ],
)
def test_what_does_not_fit_is_said(client, shared, data, word):
    answer = client.post("/search", files=[upload(image_bytes(shared))], data=data)
    assert answer.status_code == 400 and word in answer.text, answer.text
    assert answer.json().keys() == {"error", "expected", "next_step"}


def test_no_image_too_many_and_wrong_fields(client, shared):
    assert client.post("/search").status_code == 400
    assert client.post("/search", files=[upload(image_bytes(shared))] * 9).status_code == 400
    answer = client.post("/search", files=[upload(image_bytes(shared))], data={"k": "many"})
    assert answer.status_code == 422 and "k" in answer.json()["error"]
    for path in ("/similar/none", "/images/none", "/thumbnails/none"):
        assert client.get(path).status_code == 404


def test_images_and_thumbnails(client, shared):
    content = image_bytes(shared)
    row = client.post("/search", files=[upload(content)], data={"k": 1}).json()["matches"][0]["id"]
    answer = client.get(f"/images/{row}")
    assert answer.content == content and answer.headers["content-type"] == "image/jpeg"
    small = client.get(f"/images/{row}", params={"side": 32})
    assert Image.open(io.BytesIO(small.content)).size == (32, 32)
    assert Image.open(io.BytesIO(client.get(f"/thumbnails/{row}").content)).format == "JPEG"


def test_info_status_health_and_metrics(client):
    info = client.get("/info").json()
    assert info["num_images"] == 12 and info["domains"] == {"things": 12} and info["num_labels"] == 3
    assert info["can_change"] is False and len(info["samples"]) == 12 and "thumbnail" not in info["columns"]
    assert client.get("/status").json()["num_images"] == 12
    assert client.get("/health").json()["status"] == "ok"
    text = client.get("/metrics").text
    assert 'samething_requests_total{route="/info",status="200"}' in text
    assert "samething_index_images 12.0" in text and "samething_batch_images_count" in text


def test_the_api_is_described_and_its_page_needs_nothing_from_elsewhere(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/search", "/similar/{row_id}", "/images/{row_id}", "/add", "/delete", "/health"} <= paths.keys()
    for page in ("/docs", "/"):
        text = client.get(page).text
        assert "://" not in text
        for part in text.split('src="')[1:] + text.split('<link rel="stylesheet" href="')[1:]:
            assert client.get(part.partition('"')[0]).status_code == 200


def test_an_index_of_an_earlier_version_is_served(line, tmp_path):
    embedder = Embedder.load(line / "model")
    Image.new("RGB", (40, 30), "green").save(tmp_path / "green.bmp")
    old = create_index(
        tmp_path / "old", dim=embedder.dim, model_fingerprint=embedder.fingerprint, model_name=embedder.name
    )
    old.add(embedder.embed([tmp_path / "green.bmp"]), [{"id": "x/y ?", "path": str(tmp_path / "green.bmp")}])
    with TestClient(create_app(Searcher(embedder, old), token=TOKEN), base_url="http://localhost") as client:
        found = client.post("/search", files=[upload((tmp_path / "green.bmp").read_bytes())])
        assert found.json()["matches"][0]["score"] == pytest.approx(1, abs=1e-4)
        assert client.get("/info").json()["domains"] == {"": 1}
        assert client.post("/add", files=[upload(b"")], headers=BEARER).status_code == 400


# ---- the map


def test_the_map_is_made_once_and_kept(client, shared):
    deadline = time.monotonic() + 60
    figure = None
    while figure is None and time.monotonic() < deadline:
        figure = client.get("/map").json()["figure"]
    assert figure and figure["doc"]
    assert client.get("/map", params={"dark": True}).json()["figure"]
    opened = Searcher.open(shared / "index").index
    kept = image_map(opened)
    assert (shared / "index" / "map.npz").exists() and kept.places.shape == (12, 2)
    (shared / "index" / "map.npz").write_bytes(b"damaged")
    np.testing.assert_array_equal(image_map(opened).places, kept.places)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 1), (49, 8)])
def test_places_are_in_the_unit_square(shape):
    vectors = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    places = project(vectors)
    assert places.shape == (shape[0], 2) and ((places >= 0) & (places <= 1)).all()


# ---- changing


def test_add_find_delete(own):
    client, _, folder = own
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 70, 3), np.uint8)).save(content, "PNG")
    added = client.post(
        "/add", files=[upload(content.getvalue())], data={"label": "<b>noise</b>", "domain": "n"}
    )
    assert added.status_code == 201
    row = added.json()["id"]
    best = client.post("/search", files=[upload(content.getvalue())], data={"k": 1}).json()["matches"][0]
    assert (best["id"], best["label"], best["domain"]) == (row, "<b>noise</b>", "n")
    assert best["score"] == pytest.approx(1, abs=0.02)
    assert client.get(f"/images/{row}").content == content.getvalue()
    again = client.post("/add", files=[upload(content.getvalue())], data={"label": "noise"})
    assert again.json()["id"] == row and client.get("/info").json()["num_images"] == 9
    assert sync(folder).changes.num_kept == 9  # the command keeps what was uploaded
    assert client.post("/delete", json={"ids": [row, "none", row]}).json() == {"deleted": [row]}
    assert client.get(f"/images/{row}").status_code == 404
    assert not [path for path in (folder / "uploads").rglob("*") if path.suffix == ".png"]
    assert sync(folder).changes.num_kept == 8


def test_an_upload_of_a_known_image_is_a_copy(own):
    client, images, folder = own
    content = (images / "thing 00 é" / "view 0.jpg").read_bytes()
    row = client.post("/add", files=[upload(content)], data={"label": "mine"}).json()["id"]
    assert client.get("/status").json()["num_images"] == 8
    best = client.post("/search", files=[upload(content)], data={"k": 1, "label": "mine"}).json()["matches"][
        0
    ]
    assert best["id"] == row and len(best["copies"]) == 1
    assert sync(folder).index.count() == 8


def test_a_sync_in_the_background(own):
    client, images, _ = own
    Image.new("RGB", (64, 64), "red").save(images / "red.png")
    (images / "thing 00 é" / "view 3.jpg").unlink()
    (images / "broken.jpg").write_bytes(b"no image")
    assert client.post("/sync").status_code == 202
    deadline = time.monotonic() + 60
    while (now := client.get("/status").json()["sync"])["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now["state"] == "done" and now["message"].startswith("1 new") and "1 dropped" in now["message"]
    assert "1 could not be read" in now["message"] and (now["done"], now["total"]) == (2, 2)
    assert client.get("/info").json()["num_images"] == 8
    shutil.rmtree(images)
    client.post("/sync")
    while (now := client.get("/status").json()["sync"])["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now["state"] == "done" and "does not exist" in now["message"] and "0 dropped" in now["message"]
    assert client.get("/status").json()["num_images"] == 8


# ---- under load


class SlowEmbedder:
    """The model, held until it is let go."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.form, self.preprocessing = embedder, embedder.form, embedder.preprocessing
        self.go = threading.Event()

    def embed_pixels(self, pixels):
        assert self.go.wait(60)
        if (pixels == 7).all():
            raise ValueError("an image that the model cannot take")
        return self.embedder.embed_pixels(pixels)


def test_connections_send_at_once():
    """With Nagle's algorithm the end of each answer waits 40 ms for the client's delayed acknowledgement."""
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_queries_are_embedded_together_and_each_gets_its_own(line, shared):
    embedder = Embedder.load(line / "model")
    slow = SlowEmbedder(embedder)
    sizes: list[int] = []
    batcher = Batcher(embedder, max_waiting=40, on_batch=sizes.append)
    batcher._embedder = slow
    images = [decode(image_bytes(shared, number % 3, number % 4)) for number in range(39)]
    futures = [batcher.submit([embedder.prepare(image)])[0] for image in images]
    with pytest.raises(BusyError):
        batcher.submit([embedder.prepare(image) for image in images[:2]])
    assert batcher.num_waiting == 39
    slow.go.set()
    vectors = np.stack([future.result(60) for future in futures])
    np.testing.assert_allclose(vectors, embedder.embed(images), atol=1e-5)
    assert sum(sizes) == 39 and max(sizes) == MAX_BATCH
    bad = np.full_like(embedder.prepare(images[0]), 7)
    with pytest.raises(ValueError, match="cannot take"):
        batcher.submit([bad])[0].result(60)
    last = batcher.submit([embedder.prepare(images[0])])[0]
    batcher.close()
    assert last.done()  # what was taken is finished
    with pytest.raises(BusyError):
        batcher.submit([bad])
    assert batcher.num_waiting == 0


def test_queries_that_wait_together_are_searched_together(shared, monkeypatch):
    """Each had a thread and four transactions of its own; now only those that ask the same share a search."""
    searcher = Searcher.open(shared / "index")
    sizes: list[int] = []
    search = searcher.index.search
    vectors = searcher.embedder.embed([image_bytes(shared, number % 3, number % 4) for number in range(9)])
    expected = [
        searcher.find_vectors(own[None], name="upload", k=2 + row % 2) for row, own in enumerate(vectors)
    ]

    def counted(queries, k, **options):
        sizes.append(len(queries))
        if k == 4:
            raise FingerprintError("vectors", expected="others", next_step="none")
        return search(queries, k, **options)

    monkeypatch.setattr(searcher.index, "search", counted)
    slow = SlowEmbedder(searcher.embedder)
    batcher = Batcher(searcher.embedder)
    batcher._embedder = slow
    pixels = [searcher.embedder.prepare(decode(image_bytes(shared, row % 3, row % 4))) for row in range(9)]
    futures = [
        batcher.submit([own], Question(searcher, 2 + row % 2, {}))[0] for row, own in enumerate(pixels)
    ]
    wrong = batcher.submit(pixels[:1], Question(searcher, 4, {}))[0]
    slow.go.set()
    for future, one in zip(futures, expected, strict=True):
        found = future.result(60)
        assert [match.id for match in found.matches] == [match.id for match in one.matches]
        scores = [[match.score for match in each.matches] for each in (found, one)]
        np.testing.assert_allclose(*scores, atol=1e-5)
    with pytest.raises(FingerprintError):
        wrong.result(60)
    batcher.close()
    assert sum(sizes) == 10 and max(sizes) >= 4


def test_a_busy_server_says_so_and_recovers(shared):
    """As many as may wait are answered, the others get 429, and nobody else."""
    searcher = Searcher.open(shared / "index")
    app = create_app(searcher, limits=Limits(max_waiting=4))
    service = app.app.state.service
    slow = SlowEmbedder(searcher.embedder)
    service.batcher._embedder = slow
    content, answers = image_bytes(shared), []
    with running(app) as address, TestClient(app, base_url="http://localhost") as client:

        def go() -> None:
            answer = asked(address, content, k=1)
            ok = answer.status_code == 200
            answers.append(answer.json()["matches"][0]["rank"] if ok else str(answer.status_code))

        threads = [threading.Thread(target=go) for _ in range(12)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(answers) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert answers == ["429"] * 8
        assert client.get("/health").status_code == 200  # it still answers what costs nothing
        slow.go.set()
        for thread in threads:
            thread.join(60)
        assert answers.count(1) == 4
        assert asked(address, content, k=1).json()["matches"]


def test_a_query_that_takes_too_long_is_ended(shared):
    searcher = Searcher.open(shared / "index")
    app = create_app(searcher, limits=Limits(timeout_s=5.0))
    slow = SlowEmbedder(searcher.embedder)
    app.app.state.service.batcher._embedder = slow
    with TestClient(app, base_url="http://localhost") as client:
        answer = client.post("/search", files=[upload(image_bytes(shared))])
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        slow.go.set()
        batcher = app.app.state.service.batcher
        [future] = batcher.submit([searcher.embedder.prepare(decode(image_bytes(shared)))])
        assert future.result(60).shape == (searcher.embedder.dim,)  # giving up on one hurts no other


# ---- the command


def test_the_command_refuses_what_is_unsafe_or_taken(shared):
    with pytest.raises(InputError, match="which others can reach"):
        serve(shared / "index", host="0.0.0.0")
    with pytest.raises(InputError, match="token of 5"):
        serve(shared / "index", token="short")
    with pytest.raises(InputError, match="max_waiting"):
        serve(shared / "index", max_waiting=0)
    with (
        running(create_app(Searcher.open(shared / "index"))) as address,
        pytest.raises(InputError, match="port"),
    ):
        serve(shared / "index", port=int(address.rpartition(":")[2]))
    with pytest.raises(InputError, match="token"):
        create_app(Searcher.open(shared / "index"), is_public=True)


def test_the_command_helps_and_names_a_wrong_index(tmp_path):
    assert "--allow-urls" in samething("serve", "--help").stdout
    done = samething("serve", tmp_path / "none", "--port", "0")
    assert done.returncode == 1 and "none" in done.stderr


@pytest.mark.slow
def test_no_request_makes_the_server_fail(own):
    """Schemathesis reads the OpenAPI description and tries what it can think of: never a 5xx."""
    client, _, _ = own
    with running(client.app) as address:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json",
                "--checks", "not_a_server_error", "--max-examples", "60", "--seed", "1",
                "--header", f"Authorization: Bearer {TOKEN}", "--no-color",
            ],
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        print(done.stdout[-5000:])
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert httpx.get(f"{address}/status", headers=BEARER).json()["num_images"] >= 0
    counted = client.get("/metrics").text
    assert 'status="5' not in counted
    assert counted.count('status="200"') >= 8  # most of it was let in


def test_a_query_whose_batcher_was_closed_meanwhile_goes_to_the_next(shared, monkeypatch):
    """It was told that too many wait, when the server went over to another model meanwhile."""
    service = Service(Searcher.open(shared / "index"), limits=Limits())
    prepared, seen = service._prepared, []

    def overtaken(*given):
        found = prepared(*given)
        seen.append(found[1])
        if len(seen) == 1:
            service._take(dataclasses.replace(found[0]))
            found[1].close()
        return found

    monkeypatch.setattr(service, "_prepared", overtaken)
    found = asyncio.run(service.find([image_bytes(shared, 0, 0)], k=2, where={}))
    assert len(found.matches) == 2 and len(seen) == 2 and seen[0] is not seen[1]
    service.close()
