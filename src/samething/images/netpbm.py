"""PPM, PGM and PBM files whose values Pillow reads one by one in Python, all at once by NumPy."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image


def is_read_value_by_value(image: Image.Image) -> bool:
    """Whether Pillow would take seconds for a megapixel: text, and values of another range than a byte's."""
    tiles: list[Any] = list(getattr(image, "tile", ()))
    return image.format == "PPM" and bool(tiles) and tiles[0].codec_name in ("ppm", "ppm_plain")


def unpacked_values(image: Image.Image) -> Image.Image:
    """The same pixels as Pillow's: values scaled to 8 bits, or to 16 where a grey image has more than 8.

    Raises:
        ValueError: there are too few values, or one is none.
    """
    codec, _, offset, args = image.tile[0]  # type: ignore[attr-defined]
    stream = image.fp  # type: ignore[attr-defined]
    stream.seek(offset)
    content = stream.read()
    shape = image.height, image.width, len(image.getbands())
    count = shape[0] * shape[1] * shape[2]
    if codec == "ppm_plain":
        content = re.sub(rb"#[^\r\n]*", b"", content)
    if image.mode == "1":
        digits = np.frombuffer(content.translate(None, b" \t\r\n\v\f"), np.uint8, count)
        return Image.fromarray((digits == ord("0")).reshape(shape[:2]))
    largest = args[-1]
    if codec == "ppm_plain":
        values = np.fromstring(content, np.int64, count, sep=" ")
    else:
        values = np.frombuffer(content, ">u2" if largest > 255 else "u1", count)
    if len(values) < count or (codec == "ppm_plain" and (values.min() < 0 or values.max() > largest)):
        raise ValueError("values are missing or out of range")
    white = 65535 if image.mode == "I" else 255
    scaled = np.minimum(np.rint(values / largest * white), white)
    if image.mode == "I":
        return Image.fromarray(scaled.astype(np.int32).reshape(shape[:2]))
    pixels = scaled.astype(np.uint8)
    return Image.fromarray(pixels.reshape(shape) if shape[2] > 1 else pixels.reshape(shape[:2]))
