"""One image, from any file to upright 8-bit RGB, by Pillow: the reference path."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from samething.errors import ImageError, InputError
from samething.images.addresses import is_url
from samething.images.apart import Decoders
from samething.images.capture import capture_of
from samething.images.colour_profiles import in_usual_colours
from samething.images.formats import open_encoded
from samething.images.jpeg_files import AT_A_FRACTION, unpacked_jpeg
from samething.images.netpbm import is_read_value_by_value, unpacked_values
from samething.images.source import Box, Source, check_bytes, check_pixels, open_image_file
from samething.images.tiff_layouts import is_planar_with_16_bits, unpacked_planes

ImageLike: TypeAlias = str | Path | bytes | Image.Image | np.ndarray | Source
"""A path or other address, the bytes of a file, a Pillow image, a uint8 array (height, width[, 3]), or a
catalog's source."""

MAX_PIXELS: Final = 89_478_485
"""Images with more pixels are refused before they are unpacked (Pillow's own threshold)."""

DEADLINE_S: Final = 60.0
"""Seconds that one costly image may take; see :func:`is_costly`."""

_COSTLY_PIXELS: Final = 300_000_000
_SLOW: Final = ("AVIF", "HEIF", "JPEG2000")

NEARLY_WHITE: Final = 240
"""Of 255: an image that is nowhere darker on a white ground is laid on black, where that shows more."""

_BAND: Final = 256
"""Rows that are laid on their ground at a time."""

# EXIF 2.3, tag 0x0112; 1 is upright
TURNS: Final[dict[object, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    image: ImageLike,
    *,
    max_pixels: int = MAX_PIXELS,
    box: Box | None = None,
    least_side: int | None = None,
) -> Image.Image:
    """Decode one image to upright 8-bit RGB. Safe to call from several threads at once.

    EXIF orientation is applied, transparency is laid on white (on black where white would show nothing),
    16-bit and float values are scaled to 8 bits, CMYK, grey and palette images become RGB, and of an animated
    file the first frame is taken. Colour profiles are applied where they are unusual
    (:mod:`samething.images.colour_profiles`).

    A JPEG file with up to four times ``max_pixels`` is unpacked at half its sides; its ``info["full_size"]``
    then says its upright size. ``info["capture"]`` says when, where and by which camera it was taken
    (:mod:`samething.images.capture`).

    Pillow's warnings about odd metadata pass through: filters are the application's to set, and changing
    them here would race with other threads.

    Args:
        image: a path, a URL or another address (:mod:`samething.images.addresses`), the bytes of a file, a
            Pillow image (its current frame), a uint8 array (height, width[, 3]), or the source of a
            catalog row, whose box is cut out.
        max_pixels: refuse larger images before they are unpacked.
        box: the part to cut out, in pixels of the upright image; what lies outside of it is left away.
        least_side: of a JPEG file without a box, unpack a half, a quarter or an eighth of each side, as long
            as the shorter one keeps this many pixels; None: all of it.

    Raises:
        ImageError: not an image, damaged, empty, too large or not readable, or a box that holds none of it;
            the message says which.
    """
    if isinstance(image, str) and is_url(image):
        image = Source(image)
    if isinstance(image, Source):
        box = box or image.box
        name = str(image)
        image = image.read() if image.is_remote else name
    else:
        name = name_of(image)
    return decoded(image, name, max_pixels=max_pixels, box=box, least_side=least_side)


def decoded(
    image: str | Path | bytes | Image.Image | np.ndarray,
    name: str,
    *,
    max_pixels: int,
    box: Box | None,
    least_side: int | None = None,
    costly: bool = False,
) -> Image.Image:
    """As :func:`decode`, with the name that errors call it; ``costly`` images are decoded here as well."""
    options: dict[str, Any] = {
        "max_pixels": max_pixels, "box": box, "least_side": None if box else least_side
    }  # fmt: skip
    if isinstance(image, np.ndarray):
        upright = _from_array(image)
        full_size, is_turned = upright.size, False
    else:
        with opened(image, max_pixels=max_pixels, name=name) as encoded:
            full_size = encoded.size
            if not costly and not isinstance(image, Image.Image) and is_costly(encoded):
                place = image if isinstance(image, bytes) else Path(str(image)).absolute()
                found: Image.Image = _decoders(os.getpid()).call(
                    name, decoded, place, name, **options, costly=True
                )
                return found
            upright = _to_rgb(encoded, name, max_pixels, options["least_side"])
            upright.info["capture"] = capture_of(encoded.getexif)
            is_turned = orientation(encoded.getexif) in (5, 6, 7, 8)
    factor = max(full_size) / max(upright.size)
    if box is not None:
        width, height = (round(side * factor) for side in upright.size)
        inside = clipped(box, width, height, name=name)
        left, top, right, bottom = (int(side / factor) for side in inside)
        return upright.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    if factor > 1:
        upright.info["full_size"] = full_size[::-1] if is_turned else full_size
    return upright


def decoded_to(image: bytes, name: str, *, make: Callable[[Image.Image], Any] | None, **options: Any) -> Any:
    """As :func:`decoded`, or what is made of that: a process that decodes sends back no more."""
    upright = decoded(image, name, **options)
    return upright if make is None else make(upright)


def is_costly(encoded: Image.Image) -> bool:
    """Whether an image is decoded in a process that is ended after a minute: at about 300 megapixels' work.

    That is a progressive JPEG file, HEIC, AVIF or JPEG 2000 from 30 megapixels on.
    """
    is_slow = encoded.format in _SLOW or encoded.info.get("progressive")
    return encoded.width * encoded.height * (10 if is_slow else 1) > _COSTLY_PIXELS


@functools.cache
def _decoders(process_id: int) -> Decoders:
    del process_id  # what a process inherits when it is forked is its parent's
    return Decoders(os.cpu_count() or 1, deadline_s=DEADLINE_S)


def pixels_of(megapixels: float | None) -> int:
    """A limit of pixels, from a command's option; None is the default.

    Raises:
        InputError: not above 0.
    """
    if megapixels is None:
        return MAX_PIXELS
    if not megapixels > 0:
        raise InputError(
            f"--max-megapixels {megapixels:g}", expected="a number above 0", next_step="leave it out"
        )
    return round(megapixels * 1_000_000)


def clipped(box: Box, width: int, height: int, *, name: str = "the image") -> Box:
    """The part of a box that lies inside an image.

    Raises:
        ImageError: nothing does.

    >>> clipped(Box(-5, 10, 40, 90), 64, 48)
    Box(left=0, top=10, right=40, bottom=48)
    """
    inside = Box(max(0, box.left), max(0, box.top), min(width, box.right), min(height, box.bottom))
    if inside.left >= inside.right or inside.top >= inside.bottom:
        raise ImageError.of(
            name,
            f"has {width:,} × {height:,} pixels; none of them is in the box {tuple(box)}, which lies outside",
            expected="a box (left, top, right, bottom) with pixels of the upright image in it",
            next_step="correct the box in the catalog",
        )
    return inside


@contextlib.contextmanager
def opened(
    image: str | Path | bytes | Image.Image, *, max_pixels: int, name: str | None = None
) -> Iterator[Image.Image]:
    """An image with its header read and its size checked; whatever goes wrong inside is an ImageError."""
    name = name or name_of(image)
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(image, Image.Image):
                encoded = image
            else:
                if isinstance(image, bytes):
                    check_bytes(name, len(image))
                    stream: io.BufferedIOBase = io.BytesIO(image)
                else:
                    stream = stack.enter_context(open_image_file(image))
                encoded = stack.enter_context(open_encoded(stream, name, max_pixels))
            by_parts = isinstance(encoded, JpegImageFile) and not encoded.info.get("progressive")
            check_pixels(name, *encoded.size, max_pixels * (AT_A_FRACTION if by_parts else 1))
            yield encoded
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError.of(
            name,
            "has too many pixels",
            expected=f"at most {max_pixels:,} pixels",
            next_step="scale the image down",
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise nearly anything on a damaged file
        raise ImageError.of(
            name,
            f"is damaged or of a kind that cannot be decoded ({error or type(error).__name__})",
            expected="a whole image file",
            next_step="replace or remove the file",
        ) from error


def name_of(image: str | Path | bytes | Image.Image | np.ndarray) -> str:
    """What errors call an image."""
    if isinstance(image, bytes):
        return "the bytes given"
    if isinstance(image, np.ndarray):
        return "the array"
    return "the Pillow image" if isinstance(image, Image.Image) else str(image)


def _from_array(array: np.ndarray) -> Image.Image:
    shape_is_right = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not shape_is_right or 0 in array.shape:
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype}",
            expected="uint8 (height, width) or (height, width, 3)",
            next_step="convert it, for instance with (array * 255).astype('uint8')",
        )
    return Image.fromarray(array).convert("RGB")


def _to_rgb(image: Image.Image, name: str, max_pixels: int, least_side: int | None) -> Image.Image:
    # unpacked first, because Pillow turns TIFF files by itself there
    if isinstance(image, JpegImageFile) and image.tile:
        image = unpacked_jpeg(image, name, min(max_pixels, MAX_PIXELS), least_side)
    elif is_read_value_by_value(image):
        image = unpacked_values(image)
    elif is_planar_with_16_bits(image):
        image = unpacked_planes(image)
    else:
        image.load()
    # not ImageOps.exif_transpose, which also rewrites the metadata and so fails where that alone is damaged
    turn = TURNS.get(orientation(image.getexif))
    profile = image.info.get("icc_profile")
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith(("I", "F")):
        image = _scaled_to_8_bits(image, name)
    if not image.has_transparency_data:
        if not profile:
            return image.convert("RGB")
        return in_usual_colours(image if image.mode == "CMYK" else image.convert("RGB"), profile)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow drops the alpha of "La" on any other way
    on_white = _laid_on("white", image)
    if min(low for low, _ in _extremes(on_white)) >= NEARLY_WHITE:
        on_black = _laid_on("black", image)
        if any(high - low > 255 - NEARLY_WHITE for low, high in _extremes(on_black)):
            on_white = on_black
    return in_usual_colours(on_white, profile)


def _laid_on(ground: str, image: Image.Image) -> Image.Image:
    """An image with its transparency on a ground, in bands: whole, it would be in memory four times."""
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(image.height, top + _BAND))).convert("RGBA")
        below = Image.new("RGBA", band.size, ground)
        result.paste(Image.alpha_composite(below, band).convert("RGB"), (0, top))
    return result


def orientation(getexif: Callable[[], Image.Exif]) -> object:
    """The EXIF orientation, 1…8; 1 (upright) where there is none or the metadata is damaged."""
    try:
        return getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata makes the pixels no worse
        return 1


def _scaled_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey with more than 8 bits, scaled to 8 bits.

    Integers are read as 16-bit; if they exceed that, their largest becomes white. Floats are read as [0, 1],
    or as [0, 255] if they exceed 1. What is not finite becomes black.

    Raises:
        ImageError: no value is finite.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).any():
        raise ImageError.of(
            name,
            "has no finite value",
            expected="an image with numbers in it",
            next_step="replace or remove the file",
        )
    values[~np.isfinite(values)] = 0
    largest = float(values.max())
    if image.mode.startswith("F"):
        scale = 255.0 if largest <= 1 else 1.0
    elif image.mode == "I" and largest <= 255:
        scale = 1.0  # mode "I" also carries 8-bit values (PGM, label maps); they stay as they are
    else:
        scale = 255 / max(65535.0, largest)
    return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))


def thumbnail(image: Image.Image, *, longer_side: int) -> bytes:
    """A JPEG of the image whose longer side is at most ``longer_side`` pixels."""
    scale = min(1, longer_side / max(image.size))
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    # not Image.thumbnail, which needs a copy
    small = image.resize(sides, Image.Resampling.BICUBIC, reducing_gap=1.0)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def dimensions(path: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image file (or of its bytes) in pixels, upright, from its header alone.

    A file that is cut off after its header has dimensions but cannot be decoded. A PNG that keeps its EXIF
    data behind its pixels is taken as upright.

    Raises:
        ImageError: not an image, empty, too large or not readable.
    """
    with opened(path, max_pixels=max_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow reports the upright size of these
            return width, height
        # the base class's method, because the one for PNG unpacks the whole image
        turned = orientation(lambda: Image.Image.getexif(image)) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def _extremes(image: Image.Image) -> list[tuple[int, int]]:
    """Lowest and highest value of each channel."""
    found: Any = [band.getextrema() for band in image.split()]
    return [(int(low), int(high)) for low, high in found]
