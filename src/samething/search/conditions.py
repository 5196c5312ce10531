"""Filters as they are typed: ``domain``, ``label``, ``folder`` and ``COLUMN=…``, for an index."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from samething.errors import InputError
from samething.images import is_url
from samething.index import Between, IndexDescription, Where

_MOMENTS: Final = ("taken", "modified")
_YEAR: Final = re.compile(r"\d{4}")
_PERIOD: Final = re.compile(r"(\d{4})-(?:(\d\d)(?:-(\d\d))?)?")


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
