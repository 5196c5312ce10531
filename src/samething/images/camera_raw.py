"""Cameras' RAW files, by LibRaw: the preview that the camera made where it is large, else developed."""

from __future__ import annotations

import io
from typing import Any, Final

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from samething.errors import ImageError
from samething.images.source import check_pixels

LEAST_PREVIEW: Final = 1024
"""Longer side in pixels from which on an embedded preview is taken for the image."""

# LibRaw's turns as EXIF has them: half a turn, a quarter to the left, a quarter to the right
_ORIENTATIONS: Final = {3: 3, 5: 8, 6: 6}


def opened_raw(stream: io.BufferedIOBase, name: str, max_pixels: int) -> Image.Image:
    """A RAW file as a Pillow image with its orientation.

    A file without a large preview is developed here, with the camera's white balance, in sRGB; at half its
    sides where it has more pixels than ``max_pixels``.

    Raises:
        ImageError: rawpy is not installed, or the image is too large.
        rawpy.LibRawError: damaged, or of a camera that LibRaw does not know.
    """
    try:
        import rawpy
    except ImportError as error:
        raise missing(name, "a camera's RAW file", "rawpy", extra="raw") from error
    with rawpy.imread(stream) as raw:  # type: ignore[arg-type]
        preview = _preview(raw)
        if preview is not None and max(preview.size) >= LEAST_PREVIEW:
            exif = preview.getexif()
            exif.setdefault(ExifTags.Base.Orientation, _ORIENTATIONS.get(raw.sizes.flip, 1))
            return preview
        width, height = raw.sizes.width, raw.sizes.height
        at_half = width * height > max_pixels
        check_pixels(name, width // (1 + at_half), height // (1 + at_half), max_pixels)
        pixels = raw.postprocess(use_camera_wb=True, half_size=at_half)
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _preview(raw: Any) -> Image.Image | None:
    import rawpy

    try:
        found = raw.extract_thumb()
        if found.format == rawpy.ThumbFormat.JPEG:
            return JpegImageFile(io.BytesIO(found.data))
        return Image.fromarray(found.data)
    except (rawpy.LibRawError, SyntaxError, OSError):  # none, or one that cannot be read
        return None


def missing(name: str, what: str, package: str, *, extra: str) -> ImageError:
    """The error of an image whose format needs a package that is not installed."""
    return ImageError.of(
        name,
        f"is {what}, and the Python package {package!r} is not installed (pip install 'samething[{extra}]')",
        expected=f"an installation with the {extra!r} extra",
        next_step=f"pip install 'samething[{extra}]'",
    )
