"""The streaming pipeline: decode in worker processes, compute in batches, keep each batch as it is done."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from samething.arrays import PixelBatch
from samething.backbones import Backbone
from samething.backbones.graphs import graph
from samething.backbones.runtimes import Runtime, RuntimeName, with_session
from samething.backbones.whole_numbers import write_int8
from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.features.inference import extract_features
from samething.features.job import Job, identified
from samething.features.store import INT8_NAME, JOB_NAME, KIND, FeatureSet
from samething.features.worker_pool import ImageReader, ImageStream, num_decoders, read_one_batch
from samething.files import Json, claim_folder, disk_errors, is_finished, only_one_writer
from samething.progress import progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How features are computed; nothing in it changes them."""

    batch_size: int
    num_workers: int | None
    """Processes that decode or, on a cluster, compute; None for the default."""
    runtime: RuntimeName | Literal["int8"]
    cluster: str | None

    def __post_init__(self) -> None:
        if self.runtime == "int8" and self.cluster is not None:
            raise InputError(
                f"--runtime int8 with --cluster {self.cluster}",
                expected="int8 on this machine, where it is judged",
                next_step="leave one of the two out",
            )
        if self.batch_size < 1 or (self.num_workers is not None and self.num_workers < 0):
            raise InputError(
                f"batch_size={self.batch_size}, num_workers={self.num_workers}",
                expected="a batch of at least 1 image, and no or some worker processes",
                next_step="give other numbers, or leave them out",
            )


def extract(catalog: Catalog, backbone: Backbone, folder: Path, work: Work) -> FeatureSet:
    """Compute the features of a catalog into a folder; see :func:`samething.features.features`."""
    made = {"backbone": backbone.metadata(), "dtype": "float16"}
    next_step = "choose another folder with -o, or remove this one"
    with only_one_writer(folder), disk_errors(folder):
        claim_folder(folder, JOB_NAME, made, kind=KIND, next_step=next_step)
        catalog = identified(catalog)
        previous = FeatureSet.open(folder) if is_finished(folder) else None
        if previous is None or previous.manifest.made_from["catalog"] != catalog.fingerprint:
            catalog.require_files()
        elif not previous.unreadable:
            shutil.rmtree(folder / str(previous.manifest.content["data"]) / "blocks", ignore_errors=True)
            return previous
        job = Job.of(catalog, folder=folder, batch_size=work.batch_size, previous=previous)
        num_computed, rate = _compute_missing(job, backbone, work)
        job.finish(made, num_parameters=backbone.num_parameters, images_per_second=rate)
        return dataclasses.replace(FeatureSet.open(folder), num_computed=num_computed)


def _compute_missing(job: Job, backbone: Backbone, work: Work) -> tuple[int, float | None]:
    """Compute the blocks that are missing; returns how many images were computed, and how many per second.

    The rate is None of fewer than three batches: the first only starts the clock, since it waits for all that
    is done once, and what was decoded meanwhile flatters the second.
    """
    missing = job.missing()
    if not missing:
        return 0, None
    reader = ImageReader(job.catalog, job.copies, backbone.preprocessing)
    runtime = job.runtime or work.runtime
    made = int8_runtime(job, reader, backbone) if runtime == "int8" else None
    if work.cluster is None or made is not None:
        num_images = sum(map(len, missing.values()))
        stream = ImageStream(reader, missing, num_workers=num_decoders(work.num_workers))
        results = extract_features(
            stream, backbone, runtime=runtime, num_images=num_images, chosen=job.note_runtime, made=made
        )
    else:
        from samething.features.cluster import extract_on_cluster

        results = extract_on_cluster(
            reader, backbone, missing,
            address=work.cluster, num_workers=work.num_workers, runtime=runtime, chosen=job.note_runtime,
        )  # fmt: skip
    total, num_computed = sum(map(len, job.batches)), 0
    ticks: list[tuple[float, int]] = []
    with progress_bar("images") as progress:
        task = progress.add_task("features", total=total, completed=total - sum(map(len, missing.values())))
        for batch, features in results:
            job.keep(batch, features)
            num_computed += len(batch.rows)
            ticks.append((time.perf_counter(), num_computed))
            progress.advance(task, len(missing[batch.number]))
    if len(ticks) < 3:
        return num_computed, None
    (start, before), (end, after) = ticks[0], ticks[-1]
    return num_computed, (after - before) / (end - start)


def int8_runtime(job: Job, reader: ImageReader, backbone: Backbone) -> Runtime:
    """A backbone in whole numbers: judged once, and kept in the folder, so that all rows are alike.

    Raises:
        InputError: too few images, or retrieval that may be too much worse than in float32.
        MissingExtraError: the package onnx is not installed.
    """
    kept, num_threads = job.folder / INT8_NAME, torch.get_num_threads()
    record: dict[str, Json] = {"name": "int8", "device": "cpu", "threads": num_threads}
    if job.runtime is None:
        if backbone.preprocessing.any_shape:
            raise InputError(
                "--runtime int8 with --views whole",
                expected="images of one shape: a graph computes no other",
                next_step="leave one of the two out",
            )

        def read(rows: Sequence[int]) -> tuple[list[int], PixelBatch]:
            batch = read_one_batch(reader, 0, rows)
            return batch.rows, batch.pixels

        labels, domains = (job.catalog.strings(name).tolist() for name in ("label", "domain"))
        with graph(backbone) as path:
            record["int8"] = write_int8(path, kept, read, labels, domains, num_threads=num_threads)
        job.note_runtime(record)
    elif not kept.is_file():
        raise ArtefactError(
            f"{kept} is gone, which computed the features so far",
            expected="the graph that this folder began with",
            next_step="bring it back, or extract all features anew into another folder (-o)",
        )
    return Runtime("int8", "cpu", with_session(kept), record)
