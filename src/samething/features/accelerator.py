"""Describing on a GPU: pinned memory, half precision where it changes nothing, a batch always in flight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, UInt8

from samething.backbones import Backbone
from samething.backbones.runtimes import PARITY_COSINE, parity_cosine

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
        """Begin to describe a batch; the pixels may be overwritten at once.

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

    def describe(self, pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        """Features of one batch, waited for."""
        return self.submit(pixels.numpy())()


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
        compiled = device == "cuda" and num_images >= COMPILE_FROM_IMAGES
        accelerator = Accelerator(
            backbone, batch_size=batch_size, device=device, dtype=dtype, compiled=compiled
        )
        try:
            agrees = parity_cosine(accelerator.describe(sample), reference.describe(sample)) >= PARITY_COSINE
        except Exception:  # a network that cannot be compiled or has no kernel in half precision
            agrees = False
        if agrees or candidate == name:
            return candidate, accelerator
    return "cuda-float32", reference
