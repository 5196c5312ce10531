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

from samething.arrays import Float, UInt8
from samething.backbones.graphs import graph, graph_path
from samething.backbones.network import Backbone
from samething.errors import InputError, MissingExtraError, first_line, needed
from samething.files import Json

RuntimeName: TypeAlias = Literal[
    "auto", "torch", "torch-bfloat16", "onnxruntime", "openvino", "openvino-bfloat16"
]

Extract: TypeAlias = Callable[[torch.Tensor], np.ndarray]
"""From prepared pixels, uint8 (b, 3, height, width), to features, float32 (b, w)."""

PARITY_COSINE: Final = 0.9998
"""Least cosine between a runtime's features and torch's in float32, on the job's own images."""

_SAMPLE_S: Final = 2.0
"""Time that computing the sample once may take with torch, in seconds."""

_MAX_SAMPLE: Final = 32


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A backbone ready to extract features."""

    name: str
    """What computes: torch, torch-bfloat16, onnxruntime, openvino or openvino-bfloat16."""
    device: str
    """cpu or cuda."""
    extract: Extract = dataclasses.field(repr=False)
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
    """The runtime to extract features with.

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
    trials = Trials(backbone, sample, device)
    if runtime == "auto":
        trials.attempt_all(num_images)
        name = fastest(trials.rates, trials.cosines)
    else:
        trials.require(runtime)
        name = runtime
    measured: dict[str, Json] = {
        "name": name,
        "device": device,
        "threads": torch.get_num_threads(),
        "cosines": {key: round(value, 7) for key, value in trials.cosines.items()},
        "images_per_s": {key: float(f"{value:.4g}") for key, value in trials.rates.items()},
        "left_out": trials.left_out,
    }
    return Runtime(name, device, trials.candidates[name], measured)


def fastest(rates: Mapping[str, float], cosines: Mapping[str, float]) -> str:
    """The runtime of the highest rate among those whose features agree with torch's in float32.

    Args:
        rates: images per second.
        cosines: least cosine to torch's features in float32.

    >>> fastest({"torch": 10.0, "openvino": 20.0, "torch-bfloat16": 30.0},
    ...         {"torch": 1.0, "openvino": 0.99999, "torch-bfloat16": 0.99})
    'openvino'
    """
    return max((name for name in rates if cosines[name] >= PARITY_COSINE), key=rates.__getitem__)


def reason_against(
    name: str, rates: Mapping[str, float], best: float, *, num_images: int | None, export_s: float
) -> str:
    """Why a runtime that computes an exported graph need not be tried; empty if it should be.

    Args:
        name: the runtime.
        rates: images per second of what was tried.
        best: the highest of those that agree.
        num_images: how many images the job has; None: very many.
        export_s: how long the export takes, in seconds.

    >>> reason_against("openvino", {"torch": 100.0}, 100.0, num_images=200, export_s=6.0)
    'the job takes about 2 s without it, its export about 6 s'
    """
    if name == "onnxruntime" and best > 1.5 * rates.get("openvino", best):
        return "computes in float32, and another is far ahead of float32"
    if num_images is not None and num_images / best < 2 * export_s:
        # even at twice the speed the export would not come back
        return f"the job takes about {num_images / best:.0f} s without it, its export about {export_s:.0f} s"
    return ""


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


class Trials:
    """Runtimes of a backbone, built, compared with torch in float32, and measured."""

    def __init__(
        self, backbone: Backbone, sample: UInt8[torch.Tensor, "b 3 height width"], device: str
    ) -> None:
        self.backbone, self.device = backbone, device
        self.candidates: dict[str, Extract] = {"torch": with_torch(backbone, device)}
        self.rates: dict[str, float] = {}
        """Images per second."""
        self.cosines: dict[str, float] = {"torch": 1.0}
        """Least cosine to torch's features in float32."""
        self.left_out: dict[str, str] = {}
        """Why a runtime was not used."""
        # the first call is the slowest, so a second one tells how large the sample may be
        once = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            self.candidates["torch"](sample[:1])
            once = min(once, max(1e-4, time.perf_counter() - started))
        self.sample = sample[: min(_MAX_SAMPLE, max(2, int(_SAMPLE_S / once)))]
        self.expected = self.candidates["torch"](self.sample)

    def require(self, name: str) -> None:
        """Build the runtime that was asked for, or say why that cannot be."""
        if name == "torch":
            return
        try:
            self.candidates[name] = self._compared(name)
        except MissingExtraError:
            raise
        except Exception as error:
            raise InputError(
                f"{name} cannot run {self.backbone.name} here ({type(error).__name__}: {first_line(error)})",
                expected="an architecture that it can compute on this machine",
                next_step="take another runtime, or auto, which finds the fastest that works",
            ) from error
        if self.cosines[name] < PARITY_COSINE:
            raise InputError(
                f"the features of {name} have a cosine of {self.cosines[name]:.6f} to torch's in float32",
                expected=f"at least {PARITY_COSINE} on the job's own images",
                next_step="take another runtime, or auto, which finds the fastest that agrees",
            )

    def attempt_all(self, num_images: int | None) -> None:
        """Try what may pay for a job of this size."""
        self._measure("torch")
        # CPUs without bfloat16 emulate it many times slower, which two images tell
        times = []
        for extract in (self.candidates["torch"], with_torch(self.backbone, self.device, torch.bfloat16)):
            started = time.perf_counter()
            extract(self.sample[:2])
            times.append(time.perf_counter() - started)
        if times[1] < 2 * times[0]:  # the first call in bfloat16 also converts
            self.attempt("torch-bfloat16")
        else:
            self.left_out["torch-bfloat16"] = "slower than float32 on this machine"
        if self.device != "cpu":
            return
        path = graph_path(self.backbone)
        for name in ("openvino", "openvino-bfloat16", "onnxruntime"):
            if self.backbone.preprocessing.any_shape:
                self.left_out[name] = "images of any shape have no graph"
                continue
            best = self.rates[fastest(self.rates, self.cosines)]
            # measured at 5 to 90 million parameters, others in proportion
            export_s = 1.0 if path.is_file() else 6.0 + 30 * self.backbone.num_parameters / 1e9
            reason = reason_against(name, self.rates, best, num_images=num_images, export_s=export_s)
            if reason:
                self.left_out[name] = reason
            else:
                self.attempt(name)

    def attempt(self, name: str) -> None:
        """Build, compare and measure a runtime; one that cannot do it is left out, with the reason."""
        try:
            extract = self._compared(name)
            if self.cosines[name] < PARITY_COSINE:
                self.left_out[name] = f"cosine {self.cosines[name]:.6f} to torch in float32"
                return
            self.candidates[name] = extract
            self._measure(name)
        except Exception as error:  # a runtime that cannot do it is no reason not to extract features
            self.left_out[name] = f"{type(error).__name__}: {first_line(error)}"

    def _compared(self, name: str) -> Extract:
        """Build a runtime and take its cosine to torch in float32."""
        if name == "torch-bfloat16":
            extract = with_torch(self.backbone, self.device, torch.bfloat16)
        elif name == "onnxruntime":
            extract = with_onnxruntime(self.backbone)
        else:
            extract = with_openvino(self.backbone, bfloat16=name == "openvino-bfloat16")
        self.cosines[name] = parity_cosine(extract(self.sample), self.expected)
        return extract

    def _measure(self, name: str) -> None:
        """Images per second: the best of three calls after a first one."""
        extract = self.candidates[name]
        extract(self.sample)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            extract(self.sample)
            best = min(best, time.perf_counter() - started)
        self.rates[name] = len(self.sample) / max(best, 1e-9)


# ---- the candidates


def with_torch(backbone: Backbone, device: str, dtype: torch.dtype = torch.float32) -> Extract:
    """Extract features with torch; below float32 by autocast."""
    network = backbone.to(device).to(memory_format=torch.channels_last)

    def extract(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        lower = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.inference_mode(), lower:
            batch = pixels.to(device, memory_format=torch.channels_last)
            features: np.ndarray = network(batch).cpu().numpy()
            return features

    return extract


def with_onnxruntime(backbone: Backbone) -> Extract:
    """Extract features with ONNX Runtime on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # knows of OMP_NUM_THREADS
    with graph(backbone) as path:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def extract(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        features: np.ndarray = session.run(None, {"pixels": pixels.contiguous().numpy()})[0]
        return features

    return extract


def with_openvino(backbone: Backbone, *, bfloat16: bool = False) -> Extract:
    """Extract features with OpenVINO on as many threads as torch has.

    Raises:
        InputError: bfloat16 on a CPU that does not compute in it.
        MissingExtraError: OpenVINO is not installed.
    """
    openvino = needed("openvino", extra="train")
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

    def extract(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        found = request.infer({0: pixels.contiguous().numpy()})
        features: np.ndarray = np.array(found[0], np.float32)
        return features

    return extract
