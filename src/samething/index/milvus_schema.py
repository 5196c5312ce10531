"""How a row of an index lies in a Milvus collection, and how a filter is said in Milvus' language.

A collection has these fields:

``id``
    32 hexadecimal digits of the SHA-256 of the row's id, which may be any text.
``vector``, ``vector_crc32``
    The vector, and the CRC-32 over id and vector.
``metadata``, ``thumbnail``
    The row as JSON, and its thumbnail in base64 (empty: none).
``F_NAME``
    A field a column to filter by: texts as 32 digits of their SHA-256, so that no text of a user is
    ever part of a filter's expression; numbers as they are, and the lowest number there is for null.

In an index with regions these besides:

``region``
    0 for a row; from 1 on for a region of it, an entity of its own whose metadata are the row's id and the
    place, and whose further fields are the row's, to filter by.
``row``
    The ``id`` field of the row.

Milvus 2.3, which has no null and escapes nothing in texts, is enough.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from samething.arrays import Embeddings
from samething.errors import ArtefactError, InputError
from samething.index.conditions_and_hits import Between, Condition
from samething.index.description import IndexDescription, Regions, Table, vector_crc32
from samething.index.interface import Vector

LONGEST_TEXT: Final = 65_535
"""Bytes in a text of Milvus."""
MOST_TEXTS: Final = 4096
"""Texts in a list of Milvus."""
_NO_TEXT: Final = "-"
_NO_NUMBER: Final = {"integer": -(2**63), "number": -sys.float_info.max}
_HAS_NUMBER: Final = {
    "integer": f"F_{{}} >= {-(2**63) + 1}",  # Milvus reads the digits before it reads the sign
    "number": f"F_{{}} > {_NO_NUMBER['number']!r}",
}
FORMAT_VERSION: Final = 2
"""Version 2 has regions; a collection without them is written as version 1, which earlier programs read."""


def key(text: str) -> str:
    """32 hexadecimal digits that stand for a text.

    >>> key("'); drop")
    '89cb875f5c84405360b3ef0d891d02f1'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def collection_schema(description: IndexDescription) -> Any:
    """The fields of a new collection; what the index is bound to is its description."""
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(
        auto_id=False, enable_dynamic_field=False, description=bound_to(description)
    )
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=32)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=description.dim)
    schema.add_field("vector_crc32", DataType.INT64)
    schema.add_field("metadata", DataType.VARCHAR, max_length=LONGEST_TEXT)
    schema.add_field("thumbnail", DataType.VARCHAR, max_length=LONGEST_TEXT)
    if description.regions is not None:
        schema.add_field("region", DataType.INT64)
        schema.add_field("row", DataType.VARCHAR, max_length=32)
    for name, kind in description.columns.items():
        if kind == "text":
            schema.add_field(f"F_{name}", DataType.VARCHAR, max_length=32)
        elif kind == "texts":
            schema.add_field(
                f"F_{name}",
                DataType.ARRAY,
                element_type=DataType.VARCHAR,
                max_capacity=MOST_TEXTS,
                max_length=32,
            )
        elif kind != "bytes":
            schema.add_field(f"F_{name}", DataType.INT64 if kind == "integer" else DataType.DOUBLE)
    return schema


def bound_to(description: IndexDescription) -> str:
    """The inverse of :func:`read_description`."""
    bound = dataclasses.asdict(dataclasses.replace(description, coder=None))
    del bound["coder"]
    if description.regions is None:
        del bound["regions"]
    return json.dumps({"samething_index": FORMAT_VERSION if description.regions else 1, **bound})


def read_description(text: str, location: str) -> IndexDescription:
    """What a collection is bound to.

    Raises:
        ArtefactError: another program made the collection, or a newer version of this one.
    """
    try:
        bound = json.loads(text)
        version = int(bound["samething_index"])
        if version <= FORMAT_VERSION:
            return IndexDescription(
                dim=int(bound["dim"]),
                model_name=str(bound["model_name"]),
                model_fingerprint=str(bound["model_fingerprint"]),
                extra_columns=dict(bound["extra_columns"]),
                regions=bound.get("regions"),
            )
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise ArtefactError(
            f"the collection {location} was not made by samething",
            expected="a collection that samething index made",
            next_step="give another name of a collection, which will be made",
        ) from error
    raise ArtefactError(
        f"the collection {location} has format version {version}",
        expected=f"at most {FORMAT_VERSION}",
        next_step="upgrade samething",
    )


def entities(
    vectors: Embeddings,
    items: Table,
    regions: Mapping[str, Regions],
    description: IndexDescription,
) -> list[dict[str, Any]]:
    """Rows as Milvus takes them: the regions of all, then the rows.

    Raises:
        InputError: a row is larger than Milvus allows.
    """
    parts, rows = [], []
    for vector, item in zip(np.asarray(vectors), items.to_pylist(), strict=True):
        thumbnail = item.pop("thumbnail")
        row = {
            "id": key(item["id"]),
            **_vector(item["id"], vector),
            "metadata": json.dumps(item, ensure_ascii=False),
            "thumbnail": base64.b64encode(thumbnail or b"").decode(),
        }
        for name in ("metadata", "thumbnail"):
            if len(row[name].encode()) > LONGEST_TEXT:
                raise InputError(
                    f"the {name} of {item['id']!r} takes {len(row[name].encode()):,} bytes",
                    expected=f"at most {LONGEST_TEXT:,} bytes in Milvus",
                    next_step="shorten it, or use the embedded engine",
                )
        for name, kind in description.columns.items():
            if kind != "bytes":
                row[f"F_{name}"] = _field(item[name], kind)
        rows.append(row)
        if description.regions is None:
            continue
        row |= {"region": 0, "row": row["id"]}
        own = regions.get(item["id"], Regions((), vectors[:0]))
        for number, (place, vector) in enumerate(zip(own.places, own.vectors, strict=True), start=1):
            parts.append(
                {
                    **row,
                    **_vector(item["id"], vector),
                    "id": key(f"{row['id']} {number}"),
                    "metadata": json.dumps({"id": item["id"], "region": number, "place": place}),
                    "thumbnail": "",
                    "region": number,
                }
            )
    return [*parts, *rows]


def _vector(name: str, vector: Vector) -> dict[str, Any]:
    return {"vector": vector.tolist(), "vector_crc32": vector_crc32([name], vector[None])[0]}


def _field(value: Any, kind: str) -> Any:
    if kind == "text":
        return _NO_TEXT if value is None else key(value)
    if kind == "texts":
        return [key(text) for text in dict.fromkeys(value or []) if text is not None][:MOST_TEXTS]
    return _NO_NUMBER[kind] if value is None else value


def item_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a row as Milvus returns it."""
    item: dict[str, Any] = json.loads(row["metadata"])
    if "thumbnail" in row:
        item["thumbnail"] = base64.b64decode(row["thumbnail"]) or None
    return item


def expression(where: Mapping[str, Condition], description: IndexDescription) -> str:
    """A filter in Milvus' language; the empty text lets everything through.

    Numbers are compared with the range's ends written out in full. Regions have their row's fields.
    """
    parts = []
    for name, condition in where.items():
        kind = description.columns[name]
        if isinstance(condition, Between):
            parts.append(_HAS_NUMBER[kind].format(name))
            for end, sign in ((condition.low, ">="), (condition.high, "<=")):
                if end is not None:
                    parts.append(f"F_{name} {sign} {end!r}")
            continue
        values = "[" + ", ".join(f'"{key(value)}"' for value in condition) + "]"
        parts.append(
            f"array_contains_any(F_{name}, {values})" if kind == "texts" else f"F_{name} in {values}"
        )
    return " and ".join(parts)
