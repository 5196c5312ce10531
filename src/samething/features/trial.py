"""A sample of a job, done without writing, to tell what the whole would take."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np

from samething.backbones import Backbone
from samething.errors import InputError
from samething.features.describing import describe_all
from samething.features.estimate import Estimate
from samething.features.generation import Generation
from samething.features.workers import ImageReader, ImageStream
from samething.files import Json

# Enough for a steady rate, and an end for large images and large networks.
SAMPLE_BATCHES: Final = 12
SAMPLE_S: Final = 30.0

# Bytes of a catalog's row as Parquet: two hashes' worth of text that hardly compresses.
_CATALOG_BYTES_A_ROW: Final = 120


def estimate(
    generation: Generation, backbone: Backbone, *, num_workers: int, runtime: str, before_s: float
) -> Estimate:
    """Do a sample of a job without writing anything, and say what the whole would take.

    The sample is drawn at random from the images that are not done; the job's own pipeline describes it.
    The first batches, during which the pipeline fills, count as starting.

    Args:
        generation: the job.
        backbone: the frozen network.
        num_workers: processes that decode.
        runtime: what computes.
        before_s: seconds that were spent before, which the job will spend as well.
    """
    missing = [row for rows in generation.missing().values() for row in rows]
    disk = _disk_bytes(generation, backbone.width)
    free = shutil.disk_usage(_existing(generation.folder)).free
    start = time.perf_counter()
    fill = num_workers + 1
    order = np.random.default_rng(0).permutation(len(missing)).tolist()
    size = generation.batch_size
    sample = [missing[place] for place in order[: size * (fill + SAMPLE_BATCHES)]]
    batches = {at: sample[at * size : (at + 1) * size] for at in range(-(-len(sample) // size))}
    reader = ImageReader(generation.catalog, generation.copies, backbone.preprocessing)
    stream = ImageStream(reader, batches, num_workers=num_workers)
    records: list[dict[str, Json]] = []
    ticks: list[tuple[float, int]] = []
    num_bad = num_sampled = 0
    memory = 0
    for batch, _ in describe_all(
        stream, backbone, runtime=runtime, num_images=len(missing), chosen=records.append
    ):
        num_bad += len(batch.reasons)
        num_sampled += len(batches[batch.number])
        ticks.append((time.perf_counter() - start, num_sampled))
        memory = max(memory, _memory_bytes() + stream.memory_bytes())
        if len(ticks) > fill and ticks[-1][0] - ticks[fill - 1][0] > SAMPLE_S:
            break
    if missing and not records and not generation.reused:
        raise InputError(
            f"none of {num_sampled:,} images could be read",
            expected="images to measure on",
            next_step="check the files; images that were moved are found again with --root",
        )
    rate, start_s = _rate_and_start(ticks, fill)
    return Estimate(
        num_images=len(generation.catalog),
        num_to_compute=len(missing),
        width=backbone.width,
        num_sampled=num_sampled,
        num_unreadable=num_bad,
        images_per_s=rate,
        start_s=before_s + start_s,
        time_s=before_s + start_s + (len(missing) / rate if rate else 0.0),
        memory_bytes=memory,
        pixels_bytes=stream.num_bytes,
        disk_bytes=disk[0],
        disk_peak_bytes=disk[1],
        disk_free_bytes=free,
        runtime=records[0]["name"] if records else runtime,
    )


def _rate_and_start(ticks: list[tuple[float, int]], fill: int) -> tuple[float, float]:
    """Images a second once the pipeline is full, and what the beginning took beyond that, in seconds.

    >>> _rate_and_start([(5.0, 64), (5.5, 128), (6.0, 192), (6.5, 256)], 2)
    (128.0, 4.5)
    """
    if not ticks:
        return 0.0, 0.0
    at = fill - 1 if len(ticks) > fill else 0
    (begin_s, before), (end_s, total) = ticks[at], ticks[-1]
    if total == before:  # a single batch: all of it is the beginning
        return total / end_s, 0.0
    rate = (total - before) / (end_s - begin_s)
    return rate, max(0.0, end_s - total / rate)


def _disk_bytes(generation: Generation, width: int) -> tuple[int, int]:
    """Bytes of the finished folder, and the most while it is made: blocks, and the generation before."""
    rows = len(generation.catalog)
    finished = rows * (2 * width + _CATALOG_BYTES_A_ROW)
    blocks = len(generation.todo) * (2 * width + 16)
    before = 0
    if generation.previous is not None:
        data = generation.folder / str(generation.previous.manifest.content["data"])
        before = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    return finished, finished + blocks + before


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _memory_bytes() -> int:
    """Most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
