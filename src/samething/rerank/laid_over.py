"""Whether one image was made of another: cropped, in perspective, or with something laid over it.

Places that agree say that both show one flat thing, which two photographs of a package do as well. A copy has
the same pixels too: one image is laid on the other by the homography of these places, and compared tile by
tile, so that what covers a part of it costs only the tiles there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Final, TypeVar

import numpy as np
from PIL import Image

from samething.arrays import Bool, Float, UInt8
from samething.errors import ImageError, needed
from samething.rerank.geometry import Geometry
from samething.rerank.kept import Kept
from samething.rerank.second_look import Evidence, Shown, keep_all

_Name = TypeVar("_Name", bound=Hashable)
COPY: Final = 0.8
"""Correlation of the pixels from which one image counts as made of another: 0.6 to 0.9 differ little. Nearly
the same photograph of a flat thing reaches it, too: docs/curation.md has what is missed and what is wrong."""
_SIDE: Final = 512
"""Pixels of the longer side at which one image is laid on the other; they are compared at half of it, so that
a part of half the sides has no more detail than the whole it was cut from."""
_TILE: Final = 16
_FLATTEST: Final = 3.0
"""Standard deviation of a tile's grey values, 0 to 255, below which it says nothing."""
_LEAST_TILES: Final = 8
_MAY_DIFFER: Final = 1 / 3
"""Share of the tiles that may be covered by something else."""
_NUM_REMEMBERED: Final = 8192
"""Images whose local features stay in memory, 17 kB each; a sixteenth as many stay small, 256 kB each."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """One of two images was made of the other."""

    closeness: float
    """Correlation of the pixels, at least ``COPY``."""
    evidence: Evidence
    """Which places agree."""


def copy_check(
    shown: Callable[[_Name], Shown], kept: Kept | None = None
) -> Callable[[_Name, _Name], Copy | None]:
    """A check of two images by what names them: a :class:`Copy`, or None where neither was made of the other.

    Args:
        shown: the image of a name; one that cannot be read is no copy.
        kept: where local features are kept; None: in the user's cache.

    Raises:
        MissingExtraError: OpenCV is not installed.
    """
    needed("cv2", extra="rerank")
    geometry, cache = Geometry(), Kept.of_user() if kept is None else kept

    @functools.lru_cache(maxsize=_NUM_REMEMBERED)
    def content(name: _Name) -> bytes | ImageError | None:
        return keep_all(geometry, [shown(name)], cache)[0]

    @functools.lru_cache(maxsize=_NUM_REMEMBERED // 16)
    def small(name: _Name) -> UInt8[np.ndarray, "height width"]:
        return small_grey(shown(name).image())

    def check(first: _Name, second: _Name) -> Copy | None:
        one, other = content(first), content(second)
        if not isinstance(one, bytes) or not isinstance(other, bytes):
            return None
        nobody = Shown("", Image.Image, np.zeros(0, np.float32))
        [evidence] = geometry.compare(nobody, one, [nobody], [other])
        if not evidence.points:
            return None
        closeness = laid_over(small(first), small(second), evidence.points)
        return Copy(closeness, evidence) if closeness >= COPY else None

    return check


def laid_over(
    first: UInt8[np.ndarray, "height width"],
    second: UInt8[np.ndarray, "height2 width2"],
    points: Sequence[tuple[float, float, float, float]],
) -> float:
    """Correlation of the pixels that two thirds of an image's tiles reach, with the other laid over it.

    From 0 to 1, of the two images the one that is explained better: a part by the whole it was cut from. A
    tile of an image that the other does not cover counts 0, and one without detail does not count.

    Args:
        first: an image, as :func:`small_grey` gives it.
        second: another.
        points: at least four places that agree, as :class:`~samething.rerank.Evidence` has them.
    """
    cv2 = needed("cv2", extra="rerank")
    sides = (first, second)
    places = np.array(points, np.float32).reshape(-1, 2, 2) * [side.shape[::-1] for side in sides]
    found = []
    for own, other in ((0, 1), (1, 0)):
        matrix, _ = cv2.findHomography(places[:, other], places[:, own], 0)
        if matrix is None:
            return 0.0
        size = sides[own].shape[::-1]
        laid = cv2.warpPerspective(sides[other], matrix, size)
        covers = cv2.warpPerspective(np.full_like(sides[other], 255), matrix, size, flags=cv2.INTER_NEAREST)
        half = [max(_TILE, side // 2) for side in size]
        parts = [
            _tiles(cv2.resize(one, half, interpolation=cv2.INTER_AREA)) for one in (sides[own], laid, covers)
        ]
        found.append(_agreement(parts[0], parts[1], parts[2].min(axis=1) == 255))
    return max(found)


def small_grey(image: Image.Image) -> UInt8[np.ndarray, "height width"]:
    """An image as it is compared: in grey, its longer side at most 512 pixels."""
    factor = min(1.0, _SIDE / max(image.size))
    size = [max(_TILE, round(side * factor)) for side in image.size]
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX))


def _tiles(grey: UInt8[np.ndarray, "height width"]) -> Float[np.ndarray, "t 256"]:
    rows, columns = (side // _TILE for side in grey.shape)
    cut = grey[: rows * _TILE, : columns * _TILE].reshape(rows, _TILE, columns, _TILE)
    return cut.swapaxes(1, 2).reshape(rows * columns, _TILE**2).astype(np.float32)


def _agreement(
    own: Float[np.ndarray, "t 256"], laid: Float[np.ndarray, "t 256"], is_covered: Bool[np.ndarray, " t"]
) -> float:
    own, laid = (tiles - tiles.mean(axis=1, keepdims=True) for tiles in (own, laid))
    lengths = [np.sqrt((tiles**2).mean(axis=1)) for tiles in (own, laid)]
    says = lengths[0] >= _FLATTEST
    if says.sum() < _LEAST_TILES:
        return 0.0
    correlations = (own * laid).mean(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-6)
    correlations = np.where(is_covered, correlations, 0.0)
    return max(0.0, float(np.quantile(correlations[says], _MAY_DIFFER)))
