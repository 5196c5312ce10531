"""The images that the server sends, and those that it is given to keep."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from PIL import Image

from samething.errors import InputError
from samething.files import atomic_path
from samething.images import Source, is_url, thumbnail
from samething.images.decoding import decoded, opened
from samething.images.formats import kind_of
from samething.index import AbstractIndex
from samething.search.collection import UPLOADS, uploaded

MEDIA_TYPES: Final = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
"""Formats that are sent as they are; every browser shows them and none of them holds script."""
_SUFFIXES: Final = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "TIFF": ".tif",
    "HEIF": ".heic",
}
_MAX_RAW_BYTES: Final = 64 * 2**20


def sendable(
    file: Source,
    content: bytes,
    *,
    max_pixels: int,
    side: int | None = None,
    decode: Callable[..., Image.Image] = decoded,
) -> tuple[bytes, str]:
    """An image file as bytes that any browser shows, and their media type.

    What it is is found out from its content, whatever its name says. JPEG, PNG, WebP and GIF files are sent
    as they are; of everything else, a part of an image, and a smaller size, a JPEG is made.

    Args:
        file: a file that the index knows.
        content: its bytes.
        max_pixels: refuse larger images before they are unpacked.
        side: make its longer side at most that many pixels.
        decode: called like :func:`samething.images.decoding.decoded`.

    Raises:
        ImageError: no image, or too large.
    """
    if side is None and file.box is None and len(content) <= _MAX_RAW_BYTES:
        media_type = MEDIA_TYPES.get(str(kind_of(content[:16])))
        if media_type is not None:
            with opened(content, max_pixels=max_pixels, name=file.location):
                return content, media_type
    least_side = None if side is None else 2 * side
    image = decode(content, file.location, max_pixels=max_pixels, box=file.box, least_side=least_side)
    return thumbnail(image, longer_side=side or max(image.size)), "image/jpeg"


class Uploads:
    """The folder where uploaded images are kept; the index notes label and domain of each, for a sync.

    A file's name is the SHA-256 of its content: nothing of what the sender calls it is used.
    """

    def __init__(self, folder: Path, index_folder: str) -> None:
        self.folder = Path(os.path.normpath(folder.absolute()))
        self._index_folder = Path(index_folder).absolute()

    def keep(self, index: AbstractIndex, content: bytes, *, label: str, domain: str) -> tuple[str, Source]:
        """Store an image that was decoded; the identity of its content, and its file.

        Raises:
            InputError: a label or domain that cannot be kept, or a disk that is full.
        """
        for name, text in (("label", label), ("domain", domain)):
            if len(text) > 200 or not (text.isprintable() and text == text.strip()):
                raise InputError(
                    f"the {name} {text[:200]!r}",
                    expected="at most 200 characters on one line, without spaces around them",
                    next_step=f"correct the {name}",
                )
        suffix = _SUFFIXES.get(str(kind_of(content[:16])), ".img")
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"{sha256[:2]}/{sha256}{suffix}"
        path = self.folder / name
        if not path.exists():
            with atomic_path(path) as partial:
                partial.write_bytes(content)
        kept = {"label": label, "domain": domain}
        index.set_notes(UPLOADS, {self._key(path): kept})
        return sha256, uploaded(str(path), kept)

    def drop(self, index: AbstractIndex, files: list[Source]) -> None:
        """Delete those of the files that were uploaded; others are left alone."""
        mine = [Path(file.location) for file in files if not is_url(file.location)]
        mine = [path for path in mine if path.is_relative_to(self.folder)]
        if mine:
            index.set_notes(UPLOADS, {self._key(path): None for path in mine})
            for path in mine:
                path.unlink(missing_ok=True)

    def _key(self, path: Path) -> str:
        return os.path.relpath(path, self._index_folder)
