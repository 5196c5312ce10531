"""From any image to a backbone's pixels in one call, exactly as the reference or as fast as possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image

from samething.arrays import Pixels, UInt8
from samething.errors import needed
from samething.images.colour_profiles import unusual
from samething.images.decoding import (
    MAX_PIXELS,
    ImageLike,
    clipped,
    decode,
    decoded,
    name_of,
    opened,
    orientation,
)
from samething.images.jpeg_files import check_scans
from samething.images.preparing import RESAMPLING, Preprocessing, canvas, laid_out, layout_of, prepare
from samething.images.source import Box, Source

_TORCH_MODES: Final = ("bicubic", "bilinear")


def read_pixels(
    image: ImageLike, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS, box: Box | None = None
) -> Pixels:
    """Decode and prepare an image to uint8 (3, height, width), as ``preprocessing.decoding`` says.

    ``exact`` is ``prepare(decode(image))``. ``fast`` unpacks JPEG files with libjpeg-turbo's own buffers
    and resizes with torch's antialiased filter on bytes; whatever that cannot do (CMYK, damaged files, other
    formats, Lanczos) goes the reference's way, so what is refused and why never differs. On photographs no
    pixel differs by more than 2 of 255 (tests/test_images_fast.py). ``scaled`` changes more.

    Raises:
        ImageError: as :func:`decode`.
        MissingExtraError: ``fast`` or ``scaled`` without torch or simplejpeg.
    """
    if preprocessing.decoding == "exact":
        return prepare(decode(image, max_pixels=max_pixels, box=box), preprocessing)
    needed("simplejpeg", extra="train")  # asked for here, where its absence is not taken for a damaged file
    if isinstance(image, Source):
        box = box or image.box
        name, image = str(image), image.read()
    else:
        name = name_of(image)
    found = _turbo(image, name, preprocessing, max_pixels, box) if isinstance(image, bytes) else None
    if found is None:
        upright = decoded(image, name, max_pixels=max_pixels, box=box)
        found = np.array(upright), upright.size  # a copy, because torch wants to be allowed to write
    if preprocessing.views:
        return canvas([_prepared(*found, view) for view in preprocessing.views], preprocessing)
    return _prepared(*found, preprocessing)


def _prepared(
    array: UInt8[np.ndarray, "tall wide 3"], size: tuple[int, int], preprocessing: Preprocessing
) -> Pixels:
    """As :func:`prepare`; ``size`` is what the image had before it was unpacked at a fraction."""
    layout = layout_of(*size, preprocessing)
    if layout.cut is not None:
        left, top, right, bottom = layout.cut
        array = np.ascontiguousarray(array[top:bottom, left:right])
    if array.shape[1::-1] != layout.resized:
        array = _resized(array, layout.resized, preprocessing)
    return laid_out(array, layout, preprocessing)


def _turbo(
    content: bytes, name: str, preprocessing: Preprocessing, max_pixels: int, box: Box | None
) -> tuple[UInt8[np.ndarray, "tall wide 3"], tuple[int, int]] | None:
    """Upright pixels of a JPEG file with the box cut out, and the size that they have before any scaling.

    None where the reference has to decide.
    """
    import simplejpeg

    with opened(content, max_pixels=max_pixels, name=name) as encoded:
        size = encoded.size
        if (
            encoded.format != "JPEG"
            or encoded.mode not in ("RGB", "L")
            or size[0] * size[1] > min(max_pixels, MAX_PIXELS)
            or unusual(encoded.info.get("icc_profile"), encoded.mode) is not None
        ):
            return None
        check_scans(content, name)
        turn = orientation(encoded.getexif)
        upright = size[::-1] if turn in (5, 6, 7, 8) else size
        least = {}
        if preprocessing.decoding == "scaled" and box is None and not preprocessing.views:
            layout = layout_of(*upright, preprocessing)
            wide, tall = layout.resized if upright == size else layout.resized[::-1]
            if layout.cut is None:
                # from a factor of 2 on it takes less time than a full decode
                least = {"min_width": 2 * wide, "min_height": 2 * tall, "min_factor": 2.0}
        try:
            array = simplejpeg.decode_jpeg(content, "RGB", **least)
        except ValueError:  # damaged, or of a kind that only Pillow knows
            return None
    if not least and array.shape[1::-1] != size:
        return None
    array = _TURNED.get(turn, np.asarray)(array)
    if box is not None:
        left, top, right, bottom = clipped(box, *upright, name=name)
        array, upright = array[top:bottom, left:right], (right - left, bottom - top)
    return np.ascontiguousarray(array), upright


# EXIF 2.3, tag 0x0112; 1 is upright
_TURNED: Final[dict[object, Callable[[np.ndarray], np.ndarray]]] = {
    2: lambda array: array[:, ::-1],
    3: lambda array: array[::-1, ::-1],
    4: lambda array: array[::-1],
    5: lambda array: array.transpose(1, 0, 2),
    6: lambda array: np.rot90(array, -1),
    7: lambda array: array[::-1, ::-1].transpose(1, 0, 2),
    8: lambda array: np.rot90(array, 1),
}


def _resized(
    array: UInt8[np.ndarray, "tall wide 3"], size: tuple[int, int], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "height width 3"]:
    if preprocessing.interpolation not in _TORCH_MODES:
        return np.asarray(Image.fromarray(array).resize(size, RESAMPLING[preprocessing.interpolation]))
    torch = needed("torch", extra="train")
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None]  # channels last: torch's fast kernels on bytes
    scaled = torch.nn.functional.interpolate(
        pixels, size=size[::-1], mode=preprocessing.interpolation, antialias=True
    )
    resized: np.ndarray = scaled[0].permute(1, 2, 0).numpy()
    return resized
