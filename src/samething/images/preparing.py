"""A decoded image to the pixels a backbone sees, and the choice of how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from samething.arrays import Pixels, UInt8
from samething.errors import InputError
from samething.images.source import Box

ResizePolicy: TypeAlias = Literal["short_side_crop", "squash", "longer_side_pad", "longer_side"]

Decoding: TypeAlias = Literal["exact", "fast", "scaled"]

RESAMPLING: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

_LONGEST_STRIP: Final = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a decoded image becomes a backbone's input."""

    size: int
    """Side of the square input, in pixels."""
    resize: ResizePolicy = "short_side_crop"
    """``short_side_crop``: shorter side to ``size / crop_fraction``, then the central square;
    ``squash``: both sides to ``size``; ``longer_side_pad``: longer side to ``size``, the rest filled;
    ``longer_side``: the same, but its network is given the image alone (:func:`with_its_sides`)."""
    crop_fraction: float = 1.0
    """Share of the resized shorter side that the central crop keeps, in (0, 1]; for ``short_side_crop``."""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Resampling filter, antialiased."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from red, green and blue after scaling to [0, 1]."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Divides red, green and blue after the mean is subtracted."""
    decoding: Decoding = "exact"
    """``exact``: Pillow alone, the reference; ``fast``: libjpeg-turbo and torch, within 2 of 255 of it;
    ``scaled``: as fast, but large JPEG files are unpacked at a half, a quarter or an eighth of their size,
    at least twice the input's, which changes pixels. See :func:`samething.images.read_pixels`."""
    place: tuple[float, float] = (0.5, 0.5)
    """Where ``short_side_crop`` cuts: shares of the spare room left of it and above it, in [0, 1]."""
    flip: bool = False
    """Mirror the prepared image, left for right."""
    views: tuple[Preprocessing, ...] = ()
    """Several preparations of the same image, one below the other on a canvas; the other fields are then
    those of the canvas: its width is ``size``, the widest view's, and each view is normalised by its own
    ``mean`` and ``std``."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(
                f"size={self.size}", expected="a side of at least 1 pixel", next_step="give another size"
            )
        if not 0 < self.crop_fraction <= 1:
            raise InputError(
                f"crop_fraction={self.crop_fraction}",
                expected="a share in (0, 1]",
                next_step="give another crop_fraction",
            )
        for name, value, legal in (
            ("resize", self.resize, get_args(ResizePolicy)),
            ("interpolation", self.interpolation, tuple(RESAMPLING)),
            ("decoding", self.decoding, get_args(Decoding)),
        ):
            if value not in legal:
                raise InputError(
                    f"{name}={value!r}",
                    expected=f"one of {', '.join(legal)}",
                    next_step=f"give another {name}",
                )
        if min(self.std) <= 0:
            raise InputError(f"std={self.std}", expected="numbers above 0", next_step="give another std")
        if not all(0 <= share <= 1 for share in self.place):
            raise InputError(
                f"place={self.place}", expected="two shares in [0, 1]", next_step="give another place"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a prepared image, in pixels."""
        if self.views:
            return sum(view.shape[0] for view in self.views), max(view.shape[1] for view in self.views)
        return self.size + (self.resize == "longer_side"), self.size

    @property
    def any_shape(self) -> bool:
        """Whether a network is to compute each image in its own shape, which has no graph."""
        return any(view.resize == "longer_side" for view in self.views)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for fingerprints and configuration files.

        What came later than the format is left out where it says nothing: what was made before there was a
        choice is exact, of one view from the middle.
        """
        value: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            item = getattr(self, field.name)
            if field.name in _LATER_FIELDS and item == field.default:
                continue
            if field.name == "views":
                item = [view.to_json() for view in item]
            value[field.name] = list(item) if isinstance(item, tuple) else item
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_json`."""
        fields: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
        }
        if "views" in fields:
            fields["views"] = tuple(cls.from_json(view) for view in fields["views"])
        return cls(**fields)


_LATER_FIELDS: Final = ("decoding", "place", "flip", "views")


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Resize and crop a decoded image to uint8 (3, height, width): (3, size, size), or a canvas of views.

    The arithmetic is Pillow's antialiased resampling and torchvision's rounding of sides and crop offsets,
    so that the pixels equal those of timm's evaluation transform. Only strips longer than 64 times their
    width may differ under ``short_side_crop``: their ends, which the crop leaves out, are cut off first.
    """
    if preprocessing.views:
        return canvas([prepare(image, view) for view in preprocessing.views], preprocessing)
    layout = layout_of(image.width, image.height, preprocessing)
    scaled = image if layout.cut is None else image.crop(layout.cut)
    if scaled.size != layout.resized:
        scaled = scaled.resize(layout.resized, RESAMPLING[preprocessing.interpolation])
    return laid_out(np.asarray(scaled), layout, preprocessing)


def as_it_is(image: Image.Image) -> Pixels:
    """A decoded image in its own size, uint8 (3, height, width)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def least_side(preprocessing: Preprocessing) -> int:
    """Pixels of the shorter side, from which on unpacking less of a JPEG file changes few neighbours.

    It is twice what the image is resized to (docs/benchmarks.md says how many change), and 512 at least, so
    that a thumbnail can be made of it.

    >>> least_side(Preprocessing(size=384, crop_fraction=0.95)), least_side(Preprocessing(size=64))
    (808, 512)
    """
    if preprocessing.views:
        return max(map(least_side, preprocessing.views))
    share = preprocessing.crop_fraction if preprocessing.resize == "short_side_crop" else 1
    return max(512, 2 * int(preprocessing.size / share))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the pixels of an image come to lie in a backbone's square input."""

    cut: Box | None
    """Part of the image to resize; None for all of it."""
    resized: tuple[int, int]
    """Width and height after resizing."""
    offset: tuple[int, int]
    """Left and top of the square in the resized image; negative where the square reaches beyond it."""


def layout_of(width: int, height: int, preprocessing: Preprocessing) -> Layout:
    """The layout of an image of that size.

    >>> layout_of(640, 480, Preprocessing(size=224, crop_fraction=0.875))
    Layout(cut=None, resized=(341, 256), offset=(58, 16))
    """
    size = preprocessing.size
    if preprocessing.resize == "squash":
        return Layout(None, (size, size), (0, 0))
    if preprocessing.resize == "longer_side":
        share = min(width, height) / max(width, height)
        shorter = max(1, int(size * share))  # rounded down, as ILIAS' authors do
        return Layout(None, (size, shorter) if width > height else (shorter, size), (0, 0))
    if preprocessing.resize == "longer_side_pad":
        scale = size / max(width, height)
        resized = max(1, round(width * scale)), max(1, round(height * scale))
        return Layout(None, resized, (-((size - resized[0]) // 2), -((size - resized[1]) // 2)))
    cut = None
    longest = _LONGEST_STRIP * min(width, height)
    if max(width, height) > longest:  # resized whole, a strip of 1 × 60,000 pixels would need gigabytes
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        width, height = min(width, longest), min(height, longest)
        cut = Box(left, top, left + width, top + height)
    short_side = int(size / preprocessing.crop_fraction)
    if width <= height:
        resized = (short_side, int(short_side * height / width))
    else:
        resized = (int(short_side * width / height), short_side)
    left, top = (
        round((side - size) * share) for side, share in zip(resized, preprocessing.place, strict=True)
    )
    return Layout(cut, resized, (left, top))


def laid_out(
    resized: UInt8[np.ndarray, "tall wide 3"], layout: Layout, preprocessing: Preprocessing
) -> Pixels:
    """Cut the square out of the resized image, or put the image into it; uint8 (3, *preprocessing.shape)."""
    if preprocessing.resize == "longer_side":
        return with_its_sides(resized[:, ::-1] if preprocessing.flip else resized)
    size, (left, top) = preprocessing.size, layout.offset
    if left >= 0 and top >= 0:
        square = resized[top : top + size, left : left + size]
    else:
        square = np.empty((size, size, 3), np.uint8)
        square[:] = [round(255 * channel) for channel in preprocessing.mean]
        tall, wide = resized.shape[:2]
        square[-top : tall - top, -left : wide - left] = resized
    if preprocessing.flip:
        square = square[:, ::-1]
    return np.ascontiguousarray(square.transpose(2, 0, 1))


def with_its_sides(resized: UInt8[np.ndarray, "tall wide 3"]) -> Pixels:
    """An image in the top left of a square of its longer side, a row below it; uint8 (3, size + 1, size).

    The row's first pixel is the shorter side in pixels, as two bytes, and 1 where that is the height.
    """
    tall, wide = resized.shape[:2]
    size = max(tall, wide)
    pixels = np.zeros((3, size + 1, size), np.uint8)
    pixels[:, :tall, :wide] = resized.transpose(2, 0, 1)
    pixels[:, size, 0] = *divmod(min(tall, wide), 256), tall < wide
    return pixels


def canvas(views: Sequence[UInt8[np.ndarray, "3 _ _"]], preprocessing: Preprocessing) -> Pixels:
    """Views of one image, one below the other; what a narrower one leaves free is black and never read."""
    pixels = np.zeros((3, *preprocessing.shape), np.uint8)
    top = 0
    for view in views:
        height, width = view.shape[1:]
        pixels[:, top : top + height, :width] = view
        top += height
    return pixels
