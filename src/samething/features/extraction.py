"""The streaming pipeline: decode in worker processes, describe in batches, keep each batch as it is done."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from samething.backbones import Backbone, load_backbone
from samething.backbones.runtimes import RuntimeName
from samething.catalog import Catalog
from samething.errors import FingerprintError, InputError
from samething.features.describing import Description, describe_all
from samething.features.estimate import Estimate
from samething.features.folder import JOB_NAME, KIND, FeatureSet, made_from
from samething.features.generation import Generation, computed_keys, finish
from samething.features.trial import estimate
from samething.features.workers import ImageReader, ImageStream
from samething.files import claim_folder, disk_errors, file_sha256, is_finished, only_one_writer, write_json
from samething.images import Decoding, ResizePolicy, Source
from samething.progress import progress_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How features are computed; nothing in it changes them."""

    batch_size: int
    num_workers: int | None
    runtime: RuntimeName
    cluster: str | None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_workers is not None and self.num_workers < 0):
            raise InputError(
                f"batch_size={self.batch_size}, num_workers={self.num_workers}",
                expected="a batch of at least 1 image, and no or some worker processes",
                next_step="give other numbers, or leave them out",
            )

    @property
    def num_decoders(self) -> int:
        """Processes that decode: by default one less than the cores, at least one."""
        if self.num_workers is not None:
            return self.num_workers
        return max(1, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1


def extract(
    catalog: Catalog,
    *,
    backbone: str | Backbone,
    folder: Path,
    weights: Path | None,
    resize: ResizePolicy | None,
    options: Mapping[str, Any],
    decoding: Decoding,
    dry_run: bool,
    work: Work,
) -> FeatureSet | Estimate:
    """Compute the features of a catalog into a folder; see :func:`samething.features.features`."""
    if len(catalog) == 0:
        raise InputError(
            "a catalog without images",
            expected="at least one image",
            next_step="make another with: samething catalog FOLDER",
        )
    backbone = load_backbone(backbone, weights=weights, resize=resize, **options)
    backbone = backbone.with_preprocessing(dataclasses.replace(backbone.preprocessing, decoding=decoding))
    if dry_run:
        return _estimated(catalog, backbone, folder, work)
    job = made_from(backbone.describe())
    with only_one_writer(folder), disk_errors(folder):
        claim_folder(
            folder,
            JOB_NAME,
            job,
            kind=KIND,
            next_step="choose another folder with -o, or remove this one",
        )
        catalog = _identified(catalog)
        previous = FeatureSet.open(folder) if is_finished(folder) else None
        same = previous is not None and previous.manifest.made_from["catalog"] == catalog.fingerprint
        if previous is not None and same and not previous.unreadable:
            shutil.rmtree(folder / str(previous.manifest.content["data"]) / "blocks", ignore_errors=True)
            return previous
        if not same:
            catalog.require_files()
        generation = Generation.of(catalog, folder=folder, batch_size=work.batch_size, previous=previous)
        num_computed, rate = _compute_blocks(generation, backbone, work)
        computed, reasons = computed_keys(generation)
        if previous is not None and same and not computed:  # what could not be read still cannot
            shutil.rmtree(generation.data)
            return previous
        finish(
            generation, job, computed, reasons,
            num_parameters=backbone.num_parameters, images_per_second=rate,
        )  # fmt: skip
    return dataclasses.replace(FeatureSet.open(folder), num_computed=num_computed)


def _identified(catalog: Catalog) -> Catalog:
    """Fill in what tells contents apart where the catalog does not: SHA-256 of files, versions of URLs.

    A path does not tell what it leads to, and what is behind a URL may change; size, ETag or time of change
    of a URL cost one short request each (of shards, one each shard).
    """
    hashes = catalog.strings("sha256")
    rows = np.flatnonzero(hashes == "")
    if not len(rows):
        return catalog
    catalog.require_files()
    sources = [catalog.source(int(row)) for row in rows]
    with ThreadPoolExecutor(32) as pool:  # they wait for disks and networks
        hashes[rows] = list(pool.map(_hash_or_nothing, sources))
        if any(source.is_remote for source in sources) and "version" not in catalog.table.column_names:
            files = dict.fromkeys(source.container for source in sources if source.is_remote)
            versions = dict(zip(files, pool.map(_version, files), strict=True))
            column: list[str | None] = [None] * len(catalog)
            for row, source in zip(rows, sources, strict=True):
                if source.is_remote:
                    column[row] = versions[source.container] or None
            catalog = catalog.with_column("version", column)
    return catalog.with_column("sha256", [sha256 or None for sha256 in hashes])


def _version(container: str) -> str:
    return Source(container).version()


def _hash_or_nothing(source: Source) -> str:
    if source.is_remote:
        return ""
    path = Path(source.location)
    try:
        return file_sha256(path) if path.is_file() else ""  # a pipe would never end
    except OSError:
        return ""  # the image is listed with its reason later


def _compute_blocks(generation: Generation, backbone: Backbone, work: Work) -> tuple[int, float | None]:
    """Write the blocks that are missing; returns how many images were described, and how many per second.

    The rate is None of fewer than three batches: the first only starts the clock, since it waits for all that
    is done once, and what was decoded meanwhile flatters the second.
    """
    missing = generation.missing()
    if not missing:
        return 0, None
    num_described = 0
    ticks: list[tuple[float, int]] = []
    with progress_bar("images") as progress:
        task = progress.add_task("features", total=len(generation.todo))
        progress.advance(task, len(generation.todo) - sum(map(len, missing.values())))
        for batch, features in _described(generation, backbone, missing, work):
            generation.keep(batch, features)
            num_described += len(batch.rows)
            ticks.append((time.perf_counter(), num_described))
            progress.advance(task, len(missing[batch.number]))
    if len(ticks) < 3:
        return num_described, None
    (start, before), (end, after) = ticks[0], ticks[-1]
    return num_described, (after - before) / (end - start)


def _described(
    generation: Generation, backbone: Backbone, missing: dict[int, list[int]], work: Work
) -> Iterator[Description]:
    reader = ImageReader(generation.catalog, generation.copies, backbone.preprocessing)
    if work.cluster is not None:
        from samething.features.cluster import describe_on_cluster

        yield from describe_on_cluster(
            reader,
            backbone,
            missing,
            address=work.cluster,
            num_workers=work.num_workers,
            runtime=generation.pinned_runtime or work.runtime,
            chosen=lambda record: write_json(generation.runtime, record),
        )
        return
    yield from describe_all(
        ImageStream(reader, missing, num_workers=work.num_decoders),
        backbone,
        runtime=generation.pinned_runtime or work.runtime,
        num_images=sum(map(len, missing.values())),
        chosen=lambda record: write_json(generation.runtime, record),
    )


def _estimated(catalog: Catalog, backbone: Backbone, folder: Path, work: Work) -> Estimate:
    """What the job would take, by doing a sample of it without writing."""
    start = time.perf_counter()
    catalog = _identified(catalog)
    catalog.require_files()
    identifying_s = time.perf_counter() - start
    previous = FeatureSet.open(folder) if is_finished(folder) else None
    if previous is not None and previous.backbone != backbone.describe():
        raise FingerprintError(
            f"{folder} holds features of {previous.backbone['name']} under its own preprocessing",
            expected="a new folder, or one of the same backbone, weights and preprocessing",
            next_step="choose another folder with -o",
        )
    generation = Generation.of(
        catalog, folder=folder, batch_size=work.batch_size, previous=previous, write=False
    )
    return estimate(
        generation,
        backbone,
        num_workers=work.num_decoders,
        runtime=generation.pinned_runtime or work.runtime,
        before_s=identifying_s,
    )
