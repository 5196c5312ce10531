"""How a row of an index lies in an SQLite database, and how a filter is said in SQL.

``rows`` holds a row's columns, two checksums, and its slot: its place in the file of vectors. ``members``
holds every text of its lists, to filter by; ``blobs`` its thumbnail, which would slow reading the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np

from samething.arrays import Int, Shaped
from samething.index.conditions_and_hits import Between, Condition
from samething.index.description import IndexDescription, vector_crc32

Connection: TypeAlias = sqlite3.Connection
Slots: TypeAlias = Int[np.ndarray, " _"]

_SQL_TYPES: Final = {"text": "TEXT", "texts": "TEXT", "integer": "INTEGER", "number": "REAL"}
_VALUES: Final = json.JSONEncoder(default=repr).encode
_LIST: Final = json.JSONEncoder(ensure_ascii=False).encode
_MOST_VALUES: Final = 30_000
"""SQLite takes 32,766 values in a statement."""
_SCHEMA: Final = """
CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), change INTEGER NOT NULL);
CREATE TABLE spaces (space INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, file TEXT NOT NULL,
  dtype TEXT NOT NULL, dim INTEGER NOT NULL, num_slots INTEGER NOT NULL, num_dead INTEGER NOT NULL);
CREATE TABLE segments (number INTEGER PRIMARY KEY, space INTEGER NOT NULL, start INTEGER NOT NULL,
  count INTEGER NOT NULL, crc32 INTEGER NOT NULL);
CREATE TABLE dead (number INTEGER PRIMARY KEY, space INTEGER NOT NULL, slot INTEGER NOT NULL);
CREATE TABLE members (name INTEGER, text TEXT, slot INTEGER, PRIMARY KEY (name, text, slot)) WITHOUT ROWID;
CREATE TABLE blobs (kind TEXT NOT NULL, slot INTEGER NOT NULL, content BLOB NOT NULL, crc32 INTEGER NOT NULL,
  UNIQUE (kind, slot));
CREATE TABLE notes (kind TEXT, key TEXT, value TEXT NOT NULL, crc32 INTEGER NOT NULL,
  PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE TABLE rows (slot INTEGER PRIMARY KEY, {columns}, vector_crc32 INTEGER NOT NULL,
  row_crc32 INTEGER NOT NULL);
CREATE UNIQUE INDEX rows_id ON rows (id);
CREATE INDEX rows_label ON rows (label);
CREATE INDEX rows_domain ON rows (domain)"""
_REGIONS: Final = """;
CREATE TABLE regions (slot INTEGER PRIMARY KEY, row INTEGER NOT NULL, "left" REAL NOT NULL, top REAL NOT NULL,
  "right" REAL NOT NULL, bottom REAL NOT NULL, vector_crc32 INTEGER NOT NULL, region_crc32 INTEGER NOT NULL);
CREATE INDEX regions_row ON regions (row)"""


def checksum(values: Sequence[Any]) -> int:
    """CRC-32 over values of a database's row."""
    return zlib.crc32(_VALUES(values).encode())


@dataclasses.dataclass(frozen=True)
class StoredRow:
    """A row as the database has it."""

    values: tuple[Any, ...]
    """Its columns but the thumbnail; the id comes first, lists are JSON."""
    thumbnail: bytes | None


class RowFormat:
    """The tables of an index with certain columns: written, read and filtered.

    Args:
        description: what the index is bound to.
    """

    def __init__(self, description: IndexDescription) -> None:
        self.kinds = {name: kind for name, kind in description.columns.items() if kind != "bytes"}
        """Columns of the table ``rows`` and their kinds, in order."""
        columns = ", ".join(f'"{name}" {_SQL_TYPES[kind]}' for name, kind in self.kinds.items())
        schema = _SCHEMA.format(columns=columns) + (_REGIONS if description.regions else "")
        self.statements = [part.strip() for part in schema.split(";")]
        """What makes the tables."""
        self.names = ", ".join(f'"{name}"' for name in self.kinds)
        self.stored_names = f"{self.names}, row_crc32"
        self._places = {name: place for place, name in enumerate(self.kinds)}
        self._lists = {name: place for name, place in self._places.items() if self.kinds[name] == "texts"}

    # ---- writing

    def stored(self, items: Sequence[Mapping[str, Any]]) -> list[StoredRow]:
        """Checked metadata as it is stored."""
        found = []
        for item in items:
            values = []
            for name, kind in self.kinds.items():
                value = item.get(name)
                if value is None or value != value:  # SQLite knows no NaN
                    value = None
                elif kind == "texts":
                    value = _LIST(value)
                elif kind == "number":
                    value += 0.0  # nor a zero below zero
                values.append(value)
            found.append(StoredRow(tuple(values), item["thumbnail"]))
        return found

    def insert(
        self, db: Connection, slots: Sequence[int], rows: Sequence[StoredRow], checks: Sequence[int]
    ) -> None:
        """Insert rows whose ids are not there; ``checks`` are the CRC-32 of their vectors."""
        marks = ", ".join("?" * (len(self.kinds) + 3))
        db.executemany(
            f"INSERT INTO rows VALUES ({marks})",
            [
                (slot, *row.values, check, checksum(row.values))
                for slot, row, check in zip(slots, rows, checks, strict=True)
            ],
        )
        members = self._members((slot, row.values) for slot, row in zip(slots, rows, strict=True))
        db.executemany("INSERT INTO members VALUES (?, ?, ?)", members)
        db.executemany(
            "INSERT INTO blobs VALUES ('thumbnail', ?, ?, ?)",
            [
                (slot, row.thumbnail, zlib.crc32(row.thumbnail))
                for slot, row in zip(slots, rows, strict=True)
                if row.thumbnail is not None
            ],
        )

    def remove(self, db: Connection, slots: Sequence[int]) -> None:
        """Remove rows; what their slots hold stays in the file."""
        members = self._members(at_slots(db, self.names, slots).items())
        db.executemany("DELETE FROM members WHERE (name, text, slot) = (?, ?, ?)", members)
        for table in ("rows", "blobs"):
            db.executemany(f"DELETE FROM {table} WHERE slot = ?", [(slot,) for slot in slots])

    def _members(self, rows: Iterable[tuple[int, Sequence[Any]]]) -> set[tuple[int, str, int]]:
        return {
            (place, text, slot)
            for slot, values in rows
            for place in self._lists.values()
            for text in json.loads(values[place] or "[]")
            if text is not None
        }

    # ---- reading

    @staticmethod
    def slots(db: Connection, ids: Iterable[str]) -> dict[str, int]:
        """The slots of those ids that are there."""
        return {
            name: slot
            for name in ids
            for (slot,) in db.execute("SELECT slot FROM rows WHERE id = ?", (name,))
        }

    def read(
        self,
        db: Connection,
        slots: Sequence[int],
        columns: Sequence[str],
        known: Mapping[int, tuple[Any, ...]] = MappingProxyType({}),
    ) -> list[dict[str, Any]]:
        """Columns of rows, in the order of the slots.

        ``known`` are the ``stored_names`` of rows that the transaction has read already.

        Raises:
            ValueError: a row or thumbnail is damaged; names all of them.
        """
        found: dict[int, dict[str, Any]] = {}
        problems: list[str] = []
        unread = [slot for slot in slots if slot not in known]
        stored = {**known, **at_slots(db, self.stored_names, unread)}
        for slot in dict.fromkeys(slots):
            row = stored.get(slot)
            if row is None or checksum(row[:-1]) != row[-1]:
                problems.append(f"the row of {row[0]!r} is damaged" if row else f"slot {slot} has no row")
                row = (None,) * (len(self.kinds) + 1)
            found[slot] = {name: row[self._places[name]] for name in columns if name != "thumbnail"}
            for name in self._lists.keys() & found[slot].keys():
                found[slot][name] = found[slot][name] and json.loads(found[slot][name])
            if "thumbnail" in columns:
                blob = db.execute(
                    "SELECT content, crc32 FROM blobs WHERE kind = 'thumbnail' AND slot = ?", (slot,)
                ).fetchone()
                if blob and zlib.crc32(blob[0]) != blob[1]:
                    problems.append(f"the thumbnail of {row[0]!r} is damaged")
                found[slot]["thumbnail"] = blob[0] if blob else None
        if problems:
            raise ValueError("; ".join(problems))
        return [found[slot] for slot in slots]

    def scan(self, db: Connection, columns: Sequence[str], num_rows: int) -> Iterator[list[list[Any]]]:
        """The columns of all rows, so many rows at a time: a list of values per column.

        Raises:
            ValueError: a row or thumbnail is damaged.
        """
        blob, joined = "NULL, NULL", ""
        if "thumbnail" in columns:
            blob = "content, blobs.crc32"
            joined = "LEFT JOIN blobs ON kind = 'thumbnail' AND blobs.slot = rows.slot"
        cursor = db.execute(f"SELECT {self.names}, row_crc32, {blob} FROM rows {joined}")
        places = [self._places.get(name, len(self.kinds) + 1) for name in columns]
        while part := cursor.fetchmany(num_rows):
            for *values, check, content, content_check in part:
                if checksum(values) != check or (content and zlib.crc32(content) != content_check):
                    raise ValueError(f"the row of {values[0]!r} is damaged")
            by_column = list(zip(*part, strict=True))
            yield [
                [text and json.loads(text) for text in by_column[place]]
                if name in self._lists
                else list(by_column[place])
                for name, place in zip(columns, places, strict=True)
            ]

    def matching(self, db: Connection, where: Mapping[str, Condition]) -> Slots:
        """Slots of the rows that a filter lets through, ascending."""
        found = [self._meeting(db, name, condition) for name, condition in where.items()]
        return functools.reduce(functools.partial(np.intersect1d, assume_unique=True), found)

    def _meeting(self, db: Connection, name: str, condition: Condition) -> Slots:
        if isinstance(condition, Between):
            ends = {">=": condition.low, "<=": condition.high}
            parts = [f'"{name}" {sign} ?' for sign, end in ends.items() if end is not None]
            values = [end for end in ends.values() if end is not None]
            return _slots(db, "rows WHERE " + " AND ".join([f'"{name}" IS NOT NULL', *parts]), values)
        parts_found = [np.empty(0, dtype=np.int64)]
        for some in chunks(list(dict.fromkeys(condition)), _MOST_VALUES):
            marks = ", ".join("?" * len(some))
            if self.kinds[name] == "texts":
                table = f"members WHERE name = {self._places[name]} AND text IN ({marks})"
            else:
                table = f'rows WHERE "{name}" IN ({marks})'
            parts_found.append(_slots(db, table, some))
        return np.unique(np.concatenate(parts_found))

    # ---- checking

    def problems(self, db: Connection, vectors: Shaped[np.ndarray, "n _"]) -> tuple[int, list[str]]:
        """Number of rows, and a sentence for each row, list or thumbnail that is not what was written."""
        problems = [text for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
        num_rows = 0
        members: set[int] = set()
        for slot, *values, vector_check, row_check in db.execute("SELECT * FROM rows"):
            num_rows += 1
            if checksum(values) != row_check:
                problems.append(f"the row of {values[0]!r} is damaged")
                continue
            members ^= {hash(entry) for entry in self._members([(slot, values)])}
            if not slot < len(vectors) or vector_crc32([values[0]], vectors[slot : slot + 1]) != [
                vector_check
            ]:
                problems.append(f"the vector of {values[0]!r} is not what was written")
        for entry in db.execute("SELECT name, text, slot FROM members"):
            members ^= {hash(entry)}
        if members:
            problems.append("the texts to filter by are not those of the rows")
        for name, content, check in db.execute(
            "SELECT id, content, crc32 FROM blobs LEFT JOIN rows USING (slot) WHERE kind = 'thumbnail'"
        ):
            if zlib.crc32(content) != check:
                problems.append(f"the thumbnail of {name!r} is damaged")
        problems += [
            f"the note {row[:2]!r} is damaged"
            for row in db.execute("SELECT * FROM notes")
            if checksum(row[:3]) != row[3]
        ]
        return num_rows, problems


def at_slots(db: Connection, columns: str, slots: Iterable[int]) -> dict[int, tuple[Any, ...]]:
    """Columns of the rows in slots, of those that there are."""
    return {
        slot: tuple(values)
        for part in chunks(list(dict.fromkeys(slots)), _MOST_VALUES)
        for slot, *values in db.execute(
            f"SELECT slot, {columns} FROM rows WHERE slot IN ({', '.join('?' * len(part))})", part
        )
    }


def _slots(db: Connection, table: str, values: Sequence[Any]) -> Slots:
    # one text of all numbers takes a quarter of the time of a row per number
    (found,) = db.execute(f"SELECT group_concat(slot) FROM {table}", values).fetchone()
    return np.sort(np.fromstring(found or "", dtype=np.int64, sep=","))


def chunks(values: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    """Parts of a sequence."""
    return (values[start : start + size] for start in range(0, len(values), size))
