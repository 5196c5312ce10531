"""Image files on a disk: which there are, and what their headers say."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from PIL import Image

from samething.errors import InputError
from samething.images.decoding import MAX_PIXELS, opened, orientation

# fmt: off
IMAGE_SUFFIXES: Final = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})

# First bytes of the formats people keep images in, to find those whose name does not say so.
_SIGNATURES: Final = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",  # TIFF, little-endian
    b"MM\x00*",  # TIFF, big-endian
)
# fmt: on


def thumbnail(image: Image.Image, *, longer_side: int) -> bytes:
    """A JPEG of the image whose longer side is at most ``longer_side`` pixels."""
    small = image.copy()
    small.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
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


def is_image_file(path: Path) -> bool:
    """Whether a file looks like an image: by its suffix, or for other names by its first bytes.

    A broken link named like an image counts, so that it is listed; pipes and devices do not.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return True
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError:
        return path.suffix.lower() in IMAGE_SUFFIXES
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def find_images(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Walk a folder in sorted order and yield every file with whether it looks like an image.

    Hidden files and folders (names starting with a dot) are passed over. Links to folders are not followed;
    they are yielded as files that are no images.

    Raises:
        InputError: a folder cannot be listed.
    """
    for parent, name in _walk(folder):
        path = Path(parent, name)
        yield path, is_image_file(path)


def find_image_files(folder: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    """The images that :func:`find_images` finds, each with what the disk says of it.

    A path is a text and a file is asked for once, because a sync does this for every file there is. The
    status of a broken link is None.

    Raises:
        InputError: a folder cannot be listed.
    """
    for parent, name in _walk(folder):
        path = os.path.join(parent, name)  # noqa: PTH118 - a Path takes five times as long
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            status = None
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
            if status is None or stat.S_ISREG(status.st_mode):
                yield path, status
        elif is_image_file(Path(path)):
            yield path, status


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Folder and name of every file that is not hidden."""

    def refuse(error: OSError) -> None:
        raise InputError(
            f"cannot list the folder {error.filename}: {error.strerror}",
            expected="folders that this user may read",
            next_step="change the folder's permissions, or move it elsewhere",
        ) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted([*names, *links]):
            if not name.startswith("."):
                yield parent, name
