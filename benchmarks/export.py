"""Images a second through each exported form, as ratios to torch on the same images.

    python benchmarks/export.py demo/run --folder MODELS    # exports what is not there yet

Prepared images of the catalog, batches of 16, one process, all forms in turns; medians, and ratios turn by
turn. Threads are those of OMP_NUM_THREADS. Quality is measured by the export itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from samething.embedder import Embedder
from samething.export import export
from samething.export.embedding_model import source_of
from samething.export.quality import prepared_images
from samething.training.run import Run

BATCH = 16
FORMS = {
    "float32": {},
    "float16": {"precision": "float16"},
    "int8": {"precision": "int8"},
    "guiec": {"format": "guiec"},
}


def runner(name: str, folder: Path, pixels: np.ndarray) -> Callable[[], object]:
    batch = torch.from_numpy(pixels)
    if name in ("float32", "float16", "int8"):
        embedder = Embedder.load(folder, num_threads=torch.get_num_threads())
        return lambda: embedder.embed_pixels(pixels)
    with tempfile.TemporaryDirectory() as unpacked, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zipfile.ZipFile(folder / "submission.zip").extractall(unpacked)
        script = torch.jit.load(f"{unpacked}/saved_model.pt").eval()
    return lambda: script(batch)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--folder", type=Path, default=Path("models"))
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--forms", nargs="*", default=list(FORMS))
    given = arguments.parse_args()
    num_threads = torch.get_num_threads()
    source = source_of(Run.open(given.run), weights=None)
    model = source.model
    pixels = prepared_images(source.features.catalog, source.backbone.preprocessing, BATCH)
    batch = torch.from_numpy(pixels)
    calls: dict[str, Callable[[], object]] = {"torch": lambda: model(batch)}
    for name in given.forms:
        folder = given.folder / name
        export(given.run, output=folder, allow_quality_loss=True, **FORMS[name])
        calls[name] = runner(name, folder, pixels)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(given.rounds + 2):
            for name, call in calls.items():
                started = time.process_time()
                call()
                times[name].append(time.process_time() - started)
    print(f"\nbatches of {BATCH}, {num_threads} thread(s), medians of {given.rounds} turns, CPU time\n")
    print("| form | images/s | × torch | least and most |\n| --- | --- | --- | --- |")
    for name, each in times.items():
        ratios = [ours / theirs for ours, theirs in zip(times["torch"][2:], each[2:], strict=True)]
        speed = BATCH / statistics.median(each[2:])
        print(
            f"| {name} | {speed:.0f} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f}–{max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
