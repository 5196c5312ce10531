"""When, where and by which camera an image was taken, as its EXIF data say (EXIF 2.3, CIPA DC-008)."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
from collections.abc import Callable
from typing import Any, Final

from PIL import ExifTags, Image

from samething.errors import visible

_MOMENT: Final = re.compile(r"(\d{4})\D(\d\d?)\D(\d\d?)(?:\D(\d\d?)\D(\d\d?)(?:\D(\d\d?))?)?")
_MOST_CHARACTERS: Final = 100


def capture_of(getexif: Callable[[], Image.Exif]) -> dict[str, Any]:
    """What is known of ``taken``, ``camera``, ``latitude`` and ``longitude``; never an error.

    ``taken`` is in seconds since 1970, the camera's clock read as if it were UTC: few files say their time
    zone, and a day is then the day where the image was taken. The place is in degrees, north and east.
    A part that is damaged, or that cameras write for "unknown", is left out.
    """
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # damaged metadata may raise nearly anything
        exif = getexif()
        for part in (_taken, _camera, _place):
            with contextlib.suppress(Exception):
                found |= part(exif)
    return found


def _taken(exif: Image.Exif) -> dict[str, Any]:
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    for tag in (ExifTags.Base.DateTimeOriginal, ExifTags.Base.DateTimeDigitized):
        numbers = _MOMENT.match(_text(tags.get(tag)))
        with contextlib.suppress(ValueError):  # such as 0000:00:00
            if numbers is not None:
                moment = datetime.datetime(*map(int, numbers.groups("0")), tzinfo=datetime.UTC)  # type: ignore[misc, arg-type]
                return {"taken": moment.timestamp()}
    return {}


def _camera(exif: Image.Exif) -> dict[str, Any]:
    make, model = (_text(exif.get(tag)) for tag in (ExifTags.Base.Make, ExifTags.Base.Model))
    if make.split(" ")[0].lower() in model.lower():  # "NIKON CORPORATION" and "NIKON D90"
        make = ""
    name = f"{make} {model}".strip()[:_MOST_CHARACTERS]
    return {"camera": visible(name)} if name else {}


def _place(exif: Image.Exif) -> dict[str, Any]:
    tags = exif.get_ifd(ExifTags.IFD.GPSInfo)
    latitude = _degrees(tags[ExifTags.GPS.GPSLatitude], _text(tags.get(ExifTags.GPS.GPSLatitudeRef)), "S")
    longitude = _degrees(tags[ExifTags.GPS.GPSLongitude], _text(tags.get(ExifTags.GPS.GPSLongitudeRef)), "W")
    if not (abs(latitude) <= 90 and abs(longitude) <= 180) or latitude == longitude == 0:
        return {}
    return {"latitude": latitude, "longitude": longitude}


def _degrees(parts: Any, side: str, negative: str) -> float:
    """Degrees, perhaps minutes and seconds, as degrees; NaN where one of them is no number."""
    parts = parts if isinstance(parts, tuple) else (parts,)
    degrees = math.fsum(float(part) / 60**power for power, part in enumerate(parts))
    return round(-degrees if side.upper() == negative else degrees, 6)


def _text(value: object) -> str:
    """A text of EXIF data, which may come as bytes and ends at the first null."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
    return text.partition("\0")[0].strip()
