"""What one can look for: an image from anywhere, a part of it, several images of one thing, or a label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageGrab

from samething.arrays import Float
from samething.embedder import Embedder
from samething.errors import ImageError, InputError
from samething.images import Box, ImageLike

CLIPBOARD = "clipboard"
"""Name of a query that is the image in the clipboard."""


def _clipboard() -> ImageLike:
    try:
        content: Any = ImageGrab.grabclipboard()
    except (OSError, NotImplementedError) as error:
        raise ImageError(
            f"the clipboard cannot be read ({error})",
            expected="a desktop with a clipboard (on Linux with wl-paste or xclip)",
            next_step="save the image and give its path",
        ) from error
    if isinstance(content, list) and content:  # files that were copied
        return Path(content[0])
    if not isinstance(content, Image.Image):
        raise ImageError(
            "the clipboard holds no image",
            expected="an image or an image file that was copied",
            next_step="copy it again, or give its path",
        )
    return content


def query_images(
    embedder: Embedder, images: Sequence[ImageLike], *, crop: Box | None = None
) -> list[Image.Image]:
    """The images of one query, decoded as those of the index are.

    Args:
        embedder: the index's model.
        images: what :func:`samething.images.decode` takes, or the word ``clipboard``.
        crop: the part to look for.

    Raises:
        ImageError: one of them cannot be read.
        InputError: none given, or a crop of several.
    """
    if not images:
        raise InputError("no image to look for", expected="one or more", next_step="name an image")
    if crop is not None:
        require_one_to_crop(len(images))
    given = [
        _clipboard() if isinstance(image, str) and image == CLIPBOARD and not Path(image).exists() else image
        for image in images
    ]
    return [embedder.unpacked(image, box=crop) for image in given]


def require_one_to_crop(num_images: int) -> None:
    """Refuse a crop of several images.

    Raises:
        InputError: says how many.
    """
    if num_images > 1:
        raise InputError(
            f"a crop and {num_images} images",
            expected="one image with a crop",
            next_step="cut the images yourself, or give one of them",
        )


def mean_direction(vectors: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "1 d"]:
    """What several images have in common.

    >>> mean_direction(np.eye(2, dtype=np.float32)).round(3).tolist()
    [[0.7070000171661377, 0.7070000171661377]]

    Raises:
        InputError: images whose mean has no direction.
    """
    mean: Float[np.ndarray, " d"] = vectors.astype(np.float64).mean(axis=0)
    length = float(np.linalg.norm(mean))
    if length < 1e-6:
        raise InputError(
            "images that have nothing in common",
            expected="several images of one thing",
            next_step="give fewer of them, or --combine max",
        )
    direction: Float[np.ndarray, "1 d"] = (mean / length).astype(np.float32)[None]
    return direction
