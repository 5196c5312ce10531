"""The formats of image files: names, first bytes, and how each is opened before anything is unpacked."""

from __future__ import annotations

import contextlib
import io
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

# First bytes of the formats people keep images in; a dot stands for any byte.
_SIGNATURES: Final = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "WEBP": (b"RIFF....WEBP",),
    "RAW": (
        b"II*\0....CR", b"....ftypcrx ", b"FUJIFILMCCD-RAW", b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"\0MRM",
        b"FOVb", b"II\x1a\0\0\0HEAPCCDR",
    ),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "HEIF": tuple(b"....ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")),
    "AVIF": (b"....ftypavif", b"....ftypavis"),
    "JXL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
}

# Formats with a first word of their own that are no images here, so that the message can say what a file is.
_OTHERS: Final = {
    b"%PDF": "a PDF document", b"8BPS": "a Photoshop document", b"%!PS": "a PostScript document",
    b"v/1\x01": "an OpenEXR image", b"II\xbc\x01": "a JPEG XR image", b"<svg": "an SVG drawing",
    b"<?xml": "an XML document", b"<!": "a web page", b"....ftyp": "a film",
}
# fmt: on


def kind_of(head: bytes) -> str | None:
    """The format that a file's first 16 bytes tell; None for one without a signature of its own here.

    >>> kind_of(b"RIFF\\x1a\\0\\0\\0WEBPVP8 "), kind_of(b"RIFF\\x1a\\0\\0\\0WAVEfmt ")
    ('WEBP', None)
    """
    return next((kind for kind, all_of_it in _SIGNATURES.items() if _begins(head, all_of_it)), None)


def _begins(head: bytes, signatures: tuple[bytes, ...]) -> bool:
    return any(
        len(head) >= len(signature) and all(a in (b, 46) for b, a in zip(head, signature, strict=False))
        for signature in signatures
    )


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
    other = next((f"is {words} and" for start, words in _OTHERS.items() if _begins(head, (start,))), "is")
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
