"""What the server answers: JSON, its fields as the API describes them, and errors."""

from __future__ import annotations

import errno
import json
import logging
import math
import re
from tempfile import gettempdir
from typing import Any, Final

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from samething.errors import ArtefactError, InputError, MissingExtraError, SamethingError
from samething.files import Json
from samething.images import Box
from samething.search import Matches
from samething.web.batching import BusyError
from samething.web.guards import is_loopback, sender_of

_log: Final = logging.getLogger(__name__)
_NAME: Final = r"[^/\s,;:'\"()<>]+"
_PATH: Final = re.compile(rf"(?<![\w/:.])(?:/{_NAME}(?: {_NAME})*(?=/))*/{_NAME}")
"""An absolute path in a sentence; folders may have spaces in their names, the last part ends at one."""


class UnknownImageError(InputError):
    """An id that the index does not know."""

    def __init__(self, row_id: str) -> None:
        super().__init__(
            f"the image {row_id[:100]!r}",
            expected="the id of an image of this index",
            next_step="search again: it may have been deleted",
        )


class MatchAnswer(pydantic.BaseModel):
    """One image found."""

    rank: int
    score: float = pydantic.Field(description="cosine similarity to the query, in [-1, 1]")
    id: str
    path: str
    label: str
    domain: str
    probability: float | None = pydantic.Field(description="that it shows the same thing, if calibrated")
    band: str | None = pydantic.Field(description="the same, perhaps, or no match; if calibrated")
    copies: list[str] = pydantic.Field(description="other places with the same image")
    metadata: dict[str, Any]
    place: list[float] | None = pydantic.Field(
        description="the part of it that is more like the query than the whole, in an index with regions: "
        "left, top, right, bottom as shares of the sides"
    )
    evidence: dict[str, Any] | None = pydantic.Field(
        description="what a second look found, if one was asked for"
    )


class SearchAnswer(pydantic.BaseModel):
    """What a query found, best first."""

    query: str
    no_match: bool = pydantic.Field(description="nothing found is likely to be the same thing")
    band: str | None = pydantic.Field(
        description="of the best match: the same, perhaps, or no match; if calibrated"
    )
    advice: str = pydantic.Field(description="what to do with the answer; empty where nothing was calibrated")
    calibrated_by: str | None = pydantic.Field(
        description="labels, or views of the index's own images (a rough guide); null: no probabilities"
    )
    looked_for: list[str] = pydantic.Field(description="ids of the index's own images that were looked for")
    matches: list[MatchAnswer]


class ErrorAnswer(pydantic.BaseModel):
    """What is wrong, what would have been right, and what to do."""

    error: str
    expected: str | None = None
    next_step: str | None = None


class DeleteRequest(pydantic.BaseModel):
    """Which images to delete."""

    ids: list[str] = pydantic.Field(max_length=10_000)


def box_of(crop: str | None) -> Box | None:
    """A box as it is written in a request: left,top,right,bottom.

    >>> box_of("1,2,30,40"), box_of("")
    (Box(left=1, top=2, right=30, bottom=40), None)
    """
    if not crop:
        return None
    try:
        left, top, right, bottom = (round(float(part)) for part in crop.split(","))
    except (ValueError, OverflowError):
        raise InputError(
            f"the crop {crop[:100]!r}",
            expected="left,top,right,bottom in pixels",
            next_step="for instance: 10,20,200,180",
        ) from None
    return Box(left, top, right, bottom)


class Answer(JSONResponse):
    """JSON in ASCII: text that is no valid Unicode, echoed in an error, is still an answer."""

    def render(self, content: Any) -> bytes:
        """The bytes of the answer."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def plain(found: Matches) -> dict[str, Json]:
    """Matches as JSON that every reader takes: numbers that are not finite are left out."""
    answer = found.to_json()
    for match in answer["matches"]:
        match["metadata"] = {
            name: value
            for name, value in match["metadata"].items()
            if not (isinstance(value, float) and not math.isfinite(value))
        }
    return answer


def failure(status: int, error: str, expected: str | None = None, next_step: str | None = None) -> Answer:
    """An error as an answer."""
    headers = {"retry-after": "1"} if status == 429 else None
    return Answer({"error": error, "expected": expected, "next_step": next_step}, status, headers)


async def failed(request: fastapi.Request, error: Exception) -> Response:
    """The answer to a request that ended in an error; of an unexpected one the sender learns nothing.

    Who asks from elsewhere learns no path of this machine; the log of the server has the whole sentence.
    """
    if _is_full(error):
        _log.error("a folder is full: %s", error.__cause__ or error)
        next_step = f"make room where the server keeps uploads and in its temporary folder {gettempdir()}"
        return failure(507, "the server's disk is full", None, _told(request, next_step))
    if isinstance(error, SamethingError):
        statuses = {BusyError: 429, UnknownImageError: 404, MissingExtraError: 404, ArtefactError: 503}
        status = next((number for kind, number in statuses.items() if isinstance(error, kind)), 400)
        return failure(
            status, *(_told(request, text) for text in (error.given, error.expected, error.next_step))
        )
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = " ".join(str(part) for part in first["loc"][1:]) or "the request"
        return failure(422, f"{place}: {first['msg']}", None, "see /docs")
    if isinstance(error, HTTPException):
        answer = failure(error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer
    return failure(500, "something unexpected happened", None, "see the server's log")


def _told(request: fastapi.Request, text: str) -> str:
    """A sentence as its reader may have it: from elsewhere, of each absolute path only the last part."""
    if is_loopback(sender_of(request.scope)):
        return text
    shorter = _PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)
    if shorter != text:
        _log.warning("told to %s without its paths: %s", sender_of(request.scope), text)
    return shorter


def _is_full(error: BaseException | None) -> bool:
    """Whether a write found no room; the parser of forms hides that as the cause of its own error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


FAILURES = (SamethingError, RequestValidationError, HTTPException, Exception)
"""What :func:`failed` answers."""
