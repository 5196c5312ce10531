"""The dry run: a sample of a job, done without writing, to tell what the whole would take."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np

from samething.backbones import Backbone
from samething.catalog import Catalog
from samething.errors import FingerprintError, InputError
from samething.features.estimate import Estimate
from samething.features.extraction import Work, int8_runtime
from samething.features.inference import extract_features
from samething.features.job import Job, identified
from samething.features.store import FeatureSet
from samething.features.worker_pool import ImageReader, ImageStream, num_decoders
from samething.files import Json, is_finished

# Enough for a steady rate, and an end for large images and large networks.
SAMPLE_BATCHES: Final = 12
SAMPLE_S: Final = 30.0

# Bytes of a catalog's row as Parquet: two hashes' worth of text that hardly compresses.
_CATALOG_BYTES_PER_ROW: Final = 120


def dry_run(catalog: Catalog, backbone: Backbone, folder: Path, work: Work) -> Estimate:
    """Do a sample of a job without writing anything, and say what the whole would take.

    The sample is drawn at random from the images that are not done; the job's own pipeline computes it.
    The first batches, during which the pipeline fills, count as starting.

    Raises:
        FingerprintError: the folder holds features of another backbone or preprocessing.
        InputError: no image of the sample can be read.
    """
    start = time.perf_counter()
    catalog = identified(catalog)
    catalog.require_files()
    before_s = time.perf_counter() - start
    previous = FeatureSet.open(folder) if is_finished(folder) else None
    if previous is not None and previous.backbone != backbone.metadata():
        raise FingerprintError(
            f"{folder} holds features of {previous.backbone['name']} under its own preprocessing",
            expected="a new folder, or one of the same backbone, weights and preprocessing",
            next_step="choose another folder with -o",
        )
    job = Job.of(catalog, folder=folder, batch_size=work.batch_size, previous=previous, write=False)
    missing = [row for rows in job.missing().values() for row in rows]
    finished_bytes, peak_bytes = _disk_bytes(job, backbone.width)
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    num_workers, size = num_decoders(work.num_workers), job.batch_size
    start = time.perf_counter()
    fill = num_workers + 1
    order = np.random.default_rng(0).permutation(len(missing)).tolist()
    sample = [missing[place] for place in order[: size * (fill + SAMPLE_BATCHES)]]
    batches = {at: sample[at * size : (at + 1) * size] for at in range(-(-len(sample) // size))}
    reader = ImageReader(job.catalog, job.copies, backbone.preprocessing)
    stream = ImageStream(reader, batches, num_workers=num_workers)
    runtime = job.runtime or work.runtime
    if runtime == "int8" and job.runtime is None:
        raise InputError(
            "--dry-run with --runtime int8, which is made and judged first",
            expected="a dry run of what is there",
            next_step="leave --runtime int8 out: the dry run says what float32 takes",
        )
    made = int8_runtime(job, reader, backbone) if runtime == "int8" else None
    records: list[dict[str, Json]] = [] if made is None else [made.record]
    ticks: list[tuple[float, int]] = []
    num_bad = num_sampled = memory = 0
    for batch, _ in extract_features(
        stream, backbone, runtime=runtime, num_images=len(missing), chosen=records.append, made=made
    ):
        num_bad += len(batch.reasons)
        num_sampled += len(batches[batch.number])
        ticks.append((time.perf_counter() - start, num_sampled))
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = max(memory, own + stream.memory_bytes())
        if len(ticks) > fill and ticks[-1][0] - ticks[fill - 1][0] > SAMPLE_S:
            break
    if missing and not records and not job.reused:
        raise InputError(
            f"none of {num_sampled:,} images could be read",
            expected="images to measure on",
            next_step="check the files; images that were moved are found again with --root",
        )
    rate, start_s = _rate_and_start(ticks, fill)
    return Estimate(
        num_images=len(job.catalog),
        num_to_compute=len(missing),
        width=backbone.width,
        num_sampled=num_sampled,
        num_unreadable=num_bad,
        images_per_s=rate,
        start_s=before_s + start_s,
        time_s=before_s + start_s + (len(missing) / rate if rate else 0.0),
        memory_bytes=memory,
        pixels_bytes=stream.num_bytes,
        disk_bytes=finished_bytes,
        disk_peak_bytes=peak_bytes,
        disk_free_bytes=shutil.disk_usage(place).free,
        runtime=records[0]["name"] if records else runtime,
    )


def _rate_and_start(ticks: list[tuple[float, int]], fill: int) -> tuple[float, float]:
    """Images per second once the pipeline is full, and what the beginning took beyond that, in seconds.

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


def _disk_bytes(job: Job, width: int) -> tuple[int, int]:
    """Bytes of the finished folder, and the most while it is made: blocks, and the features before."""
    finished = len(job.catalog) * (2 * width + _CATALOG_BYTES_PER_ROW)
    blocks = sum(map(len, job.batches)) * (2 * width + 16)
    before = 0
    if job.previous is not None:
        data = job.folder / str(job.previous.manifest.content["data"])
        before = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    return finished, finished + blocks + before
