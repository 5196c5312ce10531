"""One generation of an index in a folder: a database of rows, and a file of vectors beside it.

A change appends its vectors to the file at places that no row has had, flushes them, and then commits its
rows. A killed writer leaves vectors that no row names, which the next writer overwrites. Readers see one
state of the database each, and map the file into memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import sqlite3
import threading
import urllib.parse
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, Literal

import numpy as np

import samething.index.sqlite_regions as sqlite_regions
from samething.arrays import Float
from samething.errors import ArtefactError, InputError
from samething.files import Json, disk_errors
from samething.index.conditions_and_hits import Condition
from samething.index.description import IndexDescription
from samething.index.sqlite_rows import Connection, RowFormat, Slots, checksum
from samething.index.view import Kept, Searched, View
from samething.retrieval import CodeScan, FewCodes, FlatScan
from samething.retrieval.codes import CodedRows

WAIT_S: Final = 600.0
"""How long a writer waits for another one's batch."""
_MOST_FILTERS: Final = 16
_READ_ONLY: Final = ("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH", "SQLITE_CANTOPEN")
_FULL: Final = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")
_FAILED: Final = ("SQLITE_IOERR_FSYNC", "SQLITE_IOERR_TRUNCATE", "SQLITE_IOERR_DIR_FSYNC")
_OF_DAMAGE: Final = (TypeError, ValueError, IndexError)


class Generation:
    """The files of one generation, open. It may be used by several threads.

    Args:
        folder: the index's folder.
        number: which generation; files are named by it.
        description: what the index is bound to.
    """

    def __init__(self, folder: Path, number: int, description: IndexDescription) -> None:
        self.folder, self.number, self.description = folder, number, description
        self.database = folder / f"rows-{number}.sqlite"
        self.vectors_file = folder / f"vectors-{number}.{description.codes.replace('float32', 'f32')}"
        """Nothing but vectors as they are kept."""
        self.rows = RowFormat(description)
        self._is_closed = False
        self._num_active = 0
        self._free: list[Connection] = []
        self._guard = threading.RLock()
        self._view: View | None = None
        self._file: IO[bytes] | None = None
        self._num_checked = 0

    @classmethod
    def create(cls, folder: Path, number: int, description: IndexDescription) -> Generation:
        """Make an empty one; what a killed process left of it is removed."""
        made = cls(folder, number, description)
        made.unlink()
        with disk_errors(folder):
            made.vectors_file.touch()
            made.database.touch()
        with made.transaction() as db:
            for statement in made.rows.statements:
                db.execute(statement)
            db.execute("INSERT INTO state VALUES (1, 0)")
            space = (made.vectors_file.name, description.codes, description.dim)
            db.execute("INSERT INTO spaces VALUES (0, 'main', ?, ?, ?, 0, 0)", space)
        return made

    def unlink(self) -> None:
        """Remove the files; other objects that have them open keep them."""
        self._let_go()
        names = (f"rows-{self.number}.sqlite*", f"vectors-{self.number}.*")
        for path in [path for name in names for path in self.folder.glob(name)]:
            with contextlib.suppress(OSError):  # Windows keeps open files; the next compaction tries again
                path.unlink()

    def close(self) -> None:
        """Let go of connections and of the vectors, when whoever reads at the moment has come to an end."""
        with self._guard:
            self._is_closed = True
            if not self._num_active:
                self._let_go()

    def _let_go(self) -> None:
        while self._free:
            self._free.pop().close()
        self._view = None
        if self._file is not None:
            self._file.close()
            self._file = None

    __del__ = _let_go

    # ---- transactions

    @contextlib.contextmanager
    def transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[Connection]:
        """A connection within a transaction of its own: ``IMMEDIATE`` to write, ``DEFERRED`` to read.

        Raises:
            InputError: the folder cannot be written to, or the disk is full.
            ArtefactError: damage, or another process writes for too long.
        """
        with self._guard:
            db = self._free.pop() if self._free else None
            self._num_active += 1
        try:
            db = db or self._connect()
            db.execute(f"BEGIN {kind}")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._translated(error, is_writing=kind == "IMMEDIATE") from error
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text {error.object!r}", expected="Unicode without surrogates", next_step="correct it"
            ) from error
        except _OF_DAMAGE as error:  # values of a kind that was never written, or a caller's own mistake
            if not self._is_damaged():
                raise
            raise self.damaged(f"{self.database}: {error}") from error
        finally:
            with self._guard:
                self._num_active -= 1
                if db is not None:
                    self._free.append(db)
                if self._is_closed and not self._num_active:
                    self._let_go()

    def _is_damaged(self) -> bool:
        try:
            with contextlib.closing(self._connect()) as db:
                return bool(self._problems(db, self._looked_at(db, None, 0))[1])
        except (ArtefactError, sqlite3.Error, *_OF_DAMAGE):
            return True

    def _connect(self) -> Connection:
        """A connection; one without locks where nobody can write, or keep a note of who reads."""
        address = f"file:{urllib.parse.quote(str(self.database.absolute()))}?mode=rw"
        wal = self.database.with_name(f"{self.database.name}-wal")
        if not os.access(self.folder, os.W_OK) and not wal.exists():
            address += "&immutable=1"
        db = sqlite3.connect(address, uri=True, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            with contextlib.suppress(sqlite3.OperationalError):  # a folder that is read only
                db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _translated(self, error: sqlite3.Error, *, is_writing: bool) -> Exception:
        name = getattr(error, "sqlite_errorname", "")
        if is_writing and name.startswith(_READ_ONLY + _FULL + _FAILED):
            numbers = ((_FULL, errno.ENOSPC), (_FAILED, errno.EIO), (_READ_ONLY, errno.EACCES))
            number = next(number for names, number in numbers if name.startswith(names))
            try:
                with disk_errors(self.folder):
                    raise OSError(number, os.strerror(number))
            except InputError as clear:
                return clear
        if name.startswith("SQLITE_BUSY"):
            return ArtefactError(
                f"another process has been writing to {self.folder} for {WAIT_S:.0f} s",
                expected="a batch that ends sooner",
                next_step="look for the process that holds it, and try again when it has ended",
            )
        return self.damaged(f"{self.database}: {error}")

    def damaged(self, what: str) -> ArtefactError:
        """The error that says so."""
        return ArtefactError(
            f"the index {self.folder} cannot be used: {what}",
            expected="files as they were written",
            next_step=f"samething index verify {self.folder} names every damage: restore the files from a "
            "copy, or make the index again",
        )

    # ---- reading

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[Connection, View]]:
        """One state of the rows, and the view of it."""
        for _ in range(100):
            with self.transaction("DEFERRED") as db:
                (change,) = db.execute("SELECT change FROM state").fetchone() or (-1,)
                with self._guard:
                    view = self._view
                    if view is None or view.change < change:
                        view = self._view = self._looked_at(db, view, change)
                if view.change == change:  # else another thread has seen a later state already
                    yield db, view
                    return
        raise self.damaged(f"{self.database} goes back in time")

    def _looked_at(self, db: Connection, old: View | None, change: int) -> View:
        """What was appended and deleted since the last view; the rest of it is taken over."""
        counts = db.execute("SELECT num_slots, num_dead FROM spaces WHERE space = 0").fetchone()
        if old is None:
            there = {sql for (sql,) in db.execute("SELECT sql FROM sqlite_master")}
            if not there.issuperset(self.rows.statements):
                raise self.damaged(f"{self.database}: its tables are not those of an index")
        if change < 0 or counts is None:
            raise self.damaged(f"{self.database} does not say what state it is in")
        num_slots, num_dead = counts
        num_bytes = self.description.vector_bytes * num_slots
        self.require_whole(num_bytes)
        mapped: mmap.mmap | bytes = b""
        if num_bytes:
            assert self._file is not None
            mapped = mmap.mmap(self._file.fileno(), num_bytes, access=mmap.ACCESS_READ)
        kept = np.frombuffer(mapped, dtype=np.uint8).reshape(num_slots, self.description.vector_bytes)
        is_dead = np.zeros(num_slots, dtype=bool)
        if old is not None:
            is_dead[: len(old.is_dead)] = old.is_dead
        known = 0 if old is None else old.num_dead
        slots = [slot for (slot,) in db.execute("SELECT slot FROM dead WHERE number > ?", (known,))]
        if known + len(slots) != num_dead or (slots and not 0 <= min(slots) <= max(slots) < num_slots):
            raise self.damaged(f"{self.database} counts its rows wrongly")
        is_dead[slots] = True
        rows = None if self.description.regions is None else self._rows_by_slot(db, old, num_slots)
        coder, before = self.description.coder, None if old is None else old.searched
        if coder is None:
            kept = kept.view("<f4")
        searched: Searched
        if before is not None and len(before.gallery) == num_slots:
            searched = before
        elif coder is None:
            searched = FlatScan(kept)
        elif num_slots <= FewCodes.most(coder):
            few = before if isinstance(before, FewCodes) else None
            searched = FewCodes(CodedRows(kept, coder), before=few)
        else:
            scan = before if isinstance(before, CodeScan) else None
            shortest = self.notes(db, "codes").get("shortest", 1.0)
            searched = CodeScan(CodedRows(kept, coder), shortest=shortest, before=scan)
        return View(change, kept, searched, is_dead, num_dead, rows)

    def _rows_by_slot(self, db: Connection, old: View | None, num_slots: int) -> Slots:
        """The slot of the row that each slot is of; a slot never changes its row."""
        rows = np.arange(num_slots)
        known = 0 if old is None or old.rows is None else len(old.rows)
        if old is not None and old.rows is not None:
            rows[:known] = old.rows
        parts, theirs = sqlite_regions.since(db, known)
        both = np.concatenate([parts, theirs])
        if len(both) and not 0 <= both.min() <= both.max() < num_slots:
            raise self.damaged(f"{self.database} has regions of nothing")
        rows[parts] = theirs
        return rows

    def require_whole(self, num_bytes: int) -> None:
        """Refuse a file of vectors that is too short: reading its map would end the process.

        Raises:
            ArtefactError: it is too short, or gone.
        """
        try:
            if self._file is None:
                self._file = self.vectors_file.open("rb")
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self.damaged(f"{self.vectors_file}: {error.strerror}") from error
        if size < num_bytes:
            raise self.damaged(f"{self.vectors_file} has {size} bytes instead of {num_bytes}")

    def matching(self, db: Connection, view: View, where: Mapping[str, Condition]) -> Slots:
        """Slots of the rows that a filter lets through, ascending; kept until the next change."""
        said = repr(where)
        found = view.filters.get(said)
        if found is None:
            if len(view.filters) >= _MOST_FILTERS:
                view.filters.clear()
            found = view.filters[said] = self.rows.matching(db, where)
        return found

    def checked(self, db: Connection, view: View) -> View:
        """The view itself, its vectors compared with their checksums the first time.

        Raises:
            ArtefactError: they are not what was written.
        """
        self.require_whole(view.kept.nbytes)
        with self._guard:
            problems = self._segment_problems(db, view, since=self._num_checked)
            if problems:
                raise self.damaged("; ".join(problems))
            self._num_checked = max(self._num_checked, len(view.kept))
        return view

    def _segment_problems(self, db: Connection, view: View, *, since: int) -> list[str]:
        if since >= len(view.kept):
            return []
        problems: list[str] = []
        expected = since
        for start, count, check in db.execute(
            "SELECT start, count, crc32 FROM segments WHERE space = 0 AND start >= ? ORDER BY start", (since,)
        ):
            part = view.kept[start : start + count]
            if start != expected or zlib.crc32(part.data) != check:
                place = f"byte {self.description.vector_bytes * start}"
                problems.append(f"{self.vectors_file} is not what was written from {place} on")
            expected = start + count
        if expected != len(view.kept):
            problems.append(f"{self.database} has no checksum of all vectors")
        return problems

    def problems(self) -> tuple[int, list[str]]:
        """Number of rows, and everything that is not as it was written."""
        with self.reading() as (db, view):
            return self._problems(db, view)

    def _problems(self, db: Connection, view: View) -> tuple[int, list[str]]:
        self.require_whole(view.kept.nbytes)
        problems = self._segment_problems(db, view, since=0)
        num_rows, of_rows = self.rows.problems(db, view.kept)
        named = [slot for (slot,) in db.execute("SELECT slot FROM rows")]
        if self.description.regions is not None:
            parts, of_parts = sqlite_regions.problems(db, view.kept)
            named, of_rows = named + parts, of_rows + of_parts
        if np.flatnonzero(~view.is_dead).tolist() != sorted(named):
            problems.append(f"{self.database} does not name the rows that it has")
        return num_rows, problems + [f"{self.database}: {problem}" for problem in of_rows]

    def notes(self, db: Connection, kind: str) -> dict[str, Json]:
        """The notes of a kind by their keys."""
        found = {}
        for row in db.execute("SELECT * FROM notes WHERE kind = ?", (kind,)):
            if checksum(row[:3]) != row[3]:
                raise self.damaged(f"{self.database}: the note {row[:2]!r} is damaged")
            found[row[1]] = json.loads(row[2])
        return found

    # ---- writing; the caller has begun a transaction

    def kept(self, vectors: Float[np.ndarray, "n d"]) -> Kept:
        """Vectors as they are kept: float32, or codes."""
        coder = self.description.coder
        return np.ascontiguousarray(vectors, dtype="<f4") if coder is None else coder.encode(vectors)

    def set_notes(self, db: Connection, kind: str, values: Mapping[str, Json]) -> None:
        """Set some notes of a kind; None removes one."""
        for key, value in values.items():
            row = (kind, key, json.dumps(value, ensure_ascii=False))
            db.execute("DELETE FROM notes WHERE kind = ? AND key = ?", row[:2])
            if value is not None:
                db.execute("INSERT INTO notes VALUES (?, ?, ?, ?)", (*row, checksum(row)))

    def looked_at_anew(self, db: Connection) -> View:
        """What the transaction that writes sees, its own changes included; kept from readers."""
        (change,) = db.execute("SELECT change FROM state").fetchone()
        with self._guard:
            base = self._view if self._view is not None and self._view.change == change else None
            return self._looked_at(db, base, change)

    def append(self, db: Connection, start: int, vectors: Kept) -> None:
        """Write vectors to the file from a slot on."""
        with disk_errors(self.vectors_file), self.vectors_file.open("r+b") as stream:
            stream.seek(self.description.vector_bytes * start)
            stream.write(vectors.data)
            stream.flush()
            os.fsync(stream.fileno())
        crc32 = zlib.crc32(vectors.data)
        db.execute("INSERT INTO segments VALUES (NULL, 0, ?, ?, ?)", (start, len(vectors), crc32))
        db.execute("UPDATE spaces SET num_slots = ? WHERE space = 0", (start + len(vectors),))
        if self.description.coder is not None:
            known = self.notes(db, "codes").get("shortest", 1.0)
            shortest = min(known, float(self.description.coder.lengths(vectors).min()))
            if shortest < known:
                self.set_notes(db, "codes", {"shortest": shortest})

    def bury(self, db: Connection, slots: Sequence[int]) -> None:
        """Count a change, after which some slots are dead."""
        db.executemany("INSERT INTO dead VALUES (NULL, 0, ?)", [(slot,) for slot in slots])
        db.execute("UPDATE spaces SET num_dead = num_dead + ? WHERE space = 0", (len(slots),))
        db.execute("UPDATE state SET change = change + 1")
