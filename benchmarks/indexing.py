"""Indexing phone photographs: what an image costs beside its decoding at a fraction and its model.

    python benchmarks/indexing.py --model MODEL                        # photographs made from scikit-image's
    python benchmarks/indexing.py --model MODEL --photographs FOLDER   # from those of a folder

The photographs are made for the run: parts of real ones, enlarged to 4,032 × 3,024 pixels, with the noise of
a sensor (6 of 255) at that size, as JPEG files of quality 90 (about 3 MB). Without the noise they would hold
nothing that a decoding at a fraction could lose, and be unpacked too quickly.

All ways take turns in one process: CPU milliseconds per image, medians over the rounds. *index* does
everything: it lists, compares checksums, decodes, embeds, makes thumbnails and writes rows. *alone* is
decoding at the same fraction, resizing and the model, no more. *Pillow* is its full decoding with resize.

Neighbours: all photographs are embedded from all their pixels and from a fraction, for several least sides;
the share of the five nearest others of each that change is compared with the tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from samething.embedder import Embedder
from samething.images import decode, least_side
from samething.index import create_index
from samething.retrieval import exact_topk
from samething.search import Searcher
from samething.search.collection import CAPTURE_COLUMNS, FILE_COLUMNS, Collection

SIDES = (4032, 3024)
NEAREST = 5
TOLERANCE = 0.02
"""Share of the five nearest that may change."""
LEAST_OF_ALONE, MOST_OF_PILLOW = 0.9, 0.35


def make_photographs(count: int, originals: list[Path], folder: Path) -> list[Path]:
    """Photographs of 12 megapixels, from parts of real ones."""
    made = []
    for number in range(count):
        rng = np.random.default_rng(number)
        image = decode(originals[number % len(originals)])
        wide = min(image.width, image.height * 4 / 3) * (
            1 if number < len(originals) else rng.uniform(0.5, 0.9)
        )
        left, top = rng.uniform(0, image.width - wide), rng.uniform(0, image.height - wide * 3 / 4)
        box = (left, top, left + wide, top + wide * 3 / 4)
        pixels = np.asarray(image.resize(SIDES, Image.Resampling.LANCZOS, box)).astype(np.float32)
        pixels += 6 * rng.standard_normal((*pixels.shape[:2], 1), dtype=np.float32)
        path = folder / f"{number:04}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        made.append(path)
    return made


def cpu_ms(job: Callable[[], object], count: int) -> float:
    """CPU milliseconds of this process per image."""
    started = time.process_time()
    job()
    return (time.process_time() - started) / count * 1e3


def index_all(embedder: Embedder, photographs: Path) -> None:
    """A new index of a folder, as the command makes it."""
    with tempfile.TemporaryDirectory() as place:
        made = create_index(
            Path(place) / "index", dim=embedder.dim, model_fingerprint=embedder.fingerprint,
            model_name=embedder.name, extra_columns={**CAPTURE_COLUMNS, **FILE_COLUMNS},
        )  # fmt: skip
        done = Searcher(embedder, made).update_files(Collection(photographs).files())
        assert not done.unreadable
        made.close()


def alone(embedder: Embedder, paths: list[Path]) -> None:
    """Decoding at a fraction by Pillow, resizing and the model, in a plain loop."""
    for start in range(0, len(paths), 8):
        pixels = []
        for path in paths[start : start + 8]:
            with Image.open(path) as image:
                by = next(by for by in (8, 4, 2, 1) if min(image.size) >= by * (embedder.least_side or 10**9))
                image.draft("RGB", (image.width // by, image.height // by))
                pixels.append(embedder.prepare(image.convert("RGB")))
        embedder.embed_pixels(np.stack(pixels))


def pillow(embedder: Embedder, paths: list[Path]) -> None:
    """Full decoding with resize by Pillow."""
    for path in paths:
        with Image.open(path) as image:
            embedder.prepare(image.convert("RGB"))


def changed_neighbours(exact: np.ndarray, other: np.ndarray) -> float:
    """Share of the nearest others of each row that are not among those of the same row elsewhere."""
    lists = [exact_topk(rows, rows, NEAREST + 1).indices for rows in (exact, other)]
    own = [[set(row) - {number} for number, row in enumerate(each)] for each in lists]
    kept = sum(len(one & two) / len(one) for one, two in zip(*own, strict=True))
    return 1 - kept / len(exact)


def peak_mb(model: str, photographs: str, decoding: str) -> tuple[float, float]:
    """Peak memory of a process in MB: with the model loaded, and after indexing."""
    embedder = dataclasses.replace(Embedder.load(model), decoding=decoding)
    embedder.embed_pixels(np.zeros((8, 3, *embedder.preprocessing.shape), np.uint8))
    before = peak_kb()
    index_all(embedder, Path(photographs))
    return before / 1e3, peak_kb() / 1e3


def peak_kb() -> int:
    """Most memory of this process so far; getrusage would tell that of its parent."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--photographs", type=Path, default=Path(skimage.data.__file__).parent)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    originals = sorted(
        path for path in options.photographs.rglob("*")
        if path.suffix in (".jpg", ".png") and min(decode(path).size) >= 128
    )  # fmt: skip
    originals = originals[:: max(1, len(originals) // options.images)]
    exact = Embedder.load(options.model, num_threads=1)
    scaled = dataclasses.replace(exact, decoding="scaled")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = make_photographs(options.images, originals, folder)
        size = sum(path.stat().st_size for path in paths) / len(paths)
        print(f"{len(paths)} photographs of {SIDES[0]} × {SIDES[1]} pixels, {size / 1e6:.1f} MB each")
        ways: dict[str, Callable[[], object]] = {
            "index": lambda: index_all(scaled, folder),
            "index --decoding exact": lambda: index_all(exact, folder),
            "alone": lambda: alone(scaled, paths),
            "Pillow": lambda: pillow(exact, paths),
        }
        turns = [{name: cpu_ms(job, len(paths)) for name, job in ways.items()} for _ in range(options.rounds)]
        for name in ways:
            print(f"{name:24}{statistics.median(turn[name] for turn in turns):8.1f} ms per image")
        of_alone = statistics.median(turn["alone"] / turn["index"] for turn in turns)
        of_pillow = statistics.median(turn["index"] / turn["Pillow"] for turn in turns)
        of_exact = statistics.median(turn["index"] / turn["index --decoding exact"] for turn in turns)
        print(f"alone / index {of_alone:.3f} (at least {LEAST_OF_ALONE})")
        print(f"index / Pillow {of_pillow:.3f} (at most {MOST_OF_PILLOW}); index / exact {of_exact:.3f}")

        vectors = exact.embed(paths)
        needed = least_side(exact.preprocessing)
        share = 1.0
        for least in (needed // 2, needed * 3 // 4, needed, 2 * needed):
            parts = [exact.prepare(decode(path, least_side=least)) for path in paths]
            others = np.concatenate([exact.embed_prepared([part]) for part in parts])
            changed = changed_neighbours(vectors, others)
            share = changed if least == needed else share
            cosine = float((vectors * others).sum(axis=1).mean())
            print(f"least side {least:5}: {changed:6.2%} of neighbours change, cosine {cosine:.5f}")
        print(f"taken: {needed}, of which at most {TOLERANCE:.0%} may change")

        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for decoding in ("scaled", "exact"):
                before, after = pool.apply(peak_mb, (options.model, str(folder), decoding))
                print(
                    f"peak memory, {decoding}: {after:,.0f} MB, of which {before:,.0f} before the first image"
                )
    met = of_alone >= LEAST_OF_ALONE and of_pillow <= MOST_OF_PILLOW and share <= TOLERANCE
    raise SystemExit(0 if met else "a demand is not met")


if __name__ == "__main__":
    main()
