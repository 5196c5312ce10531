"""What computes a model: the device that is asked for, or the fastest that gives the CPU's vectors.

The fastest is measured once and kept: in ``.devices`` in the model's folder, or in the user's cache where
that cannot be written or is the hub's cache. No manifest lists it, so a model stays the same model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from PIL import Image

from samething.arrays import Embeddings, Pixels
from samething.errors import InputError, SamethingError, first_line
from samething.files import Json, fingerprint, read_json, user_cache, write_json
from samething.progress import say
from samething.sessions import (
    PARITY_COSINE,
    devices_here,
    fastest,
    parity_cosine,
    seconds_in_turns,
    seconds_of,
)

Device: TypeAlias = Literal[
    "auto", "cpu", "cuda", "tensorrt", "coreml", "directml", "openvino", "openvino-bfloat16"
]
VARIABLE: Final = "SAMETHING_DEVICE"
"""Environment variable that names the device where a call does not."""

_FOLDER: Final = ".devices"
SAMPLE: Final = 16
"""Images that devices are compared on."""
LEAST_IMAGES: Final = 64
"""Of fewer images a choice is not worth the look."""
_SAMPLE_S: Final = 2.0
"""Seconds that the sample may take the CPU once."""
_TURNS: Final = 4
"""How often each device computes the sample while they are compared."""
_PAYS_FROM_S: Final = 30.0
"""Seconds of work for the CPU from which measuring pays."""
_AHEAD: Final = 1.2
"""How many times the CPU's rate another device needs: what is hardly faster only starts more slowly."""

Compute: TypeAlias = Callable[[Sequence[Pixels]], Embeddings]
"""From prepared images to vectors."""


def require_parity(device: str, compute: Compute, cpu: Compute, shape: tuple[int, int]) -> None:
    """Compare a device that is asked for with the CPU on a few drawn images.

    Raises:
        InputError: its vectors are others.
    """
    sample = drawn_images(shape, 4)
    cosine = parity_cosine(compute(sample), cpu(sample))
    if cosine < PARITY_COSINE:
        raise InputError(
            f"the vectors of {device} have a cosine of {cosine:.6f} to the CPU's in float32",
            expected=f"at least {PARITY_COSINE}, so that the vectors of one index can be compared",
            next_step="choose another device, or auto, which finds the fastest that agrees",
        )


def drawn_images(shape: tuple[int, int], count: int) -> list[Pixels]:
    """Images of coarse and fine structure, always the same ones, in place of a job's own."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        image = np.zeros((*shape, 3))
        for cells in (3, 12, 48):
            part = generator.integers(0, 256, (cells, cells, 3), np.uint8)
            image += np.asarray(Image.fromarray(part).resize(shape[::-1], Image.Resampling.BICUBIC)) / 3
        found.append(np.ascontiguousarray(image.astype(np.uint8).transpose(2, 0, 1)))
    return found


class Choice:
    """Which device computes a model here: kept from an earlier time, or measured now.

    Args:
        folder: the model's.
        model: its fingerprint.
        num_threads: of the CPU.
    """

    def __init__(self, folder: Path, model: str, num_threads: int) -> None:
        self.here = devices_here()
        decided_by = [model, num_threads, self.here, _versions(), _machine()]
        name = f"{fingerprint(decided_by)}.json"
        inside = [] if folder.parent.name == "snapshots" else [folder / _FOLDER / name]
        self._places = [*inside, user_cache() / "devices" / name]

    def kept(self) -> dict[str, Json] | None:
        """What was measured before, with everything that decides it as it is now."""
        for place in self._places:
            with contextlib.suppress(SamethingError, KeyError, TypeError):
                record: dict[str, Json] = read_json(place)
                if min(record["images_per_s"][name] for name in ("cpu", record["name"])) > 0:
                    return record
        return None

    def keep(self, record: Mapping[str, Json]) -> None:
        """Keep what was measured; where nothing can be written, the next job measures again."""
        for place in self._places:
            with contextlib.suppress(OSError, SamethingError):
                write_json(place, dict(record))
                return

    def measured(
        self, on: Callable[[str], Compute], sample: Sequence[Pixels], *, num_images: int | None
    ) -> dict[str, Json] | None:
        """Compare and measure the devices that are here; None where so few images are not worth it.

        Args:
            on: makes the model on a device.
            sample: prepared images.
            num_images: of the job; None: very many.

        Returns:
            Plain JSON: the ``name`` of the fastest, and of each device ``images_per_s``, the least of its
            ``cosines`` to the CPU's vectors and the seconds to open it (``open_s``), or why it was
            ``left_out``.
        """
        cpu = on("cpu")
        once = seconds_of(lambda: cpu(sample[:1]), turns=2)
        if num_images is not None and num_images * once < _PAYS_FROM_S:
            return None
        sample = sample[: max(2, int(_SAMPLE_S / once))]
        expected = cpu(sample)
        agreeing, cosines = {"cpu": cpu}, {"cpu": 1.0}
        opened, left_out = {"cpu": 0.0}, {}
        for device in self.here:
            if device == "cpu":
                continue
            try:
                started = time.perf_counter()
                compute = on(device)
                opened[device] = time.perf_counter() - started
                cosines[device] = parity_cosine(compute(sample), expected)
                if cosines[device] < PARITY_COSINE:
                    left_out[device] = f"cosine {cosines[device]:.6f} to the CPU's vectors"
                else:
                    agreeing[device] = compute
            except Exception as error:  # a device that cannot do it is no reason not to embed
                left_out[device] = f"{type(error).__name__}: {first_line(error)}"
        calls = [functools.partial(compute, sample) for compute in agreeing.values()]
        spent = seconds_in_turns(calls, turns=_TURNS)
        rates = {device: len(sample) / seconds for device, seconds in zip(agreeing, spent, strict=True)}
        return {
            "name": fastest({**rates, "cpu": _AHEAD * rates["cpu"]}, cosines),
            "images_per_s": {key: float(f"{value:.4g}") for key, value in rates.items()},
            "cosines": {key: round(value, 7) for key, value in cosines.items()},
            "open_s": {key: round(value, 2) for key, value in opened.items()},
            "left_out": left_out,
        }


def pays(record: Mapping[str, Json], num_images: int | None) -> bool:
    """Whether the fastest device saves more time on so many images than it takes to open.

    >>> record = {"name": "cuda", "images_per_s": {"cpu": 10.0, "cuda": 1000.0}, "open_s": {"cuda": 3.0}}
    >>> pays(record, 20), pays(record, 200), pays(record, None)
    (False, True, True)
    """
    name, rates = record["name"], record["images_per_s"]
    saved = float("inf") if num_images is None else num_images * (1 / rates["cpu"] - 1 / rates[name])
    return bool(name != "cpu" and saved > record["open_s"][name])


def say_choice(record: Mapping[str, Json]) -> None:
    """A line for whoever waits, where another than the CPU computes."""
    rates, name = record["images_per_s"], record["name"]
    say(
        f"{name} computes: {rates[name]:,.0f} images per second, {rates['cpu']:,.0f} by onnxruntime on the "
        f"CPU; --device or {VARIABLE} names another"
    )


def _versions() -> dict[str, str | None]:
    import importlib.metadata  # which a search does not need

    import onnxruntime

    found: dict[str, str | None] = {"onnxruntime": onnxruntime.__version__, "openvino": None}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["openvino"] = importlib.metadata.version("openvino")
    return found


def _machine() -> list[str]:
    """The processor, and the cards that are there and shown."""
    import platform

    said = [platform.system(), platform.machine(), platform.processor(), str(os.cpu_count())]
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as stream:
        first = iter(stream.readline, "\n")  # of the first of its cores
        said += [line.strip() for line in first if line.startswith(("model name", "flags"))]
    said += sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    return [*said, os.environ.get("CUDA_VISIBLE_DEVICES", "")]
