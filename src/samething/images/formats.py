"""The formats of image files: names, first bytes, and how each is opened before anything is unpacked."""

from __future__ import annotations

import contextlib
import io
import re
import struct
from typing import Final

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from samething.errors import ImageError
from samething.images.camera_raw import opened_raw
from samething.images.jpeg_xl import opened_jpeg_xl
from samething.images.source import check_pixels
from samething.images.tiff_layouts import described, is_camera_raw

# fmt: off
IMAGE_SUFFIXES: Final = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heics", ".heif", ".heifs", ".hif", ".ico", ".j2k",
    ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif",
    ".tiff", ".webp",
    # cameras' RAW files
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
})

# What Pillow tries on a file, whatever its name. A closed list, because it would start Ghostscript on some
# others. TGA is last: it has no signature.
FORMATS: Final = (
    "JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "BMP", "DIB", "ICO", "PPM",
    "TGA",
)

# How files of the formats people keep images in begin; a dot stands for any byte.
_SIGNATURES: Final = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "RAW": rb"II\*\x00....CR|....ftypcrx |FUJIFILMCCD-RAW|IIU\x00|IIR[OS]|MMOR|\x00MRM|FOVb|"
           rb"II\x1a\x00\x00\x00HEAPCCDR",
    "TIFF": rb"II[*+]\x00|MM\x00[*+]",
    "HEIF": rb"....ftyp(heic|heix|hevc|heim|mif1|msf1)",
    "AVIF": rb"....ftypavi[fs]",
    "JXL": rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n",
}

# The same of what is no image here, so that the message can say what a file is.
_OTHERS: Final = {
    rb"%PDF": "a PDF document", rb"8BPS": "a Photoshop document", rb"%!PS": "a PostScript document",
    rb"v/1\x01": "an OpenEXR image", rb"II\xbc\x01": "a JPEG XR image", rb"<svg": "an SVG drawing",
    rb"<\?xml": "an XML document", rb"<!": "a web page", rb"....ftyp": "a film",
}
# fmt: on


def kind_of(head: bytes) -> str | None:
    """The format that a file's first 16 bytes tell; None for one without a signature of its own here.

    >>> kind_of(b"RIFF\\x1a\\0\\0\\0WEBPVP8 "), kind_of(b"RIFF\\x1a\\0\\0\\0WAVEfmt ")
    ('WEBP', None)
    """
    return next((kind for kind, start in _SIGNATURES.items() if re.match(start, head, re.DOTALL)), None)


def open_encoded(stream: io.BufferedIOBase, name: str, max_pixels: int) -> Image.Image:
    """A file as a Pillow image whose pixels are still packed, wherever its format allows that.

    Pillow unpacks icons and JPEG XL while it opens them: their size is read by hand first.

    Raises:
        ImageError: no image in a known format, one that needs a package that is missing, or too large.
        Exception: of any kind, where a file is damaged.
    """
    head = stream.read(16)
    stream.seek(0)
    kind = kind_of(head)
    if kind == "JPEG":  # not by Image.open, which refuses what can be unpacked at a fraction
        return JpegImageFile(stream)  # type: ignore[arg-type]
    if kind == "RAW" or (kind == "TIFF" and is_camera_raw(stream)):
        return opened_raw(stream, name, max_pixels)
    if kind == "JXL":
        return opened_jpeg_xl(stream, name, max_pixels)
    if head[:4] == b"\0\0\1\0":
        for width, height in _icon_sizes(stream):
            check_pixels(name, width, height, max_pixels)
    if kind == "HEIF":
        from pillow_heif import register_heif_opener

        register_heif_opener()
    if kind in ("PNG", "GIF"):  # loading all formats takes longer than unpacking an image
        Image.preinit()
    else:
        Image.init()
    for factory, accepts in (Image.OPEN[known] for known in FORMATS if known in Image.OPEN):
        # not by Image.open, whose limit of pixels is one for the whole process
        if accepts is None or accepts(head) is True:
            stream.seek(0)
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                return factory(stream, "")  # type: ignore[arg-type]
    other = next((f"is {words} and" for start, words in _OTHERS.items() if re.match(start, head, re.S)), "is")
    reason = described(stream) if kind == "TIFF" else ""
    raise ImageError.of(
        name,
        f"is {reason}, which cannot be read" if reason else f"{other} not an image in a known format",
        expected=f"one of {', '.join(FORMATS)}",
        next_step="convert or remove the file",
    )


def _icon_sizes(stream: io.BufferedIOBase) -> list[tuple[int, int]]:
    """Width and height of the images in an icon, as they say themselves: the directory may say less."""
    content = stream.read()
    stream.seek(0)
    sizes = []
    for entry in range(struct.unpack_from("<H", content, 4)[0]):
        (at,) = struct.unpack_from("<I", content, 6 + 16 * entry + 12)
        is_png = content[at : at + 4] == b"\x89PNG"
        width, height = struct.unpack_from(*(">II", content, at + 16) if is_png else ("<ii", content, at + 4))
        sizes.append((abs(width), abs(height) if is_png else abs(height) // 2))
    return sizes
