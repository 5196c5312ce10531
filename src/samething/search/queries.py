"""What one can look for: an image from anywhere, a part of it, several images of one thing; and among what.

Filters are as they are typed: ``domain``, ``label``, ``folder`` and ``COLUMN=…``.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageGrab

from samething.arrays import Float
from samething.embedder import Embedder
from samething.errors import ImageError, InputError
from samething.images import Box, ImageLike, is_url
from samething.index import Between, IndexDescription, Where

CLIPBOARD = "clipboard"
"""Name of a query that is the image in the clipboard."""
_MOMENTS: Final = ("taken", "modified")
_YEAR: Final = re.compile(r"\d{4}")
_PERIOD: Final = re.compile(r"(\d{4})-(?:(\d\d)(?:-(\d\d))?)?")


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
    require_one_to_crop(crop, len(images))
    given = [
        _clipboard() if isinstance(image, str) and image == CLIPBOARD and not Path(image).exists() else image
        for image in images
    ]
    return [embedder.unpacked(image, box=crop) for image in given]


def require_one_to_crop(crop: Box | None, num_images: int) -> None:
    """Refuse a crop of several images.

    Raises:
        InputError: says how many.
    """
    if crop is not None and num_images > 1:
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


# ---- among what


def conditions(
    description: IndexDescription,
    *,
    domain: Sequence[str] | None = None,
    label: Sequence[str] | None = None,
    folder: Path | str | None = None,
    where: Sequence[str] = (),
) -> Where:
    """The filter of a search.

    Args:
        description: the columns of the index.
        domain: domains to look in.
        label: labels to look among.
        folder: folder (or URL) above the images to look among.
        where: COLUMN=TEXT, or COLUMN=LOW..HIGH for a column of numbers.

    Raises:
        InputError: an unknown column, or a value that does not fit it.
    """
    found: dict[str, str | Sequence[str] | Between] = {}
    columns = description.columns
    for name, values in (("domain", domain), ("label", label)):
        if values:
            found[f"{name}s" if f"{name}s" in columns else name] = list(values)
    if folder is not None:
        if "folders" not in columns:
            raise InputError(
                f"the folder {folder}",
                expected="an index that keeps the folders of its images",
                next_step="make the index again with this version",
            )
        text = str(folder)
        found["folders"] = text.rstrip("/") if is_url(text) else os.path.abspath(text)  # noqa: PTH100
    for text in where:
        name, sign, value = text.partition("=")
        kind = columns.get(name)
        if not sign or kind in (None, "bytes"):
            known = [column for column, its in columns.items() if its != "bytes"]
            raise InputError(
                f"the condition {text!r}",
                expected=f"COLUMN=VALUE with one of the columns {', '.join(known)}",
                next_step="for instance: --where 'width=640..'",
            )
        found[name] = _range(name, value) if kind in ("integer", "number") else [value]
    return found


def _range(name: str, text: str) -> Between:
    """A range of numbers or dates; a date may be a day, a month or, of a column of moments, a year.

    >>> _range("width", "640.."), _range("width", "3..5"), _range("modified", "1970-01-02")
    (Between(low=640.0, high=None), Between(low=3.0, high=5.0), Between(low=86400.0, high=172799.999999))
    >>> _range("taken", "1970-01") == _range("taken", "1970-01-01..1970-01-31"), _range("taken", "1970..").low
    (True, 0.0)
    """
    low, dots, high = text.partition("..")
    if not dots:
        high = low
    if name in _MOMENTS:  # four digits are a year there, and no number of seconds
        low, high = (f"{end}-" if _YEAR.fullmatch(end) else end for end in (low, high))
    try:
        return Between(_number(low, last=False), _number(high, last=True))
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"the range {name}={text}",
            expected="a number or a date (2024-01-31, 2024-01), or two with .. between, either left out",
            next_step=f"for instance: {name}=10..20",
        ) from error


def _number(text: str, *, last: bool) -> float | None:
    if not text:
        return None
    with contextlib.suppress(ValueError):
        return float(text)
    parts = _PERIOD.fullmatch(text)
    if parts is None:
        moment = datetime.datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    year, month, day = (int(part or 0) for part in parts.groups())
    first = datetime.datetime(year, month or 1, day or 1, tzinfo=datetime.UTC)
    if not last:
        return first.timestamp()
    if day:
        after = first + datetime.timedelta(days=1)
    else:  # the next month, or the next year
        after = first.replace(year=year + (month in (0, 12)), month=month % 12 + 1 if month else 1)
    return (after - datetime.timedelta(microseconds=1)).timestamp()
