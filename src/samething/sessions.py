"""An ONNX graph on a device, by onnxruntime's execution providers or by OpenVINO; and when two of them agree.

Nothing here needs torch: what extracts features and what embeds images share it.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from samething.arrays import Float
from samething.errors import ArtefactError, InputError, MissingExtraError, SamethingError, first_line, needed
from samething.files import user_cache

PARITY_COSINE: Final = 0.9998
"""Least cosine between a device's vectors and the reference's in float32, on the job's own images."""

PROVIDERS: Final[Mapping[str, str]] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
"""Devices and what onnxruntime calls them; OpenVINO is rather computed with by its own package."""

_EXTRAS: Final = {"cuda": "gpu", "tensorrt": "gpu", "openvino": "openvino", "openvino-bfloat16": "openvino"}
"""What to install for a device that is not there; onnxruntime brings CoreML on a Mac."""


def devices_here() -> list[str]:
    """Devices that the installed packages can open a graph on; whether the hardware is there shows then."""
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    found = [device for device, provider in PROVIDERS.items() if provider in providers]
    if importlib.util.find_spec("openvino") is not None:
        found = [*(device for device in found if device != "openvino"), "openvino", "openvino-bfloat16"]
    return found


def open_session(graph: Path, device: str = "cpu", *, num_threads: int | None = None) -> Any:
    """An ONNX graph, ready to run: ``session.run(None, {"pixels": …})`` gives its outputs.

    Args:
        graph: the file.
        device: one of :data:`PROVIDERS`, or openvino-bfloat16.
        num_threads: threads of a CPU for one call's arithmetic; by default all cores.

    Raises:
        ArtefactError: onnxruntime cannot read it.
        InputError: the device is not there, cannot be used on this machine, or cannot compute it.
        MissingExtraError: the device's package is not installed.
    """
    here, num_threads = devices_here(), num_threads or os.cpu_count() or 1
    if device not in here:
        if device.startswith("openvino"):
            raise MissingExtraError("openvino", extra="openvino")
        extra = _EXTRAS.get(device)
        raise InputError(
            f"the device {device}",
            expected=f"one that is here: {', '.join(here)}",
            next_step=f"pip install 'samething[{extra}]', on a machine that has it (docs/serving.md)"
            if extra
            else "choose one of these, or auto, which measures them",
        )
    import onnxruntime

    try:
        if device.startswith("openvino") and importlib.util.find_spec("openvino") is not None:
            return OpenVinoSession(graph, num_threads=num_threads, bfloat16=device == "openvino-bfloat16")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        # threads that wait leave their core to others
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if device == "directml":  # it requires both
            options.enable_mem_pattern = False
            options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        wanted = _providers(device)
        session = onnxruntime.InferenceSession(graph, options, providers=wanted, enable_fallback=False)
    except SamethingError:
        raise
    except Exception as error:  # onnxruntime has a dozen kinds of its own
        if device != "cpu":
            raise InputError(
                f"{device} cannot compute {graph} ({type(error).__name__}: {first_line(error)})",
                expected="a graph that the device computes",
                next_step="choose another device, or auto, which finds the fastest that works",
            ) from error
        raise ArtefactError(
            f"{graph} cannot be loaded ({first_line(error)})",
            expected="an ONNX model that onnxruntime reads",
            next_step="pip install --upgrade onnxruntime, or export the model again",
        ) from error
    if session.get_providers()[0] != PROVIDERS[device]:  # without its libraries it takes the CPU in silence
        raise InputError(
            f"the device {device}, which onnxruntime cannot start here",
            expected="the device's own libraries and driver",
            next_step=f"install them, or choose another device: {', '.join(here)}",
        )
    return session


def _providers(device: str) -> list[Any]:
    """What onnxruntime computes with, in the order of its choice, each with its options."""
    import onnxruntime

    wanted: list[Any] = [PROVIDERS[device]]
    if device in ("cuda", "tensorrt"):
        onnxruntime.preload_dlls()  # of NVIDIA's own packages
        # the search for the fastest convolution would be repeated for every size of a batch
        wanted = [("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"})]
    if device == "tensorrt":
        kept = user_cache() / "tensorrt"  # it builds for minutes
        kept.mkdir(parents=True, exist_ok=True)
        cache = {"trt_engine_cache_enable": True, "trt_engine_cache_path": os.fspath(kept)}
        wanted.insert(0, (PROVIDERS[device], cache))
    if device != "cpu":
        wanted.append("CPUExecutionProvider")  # for the operations that the device does not have
    return wanted


class OpenVinoSession:
    """A graph that OpenVINO computes on the CPU, called as one of onnxruntime is; by several threads.

    Args:
        graph: the ONNX file.
        num_threads: for one call's arithmetic.
        bfloat16: compute in bfloat16 instead of float32.

    Raises:
        InputError: bfloat16 on a CPU that does not compute in it.
        MissingExtraError: OpenVINO is not installed.
    """

    def __init__(self, graph: Path, *, num_threads: int, bfloat16: bool = False) -> None:
        openvino = needed("openvino", extra="openvino")
        core: Any = openvino.Core()
        if bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise InputError(
                "openvino-bfloat16 on a CPU that does not compute in bfloat16",
                expected="a CPU with AVX-512 BF16, AMX or the like",
                next_step="take another, or auto",
            )
        settings = {
            "INFERENCE_NUM_THREADS": num_threads,
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "ENABLE_CPU_PINNING": False,  # others decode images meanwhile
        }
        self._model = core.compile_model(core.read_model(graph), "CPU", settings)
        self._own = threading.local()  # a request belongs to one thread at a time

    def run(self, names: Sequence[str] | None, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs by name, or all of them, in arrays of the caller's own."""
        if not hasattr(self._own, "request"):
            self._own.request = self._model.create_infer_request()
        found = self._own.request.infer({name: np.ascontiguousarray(own) for name, own in given.items()})
        return [np.array(found[key]) for key in (names or range(len(self._model.outputs)))]

    def get_inputs(self) -> list[types.SimpleNamespace]:
        """Name and type of each input, as onnxruntime says them."""
        return [_described(port) for port in self._model.inputs]

    def get_outputs(self) -> list[types.SimpleNamespace]:
        """Name and type of each output."""
        return [_described(port) for port in self._model.outputs]


def _described(port: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(name=port.any_name, type=f"tensor({np.dtype(port.element_type.to_dtype())})")


# ---- which to take


def parity_cosine(ours: Float[np.ndarray, "b w"], theirs: Float[np.ndarray, "_ _"]) -> float:
    """Least cosine between two devices' vectors of the same images; 0 where one is not finite.

    >>> round(parity_cosine(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])), 4)
    0.7071
    """
    if ours.shape != theirs.shape:
        return 0.0
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (ours * theirs).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return float(np.nan_to_num(cosines, nan=0.0).min())


def fastest(rates: Mapping[str, float], cosines: Mapping[str, float]) -> str:
    """The one of the highest rate among those whose vectors agree with the reference's in float32.

    Args:
        rates: images per second.
        cosines: least cosine to the reference's vectors.

    >>> fastest({"torch": 10.0, "openvino": 20.0, "torch-bfloat16": 30.0},
    ...         {"torch": 1.0, "openvino": 0.99999, "torch-bfloat16": 0.99})
    'openvino'
    """
    return max((name for name in rates if cosines[name] >= PARITY_COSINE), key=rates.__getitem__)


def seconds_of(call: Callable[[], object], *, turns: int = 3) -> float:
    """Seconds that a call takes: the least of some turns, of which the first is the slowest."""
    return seconds_in_turns([call], turns=turns)[0]


def seconds_in_turns(calls: Sequence[Callable[[], object]], *, turns: int) -> list[float]:
    """Seconds that each of some calls takes, the least of its turns: other work slows them all alike."""
    best = [float("inf")] * len(calls)
    for _ in range(turns):
        for place, call in enumerate(calls):
            started = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - started)
    return [max(seconds, 1e-9) for seconds in best]
