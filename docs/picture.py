"""Draws docs/page.png, the README's picture: the page with what a query finds in the demo's index.

    python docs/picture.py demo        # a folder that samething demo has made

It needs playwright and a Chromium (apt-get install chromium, or its program in CHROMIUM).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from samething.catalog import Catalog
from samething.search import Searcher
from samething.web import Limits, create_app
from samething.web.running import Config

TARGET = Path(__file__).parent / "page.png"
WIDTH, HEIGHT = 1200, 800
MOST_BYTES = 200_000


def query_of(demo: Path, domain: str, number: int) -> Path:
    """A test query of the demo that the head has never seen."""
    catalog = Catalog.read(demo / "images" / "catalog.parquet")
    rows = np.flatnonzero(catalog.has_role("query") & (catalog.strings("domain") == domain))
    return Path(catalog.paths[int(rows[number])])


def shown(page: Page, query: Path) -> bytes:
    """The page after a search for an image, as a PNG."""
    page.set_input_files("#file", query)
    page.wait_for_selector(".tile img")
    page.evaluate("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
    while not page.evaluate("[...document.images].every((image) => image.complete)"):
        time.sleep(0.05)
    return page.screenshot()


def main() -> None:
    """Serve the index for the time of one search, and keep what a browser shows of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--domain", default="photo")
    parser.add_argument("--number", type=int, default=0, help="which of the domain's test queries")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("-o", "--output", type=Path, default=TARGET)
    options = parser.parse_args()
    searcher = Searcher.open(options.demo / "index", model=options.demo / "model")
    with socket.create_server(("127.0.0.1", 0)) as listening, sync_playwright() as runner:
        server = uvicorn.Server(Config(create_app(searcher, limits=Limits())))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = runner.chromium.launch(executable_path=program, args=["--no-sandbox"])
        phone = {"has_touch": True, "is_mobile": True} if options.width < 800 else {}
        context = browser.new_context(
            viewport={"width": options.width, "height": options.height}, color_scheme="light", **phone
        )
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
        content = shown(page, query_of(options.demo, options.domain, options.number))
        browser.close()
        server.should_exit = True
        thread.join()
    with Image.open(io.BytesIO(content)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(options.output, optimize=True)
    size = options.output.stat().st_size
    print(f"{options.output}: {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"more than {MOST_BYTES:,} bytes")


if __name__ == "__main__":
    main()
