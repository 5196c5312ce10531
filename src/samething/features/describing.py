"""Prepared batches to features, by whatever computes fastest here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float

from samething.backbones import Backbone
from samething.backbones.runtimes import Runtime, RuntimeName, choose_runtime
from samething.features.accelerator import Accelerator, choose_accelerator
from samething.features.workers import Batch, ImageStream
from samething.files import Json

Description: TypeAlias = tuple[Batch, Float[np.ndarray, "b w"]]
"""A batch, whose pixels may be overwritten already, and its features, float32."""


def describe_all(
    stream: ImageStream,
    backbone: Backbone,
    *,
    runtime: str,
    num_images: int,
    chosen: Callable[[dict[str, Json]], None],
    made: Runtime | None = None,
) -> Iterator[Description]:
    """Describe every batch of a stream; what computes is chosen on the first batch with an image.

    On a CPU each batch is complete before the next is begun. On a GPU one is always under way, so a killed
    run loses two.

    Args:
        stream: the batches.
        backbone: the frozen network.
        runtime: what computes, as in :func:`samething.backbones.runtimes.choose_runtime`.
        num_images: images of the whole job.
        chosen: is told what was chosen and what was measured (``name``, ``device``, …), before the first
            features.
        made: a runtime that is ready, instead of a choice.
    """
    empty = np.empty((0, backbone.width), np.float32)
    describe = None if made is None else made.describe
    accelerator: Accelerator | None = None
    under_way: deque[tuple[Batch, Callable[[], np.ndarray]]] = deque()
    for batch in stream:
        if not batch.rows:
            yield batch, empty
            continue
        if describe is None:
            sample = torch.from_numpy(batch.pixels)
            if _on_gpu(runtime):
                name, accelerator = choose_accelerator(
                    backbone, sample, batch_size=stream.batch_size, num_images=num_images, name=runtime
                )
                describe, record = accelerator.describe, {"name": name, "device": "cuda"}
            else:
                choice: RuntimeName = runtime  # type: ignore[assignment]  # checked where it was given
                made = choose_runtime(backbone, sample, runtime=choice, num_images=num_images)
                describe, record = made.describe, made.record
            chosen(record)
        if accelerator is None:
            yield batch, describe(torch.from_numpy(batch.pixels))
            continue
        under_way.append((batch, accelerator.submit(batch.pixels)))
        if len(under_way) > 1:
            done, result = under_way.popleft()
            yield done, result()
    for done, result in under_way:
        yield done, result()


def _on_gpu(runtime: str) -> bool:
    """Whether the GPU computes: where there is one, unless a CPU's runtime is asked for."""
    return torch.cuda.is_available() and (runtime in ("auto", "torch") or runtime.startswith("cuda-"))
