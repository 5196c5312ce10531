"""Margins that depend on how many images a class has: rare classes get the wide ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from samething.arrays import Float
from samething.errors import InputError


def cosine_margins(
    class_counts: Sequence[int], *, margin_min_radians: float, margin_max_radians: float
) -> Float[np.ndarray, " c"]:
    """``m_i = m_min + (m_max - m_min)/2·(1 + cos(π·n_i))``, n_i the class size min-max normalised to [0, 1].

    The schedule of Florek et al., arXiv 2409.13513: the rarest class gets m_max, the largest m_min. When all
    classes have the same size none is larger than the rarest, so n_i = 0 and every margin is m_max.

    Raises:
        InputError: a class without images.

    >>> cosine_margins([3, 5, 7], margin_min_radians=0.2, margin_max_radians=0.5).round(3).tolist()
    [0.5, 0.35, 0.2]
    """
    counts = _counts(class_counts)
    size = _from_zero_to_one(counts)
    half_range = (margin_max_radians - margin_min_radians) / 2
    return margin_min_radians + half_range * (1 + np.cos(math.pi * size))


def inverse_root_margins(
    class_counts: Sequence[int], *, margin_min_radians: float, margin_max_radians: float
) -> Float[np.ndarray, " c"]:
    """``m_i = a·n_i^(-1/4) + b``, with a and b such that the rarest class gets m_max and the largest m_min.

    The form of Ha et al., arXiv 2010.05350 (n_i is the number of images, not normalised). It falls
    steeply among the rare classes and is flat among the large ones. With equal sizes every margin is m_max.

    Raises:
        InputError: a class without images.

    >>> margins = inverse_root_margins([1, 16, 81], margin_min_radians=0.1, margin_max_radians=0.5)
    >>> margins.round(3).tolist()
    [0.5, 0.2, 0.1]
    """
    rarity = _from_zero_to_one(-(_counts(class_counts) ** -0.25))
    return margin_max_radians - (margin_max_radians - margin_min_radians) * rarity


def _counts(class_counts: Sequence[int]) -> Float[np.ndarray, " c"]:
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.ndim != 1 or len(counts) == 0 or counts.min() < 1:
        raise InputError(
            f"class_counts of {counts.size} numbers, some below 1" if counts.size else "no class_counts",
            expected="the number of training images of every class, at least 1 each",
            next_step="leave out classes without images, and number the others from 0",
        )
    return counts


def _from_zero_to_one(values: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    above_smallest: Float[np.ndarray, " c"] = values - values.min()
    span = above_smallest.max()
    return above_smallest if span == 0 else above_smallest / span
