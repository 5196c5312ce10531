"""Whether two pictures are one, looked at closely: the last word on a candidate pair.

Hashes and embeddings find candidates, and among drawings, renderings and products also pairs that only look
alike. Here the pixels are compared: one of the two, at 32 × 32, is laid on every place of the other where it
could have been cut from, and the best correlation of the colours counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from samething.errors import ImageError
from samething.progress import progress_bar

DecodeRow: TypeAlias = Callable[[int], Image.Image]
"""From a row to its picture; raises ImageError where it cannot be read."""

_SIDE: Final = 32
_SIDES: Final = (32, 34, 36, 38)
"""Sides of the whole when 32 of it are shown: crops that keep 100, 94, 89 and 84 % of a side."""

_PAIRS_AT_A_TIME: Final = 1024

_NUM_REMEMBERED: Final = 4096
"""Pictures kept small in memory, 26 KB each."""


def aligned_similarity(first: Image.Image, second: Image.Image) -> float:
    """Correlation of the colours of two pictures, at the best way to take one for a crop of the other.

    From -1 to 1. Crops keep at least 84 % of each side, cut at any place. A flat picture has 0 with all.

    >>> noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8))
    >>> picture = noise.resize((200, 200), Image.Resampling.BICUBIC)
    >>> round(aligned_similarity(picture, picture.crop((10, 0, 190, 190))), 1)
    1.0
    """
    return _similarity(_scaled(first), _scaled(second))


def pair_similarities(
    decode_row: DecodeRow, pairs: Iterable[tuple[int, int, bool]]
) -> Float32[np.ndarray, " p"]:
    """:func:`aligned_similarity` of pairs of files; -1 where one cannot be read. Progress is shown on stderr.

    Args:
        decode_row: the picture of a row.
        pairs: two rows, and whether the first is mirrored before; sorted by the first, so
            that pictures are decoded seldom.
    """
    pairs = list(pairs)

    @functools.lru_cache(maxsize=_NUM_REMEMBERED)
    def scaled(number: int) -> tuple[np.ndarray, ...] | None:
        try:
            return _scaled(decode_row(number))
        except ImageError:
            return None

    def similarity(pair: tuple[int, int, bool]) -> float:
        first, second = scaled(pair[0]), scaled(pair[1])
        if first is None or second is None:
            return -1.0
        if pair[2]:
            first = tuple(np.ascontiguousarray(array[:, ::-1]) for array in first)
        return _similarity(first, second)

    found: list[float] = []
    with progress_bar("pairs", disable=not pairs) as progress, ThreadPoolExecutor() as pool:
        task = progress.add_task("comparing", total=len(pairs))
        for start in range(0, len(pairs), _PAIRS_AT_A_TIME):
            block = pairs[start : start + _PAIRS_AT_A_TIME]
            found += pool.map(similarity, block)
            progress.advance(task, len(block))
    return np.asarray(found, np.float32)


def _scaled(image: Image.Image) -> tuple[np.ndarray, ...]:
    """The picture at each pair of sides, float32 (height, width, 3), in the order of :data:`_SIDES` squared."""
    # through a small one, because scaling a large one sixteen times costs more than decoding it
    small = image.convert("RGB").resize((4 * _SIDE, 4 * _SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    return tuple(
        np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        for height in _SIDES
        for width in _SIDES
    )


def _similarity(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> float:
    """The first of each is the picture at 32 × 32, laid on all sizes of the other."""
    best = max(_best_place(first[0], whole) for whole in second)
    return max(best, *(_best_place(second[0], whole) for whole in first[1:]))


def _best_place(part: Float[np.ndarray, "h w 3"], whole: Float[np.ndarray, "h2 w2 3"]) -> float:
    """Highest correlation of a part with the equally large windows of a whole."""
    views = np.lib.stride_tricks.sliding_window_view(whole, part.shape).reshape(-1, part.size)
    centred = part.ravel() - part.mean()
    spread = np.sqrt(np.einsum("wn,wn->w", views, views) - views.mean(axis=1) ** 2 * part.size)
    length = float(np.sqrt(centred @ centred))
    if length < part.size**0.5:  # a standard deviation of 1 of 255: nothing to compare
        return 0.0
    products = views @ centred
    return float(np.max(products / np.maximum(spread * length, part.size)))
