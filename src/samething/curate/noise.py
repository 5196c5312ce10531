"""Images whose label is doubtful, by what a frozen backbone sees in them, one domain at a time.

An image agrees with its class if it is nearer to the other images of its class than to the nearest other
class, and about as near to them as they are to each other. Nothing is trained.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import numpy as np

from samething.arrays import FeatureRows, Float, Float32, Int, unit

Noise: TypeAlias = Literal["none", "agreement"]

LEAST_AGREEMENT: Final = -0.6
"""Chosen on the demo's emoji and objects with planted noise, see docs/curation.md."""

_ROWS_AT_A_TIME: Final = 1024


def agreement(
    features: FeatureRows, classes: Int[np.ndarray, " n"], domains: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """How well each image agrees with its class; the lower, the more doubtful its label.

    With features of unit length, from which the mean of their domain is taken before:
    (cosine with the sum of its class's other images - largest cosine with the sum of another class of the
    domain) + (mean cosine with its class's other images - the median of that over the class). Between -4
    and 4, for unrelated images around -0.5. An image alone in its class gets 0: nothing speaks against it.

    Args:
        features: of n images.
        classes: their classes 0….
        domains: their domains 0….

    >>> features = np.array([[9, 0, 1], [9, 1, 0], [0, 9, 0], [9, 0, 0], [0, 9, 1], [1, 9, 0]], np.float32)
    >>> doubtful = agreement(features, np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, int))
    >>> np.argsort(doubtful)[:2].tolist()
    [3, 2]
    """
    found = np.zeros(len(classes), np.float32)
    all_classes = classes
    for domain in np.unique(domains):
        of_domain = np.flatnonzero(domains == domain)
        _, classes = np.unique(all_classes[of_domain], return_inverse=True)
        sizes = np.bincount(classes)
        rows = unit(np.asarray(features[of_domain]), np.float32)
        rows = unit(rows - rows.mean(axis=0))
        order = np.argsort(classes, kind="stable")
        sums = np.add.reduceat(rows[order].astype(np.float64), np.cumsum(sizes) - sizes, axis=0).astype(
            np.float32
        )
        directions = unit(sums)
        others = sums[classes] - rows
        products = np.einsum("nd,nd->n", rows, others)
        own = products / np.maximum(np.linalg.norm(others, axis=1), 1e-6)
        mean = products / np.maximum(sizes[classes] - 1, 1)
        rival = np.full(len(classes), -1.0, np.float32)
        for start in range(0, len(classes), _ROWS_AT_A_TIME):
            block = slice(start, start + _ROWS_AT_A_TIME)
            cosines = rows[block] @ directions.T
            cosines[:, sizes < 2] = -1  # a class of one image says little about a class
            cosines[np.arange(len(cosines)), classes[block]] = -1
            rival[block] = cosines.max(axis=1)
        scores = own - rival + mean - _class_medians(mean, classes)[classes]
        scores[sizes[classes] < 2] = 0
        found[of_domain] = scores
    return found


def _class_medians(
    values: Float[np.ndarray, " n"], classes: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " c"]:
    """Median of each class 0…, which all occur."""
    order = np.lexsort((values, classes))
    sizes = np.bincount(classes)
    starts = np.cumsum(sizes) - sizes
    low, high = order[starts + (sizes - 1) // 2], order[starts + sizes // 2]
    return np.asarray((values[low] + values[high]) / 2)
