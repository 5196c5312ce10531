"""JPEG files: scans counted before they are unpacked, ends that are missing, large ones at a fraction."""

from __future__ import annotations

import io
import re
from typing import Final, NamedTuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from samething.errors import ImageError

MAX_SCANS: Final = 100
"""JPEG files with more scans are refused: each goes over the whole image, and encoders write about ten."""

AT_A_FRACTION: Final = 4
"""Times the pixels of other images that a JPEG file may have, unless it is progressive: it is unpacked at
half its sides then, so that its pixels need not be in memory at once."""

# Neither stuffed bytes nor restarts, which lie inside of a scan (ITU-T T.81, B.1.1.2).
_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")
_END: Final = b"\xff\xd9"
# What stands in for missing bytes in a second decoding: where it changes no pixel, none was missing.
_PADDING: Final = bytes(range(1, 255)) * 16


class _Scans(NamedTuple):
    headers: list[bytes]
    """Of each scan, without its length."""
    has_end: bool


def check_scans(content: bytes, name: str) -> None:
    """Refuse a JPEG file that would be gone over too often.

    Raises:
        ImageError: it has more than 100 scans.
    """
    # Quick, but also counts what lies in previews and behind the image. NumPy takes a seventh of the time of
    # bytes.count, which was a twentieth of the time of indexing a phone's photograph.
    starts = sum(
        int(np.count_nonzero(np.frombuffer(content, "<u2", (len(content) - at) // 2, at) == 0xDAFF))
        for at in (0, 1)
    )
    if starts > MAX_SCANS and len(_scans(content).headers) > MAX_SCANS:
        raise ImageError.of(
            name,
            f"has more than {MAX_SCANS} scans",
            expected=f"a JPEG image of at most {MAX_SCANS} scans; ordinary ones have one, or about ten",
            next_step="save the image again in a program that you trust",
        )


def fraction_of(width: int, height: int, max_pixels: int, least_side: int | None) -> int:
    """By how much the sides of a JPEG file are divided while it is unpacked, which saves most of the time.

    Args:
        width: pixels.
        height: pixels.
        max_pixels: with more of them it is 2 at least.
        least_side: pixels that the shorter side keeps where that allows 2, 4 or 8; None: it stays whole.

    >>> fraction_of(4032, 3024, 89_478_485, 512), fraction_of(4032, 3024, 10_000_000, None)
    (4, 2)
    """
    least = 2 if width * height > max_pixels else 1
    if least_side is None:
        return least
    return max(least, *(by for by in (1, 2, 4, 8) if by == 1 or min(width, height) >= by * least_side))


def unpacked_jpeg(
    image: JpegImageFile, name: str, max_pixels: int, least_side: int | None = None
) -> Image.Image:
    """The pixels of a JPEG file, at the fraction of its sides that :func:`fraction_of` says.

    A file that ends too early counts as whole where less than one row of blocks is missing, as for viewers.
    Whether it does is looked up without ``least_side``, so that it decides nothing.

    Raises:
        ImageError: it has too many scans.
        OSError: damaged, or cut off.
    """
    assert image.fp is not None
    image.fp.seek(0)
    content = image.fp.read()
    check_scans(content, name)
    if not image.filename:  # else Pillow opened it, and closes the file when it has loaded it
        image.fp = io.BytesIO(content)  # not read again
    full_height = image.height
    fraction = fraction_of(*image.size, max_pixels, least_side)
    draft = image.width // fraction, image.height // fraction
    if fraction > 1:
        image.draft(None, draft)
    try:
        image.load()
    except OSError:
        if least_side is not None:
            return unpacked_jpeg(JpegImageFile(io.BytesIO(content)), name, max_pixels)
        mended = _without_last_bytes(content, image, full_height, draft)
        if mended is None:
            raise
        return mended
    return image


def _without_last_bytes(
    content: bytes, image: JpegImageFile, full_height: int, draft: tuple[int, int]
) -> Image.Image | None:
    found = _scans(content)
    if found.has_end or (image.info.get("progressive") and not _are_complete(found.headers)):
        return None
    shown, other = (JpegImageFile(io.BytesIO(content + padding + _END)) for padding in (b"", _PADDING))
    for each in (shown, other):
        each.draft(None, draft)
    differ = (np.asarray(shown) != np.asarray(other)).reshape(shown.height, -1).any(axis=1)
    blocks = max(1, 8 * max(tall for _, _, tall, _ in image.layer) * shown.height // full_height)
    last_row = (shown.height - 1) // blocks * blocks
    # colours at half the resolution reach two rows further when they are scaled up
    return shown if not differ[: max(0, last_row - 2)].any() else None


def _scans(content: bytes) -> _Scans:
    headers: list[bytes] = []
    at = 2
    while (marker := _MARKER.search(content, at)) and len(headers) <= MAX_SCANS:
        if marker[0] == _END:
            return _Scans(headers, True)
        start = marker.end()
        at = start + int.from_bytes(content[start : start + 2])
        if marker[1] == b"\xda":
            headers.append(content[start + 2 : at])
    return _Scans(headers, False)


def _are_complete(headers: list[bytes]) -> bool:
    """Whether the scans of a progressive file give every coefficient to its last bit (ITU-T T.81, G.1.1)."""
    missing: dict[int, np.ndarray] = {}
    for header in headers:
        num_components = header[0]
        first, last, bits = header[1 + 2 * num_components : 4 + 2 * num_components]
        for component in header[1 : 1 + 2 * num_components : 2]:
            missing.setdefault(component, np.full(64, -1))[first : last + 1] = bits & 15
    return all((part == 0).all() for part in missing.values())
