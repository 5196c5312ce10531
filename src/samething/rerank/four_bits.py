"""Directions in four bits a number: how re-rankers keep many short vectors of an image."""

from __future__ import annotations

from typing import Final

import numpy as np

from samething.arrays import Float, unit

_LEVELS: Final = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.float32) - 7.5
"""Both numbers of a byte."""


def packed(rows: Float[np.ndarray, "n d"], *, steps: int) -> bytes:
    """Unit vectors of an even number of dimensions in 16 levels a number, ``steps`` levels per unit."""
    levels = (np.floor(rows * steps).clip(-8, 7) + 8).astype(np.uint8)
    return bytes((levels[:, 0::2] | levels[:, 1::2] << 4).tobytes())


def unpacked(content: bytes, num_dims: int) -> Float[np.ndarray, "n d"]:
    """Their directions again, of unit length, whatever the steps were; numbers in the middle of their level.

    >>> row = np.array([[0.6, -0.8]], np.float32)
    >>> unpacked(packed(row, steps=8), 2).round(1)
    array([[ 0.6, -0.8]], dtype=float32)
    """
    pairs = _LEVELS.take(np.frombuffer(content, np.uint8), axis=0)
    return unit(pairs.reshape(-1, num_dims))
