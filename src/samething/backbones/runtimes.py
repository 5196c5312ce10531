"""What computes a backbone's features: torch, ONNX Runtime or OpenVINO, in float32 or bfloat16.

:func:`choose_runtime` measures the candidates on images of the job and takes the fastest of those whose
features agree with torch's in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import torch

from samething.arrays import Float, UInt8
from samething.backbones.graphs import graph, graph_path
from samething.backbones.network import Backbone
from samething.errors import InputError, MissingExtraError, first_line
from samething.files import Json
from samething.sessions import PARITY_COSINE, fastest, open_session, parity_cosine, seconds_of

RuntimeName: TypeAlias = Literal[
    "auto", "torch", "torch-bfloat16", "onnxruntime", "openvino", "openvino-bfloat16"
]

Extract: TypeAlias = Callable[[torch.Tensor], np.ndarray]
"""From prepared pixels, uint8 (b, 3, height, width), to features, float32 (b, w)."""

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
    runtime: str = "auto",
    num_images: int | None = None,
    device: str | None = None,
) -> Runtime:
    """The runtime to extract features with.

    Args:
        backbone: the frozen network.
        sample: a few prepared images of the job; a batch as large as the job's gives the truest rates.
        runtime: auto takes the fastest that agrees with torch in float32; a name takes that one.
        num_images: how many images the job has; a runtime whose preparation takes longer than it saves
            is left out. None: very many.
        device: cpu or cuda; by default cuda where there is one.

    Raises:
        InputError: the runtime asked for cannot run this backbone here, or its features disagree.
        MissingExtraError: its package is not installed.
    """
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
        runtime = fastest(trials.rates, trials.cosines)
    elif runtime != "torch":
        trials.require(runtime)
    measured: dict[str, Json] = {
        "name": runtime,
        "device": device,
        "threads": torch.get_num_threads(),
        "cosines": {key: round(value, 7) for key, value in trials.cosines.items()},
        "images_per_s": {key: float(f"{value:.4g}") for key, value in trials.rates.items()},
        "left_out": trials.left_out,
    }
    return Runtime(runtime, device, trials.candidates[runtime], measured)


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


class Trials:
    """Runtimes of a backbone, built, compared with torch in float32, and measured."""

    def __init__(
        self, backbone: Backbone, sample: UInt8[torch.Tensor, "b 3 height width"], device: str
    ) -> None:
        self.backbone, self.device, self._images = backbone, device, sample
        self.candidates: dict[str, Extract] = {"torch": with_torch(backbone, device)}
        self.rates: dict[str, float] = {}
        """Images per second."""
        self.cosines: dict[str, float] = {"torch": 1.0}
        """Least cosine to torch's features in float32."""
        self.left_out: dict[str, str] = {}
        """Why a runtime was not used."""

    @functools.cached_property
    def sample(self) -> UInt8[torch.Tensor, "b 3 height width"]:
        """As many images as torch computes in about two seconds."""
        once = seconds_of(lambda: self.candidates["torch"](self._images[:1]), turns=2)
        return self._images[: min(_MAX_SAMPLE, max(2, int(_SAMPLE_S / once)))]

    @functools.cached_property
    def expected(self) -> Float[np.ndarray, "b w"]:
        """Their features by torch."""
        return self.candidates["torch"](self.sample)

    def require(self, name: str) -> None:
        """Build the runtime that was asked for, or say why that cannot be."""
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
        both = (self.candidates["torch"], with_torch(self.backbone, self.device, torch.bfloat16))
        times = [seconds_of(functools.partial(extract, self.sample[:2]), turns=1) for extract in both]
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
        else:
            extract = with_graph(self.backbone, "cpu" if name == "onnxruntime" else name)
        self.cosines[name] = parity_cosine(extract(self.sample), self.expected)
        return extract

    def _measure(self, name: str) -> None:
        """Images per second: the best of three calls after a first one."""
        extract = self.candidates[name]
        extract(self.sample)
        self.rates[name] = len(self.sample) / seconds_of(lambda: extract(self.sample))


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


def with_graph(backbone: Backbone, device: str) -> Extract:
    """Extract features with ONNX Runtime (cpu) or OpenVINO, on as many threads as torch has.

    Raises:
        InputError: bfloat16 on a CPU that does not compute in it.
        MissingExtraError: OpenVINO is not installed.
    """
    with graph(backbone) as path:
        return with_session(path, device)


def with_session(path: Path, device: str = "cpu") -> Extract:
    """Extract features with an ONNX graph, on as many threads as torch has.

    ONNX Runtime's threads each compute a part of a batch: together on one image they wait for each other,
    which takes a fifth more.
    """
    num_threads = torch.get_num_threads()  # knows of OMP_NUM_THREADS
    num_parts = num_threads if device == "cpu" else 1
    session = open_session(path, device, num_threads=num_threads // num_parts)
    pool = ThreadPoolExecutor(num_parts)

    def extract(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        parts = np.array_split(pixels.contiguous().numpy(), min(num_parts, max(1, len(pixels))))
        found = pool.map(lambda part: session.run(None, {"pixels": part})[0], parts)
        return np.concatenate(list(found))

    return extract
