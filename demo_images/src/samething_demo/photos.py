"""Photos: places in sample photographs of scientific packages, seen by simulated cameras and light."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageFilter

from samething.arrays import Float
from samething.images import decode
from samething_demo.instances import SIDE, Instance, limited
from samething_demo.packages import package_files

PHOTOGRAPHS: Final = {
    "skimage": (
        "data/astronaut.png",
        "data/brick.png",
        "data/camera.png",
        "data/cell.png",
        "data/chelsea.png",
        "data/clock_motion.png",
        "data/coffee.png",
        "data/coins.png",
        "data/grass.png",
        "data/gravel.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/moon.png",
        "data/motorcycle_left.png",
        "data/page.png",
        "data/retina.jpg",
        "data/rocket.jpg",
        "data/text.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
"""Photographs and scans by package."""

CELL: Final = 240
"""Side of a place, in pixels of the enlarged photograph; they do not overlap, so that none shows another."""

_LONGER_SIDE: Final = 1000
_MAX_ENLARGEMENT: Final = 2.0
_MIN_CONTRAST: Final = 18.0
_MIN_DETAIL: Final = 4.0

_RIM: Final = 0.2
"""Share of a cell on each side that some views do not show: contrast and detail must lie further in."""

_VIEW_MARGIN: Final = 0.28
_TURN_DEGREES: Final = 30.0

# A square turned by 30° holds an upright one of 1 / (cos 30° + sin 30°) = 0.73 of its side, here 140 of 192.
_CUT: Final = 28


@dataclasses.dataclass(frozen=True)
class PhotoInstance(Instance):
    """One place in one photograph."""

    name: str
    photograph: str
    """Path of the photograph."""
    row: int
    column: int
    """The place's cell, counted from the top left."""
    domain: str = "photo"

    def painter(self) -> Callable[[str, np.random.Generator], Image.Image]:
        """The place from a random viewpoint, with random exposure, white balance and blur."""
        photograph, corner = _enlarged(self.photograph), (self.column * CELL, self.row * CELL)
        return lambda source, random: _exposed(_seen_aslant(photograph, corner, random), random)


def find_photos(limit: int | None) -> list[PhotoInstance]:
    """The instances of the domain ``photo``: cells with contrast and detail.

    A flat cell, such as sky or blank paper, cannot be told from another.

    Args:
        limit: take at most this many.

    Raises:
        MissingExtraError, InputError: a package is missing or has another layout.
    """
    cells: dict[str, PhotoInstance] = {}
    for module, names in PHOTOGRAPHS.items():
        for name in names:
            path = package_files(module, name)[0]
            width, height = _enlarged_size(str(path))
            for row in range(height // CELL):
                for column in range(width // CELL):
                    label = f"{path.stem}_r{row}_c{column}"
                    cells[label] = PhotoInstance(label, str(path), row, column)
    # a third of the cells passes
    considered = limited("photo", cells, None if limit is None else 4 * limit)
    return [cells[name] for name in considered if _has_detail(cells[name])][:limit]


@functools.lru_cache(maxsize=4)
def _enlarged(path: str) -> Image.Image:
    """The photograph scaled to a longer side of 1,000 pixels, but at most doubled."""
    return decode(Path(path)).resize(_enlarged_size(path), Image.Resampling.LANCZOS)


def _enlarged_size(path: str) -> tuple[int, int]:
    """Width and height of the enlarged photograph, from the file's header (none of the files is turned)."""
    with Image.open(path) as photograph:
        width, height = photograph.size
    scale = min(_LONGER_SIDE / max(width, height), _MAX_ENLARGEMENT)
    return round(width * scale), round(height * scale)


def _has_detail(place: PhotoInstance) -> bool:
    left, top, rim = place.column * CELL, place.row * CELL, round(CELL * _RIM)
    middle = (left + rim, top + rim, left + CELL - rim, top + CELL - rim)
    cell = _enlarged(place.photograph).crop(middle).convert("L")
    grey = np.asarray(cell.filter(ImageFilter.GaussianBlur(1.5)), np.float64)
    detail = np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()
    return bool(grey.std() >= _MIN_CONTRAST and detail >= _MIN_DETAIL)


def _seen_aslant(
    photograph: Image.Image, corner: tuple[int, int], random: np.random.Generator
) -> Image.Image:
    """A random quadrilateral within the cell, made square, and turned."""
    reach = CELL * _VIEW_MARGIN
    inset = random.uniform(0, reach, (4, 2))
    outer = np.array([(0, 0), (CELL, 0), (CELL, CELL), (0, CELL)], np.float64)
    inward = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)], np.float64)
    quadrilateral = np.asarray(corner) + outer + inward * inset
    square = np.array([(0, 0), (SIDE, 0), (SIDE, SIDE), (0, SIDE)], np.float64)
    bicubic = Image.Resampling.BICUBIC
    mapping = perspective(square, quadrilateral)
    flat = photograph.transform((SIDE, SIDE), Image.Transform.PERSPECTIVE, mapping, bicubic)
    turned = flat.rotate(float(random.uniform(-_TURN_DEGREES, _TURN_DEGREES)), bicubic)
    return turned.crop((_CUT, _CUT, SIDE - _CUT, SIDE - _CUT)).resize((SIDE, SIDE), bicubic)


def perspective(
    corners: Float[np.ndarray, "4 2"], targets: Float[np.ndarray, "4 2"]
) -> tuple[float, float, float, float, float, float, float, float]:
    """The projective map that takes four corners to four targets, in Pillow's order of coefficients.

    ``(a, b, c, d, e, f, g, h)`` with ``x' = (a x + b y + c) / (g x + h y + 1)`` and
    ``y' = (d x + e y + f) / (g x + h y + 1)``; no three of the points may lie on a line.
    """
    equations = np.zeros((8, 8))
    for number, ((x, y), (u, v)) in enumerate(zip(corners, targets, strict=True)):
        equations[2 * number] = [x, y, 1, 0, 0, 0, -u * x, -u * y]
        equations[2 * number + 1] = [0, 0, 0, x, y, 1, -v * x, -v * y]
    a, b, c, d, e, f, g, h = np.linalg.solve(equations, targets.ravel()).tolist()
    return a, b, c, d, e, f, g, h


def _exposed(image: Image.Image, random: np.random.Generator) -> Image.Image:
    values = np.asarray(image, np.float64) / 255
    values = values ** random.uniform(0.6, 1.6) * random.uniform(0.7, 1.2, 3)
    exposed = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    return exposed.filter(ImageFilter.GaussianBlur(float(random.uniform(0, 1.6))))
