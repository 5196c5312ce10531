"""The same work by many workers on many machines, with Ray Data; this process only writes.

Each batch is a row of a Ray dataset. A worker that dies is replaced and its batches are done again by
others; a batch that arrives is written like one that was made here, so a job goes on whichever way it was
begun. Batches that a machine has done and not yet sent are lost with it, and done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

from samething.backbones import Backbone
from samething.errors import ArtefactError, needed
from samething.features.inference import BatchFeatures, choose
from samething.features.worker_pool import Batch, ImageReader, read_one_batch
from samething.files import Json

# A task of Ray sends what it has when it ends: few batches each, so that little is lost with a machine.
_BATCHES_PER_TASK: Final = 4

# An image that ends every process that decodes it would be tried for ever.
_TRIES_PER_TASK: Final = 8

_SAMPLE_IMAGES: Final = 16


def extract_on_cluster(
    reader: ImageReader,
    backbone: Backbone,
    batches: Mapping[int, list[int]],
    *,
    address: str,
    num_workers: int | None,
    runtime: str,
    chosen: Callable[[dict[str, Json]], None],
) -> Iterator[BatchFeatures]:
    """Features of batches, computed on a cluster; they come in the order in which they are ready.

    Args:
        reader: what prepares a row; its images must be readable from all machines.
        backbone: the frozen network; it is sent to the workers, which need no weights of their own.
        batches: numbers of the batches, and the catalog rows of each.
        address: ``local`` for this machine alone, or the address of a running cluster.
        num_workers: processes that compute; by default one for each core, or each GPU where there are any.
        runtime: what computes, as in :func:`samething.backbones.runtimes.choose_runtime`.
        chosen: is told what was chosen and what was measured (``name``, ``device``, …), before the first
            features.

    Raises:
        MissingExtraError: Ray is not installed.
        ArtefactError: the cluster cannot be reached, or gave up on a batch.
    """
    needed("ray.data", extra="cluster")
    ray = needed("ray", extra="cluster")
    with _connected(ray, address):
        resources = ray.cluster_resources()
        on_gpu = runtime.startswith("cuda-") or (
            runtime in ("auto", "torch") and resources.get("GPU", 0) >= 1
        )
        place = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
        job = ray.put((reader, backbone.cpu()))
        rows = [row for rows in batches.values() for row in rows]
        choose = ray.remote(**place)(_choose)
        record = ray.get(choose.remote([job], rows, runtime, _batch_size(batches)))
        chosen(record)
        limit = num_workers or max(1, int(resources.get("GPU" if on_gpu else "CPU", 1)))
        plan = _Plan([job], dict(batches), record["name"], min(limit, len(batches)), place)
        num_left = len(batches)
        try:
            for content in _results(ray, plan):
                num_left -= 1
                yield pickle.loads(content)  # made by our own workers
        except ray.exceptions.RayError as error:
            raise ArtefactError(
                f"the cluster gave up ({str(error).strip().splitlines()[-1][:200]})",
                expected="workers that live longer than a batch takes",
                next_step="run the same command again: what is done is kept",
            ) from error
        if num_left:
            raise ArtefactError(
                f"{num_left:,} batches did not come back from the cluster",
                expected="all of them",
                next_step="run the same command again: what is done is kept",
            )


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """A connection to the cluster, ended with the work unless the caller had one already."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray has a dozen kinds of its own
        raise ArtefactError(
            f"no Ray cluster at {address} ({str(error).strip().splitlines()[0][:200]})",
            expected="local, ray://HOST:10001, or HOST:6379 of a running cluster of the same version",
            next_step="check the address, and RAY_AUTH_MODE where the cluster asks for a token",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the process that drives the dataset needs to know."""

    job: list[Any]
    batches: dict[int, list[int]]
    name: str
    num_workers: int
    place: dict[str, int]

    def run(self) -> Iterator[bytes]:
        """Results, pickled, in the order in which they are ready."""
        import ray.data

        settings = ray.data.DataContext.get_current()
        settings.enable_progress_bars = settings.print_on_execution_start = False  # there is a bar already
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [{"number": number, "rows": rows} for number, rows in self.batches.items()]
        dataset = ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / _BATCHES_PER_TASK))
        extracted = dataset.map_batches(
            _Extractor,
            fn_constructor_args=(self.job, self.name, _batch_size(self.batches)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.num_workers),
            ray_remote_args_fn=_many_lives,
            **self.place,
        )
        for row in extracted.iter_rows():
            yield row["content"]


def _many_lives() -> dict[str, int]:
    """A worker may die any number of times; a batch may end its worker a few times only."""
    return {"max_restarts": -1, "max_task_retries": _TRIES_PER_TASK}


def _results(ray: Any, plan: _Plan) -> Iterator[bytes]:
    """Results of the plan, driven from here, or through a client's connection from within the cluster."""
    if not ray.util.client.ray.is_connected():
        yield from plan.run()
        return
    driver = ray.remote(num_cpus=0)(_Driver).remote(plan)
    waiting = driver.next.remote()
    while (content := ray.get(waiting)) is not None:
        waiting = driver.next.remote()
        yield content


class _Driver:
    """Drives the dataset inside the cluster, where Ray Data wants to be."""

    def __init__(self, plan: _Plan) -> None:
        self.results = plan.run()

    def next(self) -> bytes | None:
        """The next result; None at the end."""
        return next(self.results, None)


class _Extractor:
    """One worker: decodes a batch and computes its features."""

    def __init__(self, job: list[Any], name: str, batch_size: int) -> None:
        import ray

        torch.set_num_threads(1)  # one worker per core
        self.reader, self.backbone = ray.get(job[0])
        self.name, self.batch_size = name, batch_size
        self.extract: Callable[[torch.Tensor], np.ndarray] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        number, rows = int(batch["number"][0]), [int(row) for row in batch["rows"][0]]
        read = read_one_batch(self.reader, number, rows)
        features = np.empty((0, self.backbone.width), np.float32)
        if read.rows:
            pixels = torch.from_numpy(np.ascontiguousarray(read.pixels))
            if self.extract is None:
                computer, _ = choose(
                    self.backbone, pixels, runtime=self.name, batch_size=self.batch_size, num_images=None
                )
                self.extract = computer.extract
            features = self.extract(pixels)
        sent = Batch(number, read.rows, read.pixels[:0], read.reasons)
        return {"content": [pickle.dumps((sent, features))]}


def _choose(job: list[Any], rows: list[int], runtime: str, batch_size: int) -> dict[str, Json]:
    """What computes fastest there, tried on the first images that can be read, and what was measured."""
    import ray

    reader, backbone = ray.get(job[0])
    for start in range(0, len(rows), _SAMPLE_IMAGES):
        read = read_one_batch(reader, 0, rows[start : start + _SAMPLE_IMAGES])
        if read.rows:
            sample = torch.from_numpy(read.pixels)
            return choose(backbone, sample, runtime=runtime, batch_size=batch_size, num_images=None)[1]
    return {"name": "torch"}


def _batch_size(batches: Mapping[int, list[int]]) -> int:
    return max(map(len, batches.values()))
