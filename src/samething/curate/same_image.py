"""Whether two images are one, looked at closely: the last word on a candidate pair.

Hashes and embeddings find candidates, and among drawings, renderings and products also pairs that only look
alike. Here the pixels are compared: one of the two, at 32 × 32, is laid on every place of the other where it
could have been cut from, and the best correlation of the colours counts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

import numpy as np
from PIL import Image

from samething.arrays import Float, Float32
from samething.errors import ImageError
from samething.progress import progress_bar
from samething.rerank import Shown
from samething.rerank.laid_over import Copy, copy_check

DecodeRow: TypeAlias = Callable[[int], Image.Image]
"""From a row to its image; raises ImageError where it cannot be read."""

_SIDES: Final = (32, 34, 36, 38)
"""Sides of the whole when 32 of it are shown: crops that keep 100, 94, 89 and 84 % of a side."""

_COARSE_SIDES: Final = (12, 13, 14)
"""The same in grey and small, at a hundredth of the cost: what is not alike here is not looked at further."""

_COARSE_LOSS: Final = 0.12
"""How much lower the small correlation may be; see docs/curation.md."""

_Scaled: TypeAlias = tuple[np.ndarray, ...]
"""An image at each pair of sides, float32 (height, width, 3), row by row; the first is the smallest."""

_NUM_REMEMBERED: Final = 8192
"""Images kept small in memory, 21 KB each; a sixteenth as many are kept larger, 230 KB each."""


def pair_similarities(
    decode_row: DecodeRow, pairs: Iterable[tuple[int, int, bool]], *, least: float = -1.0
) -> Float32[np.ndarray, " p"]:
    """Correlation of the colours of two images, at the best way to take one for a crop of the other.

    From -1 to 1; -1 where one cannot be read. Crops keep at least 84 % of each side, cut at any place. A flat
    image has 0 with all. Progress is shown on stderr.

    Args:
        decode_row: the image of a row.
        pairs: two rows, and whether the first is mirrored before; sorted by the first, so
            that images are decoded seldom.
        least: similarities that are surely lower need not be exact.
    """
    pairs = list(pairs)

    @functools.lru_cache(maxsize=_NUM_REMEMBERED)
    def coarse(number: int) -> _Windows | None:
        try:
            return _Windows.of(decode_row(number))
        except ImageError:
            return None

    @functools.lru_cache(maxsize=_NUM_REMEMBERED // 16)
    def fine(number: int) -> _Scaled:
        # through a small one, because scaling a large one sixteen times costs more than decoding it
        image = decode_row(number).convert("RGB")
        small = image.resize((128, 128), Image.Resampling.BOX, reducing_gap=2.0)
        return tuple(
            np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
            for height in _SIDES
            for width in _SIDES
        )

    def similarity(first: int, second: int, is_mirrored: bool) -> float:
        left, right = coarse(first), coarse(second)
        if left is None or right is None:
            return -1.0
        best = left.similarity(right, is_mirrored)
        if best < least - _COARSE_LOSS:
            return best
        whole = fine(first)
        if is_mirrored:
            whole = tuple(np.ascontiguousarray(array[:, ::-1]) for array in whole)
        return _similarity(whole, fine(second))

    # no threads: the arrays are so small that they would only wait for each other
    found: list[float] = []
    with progress_bar("pairs", disable=not pairs) as progress:
        found += (similarity(*pair) for pair in progress.track(pairs, description="comparing"))
    return np.asarray(found, np.float32)


def made_of_each_other(decode_row: DecodeRow, pairs: Iterable[tuple[int, int]]) -> list[Copy | None]:
    """Whether one image of each pair was made of the other, also under crop, perspective and overlays.

    Args:
        decode_row: the image of a row.
        pairs: two rows; sorted by the first, so that images are decoded seldom.

    Raises:
        MissingExtraError: OpenCV is not installed.
    """
    pairs = list(pairs)

    def shown(row: int) -> Shown:
        return Shown("", lambda: decode_row(row), np.zeros(0, np.float32))

    check = copy_check(shown)
    with progress_bar("pairs", disable=not pairs) as progress:
        return [check(*pair) for pair in progress.track(pairs, description="verifying")]


@dataclasses.dataclass(frozen=True)
class _Windows:
    """All places of a small grey image that a part can be laid on; rows of unit length and mean 0."""

    places: Float32[np.ndarray, "w 144"]
    """The first is the whole image."""
    mirrored_whole: Float32[np.ndarray, " 144"]

    @classmethod
    def of(cls, image: Image.Image) -> _Windows:
        grey = image.convert("L")
        part = (_COARSE_SIDES[0], _COARSE_SIDES[0])
        windows = [
            np.lib.stride_tricks.sliding_window_view(
                np.asarray(grey.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)), part
            ).reshape(-1, part[0] * part[1])
            for height in _COARSE_SIDES
            for width in _COARSE_SIDES
        ]
        places = np.concatenate(windows).astype(np.float32)
        places -= places.mean(axis=1, keepdims=True)
        places /= np.maximum(np.linalg.norm(places, axis=1, keepdims=True), np.float32(part[0]))
        return cls(places, np.ascontiguousarray(places[0].reshape(part)[:, ::-1]).ravel())

    def similarity(self, other: _Windows, is_mirrored: bool) -> float:
        """The best place of either on the other; mirrored, of this one's whole on the other's places only."""
        if is_mirrored:
            return float((other.places @ self.mirrored_whole).max())
        return float(max((other.places @ self.places[0]).max(), (self.places @ other.places[0]).max()))


def _similarity(first: _Scaled, second: _Scaled) -> float:
    """The smallest of each, laid on all sizes of the other."""
    if min(_detail(first[0]), _detail(second[0])) < 1:
        return 0.0
    best = max(_best_place(first[0], whole) for whole in second)
    return max(best, *(_best_place(second[0], whole) for whole in first[1:]))


def _detail(image: Float[np.ndarray, "h w 3"]) -> float:
    """Standard deviation of the channel that varies most, of 255."""
    return float(image.std(axis=(0, 1)).max())


def _best_place(part: Float[np.ndarray, "h w 3"], whole: Float[np.ndarray, "h2 w2 3"]) -> float:
    """Highest correlation of a part with the equally large windows of a whole; both have some detail."""
    views = np.lib.stride_tricks.sliding_window_view(whole, part.shape).reshape(-1, part.size)
    centred = part.ravel() - part.mean()
    variances = np.einsum("wn,wn->w", views, views) - views.mean(axis=1) ** 2 * part.size
    lengths = np.sqrt(np.maximum(variances, part.size)) * np.sqrt(centred @ centred)
    return float(np.max(views @ centred / lengths))
