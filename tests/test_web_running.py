"""The server as it is met: behind a proxy, by browsers that ask twice, by guessers, and at its end."""

from __future__ import annotations

import contextlib
import logging
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

import httpx
import pytest
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.routing import Mount

from line import ENVIRONMENT, PROGRAM
from samething.index import create_index
from samething.search import Searcher, index
from samething.web import Limits, create_app
from samething.web.fetching import public_address
from samething.web.running import MAX_HALF_SENT
from scenes import write_things
from web_server import asked, running

TOKEN = "a secret of some length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def served(line, tmp_path_factory):
    """Images and their index."""
    folder = tmp_path_factory.mktemp("running")
    index(write_things(folder / "images", num_things=2), model=line / "model", output=folder / "index")
    return folder


@pytest.fixture
def client(served):
    with TestClient(
        create_app(Searcher.open(served / "index"), token=TOKEN),
        base_url="http://localhost",
        client=("127.0.0.1", 1),
    ) as opened:
        yield opened


def first_image(served):
    return next((served / "images").rglob("*.jpg"))


def first_id(client) -> str:
    return client.get("/info").json()["samples"][0]


# ---- behind a proxy, and by browsers


def test_the_page_works_below_a_path(served):
    """Every address in the page began with a slash, so below a proxy's path nothing of it was found."""
    app = create_app(Searcher.open(served / "index"))
    below = Starlette(
        routes=[Mount("/photos", app)], lifespan=lambda _: app.app.router.lifespan_context(app.app)
    )
    with TestClient(below, base_url="http://localhost") as client:
        for page in ("/photos/", "/photos/docs"):
            text = client.get(page).text
            addresses = re.findall(r'(?:src|href)="([^"#]+)"', text)
            assert addresses
            for address in addresses:
                found = httpx.URL(f"http://localhost{page}").join(address)
                if "static" in address:
                    assert client.get(found.path).status_code == 200, address
        for script in ("search", "server", "views", "docs"):
            text = client.get(f"/photos/static/{script}.js").text
            assert not re.search(r"""(?:ask|fetch|loadScriptOnce)\(["`]/""", text), script
            assert not re.search(r"=>? [`\"]/(?:images|thumbnails)", text), script
        assert {"url": "./"} in client.get("/photos/openapi.json").json()["servers"]


def test_head_is_answered_wherever_get_is(client):
    """Every HEAD was a 405."""
    row = first_id(client)
    for path in (
        "/",
        "/info",
        "/health",
        "/metrics",
        f"/images/{row}",
        f"/thumbnails/{row}",
        "/static/mark.svg",
    ):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        if path not in ("/metrics", "/info"):
            assert head.headers["content-length"] == str(len(got.content))
    assert client.head("/none").status_code == 404
    assert client.head("/add").status_code == 405


def test_head_over_a_connection_that_stays(served):
    with running(create_app(Searcher.open(served / "index"))) as address, httpx.Client() as one:
        for _ in range(3):
            assert one.head(f"{address}/").status_code == 200
            assert one.get(f"{address}/health").json()["status"] == "ok"


def test_an_image_is_sent_once(client):
    """Images had no ETag: after an hour the browser fetched each one again."""
    row = first_id(client)
    for path in (f"/images/{row}", f"/images/{row}?side=32", f"/thumbnails/{row}"):
        first = client.get(path)
        mark = first.headers["etag"]
        for known in (mark, f'"other", {mark}', f"W/{mark}", "*"):
            again = client.get(path, headers={"if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", mark)
        assert client.get(path, headers={"if-none-match": '"other"'}).content == first.content


@pytest.mark.parametrize(("scheme", "is_secure"), [("https", True), ("http", False)])
def test_the_cookie_is_secure_behind_tls(served, scheme, is_secure):
    """A proxy with TLS talks plain HTTP to the server: its word on the scheme was not heard."""
    app = create_app(Searcher.open(served / "index"), token=TOKEN, is_public=True, host_names=None)
    with running(app) as address:
        answer = httpx.post(f"{address}/login", json={"token": TOKEN}, headers={"x-forwarded-proto": scheme})
        assert answer.status_code == 204
        assert ("secure" in answer.headers["set-cookie"].lower().split("; ")) is is_secure


# ---- guesses and dawdlers


def test_guesses_are_logged_and_then_not_looked_at(served, caplog):
    """Tokens could be guessed at full speed, and nobody was told."""
    app = create_app(Searcher.open(served / "index"), token=TOKEN, is_public=True, host_names=None)
    caplog.set_level(logging.WARNING, "samething")
    with (
        TestClient(app, client=("203.0.113.9", 1)) as guesser,
        TestClient(app, client=("198.51.100.7", 1)) as other,
    ):
        wrong = [{"Authorization": f"Bearer guess {number}"} for number in range(9)]
        assert [guesser.get("/info", headers=each).status_code for each in wrong] == [401] * 9
        assert guesser.get("/info", headers=wrong[0]).status_code == 401  # an old token guesses once
        assert guesser.get("/info", headers=BEARER).status_code == 200
        assert guesser.post("/login", json={"token": "guess 9"}).status_code == 401
        for answer in (
            guesser.get("/info", headers={"Authorization": "Bearer guess 10"}),
            guesser.get("/info", headers=BEARER),
            guesser.get("/info", headers={"cookie": f'samething_token="{TOKEN}"'}),
            guesser.post("/login", json={"token": TOKEN}),
        ):
            assert answer.status_code == 429 and answer.headers["retry-after"]
        assert other.get("/info", headers=BEARER).status_code == 200
        assert guesser.get("/health").status_code == 200
    told = [record.getMessage() for record in caplog.records if "wrong token" in record.getMessage()]
    assert len(told) == 10 and all("203.0.113.9" in text for text in told)
    assert "guess" not in " ".join(told)


def test_half_sent_headers_do_not_shut_others_out(served):
    """1,100 connections that never finished their headers, and everybody else was answered 503."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    try:
        with running(create_app(Searcher.open(served / "index"))) as address, contextlib.ExitStack() as open_:
            host, port = address.removeprefix("http://").split(":")
            for _ in range(1100):
                half = open_.enter_context(socket.create_connection((host, int(port)), timeout=30))
                with contextlib.suppress(OSError):
                    half.sendall(b"GET /info HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
            assert httpx.get(f"{address}/health", timeout=30).status_code == 200
            assert asked(address, first_image(served), k=1).status_code == 200
            half.settimeout(30)
            half.sendall(b"no more\r\n\r\n")  # one of the last is still there
            assert b" 200 " in half.recv(100).splitlines()[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert MAX_HALF_SENT < 1000


# ---- images elsewhere


def test_images_of_a_tar_file_are_shown(line, served, tmp_path):
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(first_image(served), "one.jpg")
    opened, embedder = known_places(served, tmp_path / "i", {"a": f"tar://one.jpg::{shard}"})
    with TestClient(create_app(Searcher(embedder, opened)), base_url="http://localhost") as client:
        assert client.get("/images/a").content == first_image(served).read_bytes()


def known_places(served, folder, places):
    embedder = Searcher.open(served / "index").embedder
    opened = create_index(
        folder, dim=embedder.dim, model_fingerprint=embedder.fingerprint, model_name=embedder.name
    )
    vectors = embedder.embed([first_image(served)] * len(places))
    opened.add(vectors, [{"id": row, "path": place} for row, place in places.items()])
    return opened, embedder


def test_addresses_in_an_index_are_not_asked(served, tmp_path):
    """Whoever writes an index could make the server fetch from its own network, or open file: addresses."""
    hits: list[bytes] = []
    inside = socket.create_server(("127.0.0.1", 0))
    port = inside.getsockname()[1]

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = inside.accept()
                hits.append(connection.recv(100))
                connection.close()

    threading.Thread(target=accept, daemon=True).start()
    places = {
        "http": f"http://127.0.0.1:{port}/a.jpg",
        "shard": f"tar://a.jpg::http://127.0.0.1:{port}/a.tar",
        "cell": f"parquet://image/0::http://127.0.0.1:{port}/a.parquet",
        "file": f"file://{first_image(served)}",
    }
    opened, embedder = known_places(served, tmp_path / "i", places)
    with inside:
        for allow_urls in (False, True):
            app = create_app(Searcher(embedder, opened), allow_urls=allow_urls)
            with TestClient(app, base_url="http://localhost") as client:
                for row in places:
                    status = client.get(f"/images/{row}").status_code
                    assert status == (200 if allow_urls and row == "file" else 400), (row, allow_urls)
        assert not hits


@pytest.mark.parametrize(
    "address",
    ["64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::a00:1", "::127.0.0.1", "::ffff:10.0.0.1", "fec0::1",
     "fc00::1", "fe80::1", "2002:7f00:1::", "2001:0:7f00:1::1", "2001:db8::1", "ff02::1", "::"],
)  # fmt: skip
def test_addresses_that_lead_inside_by_another_name(address):
    """NAT64, IPv4-compatible and site-local addresses passed for public ones."""
    with pytest.raises(OSError, match="not public"):
        public_address(address, 80)
    assert public_address("2606:4700::1111", 80) == "2606:4700::1111"


# ---- what is told, and the end


def test_callers_from_elsewhere_learn_no_paths(served, tmp_path, caplog):
    """The errors told strangers where the index and the photographs are."""
    gone = tmp_path / "My photos" / "gone away.jpg"
    opened, embedder = known_places(served, tmp_path / "secret place" / "i", {"a": str(gone)})
    app = create_app(Searcher(embedder, opened), token=TOKEN, is_public=True, host_names=None)
    with TestClient(app, headers=BEARER, client=("203.0.113.9", 1)) as elsewhere:
        for answer in (elsewhere.get("/images/a"), elsewhere.post("/sync"), elsewhere.get("/status")):
            assert str(tmp_path) not in answer.text and "secret place" not in answer.text
            assert "My photos" not in answer.text
        assert "gone away.jpg" in elsewhere.get("/images/a").text
    assert str(gone) in caplog.text
    with TestClient(app, headers=BEARER, client=("127.0.0.1", 1)) as here:
        assert str(gone) in here.get("/images/a").text


def test_a_full_temporary_folder_is_said(client, tmp_path):
    """Large uploads wait in the temporary folder; its being full was called an error of the request."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, previous[1]))
    try:
        answer = client.post("/search", files={"image": b"\xff" * (3 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, ignored)
    assert answer.status_code == 507 and "full" in answer.json()["error"]
    assert "temporary folder" in answer.json()["next_step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_is_a_success_when_all_was_answered(served, number):
    """The program ended by the signal itself: service managers took every restart for a crash."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", str(served / "index"), "--port", "0"],
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        address = re.search(r"http://[^/]+", line)[0]
        assert asked(address, first_image(served), k=1).status_code == 200
        process.send_signal(number)
        assert process.wait(60) == 0, process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def test_what_was_not_answered_in_time_is_no_success(served, monkeypatch):
    from samething.errors import SamethingError
    from samething.web import running as ending

    monkeypatch.setattr(ending, "_STOPPING_S", 0.2)
    app = create_app(Searcher.open(served / "index"), limits=Limits(timeout_s=20.0))
    with ending.listen("127.0.0.1", 0) as listening:
        place = listening.getsockname()

        def ask_and_stop():
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(place) as slow:
                    slow.sendall(
                        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
                        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
                    )
                    time.sleep(0.5)
                    signal.raise_signal(signal.SIGTERM)
                    slow.recv(100)
                    return

        asking = threading.Thread(target=ask_and_stop)
        asking.start()
        with pytest.raises(SamethingError, match="1 requests that were not answered"):
            ending.run(app, listening, "127.0.0.1", browser=False)
        asking.join(60)
