"""What computes a backbone's features: torch, ONNX Runtime or OpenVINO, in float32 or bfloat16.

:func:`choose_runtime` measures the candidates on images of the job and takes the fastest of those whose
features agree with torch's in float32.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8

from samething.backbones.graphs import graph, graph_path
from samething.backbones.network import Backbone
from samething.errors import InputError, MissingExtraError
from samething.files import Json

RuntimeName: TypeAlias = Literal[
    "auto", "torch", "torch-bfloat16", "onnxruntime", "openvino", "openvino-bfloat16"
]

Describe: TypeAlias = Callable[[torch.Tensor], np.ndarray]
"""From prepared pixels, uint8 (b, 3, height, width), to features, float32 (b, w)."""

PARITY_COSINE: Final = 0.9998
"""Least cosine between a runtime's features and torch's in float32, on the job's own images."""

_SAMPLE_S: Final = 2.0
"""Time that describing the sample once may take with torch, in seconds."""

_MAX_SAMPLE: Final = 32


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A backbone ready to describe images."""

    name: str
    """What computes: torch, torch-bfloat16, onnxruntime, openvino or openvino-bfloat16."""
    device: str
    """cpu or cuda."""
    describe: Describe = dataclasses.field(repr=False)
    """From prepared pixels, uint8 (b, 3, height, width), to features, float32 (b, w)."""
    record: dict[str, Json] = dataclasses.field(default_factory=dict)
    """Plain JSON for a manifest: name, device, threads, and of each candidate the least cosine to torch in
    float32, the images per second, or why it was left out."""


def choose_runtime(
    backbone: Backbone,
    sample: UInt8[torch.Tensor, "b 3 height width"],
    *,
    runtime: RuntimeName = "auto",
    num_images: int | None = None,
    device: str | None = None,
    record: Mapping[str, Json] | None = None,
) -> Runtime:
    """The runtime to describe images with.

    Args:
        backbone: the frozen network.
        sample: a few prepared images of the job; a batch as large as the job's gives the truest rates.
        runtime: auto takes the fastest that agrees with torch in float32; a name takes that one.
        num_images: how many images the job has; a runtime whose preparation takes longer than it saves
            is left out. None: very many.
        device: cpu or cuda; by default cuda where there is one.
        record: of an earlier choice, which is then repeated instead of measured, for rows that are alike.

    Raises:
        InputError: the runtime asked for cannot run this backbone here, or its features disagree.
        MissingExtraError: its package is not installed.
    """
    if record is not None:
        runtime = record["name"]
    if runtime not in get_args(RuntimeName):
        raise InputError(
            f"runtime={runtime!r}",
            expected=f"one of {', '.join(get_args(RuntimeName))}",
            next_step="choose one of these; auto measures them",
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    trials = _Trials(backbone, sample, device)
    if runtime == "auto":
        name = trials.fastest(num_images)
    else:
        trials.require(runtime)
        name = runtime
    return Runtime(name, device, trials.describers[name], trials.record(name))


def parity_cosine(ours: Float[np.ndarray, "b w"], theirs: Float[np.ndarray, "_ _"]) -> float:
    """Least cosine between two runtimes' features of the same images; 0 where one is not finite.

    >>> round(parity_cosine(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])), 4)
    0.7071
    """
    if ours.shape != theirs.shape:
        return 0.0
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (ours * theirs).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return float(np.nan_to_num(cosines, nan=0.0).min())


class _Trials:
    """Candidates built, measured and compared with torch in float32."""

    def __init__(
        self, backbone: Backbone, sample: UInt8[torch.Tensor, "b 3 height width"], device: str
    ) -> None:
        self.backbone, self.device = backbone, device
        self.describers: dict[str, Describe] = {"torch": with_torch(backbone, device)}
        self.rates: dict[str, float] = {}
        self.cosines: dict[str, float] = {"torch": 1.0}
        self.left_out: dict[str, str] = {}
        self._exported = False
        started = time.perf_counter()
        self.describers["torch"](sample[:1])
        once = max(1e-4, time.perf_counter() - started)
        # the first call is the slowest, so a second one tells how large the sample may be
        started = time.perf_counter()
        self.describers["torch"](sample[:1])
        once = min(once, max(1e-4, time.perf_counter() - started))
        self.sample = sample[: min(_MAX_SAMPLE, max(2, int(_SAMPLE_S / once)))]
        self.expected = self.describers["torch"](self.sample)

    def record(self, name: str) -> dict[str, Json]:
        """What was chosen and what was measured, as plain JSON."""
        return {
            "name": name,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "cosines": {key: round(value, 7) for key, value in self.cosines.items()},
            "images_per_s": {key: float(f"{value:.4g}") for key, value in self.rates.items()},
            "left_out": self.left_out,
        }

    def require(self, name: str) -> None:
        """Build the runtime that was asked for, or say why that cannot be."""
        if name == "torch":
            return
        try:
            agrees = self._build(name)
        except MissingExtraError:
            raise
        except Exception as error:
            raise InputError(
                f"{name} cannot run {self.backbone.name} here ({type(error).__name__}: {_brief(error)})",
                expected="an architecture that it can compute on this machine",
                next_step="take another runtime, or auto, which finds the fastest that works",
            ) from error
        if not agrees:
            raise InputError(
                f"the features of {name} have a cosine of {self.cosines[name]:.6f} to torch's in float32",
                expected=f"at least {PARITY_COSINE} on the job's own images",
                next_step="take another runtime, or auto, which finds the fastest that agrees",
            )

    def fastest(self, num_images: int | None) -> str:
        """Try what may pay for a job of this size; the name of the fastest that agrees."""
        self._measure("torch")
        if self._bfloat16_pays():
            self._try("torch-bfloat16")
        else:
            self.left_out["torch-bfloat16"] = "slower than float32 on this machine"
        if self.device != "cpu":
            return self._best()
        for name in ("openvino", "openvino-bfloat16", "onnxruntime"):
            reason = self._not_worth_it(name, num_images)
            if reason:
                self.left_out[name] = reason
            else:
                self._try(name)
        return self._best()

    def _best(self) -> str:
        agreeing = {name: rate for name, rate in self.rates.items() if name in self.describers}
        best = max(agreeing, key=agreeing.__getitem__)
        for name in set(self.describers) - {best}:
            del self.describers[name]  # their memory
        return best

    def _not_worth_it(self, name: str, num_images: int | None) -> str:
        """Why a candidate need not be tried; empty if it should be."""
        best = max(self.rates[name] for name in self.describers if name in self.rates)
        if name == "onnxruntime" and best > 1.5 * self.rates.get("openvino", best):
            return "computes in float32, and another is far ahead of float32"
        if num_images is not None:
            remaining = num_images / best
            cost = self._export_s()
            if remaining < 2 * cost:  # even at twice the speed the export would not come back
                return f"the job takes about {remaining:.0f} s without it, its export about {cost:.0f} s"
        return ""

    def _export_s(self) -> float:
        """About how long the export takes: measured at 5 to 90 million parameters, others in proportion."""
        if self._exported or graph_path(self.backbone).is_file():
            return 1.0
        return 6.0 + 30 * self.backbone.num_parameters / 1e9

    def _bfloat16_pays(self) -> bool:
        """Whether an image takes less time in bfloat16, which CPUs without it emulate many times slower."""
        describe = with_torch(self.backbone, self.device, dtype=torch.bfloat16)
        pixels = self.sample[:2]
        times = []
        for one in (self.describers["torch"], describe):
            started = time.perf_counter()
            one(pixels)
            times.append(time.perf_counter() - started)
        return times[1] < 2 * times[0]  # the first call in bfloat16 also converts

    def _try(self, name: str) -> None:
        try:
            if self._build(name):
                self._measure(name)
            else:
                self.left_out[name] = f"cosine {self.cosines[name]:.6f} to torch in float32"
        except Exception as error:  # a runtime that cannot do it is no reason not to describe images
            self.left_out[name] = f"{type(error).__name__}: {_brief(error)}"

    def _build(self, name: str) -> bool:
        """Build a candidate and compare it; whether it agrees."""
        describe = self._describer(name)
        self.cosines[name] = parity_cosine(describe(self.sample), self.expected)
        if self.cosines[name] < PARITY_COSINE:
            return False
        self.describers[name] = describe
        return True

    def _describer(self, name: str) -> Describe:
        if name == "torch-bfloat16":
            return with_torch(self.backbone, self.device, dtype=torch.bfloat16)
        if name == "onnxruntime":
            return with_onnxruntime(self.backbone)
        self._exported = True
        return with_openvino(self.backbone, bfloat16=name == "openvino-bfloat16")

    def _measure(self, name: str) -> None:
        """Images a second: the best of three calls after a first one."""
        describe = self.describers[name]
        describe(self.sample)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            describe(self.sample)
            best = min(best, time.perf_counter() - started)
        self.rates[name] = len(self.sample) / max(best, 1e-9)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else ""


# ---- the candidates


def with_torch(backbone: Backbone, device: str, *, dtype: torch.dtype = torch.float32) -> Describe:
    """Describe with torch; below float32 by autocast."""
    network = backbone.to(device).to(memory_format=torch.channels_last)

    def describe(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        lower = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.inference_mode(), lower:
            batch = pixels.to(device, memory_format=torch.channels_last)
            features: np.ndarray = network(batch).cpu().numpy()
            return features

    return describe


def with_onnxruntime(backbone: Backbone) -> Describe:
    """Describe with ONNX Runtime on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # knows of OMP_NUM_THREADS
    with graph(backbone) as path:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def describe(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        features: np.ndarray = session.run(None, {"pixels": pixels.contiguous().numpy()})[0]
        return features

    return describe


def with_openvino(backbone: Backbone, *, bfloat16: bool = False) -> Describe:
    """Describe with OpenVINO on as many threads as torch has.

    Raises:
        InputError: bfloat16 on a CPU that does not compute in it.
        MissingExtraError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", extra="train") from error
    core: Any = openvino.Core()
    if bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError(
            "openvino-bfloat16 on a CPU that does not compute in bfloat16",
            expected="a CPU with AVX-512 BF16, AMX or the like",
            next_step="take another runtime, or auto",
        )
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "ENABLE_CPU_PINNING": False,  # other processes decode images meanwhile
    }
    with graph(backbone) as path:
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request = compiled.create_infer_request()

    def describe(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        found = request.infer({0: pixels.contiguous().numpy()})
        features: np.ndarray = np.array(found[0], np.float32)
        return features

    return describe
