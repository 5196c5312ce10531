"""Filters as they are typed: ``domain``, ``label``, ``folder`` and ``COLUMN=…``, for an index."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from samething.errors import InputError
from samething.images import is_url
from samething.index import Between, IndexDescription, Where


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
    """A range of numbers or dates.

    >>> _range("width", "640.."), _range("width", "3..5"), _range("modified", "1970-01-02")
    (Between(low=640.0, high=None), Between(low=3.0, high=5.0), Between(low=86400.0, high=172799.999999))
    """
    low, dots, high = text.partition("..")
    if not dots:
        high = low
    try:
        return Between(_number(low, last=False), _number(high, last=True))
    except ValueError as error:
        raise InputError(
            f"the range {name}={text}",
            expected="a number or a date (2024-01-31), or two of them with .. between, either left out",
            next_step=f"for instance: {name}=10..20",
        ) from error


def _number(text: str, *, last: bool) -> float | None:
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        moment = datetime.datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        if last and len(text) == len("2024-01-31"):
            moment += datetime.timedelta(days=1) - datetime.timedelta(microseconds=1)
        return moment.timestamp()
