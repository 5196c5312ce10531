"""The same embeddings smaller: fewer dimensions, fewer bits; and what a backbone gives without training."""

from __future__ import annotations

from typing import Final

import numpy as np
from jaxtyping import Float

from samething.arrays import unit

DTYPES: Final = ("float32", "float16", "int8", "binary")


def swept_dimensions(full: int) -> list[int]:
    """Powers of two from 16 below the full dimension, and the full one.

    >>> swept_dimensions(100)
    [16, 32, 64, 100]
    """
    return [dim for dim in (2**power for power in range(4, 16)) if dim < full] + [full]


def reduced(
    rows: Float[np.ndarray, "n d"], train: Float[np.ndarray, "t d"], dim: int
) -> Float[np.ndarray, "n e"]:
    """The coordinates along the directions of largest variance of training embeddings, of unit length.

    Nothing is subtracted, so that at the full dimension cosines stay what they were.
    """
    train, rows = unit(train, np.float32), unit(rows, np.float32)
    covariance = np.cov(train, rowvar=False)
    directions = np.linalg.eigh(np.atleast_2d(covariance))[1][:, ::-1][:, :dim]
    return unit(rows @ directions, np.float32)


def stored_as(
    rows: Float[np.ndarray, "n d"], train: Float[np.ndarray, "t d"], dtype: str
) -> Float[np.ndarray, "n d"]:
    """Embeddings as they come back from a narrower type, as float32.

    ``int8``: whole steps of one size, the largest magnitude among training embeddings being 127. ``binary``:
    the sign of each coordinate minus its median over training embeddings, as ±1, whose cosine orders as the
    Hamming distance does.
    """
    rows, train = unit(rows, np.float32), unit(train, np.float32)
    if dtype == "float16":
        return rows.astype(np.float16).astype(np.float32)
    if dtype == "int8":
        step = np.abs(train).max() / 127
        steps: np.ndarray = np.clip(np.rint(rows / step), -127, 127).astype(np.float32)
        return steps
    if dtype == "binary":
        return np.where(rows >= np.median(train, axis=0), 1, -1).astype(np.float32)
    return rows


def bytes_per_image(dim: int, dtype: str) -> int:
    """What one embedding takes.

    >>> [bytes_per_image(64, dtype) for dtype in DTYPES]
    [256, 128, 64, 8]
    """
    return {"float32": 4 * dim, "float16": 2 * dim, "int8": dim, "binary": -(-dim // 8)}[dtype]


def zero_shot(
    rows: Float[np.ndarray, "n w"], train: Float[np.ndarray, "t w"], dim: int
) -> dict[str, Float[np.ndarray, "n e"]]:
    """A backbone's features brought to ``dim`` numbers without labels.

    ``average``: torch's AdaptiveAvgPool1d, the paper's baseline; ``max``: the largest of the same bins;
    ``first``: the first numbers; ``random``: a fixed random projection; ``PCA`` and ``whitened PCA`` of
    unit-length training features, the latter with every direction scaled to unit variance.
    """
    rows, train = unit(rows, np.float32), unit(train, np.float32)
    width = rows.shape[1]
    starts = [place * width // dim for place in range(dim)]
    stops = [-(-(place + 1) * width // dim) for place in range(dim)]
    bins = list(zip(starts, stops, strict=True))
    mean = train.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(train, rowvar=False))
    directions, variances = vectors[:, ::-1][:, :dim], values[::-1][:dim]
    projected = (rows - mean) @ directions
    random = np.random.default_rng(0).standard_normal((width, dim)) / np.sqrt(dim)
    pooled = {
        "average": np.stack([rows[:, start:stop].mean(axis=1) for start, stop in bins], axis=1),
        "max": np.stack([rows[:, start:stop].max(axis=1) for start, stop in bins], axis=1),
        "first": rows[:, :dim],
        "random": rows @ random,
        "PCA": projected,
        "whitened PCA": projected / np.sqrt(np.maximum(variances, 1e-12)),
    }
    return {f"{name}-{dim}": embeddings.astype(np.float32) for name, embeddings in pooled.items()}


def sweep(
    name: str, rows: Float[np.ndarray, "n d"], train: Float[np.ndarray, "t d"]
) -> dict[str, np.ndarray]:
    """The embeddings in every dimension and, at the full one, every narrower type."""
    full = rows.shape[1]
    variants = {
        f"{name} → {dim}-d": reduced(rows, train, dim) for dim in swept_dimensions(full) if dim < full
    }
    variants[name] = rows
    for dtype in DTYPES[1:]:
        label = f"{name} {dtype} ({bytes_per_image(full, dtype)} bytes)"
        variants[label] = stored_as(rows, train, dtype)
    return variants
