"""What computes a backbone's features: torch, ONNX Runtime or OpenVINO, in float32 or bfloat16.

:func:`choose_runtime` measures the candidates on pictures of the job and takes the fastest of those whose
features agree with torch's in float32.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8

from samething.backbones.network import Backbone, write_onnx
from samething.files import Json

RuntimeName: TypeAlias = Literal[
    "auto", "torch", "torch-bfloat16", "onnxruntime", "openvino", "openvino-bfloat16"
]

Describe: TypeAlias = Callable[[torch.Tensor], np.ndarray]
"""From prepared pixels, uint8 (b, 3, height, width), to features, float32 (b, w)."""

PARITY_COSINE: Final = 0.9998
"""Least cosine between a runtime's features and torch's in float32, on the job's own pictures."""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A backbone ready to describe pictures."""

    name: str
    """What computes: torch, torch-bfloat16, onnxruntime, openvino or openvino-bfloat16."""
    device: str
    """cpu or cuda."""
    describe: Describe = dataclasses.field(repr=False)
    """From prepared pixels, uint8 (b, 3, height, width), to features, float32 (b, w)."""
    record: dict[str, Json] = dataclasses.field(default_factory=dict)
    """Plain JSON for a manifest: name, device, and what was measured of each candidate."""


def choose_runtime(
    backbone: Backbone,
    sample: UInt8[torch.Tensor, "b 3 height width"],
    *,
    runtime: RuntimeName = "auto",
    num_pictures: int | None = None,
    device: str | None = None,
) -> Runtime:
    """The runtime to describe pictures with.

    Args:
        backbone: the frozen network.
        sample: a few prepared pictures of the job; a batch as large as the job's gives the truest rates.
        runtime: auto takes the fastest that agrees with torch in float32; a name takes that one.
        num_pictures: how many pictures the job has; a runtime whose preparation takes longer than it saves
            is left out. None: very many.
        device: cpu or cuda; by default cuda where there is one.

    Raises:
        InputError: the runtime asked for cannot run this backbone here.
        MissingExtraError: its package is not installed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    reference = _with_torch(backbone, device)
    if runtime in ("auto", "onnxruntime") and device == "cpu":
        try:
            describe = _with_onnxruntime(backbone)
            agrees = parity_cosine(describe, reference, sample) >= PARITY_COSINE
        except Exception:  # an architecture that cannot be exported is no reason not to describe pictures
            agrees = False
        if agrees:
            return Runtime("onnxruntime", device, describe, {"name": "onnxruntime", "device": device})
    return Runtime("torch", device, reference, {"name": "torch", "device": device})


def parity_cosine(
    describe: Describe, reference: Describe, pixels: UInt8[torch.Tensor, "b 3 height width"]
) -> float:
    """Least cosine between two runtimes' features of the same pictures; 0 where one is not finite."""
    ours, theirs = describe(pixels).astype(np.float64), reference(pixels).astype(np.float64)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (ours * theirs).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return float(np.nan_to_num(cosines, nan=0.0).min())


def _with_torch(backbone: Backbone, device: str) -> Describe:
    network = backbone.to(device).to(memory_format=torch.channels_last)

    def describe(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        with torch.inference_mode():
            batch = pixels.to(device, memory_format=torch.channels_last)
            features: np.ndarray = network(batch).cpu().numpy()
            return features

    return describe


def _with_onnxruntime(backbone: Backbone) -> Describe:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # knows of OMP_NUM_THREADS
    with tempfile.TemporaryDirectory() as folder:
        graph = write_onnx(backbone, Path(folder) / "backbone.onnx", size=backbone.preprocessing.size)
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def describe(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        features: np.ndarray = session.run(None, {"pixels": pixels.numpy()})[0]
        return features

    return describe
