"""Prepared batches to features, by whatever computes fastest: a CPU's runtimes, or a GPU.

On a GPU memory is pinned, precision is halved where that changes nothing, and a batch is always under way.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from samething.arrays import Float, UInt8
from samething.backbones import Backbone
from samething.backbones.runtimes import Runtime, choose_runtime
from samething.features.worker_pool import Batch, ImageStream
from samething.files import Json
from samething.sessions import PARITY_COSINE, parity_cosine

BatchFeatures: TypeAlias = tuple[Batch, Float[np.ndarray, "b w"]]
"""A batch, whose pixels may be overwritten already, and its features, float32."""

# Compiling takes a minute or more, once; a job that is done in a few minutes is done before it pays.
COMPILE_FROM_IMAGES: Final = 100_000

# bfloat16 has float32's range: networks whose activations leave float16's (DINOv3) need it. float16 is more
# precise, and the choice where bfloat16 is not precise enough.
_DTYPES: Final = {
    "cuda-bfloat16": torch.bfloat16,
    "cuda-float16": torch.float16,
    "cuda-float32": torch.float32,
}


@dataclasses.dataclass
class _Stage:
    """Room for one batch on its way to the device and back."""

    pixels: torch.Tensor
    features: torch.Tensor
    copied_back: Any = None
    """The event after which ``features`` holds the result; None on a CPU."""


class Accelerator:
    """A backbone on a device.

    Batches are padded to one size, so that kernels are chosen and compiled once. While a batch is computed,
    the next is copied to the device and the last one's features are copied back.

    Args:
        backbone: the frozen network.
        batch_size: the largest batch.
        device: where to compute.
        dtype: what the matrix products are computed in; weights stay in float32.
        compiled: compile the network with torch.compile.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        batch_size: int,
        device: str = "cuda",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.device, self.dtype, self.width = torch.device(device), dtype, backbone.width
        network = backbone.to(self.device).to(memory_format=torch.channels_last)
        self.network: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(network, dynamic=False) if compiled else network
        )
        shape, pinned = backbone.preprocessing.shape, self.device.type == "cuda"
        self._stages = [
            _Stage(
                torch.zeros(batch_size, 3, *shape, dtype=torch.uint8, pin_memory=pinned),
                torch.empty(batch_size, backbone.width, pin_memory=pinned),
            )
            for _ in range(2)
        ]

    def submit(self, pixels: UInt8[np.ndarray, "b 3 height width"]) -> Callable[[], Float[np.ndarray, "b w"]]:
        """Begin to compute a batch; the pixels may be overwritten at once.

        Returns what waits for the features. At most two batches may be under way.
        """
        stage = self._stages[0]
        self._stages.reverse()
        num = len(pixels)
        stage.pixels[:num].copy_(torch.from_numpy(pixels))
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            batch = stage.pixels.to(self.device, non_blocking=True)
            features = self.network(batch.contiguous(memory_format=torch.channels_last))
            stage.features.copy_(features, non_blocking=True)
        if self.device.type == "cuda":
            stage.copied_back = torch.cuda.Event()  # type: ignore[no-untyped-call]
            stage.copied_back.record()

        def result() -> Float[np.ndarray, "b w"]:
            if stage.copied_back is not None:
                stage.copied_back.synchronize()
            return stage.features[:num].numpy().copy()

        return result

    def extract(self, pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        """Features of one batch, waited for."""
        return self.submit(pixels.numpy())()


def extract_features(
    stream: ImageStream,
    backbone: Backbone,
    *,
    runtime: str,
    num_images: int,
    chosen: Callable[[dict[str, Json]], None],
    made: Runtime | None = None,
) -> Iterator[BatchFeatures]:
    """Features of every batch of a stream; what computes is chosen on the first batch with an image.

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
    computer: Runtime | Accelerator | None = made
    under_way: deque[tuple[Batch, Callable[[], np.ndarray]]] = deque()
    for batch in stream:
        if not batch.rows:
            yield batch, empty
            continue
        if computer is None:
            sample = torch.from_numpy(batch.pixels)
            computer, record = choose(
                backbone, sample, runtime=runtime, batch_size=stream.batch_size, num_images=num_images
            )
            chosen(record)
        if isinstance(computer, Runtime):
            yield batch, computer.extract(torch.from_numpy(batch.pixels))
            continue
        under_way.append((batch, computer.submit(batch.pixels)))
        if len(under_way) > 1:
            done, result = under_way.popleft()
            yield done, result()
    for done, result in under_way:
        yield done, result()


def choose(
    backbone: Backbone,
    sample: UInt8[torch.Tensor, "b 3 height width"],
    *,
    runtime: str,
    batch_size: int,
    num_images: int | None,
) -> tuple[Runtime | Accelerator, dict[str, Json]]:
    """What computes, and what was measured when it was chosen.

    The GPU computes where there is one, unless a CPU's runtime is asked for.
    """
    if torch.cuda.is_available() and (runtime in ("auto", "torch") or runtime.startswith("cuda-")):
        name, accelerator = choose_accelerator(
            backbone, sample, batch_size=batch_size, num_images=num_images or 0, name=runtime
        )
        return accelerator, {"name": name, "device": "cuda"}
    made = choose_runtime(backbone, sample, runtime=runtime, num_images=num_images)
    return made, made.record


def choose_accelerator(
    backbone: Backbone,
    sample: UInt8[torch.Tensor, "b 3 height width"],
    *,
    batch_size: int,
    num_images: int,
    name: str | None = None,
    device: str = "cuda",
) -> tuple[str, Accelerator]:
    """The backbone in the first precision whose features agree with those of float32.

    Args:
        backbone: the frozen network.
        sample: prepared images of the job.
        batch_size: the largest batch.
        num_images: how many images the job has; many make compiling pay.
        name: the precision a folder began with; it is taken again, whatever it is.
        device: where to compute.

    Returns:
        The name to record, and the accelerator.
    """
    reference = Accelerator(backbone, batch_size=batch_size, device=device)
    for candidate, dtype in _DTYPES.items():
        if name in _DTYPES and candidate != name:
            continue
        if device == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
            continue
        pays = num_images >= COMPILE_FROM_IMAGES and not backbone.preprocessing.any_shape
        compiled = device == "cuda" and pays
        accelerator = Accelerator(
            backbone, batch_size=batch_size, device=device, dtype=dtype, compiled=compiled
        )
        try:
            agrees = parity_cosine(accelerator.extract(sample), reference.extract(sample)) >= PARITY_COSINE
        except Exception:  # a network that cannot be compiled or has no kernel in half precision
            agrees = False
        if agrees or candidate == name:
            return candidate, accelerator
    return "cuda-float32", reference
