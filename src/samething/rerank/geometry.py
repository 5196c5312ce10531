"""The same places in both images: local features, and a homography that many of their pairs agree on.

SIFT (Lowe, *Distinctive Image Features from Scale-Invariant Keypoints*, IJCV 2004) as RootSIFT
(Arandjelović and Zisserman, *Three things everyone should know to improve object retrieval*, CVPR 2012);
bright points are compared with bright ones alone, and dark ones with dark (Bay, Ess, Tuytelaars and Van Gool,
*Speeded-Up Robust Features*, CVIU 2008), at half the cost; pairs that are each other's nearest and clearly
nearer than the next (Lowe's ratio); a homography by MAGSAC
(Barath, Noskova, Ivashechkin and Matas, *MAGSAC++, a Fast, Reliable and Accurate Robust Estimator*, CVPR
2020), all by OpenCV.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from PIL import Image

from samething.arrays import Bool, Float, Int, UInt8, unit
from samething.errors import needed
from samething.files import Json
from samething.rerank.four_bits import packed, unpacked
from samething.rerank.second_look import Evidence, Shown

_SIDE: Final = 640
"""Pixels of the longer side that features are looked for in; smaller images stay as they are."""
_NUM_POINTS: Final = 600
"""Of the strongest response. A point takes 28 bytes, so an image at most 16,804."""
_NUM_NUMBERS: Final = 48
"""Of a descriptor, of 4 bits each: what that costs against 128 floats is in docs/second-look.md."""
_STEPS: Final = 16
"""Levels of a descriptor's numbers per unit."""
_RATIO: Final = 0.8
_PIXELS: Final = 4.0
"""How far a place may be from where the homography has it."""
_SURE: Final = 0.999
"""Of a homography's finding: probability that no better one is there."""
_MOST_DRAWS: Final = 1000
_MOST_SCALE: Final = 16.0
"""Between both images, by which a homography may enlarge or shrink; others are no view of a thing."""
LEAST_POINTS: Final = 8
"""Places that must agree before anything is said: any two images have a few."""
_SHOWN_POINTS: Final = 40


@dataclasses.dataclass(frozen=True)
class _Points:
    """Local features of an image."""

    size: tuple[int, int]
    """Width and height of the image that they were looked for in."""
    places: Float[np.ndarray, "m 2"]
    """x and y, in its pixels."""
    descriptors: Float[np.ndarray, "m 48"]
    """Of unit length."""
    is_bright: Bool[np.ndarray, " m"]
    """Brighter than what is around it, or darker."""

    def to_bytes(self) -> bytes:
        """Sides and places as uint16 (places in 1/65,535 of the sides), descriptors in 4 bits a number.

        The last bit of y says whether the point is bright.
        """
        shares = np.round(self.places / self.size * 65535).clip(0, 65535).astype("<u2")
        shares[:, 1] = shares[:, 1] & 0xFFFE | self.is_bright
        sides = np.array(self.size, "<u2")
        return sides.tobytes() + shares.tobytes() + packed(self.descriptors, steps=_STEPS)

    @classmethod
    def from_bytes(cls, content: bytes) -> _Points:
        """The inverse of :meth:`to_bytes`, each number in the middle of its level."""
        count = (len(content) - 4) // (4 + _NUM_NUMBERS // 2)
        width, height = np.frombuffer(content, "<u2", 2).tolist()
        shares = np.frombuffer(content, "<u2", 2 * count, 4).reshape(count, 2)
        places = (shares / 65535 * (width, height)).astype(np.float32)
        descriptors = unpacked(content[4 + 4 * count :], _NUM_NUMBERS)
        return cls((width, height), places, descriptors, (shares[:, 1] & 1).astype(bool))


@functools.cache
def _waves() -> Float[np.ndarray, "128 48"]:
    """The slowest waves over a descriptor's 4 x 4 places and 8 directions, but the constant one.

    Neighbouring cells of a histogram of gradients are alike, so little is lost with the fast ones.
    """
    along = np.cos(np.pi * np.arange(4)[:, None] * (np.arange(4) + 0.5) / 4)
    around = [np.cos(2 * np.pi * number * np.arange(8) / 8) for number in range(5)]
    around += [np.sin(2 * np.pi * number * np.arange(8) / 8) for number in (1, 2, 3)]
    waves = {
        (row + column + turn % 5 + (turn > 4), row, column, turn): np.einsum(
            "i,j,k->ijk", along[row], along[column], around[turn]
        ).ravel()
        for row in range(4)
        for column in range(4)
        for turn in range(8)
    }
    slowest = [waves[name] for name in sorted(waves)[1 : _NUM_NUMBERS + 1]]
    return unit(np.array(slowest), np.float32).T


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Local features and a homography: sure of flat and rigid things, silent on others.

    The numbers of its evidence are 0 below 8 places that agree. Else: how often 8 places are doubled, how
    often 16 are, the share of either image that the places cover, and how far they are from lying on a line,
    in [0, 1].
    """

    name: str = "geometry"
    weights: tuple[float, ...] = (0.05, 0.1, 0.0, 0.0)
    at_once: int = 20

    @property
    def made_from(self) -> Json:
        """Settings, and the version of OpenCV: another one may find other points."""
        version = ".".join(_cv2().__version__.split(".")[:2])
        return {"geometry": [2, _SIDE, _NUM_POINTS, _NUM_NUMBERS, _STEPS], "opencv": version}

    def keep(self, image: Image.Image) -> bytes:
        """Places and descriptors, 4 to 16,804 bytes."""
        return _points_of(image).to_bytes()

    def compare(
        self, query: Shown, of_query: bytes, candidates: Sequence[Shown], of_each: Sequence[bytes]
    ) -> Iterator[Evidence]:
        """Which places agree, and what that says."""
        del query, candidates
        asked = _Points.from_bytes(of_query)
        for content in of_each:
            other = _Points.from_bytes(content)
            yield _evidence(asked, other, *agreeing(asked.places, other.places, *_pairs(asked, other)))


def _cv2() -> Any:
    return needed("cv2", extra="rerank")


def _points_of(image: Image.Image) -> _Points:
    cv2 = _cv2()
    grey = np.asarray(image.convert("L"))
    if (scale := _SIDE / max(grey.shape)) < 1:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    found, rows = cv2.SIFT_create().detectAndCompute(grey, None)
    # of equally strong points the first from the top left, so that every run keeps the same
    order = sorted(range(len(found)), key=lambda place: (-found[place].response, found[place].pt[::-1]))
    order = order[:_NUM_POINTS]
    places = np.array([found[place].pt for place in order], np.float32).reshape(-1, 2)
    descriptors = np.zeros((0, 128), np.float32) if rows is None else np.asarray(rows[order], np.float32)
    length = np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9)
    descriptors = unit(np.sqrt(descriptors / length) @ _waves())
    sizes = np.array([found[place].size for place in order])
    return _Points(grey.shape[::-1], places, descriptors, _is_bright(grey, places, sizes))


def _is_bright(
    grey: UInt8[np.ndarray, "height width"], places: Float[np.ndarray, "m 2"], sizes: Float[np.ndarray, " m"]
) -> Bool[np.ndarray, " m"]:
    """Whether a point of some size, in pixels, is brighter than what is around it."""
    cv2 = _cv2()
    found = np.zeros(len(places), bool)
    levels = np.round(2 * np.log2(np.maximum(sizes / 2, 1))).astype(int)  # half octaves of its blur
    for level in np.unique(levels).tolist():
        own = levels == level
        size = [max(1, round(side / 2 ** (level // 2))) for side in grey.shape[::-1]]
        small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        blur = 2 ** (level % 2 / 2)
        above = cv2.GaussianBlur(small, (0, 0), blur) - cv2.GaussianBlur(small, (0, 0), 1.6 * blur)
        x, y = ((places[own] + 0.5) * (np.array(size) / grey.shape[::-1]) - 0.5).astype(np.float32).T
        found[own] = cv2.remap(above, x[:, None], y[:, None], cv2.INTER_LINEAR)[:, 0] > 0
    return found


def _pairs(one: _Points, other: _Points) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """Points of one brightness that are each other's nearest, clearly nearer than the next one."""
    parts = []
    for is_bright in (False, True):
        ours, theirs = (np.flatnonzero(points.is_bright == is_bright) for points in (one, other))
        if len(ours) and len(theirs) > 1:
            rows, columns = _nearest(one.descriptors[ours], other.descriptors[theirs])
            parts.append(np.stack([ours[rows], theirs[columns]]))
    pairs = np.concatenate([np.zeros((2, 0), int), *parts], axis=1)
    found, others = pairs[:, np.argsort(pairs[0])]
    return found, others


def _nearest(
    ours: Float[np.ndarray, "m 48"], theirs: Float[np.ndarray, "r 48"]
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    cosines = ours @ theirs.T
    rows = np.arange(len(cosines))
    nearest = cosines.argmax(axis=1)
    best = cosines[rows, nearest]
    cosines[rows, nearest] = -1.0
    clear = rows[1 - best < _RATIO**2 * (1 - cosines.max(axis=1))]  # squared distances are 2 - 2 cosine
    cosines[rows, nearest] = best
    chosen = clear[cosines[:, nearest[clear]].argmax(axis=0) == clear]
    return chosen, nearest[chosen]


def agreeing(
    places: Float[np.ndarray, "m 2"],
    others: Float[np.ndarray, "r 2"],
    ours: Int[np.ndarray, " p"],
    theirs: Int[np.ndarray, " p"],
) -> tuple[Float[np.ndarray, "a 2"], Float[np.ndarray, "a 2"]]:
    """The pairs of places that one homography explains, each place of an image once.

    Nothing where fewer than ``LEAST_POINTS`` agree, or where the homography mirrors, or shrinks to nothing.
    """
    nothing = np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)
    if len(ours) < LEAST_POINTS:
        return nothing
    cv2 = _cv2()
    source, target = places[ours], others[theirs]
    # draws of four pairs among which surely one is of the least that must agree
    share = math.comb(LEAST_POINTS, 4) / math.comb(len(ours), 4)
    draws = math.ceil(math.log(1 - _SURE) / math.log(1 - share)) if share < 1 else 1
    matrix, mask = cv2.findHomography(
        source, target, cv2.USAC_MAGSAC, _PIXELS, maxIters=min(draws, _MOST_DRAWS), confidence=_SURE
    )
    if matrix is None:
        return nothing
    is_inside = mask.ravel().astype(bool)
    if is_inside.sum() < LEAST_POINTS:  # most pairs of images end here
        return nothing
    source, target = source[is_inside], target[is_inside]
    # a place with two orientations is two points, and says one thing
    for number in (0, 1):
        kept = np.sort(np.unique(np.round((source, target)[number] / 2), axis=0, return_index=True)[1])
        source, target = source[kept], target[kept]
    if len(source) < LEAST_POINTS:
        return nothing
    # the determinant of the map's derivative: its sign says whether it mirrors, its root the scale
    depth = source @ matrix[2, :2] + matrix[2, 2]
    areas = np.linalg.det(matrix) / depth**3
    is_view = (areas > _MOST_SCALE**-2) & (areas < _MOST_SCALE**2)
    return (source, target) if is_view.all() else nothing


def _evidence(
    asked: _Points, other: _Points, source: Float[np.ndarray, "a 2"], target: Float[np.ndarray, "a 2"]
) -> Evidence:
    if len(source) == 0:
        return Evidence((0.0, 0.0, 0.0, 0.0))
    cv2 = _cv2()
    shares = [
        cv2.contourArea(cv2.convexHull(side)) / (size[0] * size[1])
        for side, size in ((source, asked.size), (target, other.size))
    ]
    least, most = np.linalg.eigvalsh(np.cov(source.T))
    spread = math.sqrt(max(0.0, float(least)) / float(most)) if most > 0 else 0.0
    doublings = math.log2(len(source) / LEAST_POINTS)
    points = np.hstack([source / asked.size, target / other.size]).round(4)
    left, top = points[:, 2:].min(axis=0).tolist()
    right, bottom = points[:, 2:].max(axis=0).tolist()
    return Evidence(
        (doublings, max(0.0, doublings - 1), float(max(shares)), spread),
        tuple(map(tuple, points[:_SHOWN_POINTS].tolist())),
        (left, top, right, bottom),
        len(source),
    )
