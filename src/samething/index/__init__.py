"""The index: vectors and metadata of an image collection, tied to the model that made them.

:func:`create_index` and :func:`open_index` choose the engine by the location: a folder, or a URL whose scheme
is a key of :data:`ENGINES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from samething.errors import InputError
from samething.index.approximate import RecallReport
from samething.index.backup import back_up, restore
from samething.index.conditions_and_hits import Between, Hits, Verification, Where
from samething.index.description import COLUMNS, ColumnKind, IndexDescription, Items, Regions
from samething.index.interface import AbstractIndex
from samething.index.milvus import MilvusIndex
from samething.index.sqlite import SqliteIndex
from samething.retrieval.codes import Coder

__all__ = [
    "COLUMNS",
    "ENGINES",
    "AbstractIndex",
    "Between",
    "ColumnKind",
    "Hits",
    "IndexDescription",
    "Items",
    "MilvusIndex",
    "RecallReport",
    "Regions",
    "SqliteIndex",
    "Verification",
    "Where",
    "back_up",
    "create_index",
    "exists_index",
    "open_index",
    "restore",
]

ENGINES: Final[dict[str, type[AbstractIndex]]] = {
    "sqlite": SqliteIndex,
    "milvus": MilvusIndex,
    "milvus-lite": MilvusIndex,
}
"""URL scheme -> engine. A location without a scheme is a folder, which is ``sqlite``."""

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def create_index(
    location: str | Path,
    *,
    dim: int,
    model_fingerprint: str,
    model_name: str,
    extra_columns: Mapping[str, ColumnKind] | None = None,
    coder: Coder | None = None,
    regions: str | None = None,
) -> AbstractIndex:
    """Make an empty index with the engine that the location asks for. See :meth:`AbstractIndex.create`.

    Args:
        location: a folder, or a URL.
        dim: number of dimensions of a vector.
        model_fingerprint: identity of the model whose vectors will be kept.
        model_name: its name, for messages.
        extra_columns: further metadata columns and their kinds.
        coder: the model's, if vectors are to be kept in codes; an engine may keep floats all the same.
        regions: how parts of images are chosen that have vectors of their own; None: none have.
    """
    engine, place = _engine(location)
    description = IndexDescription(
        dim=dim,
        model_name=model_name,
        model_fingerprint=model_fingerprint,
        extra_columns=dict(extra_columns or {}),
        coder=coder,
        regions=regions,
    )
    return engine.create(place, description)


def open_index(location: str | Path) -> AbstractIndex:
    """Open an index with the engine that the location asks for. See :meth:`AbstractIndex.open`.

    Args:
        location: where it was made.
    """
    engine, place = _engine(location)
    return engine.open(place)


def exists_index(location: str | Path) -> bool:
    """Whether there is an index at a location, finished or not readable by this version included."""
    engine, place = _engine(location)
    return engine.exists(place)


def _engine(location: str | Path) -> tuple[type[AbstractIndex], str | Path]:
    url = _URL.fullmatch(location) if isinstance(location, str) else None
    if url is None:
        return SqliteIndex, location
    scheme = url[1].lower()
    if scheme not in ENGINES:
        raise InputError(
            f"the index location {location!r}",
            expected="a folder, or a URL that starts with " + " or ".join(f"{name}://" for name in ENGINES),
            next_step="correct the scheme; a folder needs none",
        )
    return ENGINES[scheme], (url[2] if ENGINES[scheme] is SqliteIndex else location)
