"""A server on a free port of this machine, in a thread of the test process, and a question to it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn

from samething.web.running import Config


@contextlib.contextmanager
def running(app) -> Iterator[str]:
    """Serve an application; yields its address, and stops it gracefully."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(Config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.started
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()


def asked(address: str, image: bytes | Path, **data: object) -> httpx.Response:
    """The answer to a search for an image, over a connection of its own."""
    content = image if isinstance(image, bytes) else image.read_bytes()
    return httpx.post(f"{address}/search", files={"image": content}, data=data, timeout=60)
