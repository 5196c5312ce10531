"""What re-rankers keep of images: one SQLite file, which may be removed at any time.

An entry belongs to the fingerprint of what decides it (settings, versions, the model) and to the identity of
an image's content, so it is never out of date. It has a checksum, and what does not agree with it is computed
again. Several processes may share the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from samething.files import Json, fingerprint, user_cache

NAME: Final = "second-look.sqlite"
_TABLE: Final = """CREATE TABLE IF NOT EXISTS kept (made_from TEXT, key TEXT, content BLOB, crc32 INTEGER,
PRIMARY KEY (made_from, key))"""
_WAIT_S: Final = 30.0
_AT_ONCE: Final = 500
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Kept:
    """The file in a folder."""

    path: Path

    @classmethod
    def beside(cls, location: str | Path) -> Kept:
        """That of an index folder; in the user's cache where there is no folder, or none to write to."""
        folder = Path(location)
        if folder.is_dir() and os.access(folder, os.W_OK):
            return cls(folder / NAME)
        return cls.of_user()

    @classmethod
    def of_user(cls) -> Kept:
        """That of the user's cache."""
        return cls(user_cache() / NAME)

    def get(self, made_from: Json, keys: Sequence[str]) -> dict[str, bytes]:
        """What is kept of images, by their keys; damaged entries are not there."""

        def read(db: sqlite3.Connection) -> dict[str, bytes]:
            found = {}
            for start in range(0, len(keys), _AT_ONCE):
                part = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = db.execute(
                    f"SELECT key, content, crc32 FROM kept WHERE made_from = ? AND key IN ({marks})",
                    (fingerprint(made_from), *part),
                )
                found.update({key: content for key, content, crc in rows if zlib.crc32(content) == crc})
            return found

        return (self._done(read) if keys and self.path.exists() else None) or {}

    def put(self, made_from: Json, contents: Mapping[str, bytes]) -> None:
        """Keep something of images, in one step; where nothing can be written, nothing is kept."""
        rows = [
            (fingerprint(made_from), key, content, zlib.crc32(content)) for key, content in contents.items()
        ]
        if rows:
            self._done(lambda db: db.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?)", rows))

    def keep_only(self, keys: Sequence[str]) -> int:
        """Forget all other images, and say how many entries that were."""

        def forget(db: sqlite3.Connection) -> int:
            db.execute("CREATE TEMP TABLE wanted (key TEXT PRIMARY KEY)")
            db.executemany("INSERT OR IGNORE INTO wanted VALUES (?)", [(key,) for key in keys])
            return db.execute("DELETE FROM kept WHERE key NOT IN (SELECT key FROM wanted)").rowcount

        return (self._done(forget) if self.path.exists() else None) or 0

    def _done(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result | None:
        """What a transaction gives; None where the disk does not let it. A damaged file is begun anew."""
        for _ in range(2):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT_S)) as db, db:
                    db.execute("PRAGMA synchronous = OFF")  # it can be computed again
                    db.execute(_TABLE)
                    return work(db)
            except (sqlite3.OperationalError, OSError):
                return None
            except sqlite3.DatabaseError:
                with contextlib.suppress(OSError):
                    self.path.unlink()
        return None
