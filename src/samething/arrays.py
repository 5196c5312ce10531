"""Shape and dtype names used in signatures, and the legend of their letters.

The letters stand for the same thing everywhere:

====  ==========================================================================
n     images, in catalog order
q     queries
g     gallery (index) entries
b     a batch
c     classes (instances seen in training)
k     neighbours returned for a query; in losses, sub-centres per class
w     width of a backbone's feature
d     dimension of an embedding
====  ==========================================================================

In the tests the names are jaxtyping's and are checked at run time. Elsewhere, unless jaxtyping was imported
first, they say nothing and cost nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING or sys.modules.get("jaxtyping"):
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Float32 as Float32
    from jaxtyping import Int as Int
    from jaxtyping import Shaped as Shaped
    from jaxtyping import UInt8 as UInt8
    from jaxtyping import UInt16 as UInt16
    from jaxtyping import UInt64 as UInt64
else:

    class Shaped:
        """An array or a tensor; shape and dtype are for the reader."""

        def __class_getitem__(cls, array_and_shape: tuple[type, str]) -> type:
            """The array's type alone."""
            return array_and_shape[0]

    Bool = Float = Float32 = Int = UInt8 = UInt16 = UInt64 = Shaped

FeatureRows: TypeAlias = Float[np.ndarray, "n w"]
Embeddings: TypeAlias = Float[np.ndarray, "n d"]
Queries: TypeAlias = Float[np.ndarray, "q d"]
Gallery: TypeAlias = Float[np.ndarray, "g d"]
Relevance: TypeAlias = Bool[np.ndarray, "q k"]
NumRelevant: TypeAlias = Int[np.ndarray, " q"]
PerQuery: TypeAlias = Float[np.ndarray, " q"]
TopIndices: TypeAlias = Int[np.ndarray, "q k"]
TopScores: TypeAlias = Float[np.ndarray, "q k"]
Pixels: TypeAlias = UInt8[np.ndarray, "3 height width"]
PixelBatch: TypeAlias = UInt8[np.ndarray, "b 3 height width"]


def counted(lengths: Int[np.ndarray, " r"]) -> Int[np.ndarray, " n"]:
    """The place, from 0, of every entry in its run, for runs of these lengths one behind the other.

    >>> counted(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    starts = np.cumsum(lengths) - lengths
    return np.asarray(np.arange(int(lengths.sum())) - np.repeat(starts, lengths))


def unit(rows: Float[np.ndarray, "n d"], dtype: npt.DTypeLike | None = None) -> Float[np.ndarray, "n d"]:
    """The rows, each divided by its length, as a new array; a row of zeros stays zeros.

    Args:
        rows: vectors, of which nothing is changed.
        dtype: the type to compute in and to return; by default that of the rows,
            which should then be float32 or wider: in float16 a row of zeros becomes NaN.

    >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    rows = np.asarray(rows, dtype=dtype)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def signed_power(rows: Float[np.ndarray, "n d"], power: float) -> Float[np.ndarray, "n d"]:
    """Every number's magnitude to a power in (0, 1], with the number's sign.

    >>> signed_power(np.array([[-4.0, 9.0]]), 0.5).tolist()
    [[-2.0, 3.0]]
    """
    return rows if power == 1 else np.asarray(np.sign(rows) * np.abs(rows) ** power)
