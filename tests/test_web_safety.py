"""The server against those who mean it harm: each thing that could be tried, tried."""

from __future__ import annotations

import http.server
import io
import json
import socket
import threading
import time
import zlib
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin

from samething.errors import ImageError
from samething.images import Box, Source
from samething.index import create_index
from samething.search import Searcher, index
from samething.web import Limits, create_app, fetching
from samething.web.fetching import fetch_public, public_address
from samething.web.guards import Access
from samething.web.uploads import sendable
from scenes import write_things
from web_server import running

TOKEN = "a secret of some length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def served(line, tmp_path_factory):
    """Images and their index."""
    folder = tmp_path_factory.mktemp("safety")
    index(write_things(folder / "images", num_things=1), model=line / "model", output=folder / "index")
    return folder


@pytest.fixture(scope="module")
def client(served):
    limits = Limits(max_bytes=200_000, max_pixels=2_000_000)
    app = create_app(Searcher.open(served / "index"), token=TOKEN, limits=limits)
    with TestClient(app, base_url="http://localhost") as opened:
        yield opened


@pytest.fixture(scope="module")
def public(served):
    app = create_app(Searcher.open(served / "index"), token=TOKEN, is_public=True, host_names=None)
    with TestClient(app, base_url="http://example.org") as opened:
        yield opened


def one_image(served) -> bytes:
    return next((served / "images").rglob("*.jpg")).read_bytes()


def search(client, content: bytes, name: str = "image", kind: str = "image/png", **data):
    return client.post("/search", files=[("image", (name, content, kind))], data=data)


def png(*, width: int, height: int) -> bytes:
    """A PNG file of one colour, some bytes for any number of pixels."""
    stream = io.BytesIO()
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + width // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    stream.write(b"\x89PNG\r\n\x1a\n")
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    for name, content in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")):
        PngImagePlugin.putchunk(stream, name, content)
    return stream.getvalue()


# ---- uploads


def test_an_upload_that_is_too_large(client):
    answer = search(client, b"\xff" * 250_000)
    assert answer.status_code == 413 and "200,000" in answer.json()["error"]

    def drip():  # no length is announced
        for _ in range(100):
            yield b"\xff" * 10_000

    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/search", content=drip(), headers=kind).status_code == 413
    assert client.get("/health", headers={"content-length": "-1"}).status_code == 413


def test_an_upload_that_never_ends(served):
    limits = Limits(timeout_s=0.5, max_waiting=2)
    with running(create_app(Searcher.open(served / "index"), limits=limits)) as address:
        host, port = address.removeprefix("http://").split(":")
        head = "POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        slow = []
        for _ in range(2):
            slow.append(socket.create_connection((host, int(port)), timeout=30))
            slow[-1].sendall(f"{head}Content-Length: 1000\r\n\r\n--x\r\n".encode())
        for connection in slow:
            with connection:
                assert b" 408 " in connection.recv(1000).splitlines()[0]
        with socket.create_connection((host, int(port)), timeout=30) as after:  # their places are free again
            after.sendall(f"{head}Content-Length: 5\r\nConnection: close\r\n\r\n--x--".encode())
            assert b" 400 " in after.recv(1000).splitlines()[0]


def test_a_decompression_bomb(client, tmp_path):
    for width, height in ((30_000, 30_000), (1500, 1500)):
        bomb = png(width=width, height=height)
        assert len(bomb) < 200_000
        began = time.process_time()
        answer = search(client, bomb)
        assert answer.status_code == 400 and "pixels" in answer.json()["error"]
        assert time.process_time() - began < 5  # it was not unpacked
        assert client.post("/add", files={"image": bomb}, headers=BEARER).status_code == 400


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no image", b"\xff\xd8\xff\xe0cut",
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a" + b"\0" * 20, b"<html></html>",
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_whatever_it_is_called(client, content):
    for kind in ("image/png", "image/svg+xml", "text/html"):
        assert search(client, content, "a.png", kind).status_code == 400
    assert client.post("/add", files={"image": content}, headers=BEARER).status_code == 400


def test_names_of_uploads_are_not_used(client, served):
    content = one_image(served)
    for name in ("../../../tmp/evil.jpg", "/etc/passwd", SCRIPT, "a\\b.jpg", "con.jpg", "x" * 2000):
        assert search(client, content, name).status_code == 200, name[:20]
        assert SCRIPT not in search(client, content, name).text
        assert client.post("/add", files={"image": (name, content)}, headers=BEARER).status_code == 201
    kept = [path for path in (served / "index" / "uploads").rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in kept) == [".jpg"]


@pytest.mark.parametrize("label", ["a\nb", "a\0b", " a", "x" * 201, "a\u202eb"])
def test_labels_that_cannot_be_kept(client, served, label):
    form = {"label": label}
    files = {"image": one_image(served)}
    assert client.post("/add", files=files, data=form, headers=BEARER).status_code == 400


# ---- what is sent


@pytest.mark.parametrize(
    "name",
    ["../../../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "manifest.json", "%00", "' OR 1=1"],
)
def test_only_what_the_index_knows_is_sent(client, name):
    for route in ("images", "thumbnails", "static", "similar", "docs/static", "static-bokeh"):
        for written in (name, quote(name, safe="")):
            answer = client.get(f"/{route}/{written}")
            assert answer.status_code in (400, 404), (route, written)
            assert "root:" not in answer.text


def test_a_file_that_turned_into_something_else(line, served, tmp_path):
    """An index knows a path, and the file there is replaced: its content decides, not its name."""
    embedder = Searcher.open(served / "index").embedder
    page = tmp_path / "a.jpg"
    Image.new("RGB", (20, 20)).save(page)
    vectors = embedder.embed([page])
    opened = create_index(
        tmp_path / "i", dim=embedder.dim, model_fingerprint=embedder.fingerprint, model_name=embedder.name
    )
    opened.add(vectors, [{"id": "a", "path": str(page), "label": SCRIPT}])
    with TestClient(create_app(Searcher(embedder, opened)), base_url="http://localhost") as client:
        for content in (f"<html>{SCRIPT}".encode(), b"<svg/>"):
            page.write_bytes(content)
            answer = client.get("/images/a")
            assert answer.status_code == 400 and answer.headers["content-type"] == "application/json"
        page.unlink()
        page.symlink_to("/etc/passwd")
        assert client.get("/images/a").status_code == 400
        page.unlink()
        assert client.get("/images/a").status_code == 400
        found = client.get("/similar/a").json()
        assert found["matches"] == []


@pytest.mark.parametrize(
    ("kind", "media_type"),
    [("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "jpeg"), ("TIFF", "jpeg")],
)
def test_the_type_is_what_the_content_is(tmp_path, kind, media_type):
    path = tmp_path / "page.html"
    Image.new("RGB", (64, 48), "red").save(path, kind)
    source = Source(str(path))
    content, sent_type = sendable(source, source.read(), max_pixels=10_000)
    assert sent_type == f"image/{media_type}" and Image.open(io.BytesIO(content)).format == media_type.upper()
    part, part_type = sendable(Source(str(path), Box(0, 0, 20, 10)), source.read(), max_pixels=10_000)
    assert part_type == "image/jpeg" and Image.open(io.BytesIO(part)).size == (20, 10)
    with pytest.raises(ImageError, match="pixels"):
        sendable(source, source.read(), max_pixels=100)


def test_headers_of_every_answer(client):
    for path in ("/", "/search", "/none", "/images/none", "/static/search.js", "/docs", "/metrics"):
        answer = client.get(path, headers={"origin": "http://evil.example"})
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe-eval" not in policy
        )
        assert answer.headers["x-frame-options"] == "DENY"
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = client.options("/search", headers=asked)
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control-")]


# ---- who is asking


def test_another_site_and_another_name(client, served):
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:8000", ""):
        assert client.get("/info", headers={"host": host}).status_code == 421
    for host in ("localhost:8000", "127.0.0.1", "[::1]:99", "LOCALHOST"):
        assert client.get("/info", headers={"host": host}).status_code == 200
    content = one_image(served)
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        answer = client.post("/search", files={"image": content}, headers={"sec-fetch-site": site})
        assert answer.status_code == status


def test_changes_need_the_token(client, served):
    files = {"image": one_image(served)}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"},
                    {"authorization": "Bearer"}, {"cookie": f"samething_token={TOKEN}"}):  # fmt: skip
        assert client.post("/add", files=files, headers=headers).status_code == 401
        assert client.post("/delete", json={"ids": ["a"]}, headers=headers).status_code == 401
        assert client.post("/sync", headers=headers).status_code == 401
        assert client.post("/add/", files=files, headers=headers).status_code == 401
    no_token = create_app(Searcher.open(served / "index"))
    with TestClient(no_token, base_url="http://localhost") as closed:
        answer = closed.post("/delete", json={"ids": []}, headers={"authorization": "Bearer "})
        assert answer.status_code == 403 and "--token" in answer.json()["next_step"]
        assert closed.post("/login", json={"token": ""}).status_code == 401


def test_a_public_server_needs_the_token_for_all_that_is_of_the_index(public, served):
    row = public.get("/info", headers=BEARER).json()["samples"][0]
    private = [
        "/info",
        "/status",
        "/metrics",
        "/map",
        f"/images/{row}",
        f"/thumbnails/{row}",
        f"/similar/{row}",
    ]
    for path in private:
        answer = public.get(path)
        assert answer.status_code == 401 and row not in answer.text
        assert answer.headers["www-authenticate"] == "Bearer"
        assert public.get(path, headers=BEARER).status_code == 200
    assert search(public, one_image(served)).status_code == 401
    for path in ("/", "/health", "/static/search.js", "/docs", "/openapi.json"):
        assert public.get(path).status_code == 200
    for path in ("/static/../info", "/docs/../info", "/health/../info", "/INFO"):
        assert public.get(path).status_code in (401, 404), path


def test_the_cookie_opens_reading_and_nothing_more(public, served):
    assert public.post("/login", json={"token": "wrong"}).status_code == 401
    answer = public.post("/login", json={"token": TOKEN})
    cookie = answer.headers["set-cookie"].lower()
    assert answer.status_code == 204 and "httponly" in cookie and "samesite=strict" in cookie
    try:
        assert public.get("/info").status_code == 200
        assert public.post("/add", files={"image": one_image(served)}).status_code == 401
    finally:
        public.cookies.clear()
    assert public.get("/info").status_code == 401


def test_access_without_a_host_header():
    scope = {"headers": [], "path": "/info", "method": "GET"}
    assert Access(host_names=frozenset({"localhost"})).refusal(scope)[0] == 421
    assert Access().refusal(scope) is None


def test_answers_are_json_whatever_was_asked(client):
    answer = client.post(
        "/delete",
        content=b'{"ids": ["\\ud800", "\\u0000"]}',
        headers={**BEARER, "content-type": "application/json"},
    )
    assert answer.status_code < 500
    for body in (b"{", b"[]", b'{"ids": 3}', b"\xff", b'{"ids": [' + b"[" * 5000):
        headers = {**BEARER, "content-type": "application/json"}
        answer = client.post("/delete", content=body, headers=headers)
        assert answer.status_code in (400, 422) and json.loads(answer.text)["error"]


# ---- addresses that the server is asked to fetch


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png", "http://localhost/a.png", "http://[::1]/", "http://0.0.0.0/", "http://10.0.0.1/",
        "http://192.168.1.1/", "http://169.254.169.254/latest/meta-data/", "http://[::ffff:127.0.0.1]/",
        "http://[fe80::1]/", "http://100.64.0.1/", "http://2130706433/", "http://0x7f.1/", "http://[2002:7f00:1::]/",
        "http://224.0.0.1/", "http://user:pass@example.org/", "http://example.org:22/", "ftp://example.org/a",
        "file:///etc/passwd", "gopher://example.org/", "http:///a", "http://example.org:99999/", "http://[::1",
        "no address", "//example.org/a", "data:image/png;base64,AAAA",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_not_asked(url, monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError(f"connected for {url}")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ImageError, match="was not fetched"):
        fetch_public(url, max_bytes=100, timeout_s=2.0)


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    found = [(0, 0, 0, "", ("93.184.216.34", 80)), (0, 0, 0, "", ("127.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(OSError, match="not public"):
        public_address("example.org", 80)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found[:1])
    assert public_address("example.org", 80) == "93.184.216.34"


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A server that stands for the internet: images, redirects, and answers that never end."""

    content = b""

    def do_GET(self):
        if self.path == "/inside":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest")
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
        else:
            self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        if self.path == "/image.png":
            self.wfile.write(self.content)
        try:
            while self.path in ("/drip", "/flood"):
                self.wfile.write(b"x" * (1 if self.path == "/drip" else 65536))
                time.sleep(0.05 if self.path == "/drip" else 0)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def elsewhere(served, monkeypatch):
    """Every public host name leads to a server of this test, its port standing for port 80."""
    Elsewhere.content = one_image(served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connect, look_up = socket.create_connection, fetching.public_address

        def public(host, port):
            return "127.0.0.1" if host == "example.org" else look_up(host, port)

        monkeypatch.setattr(fetching, "public_address", public)
        monkeypatch.setattr(
            socket, "create_connection", lambda address, timeout=None: connect(server.server_address, timeout)
        )
        yield server
        server.shutdown()


def test_a_public_image_is_fetched_and_nothing_else(elsewhere, served):
    address = "http://example.org"
    content = fetch_public(f"{address}/image.png", max_bytes=100_000, timeout_s=5.0)
    assert content == one_image(served)
    for path, word in (
        ("inside", "not public"), ("loop", "redirects"), ("none", "404"), ("flood", "more than"),
        ("drip", "too long"),
    ):  # fmt: skip
        began = time.monotonic()
        with pytest.raises(ImageError, match=f"was not fetched: .*{word}"):
            fetch_public(f"{address}/{path}", max_bytes=100_000, timeout_s=1.0)
        assert time.monotonic() - began < 30
    app = create_app(Searcher.open(served / "index"), allow_urls=True)
    with TestClient(app, base_url="http://localhost") as client:
        found = client.post("/search", data={"url": f"{address}/image.png", "k": 1}).json()
        assert found["matches"][0]["score"] == pytest.approx(1, abs=0.02)
        answer = client.post("/search", data={"url": "http://127.0.0.1/"})
        assert answer.status_code == 400 and "not public" in answer.json()["error"]
