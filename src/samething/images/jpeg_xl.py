"""JPEG XL files: their size is read by hand first, because the plugin unpacks a file while it opens it."""

from __future__ import annotations

import io
from typing import Any, Final

from PIL import ExifTags, Image

from samething.images.camera_raw import missing
from samething.images.source import check_pixels

_RATIOS: Final = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def opened_jpeg_xl(stream: io.BufferedIOBase, name: str, max_pixels: int) -> Image.Image:
    """A JPEG XL file as a Pillow image with its orientation.

    Raises:
        ImageError: the plugin is not installed, or the image is too large.
        Exception: it is damaged.
    """
    try:
        from pillow_jxl.JpegXLImagePlugin import JXLImageFile
    except ImportError as error:
        raise missing(name, "a JPEG XL image", "pillow_jxl", extra="jxl") from error
    width, height, is_turned = header(stream.read())
    check_pixels(name, width, height, max_pixels)
    stream.seek(0)
    image: Any = JXLImageFile(stream)  # type: ignore[arg-type]
    if is_turned and not image.jpeg:  # the decoder has turned it, whatever the EXIF data say
        image.getexif()[ExifTags.Base.Orientation] = 1
    found: Image.Image = image
    return found


def header(content: bytes) -> tuple[int, int, bool]:
    """Width and height in pixels as they are stored, and whether the image has to be turned.

    After ISO/IEC 18181-1, SizeHeader and ImageMetadata; 18181-2 for the boxes around them.

    Raises:
        ValueError: there is no header.
    """
    at = 0
    if content[:2] != b"\xff\x0a":
        while content[at + 4 : at + 8] not in (b"jxlc", b"jxlp"):
            size = int.from_bytes(content[at : at + 4])
            if size == 1:
                size = int.from_bytes(content[at + 8 : at + 16])
            if size < 8 or at + size >= len(content):
                raise ValueError("a JPEG XL file without an image")
            at += size
        at += 8 + 4 * (content[at + 4 : at + 8] == b"jxlp") + 8 * (content[at : at + 4] == b"\0\0\0\1")
    bits = int.from_bytes(content[at + 2 : at + 26], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << count) - 1, bits >> count
        return value

    is_small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if is_small else 1 + take((9, 13, 18, 30)[take(2)])

    height = side()
    ratio = take(3)
    width = height * _RATIOS[ratio - 1][0] // _RATIOS[ratio - 1][1] if ratio else side()
    is_turned = not take(1) and take(1) == 1 and take(3) != 0
    return width, height, is_turned
