"""Parts of an image that may hold a thing by themselves: a grid of windows, and what stands out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from PIL import Image

from samething.arrays import Float

Place: TypeAlias = tuple[float, float, float, float]
"""A part of an image: left, top, right and bottom as shares of its sides."""

WINDOWS: Final[tuple[Place, ...]] = tuple(
    (
        column * (1 - side) / (count - 1),
        row * (1 - side) / (count - 1),
        column * (1 - side) / (count - 1) + side,
        row * (1 - side) / (count - 1) + side,
    )
    for side, count in ((0.5, 3), (0.36, 4))
    for row in range(count)
    for column in range(count)
)
"""9 parts of half the sides, 16 of a third and a bit."""

_SIDE: Final = 64
_SIZES: Final = (0.2, 0.28, 0.4, 0.56, 0.8)
"""Sides of the parts that may stand out, as shares of the image's."""
_MOST: Final = 8
_WIDEST: Final = 2.3
_OVERLAP: Final = 0.4
"""Intersection over union from which on two parts are the same one."""

Map: TypeAlias = Float[np.ndarray, "64 64"]


def cut_out(image: Image.Image, places: Sequence[Place]) -> list[Image.Image]:
    """The parts of an image, each at least a pixel."""
    width, height = image.size
    boxes = [
        (round(left * width), round(top * height), round(right * width), round(bottom * height))
        for left, top, right, bottom in places
    ]
    return [image.crop((x, y, max(x + 1, right), max(y + 1, bottom))) for x, y, right, bottom in boxes]


def standing_out(image: Image.Image) -> list[Place]:
    """Up to 8 parts that stand out from what is around them, the clearest first.

    Two maps of 64 × 64 pixels are added: how unlike the image's colours a pixel is, and the spectral residual
    (Hou and Zhang, *Saliency detection: a spectral residual approach*, CVPR 2007). A part counts by how much
    more the map holds in it than in the band around it, times the root of its area.
    """
    small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float64) / 255
    if np.ptp(pixels, axis=(0, 1)).max() < 2 / 255:
        return []
    maps = [_unlike_the_rest(pixels), _spectral_residual(pixels)]
    return _clearest(np.asarray(sum(each / each.mean() for each in maps)))


def _unlike_the_rest(pixels: Float[np.ndarray, "64 64 3"]) -> Map:
    """Squared distance of each colour from the mean, in units of the colours' spread."""
    colours = pixels.reshape(-1, 3)
    off = colours - colours.mean(axis=0)
    inverse = np.linalg.inv(np.cov(colours.T) + 1e-3 * np.eye(3))
    return np.asarray(np.einsum("ni,ij,nj->n", off, inverse, off).reshape(_SIDE, _SIDE))


def _spectral_residual(pixels: Float[np.ndarray, "64 64 3"]) -> Map:
    """What of brightness and of two colour differences is not as smooth spectra have it."""
    red, green, blue = np.moveaxis(pixels, 2, 0)
    frequency = np.fft.fftfreq(_SIDE)
    squared = frequency[:, None] ** 2 + frequency[None] ** 2
    blur = np.exp(-2 * (math.pi * 2.5) ** 2 * squared)  # of 2.5 pixels
    total = np.zeros((_SIDE, _SIDE))
    for channel in (pixels.mean(axis=2), red - green, blue - (red + green) / 2):
        spectrum = np.fft.fft2(channel)
        size = np.log(np.abs(spectrum) + 1e-6)
        smooth = sum(np.roll(size, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9
        found = np.abs(np.fft.ifft2(np.exp(size - smooth + 1j * np.angle(spectrum)))) ** 2
        found = np.maximum(np.fft.ifft2(np.fft.fft2(found) * blur).real, 0)
        total += found / max(found.max(), 1e-12)
    return total


def _clearest(found: Map) -> list[Place]:
    summed = np.pad(found.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    parts, scores = [], []
    for width in (round(size * _SIDE) for size in _SIZES):
        for height in (round(size * _SIDE) for size in _SIZES):
            if max(width, height) > _WIDEST * min(width, height):
                continue
            left, top = np.mgrid[0 : _SIDE - width + 1 : 2, 0 : _SIDE - height + 1 : 2].reshape(2, -1)
            band = max(2, round(min(width, height) / 4))
            inner = np.array([left, top, left + width, top + height])
            outer = np.array(
                [
                    np.maximum(left - band, 0),
                    np.maximum(top - band, 0),
                    np.minimum(left + width + band, _SIDE),
                    np.minimum(top + height + band, _SIDE),
                ]
            )
            area = width * height
            around = np.maximum((outer[2] - outer[0]) * (outer[3] - outer[1]) - area, 1)
            inside = _within(summed, inner)
            contrast = inside / area - (_within(summed, outer) - inside) / around
            parts.append(inner.T / _SIDE)
            scores.append(contrast * math.sqrt(area))
    return _apart(np.concatenate(parts), np.concatenate(scores))


def _within(summed: Float[np.ndarray, "65 65"], boxes: np.ndarray) -> Float[np.ndarray, " n"]:
    left, top, right, bottom = boxes
    within = summed[bottom, right] - summed[top, right] - summed[bottom, left] + summed[top, left]
    return np.asarray(within)


def _apart(parts: Float[np.ndarray, "n 4"], scores: Float[np.ndarray, " n"]) -> list[Place]:
    """The best parts of which none is nearly another."""
    areas = (parts[:, 2] - parts[:, 0]) * (parts[:, 3] - parts[:, 1])
    chosen: list[Place] = []
    left = np.argsort(-scores, kind="stable")
    while len(left) and len(chosen) < _MOST and scores[left[0]] > 0:
        best = parts[left[0]]
        chosen.append((float(best[0]), float(best[1]), float(best[2]), float(best[3])))
        sides = np.minimum(parts[left, 2:], best[2:]) - np.maximum(parts[left, :2], best[:2])
        shared = np.maximum(sides, 0).prod(axis=1)
        left = left[shared < _OVERLAP * (areas[left] + areas[left[0]] - shared)]
    return chosen
