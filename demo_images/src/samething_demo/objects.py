"""Objects: made-up 3-D shapes of pybullet's data, rendered from several sides under changing light."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from samething.arrays import Float
from samething.errors import MissingExtraError
from samething_demo.instances import SIDE, Instance, limited
from samething_demo.packages import package_files

NUM_OBJECTS: Final = 500
"""Of the 1,000 shapes, every second one: enough for the demo, and half the time."""

_RENDERED_SIDE: Final = 3 * SIDE // 2
"""The renderer does not smooth edges, so that images are made larger and scaled down."""

_FIELD_OF_VIEW_DEGREES: Final = 40.0


@dataclasses.dataclass(frozen=True)
class ObjectInstance(Instance):
    """One mesh of one colour."""

    name: str
    urdf: str
    """Path of the mesh's description (URDF)."""
    domain: str = "object"

    def painter(self) -> Callable[[str, np.random.Generator], Image.Image]:
        """The mesh from a random side, in random light, before a random gradient."""
        engine, client = _renderer()
        engine.resetSimulation(physicsClientId=client)
        body = engine.loadURDF(self.urdf, useFixedBase=True, physicsClientId=client)
        box = np.array(engine.getAABB(body, physicsClientId=client))
        centre, radius = box.mean(axis=0), float(np.linalg.norm(box[1] - box[0])) / 2
        return lambda source, random: _view(engine, client, centre, radius, random)


def find_objects(limit: int | None) -> list[ObjectInstance]:
    """The instances of the domain ``object``.

    Args:
        limit: take this many only.

    Raises:
        MissingExtraError, InputError: pybullet is missing or has another layout.
    """
    files = package_files("pybullet_data", "random_urdfs/*/*.urdf")
    urdfs = {f"shape_{path.stem}": path for path in files[:: max(1, len(files) // NUM_OBJECTS)]}
    return [ObjectInstance(name, str(urdfs[name])) for name in limited("object", urdfs, limit)]


def _view(
    engine: Any,
    client: int,
    centre: Float[np.ndarray, 3],
    radius: float,
    random: np.random.Generator,
) -> Image.Image:
    camera = engine.computeViewMatrixFromYawPitchRoll(
        cameraTargetPosition=centre.tolist(),
        distance=radius * random.uniform(2.7, 3.6),
        yaw=random.uniform(0, 360),
        pitch=random.uniform(-65, 20),
        roll=random.uniform(-20, 20),
        upAxisIndex=2,
    )
    projection = engine.computeProjectionMatrixFOV(_FIELD_OF_VIEW_DEGREES, 1, 0.005, 10)
    light = random.normal(size=3) + np.array([0, 0, 1.5])
    _, _, colour, _, body = engine.getCameraImage(
        _RENDERED_SIDE,
        _RENDERED_SIDE,
        camera,
        projection,
        lightDirection=light.tolist(),
        shadow=0,
        lightAmbientCoeff=float(random.uniform(0.35, 0.6)),
        lightDiffuseCoeff=float(random.uniform(0.4, 0.7)),
        renderer=engine.ER_TINY_RENDERER,
        physicsClientId=client,
    )
    shape = (_RENDERED_SIDE, _RENDERED_SIDE)
    rgba = np.asarray(colour, np.uint8).reshape(*shape, 4)
    rgba[..., 3] = 255 * (np.asarray(body).reshape(shape) >= 0)
    # scaled down as RGBA, so that the ground the renderer drew does not shine through at the edges
    small = Image.fromarray(rgba).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    *colours, cover = (np.asarray(channel, np.float32) for channel in small.split())
    cover, tint = cover / np.float32(255), random.uniform(0.85, 1.15, 3).astype(np.float32)
    ground = _gradient(random)
    noise = 3 * random.standard_normal((SIDE, SIDE, 3), np.float32)
    # a channel at a time: arrays whose last axis is 3 long take twice as long
    parts = [
        cover * colours[number] * tint[number] + (1 - cover) * ground[..., number] + noise[..., number]
        for number in range(3)
    ]
    image = np.stack([part.round().clip(0, 255).astype(np.uint8) for part in parts], axis=2)
    return Image.fromarray(image)


def _gradient(random: np.random.Generator) -> Float[np.ndarray, "rows columns 3"]:
    first, second = random.uniform(60, 250, (2, 3)).astype(np.float32)
    steps = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None]
    line: np.ndarray = first * (1 - steps) + second * steps
    # one row, or one column, to be spread over the image
    return line[:, None] if random.random() < 0.5 else line[None]


@functools.lru_cache(maxsize=1)
def _renderer() -> tuple[Any, int]:
    """The physics engine, without a window, and its connection; one per process."""
    with _quiet_stderr():
        try:
            import pybullet
        except ImportError as error:
            raise MissingExtraError("pybullet", extra="demo") from error
    return pybullet, pybullet.connect(pybullet.DIRECT)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep a compiled module from greeting on the terminal: pybullet prints its build time on import."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
