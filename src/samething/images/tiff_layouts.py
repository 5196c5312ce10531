"""What a TIFF file is: an image that Pillow reads, a camera's RAW file, or a layout that needs help."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Final, TypeGuard

import numpy as np
from PIL import Image, TiffTags
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2, TiffImageFile

# TIFF 6.0, TIFF/EP and DNG 1.7: numbers of tags
_REDUCED, _BITS, _COMPRESSION, _COLOURS, _MAKE, _SAMPLES = 254, 258, 259, 262, 271, 277
_TURN, _PLANES, _INSIDE, _SAMPLE_FORMAT, _DNG = 274, 284, 330, 339, 50706
_LAYOUT: Final = (256, 257, 259, 266, 278, 317, 322, 323)
"""Sides, compression, order of bits, rows of a strip, predictor, sides of a tile."""
_TILES: Final = 324
_PLACES: Final = (273, 279, _TILES, 325)
"""Offsets and lengths of strips and tiles; all those of the first plane come first."""

_SENSOR: Final = (32803, 34892)
"""Colours (photometric interpretation) of a sensor's values: a colour filter array, and linear RAW."""
_COLOUR_NAMES: Final = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
_NUMBER_NAMES: Final = {2: "signed ", 3: "floating-point ", 5: "complex ", 6: "complex "}


def is_camera_raw(stream: io.BufferedIOBase) -> bool:
    """Whether a TIFF file is a camera's RAW file, whose first image is only a thumbnail."""
    directories = _directories(stream)
    if not directories:
        return False
    first = directories[0]
    has_thumbnail_first = first.get(_REDUCED, 0) & 1 and _INSIDE in first and _MAKE in first
    return bool(
        _DNG in first or has_thumbnail_first or any(part.get(_COLOURS) in _SENSOR for part in directories)
    )


def is_planar_with_16_bits(image: Image.Image) -> TypeGuard[TiffImageFile]:
    """Whether a TIFF image has a plane per colour, of 16 bits: Pillow takes their bytes for values."""
    if not isinstance(image, TiffImageFile) or not image.tile:
        return False
    tags = image.tag_v2
    return bool(tags.get(_PLANES, 1) == 2 and max(tags.get(_BITS, (1,))) == 16 and tags.get(_SAMPLES, 1) > 1)


def unpacked_planes(image: TiffImageFile) -> Image.Image:
    """The high bytes of a planar image's first three colours, each read as a grey image of its own."""
    assert image.fp is not None
    image.fp.seek(0)
    content = image.fp.read()
    head = (b"II*\0" if content[:2] == b"II" else b"MM\0*") + int.to_bytes(
        8, 4, "little" if content[:2] == b"II" else "big"
    )
    old = image.tag_v2
    planes = []
    for plane in range(min(3, old[_SAMPLES])):
        tags = ImageFileDirectory_v2(head)
        for tag in _LAYOUT:
            if tag in old:
                tags[tag] = old[tag]
        for tag in _PLACES:
            if tag in old:
                part = len(old[tag]) // old[_SAMPLES]
                tags.tagtype[tag] = TiffTags.LONG
                tags[tag] = old[tag][part * plane : part * (plane + 1)]
        tags[_BITS], tags[_SAMPLES], tags[_COLOURS] = 16, 1, 1
        if _TILES in tags:  # Pillow itself adds what stands before to the places of strips alone
            before = 8 + len(tags.tobytes(8))
            tags[_TILES] = tuple(place + before for place in tags[_TILES])
        with TiffImageFile(io.BytesIO(head + tags.tobytes(8) + content)) as grey:
            planes.append(Image.fromarray((np.asarray(grey) >> 8).astype(np.uint8)))
    found = Image.merge("RGB", planes) if len(planes) == 3 else planes[0]
    found.info.update(image.info)
    found.getexif()[_TURN] = image.tag_v2.get(_TURN, 1)
    return found


def described(stream: io.BufferedIOBase) -> str:
    """What the first image of a TIFF file is, for a message; empty where it does not say."""
    directories = _directories(stream)
    if not directories:
        return ""
    first = directories[0]
    bits = first.get(_BITS, (1,))
    number = first.get(_SAMPLE_FORMAT, (1,))
    colours, packed = first.get(_COLOURS), first.get(_COMPRESSION, 1)
    return (
        f"a TIFF image of {_COLOUR_NAMES.get(colours, f'colours of kind {colours}')} with "
        f"{first.get(_SAMPLES, 1)} × {'/'.join(str(each) for each in sorted(set(bits)))}-bit "
        f"{_NUMBER_NAMES.get(number[0], '')}samples "
        f"(compression {COMPRESSION_INFO.get(packed, packed)})"
    )


def _directories(stream: io.BufferedIOBase) -> list[Any]:
    """The tags of a TIFF file's first image, and of those inside of it; none where they are damaged."""
    found: list[Any] = []
    with contextlib.suppress(Exception):  # whatever Pillow raises on damaged tags, it says when it reads
        stream.seek(0)
        head = stream.read(16)
        first = ImageFileDirectory_v2(head if head[2:4] in (b"+\0", b"\0+") else head[:8])
        places = [first.next]
        while places and len(found) < 16:
            directory = ImageFileDirectory_v2(head[:8]) if found else first
            stream.seek(places.pop(0))
            directory.load(stream)  # type: ignore[arg-type]
            found.append(directory)
            if len(found) == 1:
                inside = directory.get(_INSIDE, ())
                places += inside if isinstance(inside, tuple) else [inside]
    stream.seek(0)
    return found
