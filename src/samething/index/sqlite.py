"""The embedded engine: SQLite keeps the rows, our own exact search reads their vectors from a mapped file.

The folder::

    manifest.json       what the index is bound to, and the number of the generation in use
    rows-1.sqlite       its rows, see ``sqlite_rows``
    vectors-1.f32       its vectors, float32, a row per slot; in codes vectors-1.int8 or vectors-1.int4
    approximate-1.faiss after ``tune``: the graph of the approximate search

A change is acknowledged when it is on disk. A new manifest is renamed in under the old generation's lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

import samething.index.sqlite_regions as sqlite_regions
from samething.arrays import Embeddings, Queries
from samething.errors import ArtefactError, SamethingError
from samething.files import Json, disk_errors, is_finished, only_one_writer, write_manifest
from samething.index.approximate import Graph, RecallReport, note_report, tuned_graph
from samething.index.conditions_and_hits import Condition, Hits, Verification
from samething.index.description import ColumnKind, IndexDescription, RecordBatch, Regions, Table, item_rows
from samething.index.generation import Generation
from samething.index.interface import AbstractIndex, Changed, Vector, listed
from samething.index.ranked import nearest_rows
from samething.index.row_changes import as_kept, copy_rows, delete, regions_of, upsert
from samething.index.sqlite_folder import (
    NO_STAMP,
    Stamp,
    bound_to,
    generation_numbers,
    graph_path,
    manifest_stamp,
    new_manifest,
    of_another_model,
    read_description,
    require_free,
)
from samething.index.sqlite_rows import Connection, RowFormat
from samething.index.view import View

T = TypeVar("T")

_ROWS_A_SCAN: Final = 10_000
_MANY_QUERIES: Final = 64
"""From so many queries at once on, exact search is the quicker one."""


class SqliteIndex(AbstractIndex):
    """An index in a folder. See :class:`AbstractIndex` for what it does and the module for how.

    It may be used by several threads. Memory: the vectors are mapped, not copied; the system lets go of them
    when it needs to. A change costs its readers what it changes.
    """

    def __init__(self, folder: Path, description: IndexDescription, number: int, stamp: Stamp | None) -> None:
        """Use ``create`` or ``open``. ``stamp``: the manifest's before it was read; None: not followed."""
        self.location, self.folder, self.description = str(folder), folder, description
        self._generation = Generation(folder, number, description)
        self._stamp = stamp
        self._is_closed = False
        self._guard = threading.Lock()
        self._succeeds = (-1, -1)
        self._loaded: tuple[tuple[int, int], str, Graph | None] = ((-1, -1), "", None)

    # ---- making and opening

    @classmethod
    def create(cls, location: str | Path, description: IndexDescription) -> SqliteIndex:
        """Make an empty one. See :meth:`AbstractIndex.create`."""
        folder = Path(location)
        require_free(folder)
        with only_one_writer(folder):
            require_free(folder)  # another process may have made one while this one began
            Generation.create(folder, 1, description).close()
            with disk_errors(folder):
                write_manifest(folder, new_manifest(description, 1))
        return cls(folder, description, 1, NO_STAMP)

    @classmethod
    def open(cls, location: str | Path) -> SqliteIndex:
        """Open one. See :meth:`AbstractIndex.open`."""
        folder = Path(location)
        stamp = manifest_stamp(folder)
        index = cls(folder, *read_description(folder), stamp)
        index.count()  # finds missing and truncated files now rather than later
        return index

    @classmethod
    def exists(cls, location: str | Path) -> bool:
        """Whether there is a manifest. See :meth:`AbstractIndex.exists`."""
        return is_finished(Path(location))

    # ---- being replaced

    def beside(self, description: IndexDescription) -> SqliteIndex:
        """One to take this one's place. See :meth:`AbstractIndex.beside`."""
        with self.in_use(Generation.transaction) as (db, generation):
            extra = generation.description.extra_columns  # another process may have added some
            description = dataclasses.replace(description, extra_columns=extra)
            wanted = bound_to(description)
            noted = generation.notes(db, "next").get("generation", {})
            number = noted.get("number") if noted.get("made_from") == wanted else None
            if number is None:
                self._remove_others(keep=(generation.number,))
                number = self._new_number(db, generation)
                Generation.create(self.folder, number, description).close()
                generation.set_notes(db, "next", {"generation": {"number": number, "made_from": wanted}})
            (change,) = db.execute("SELECT change FROM state").fetchone()
        successor = SqliteIndex(self.folder, description, number, None)
        successor._succeeds = (generation.number, change)
        return successor

    def swap(self, of: AbstractIndex) -> bool:
        """Write a manifest that names this generation. See :meth:`AbstractIndex.swap`."""
        assert isinstance(of, SqliteIndex)
        with of.in_use(Generation.transaction) as (db, old):
            number = self._generation.number
            if old.number == number:
                return True  # another process that made the same one was faster
            is_ours = old.notes(db, "next").get("generation", {}).get("number") == number
            if not is_ours or old.description.extra_columns != self.description.extra_columns:
                raise ArtefactError(
                    f"the index {self.location} is being rebuilt with another model by another process, "
                    "or has other columns by now",
                    expected="one rebuild at a time",
                    next_step="run samething index rebuild again when that one has ended",
                )
            (change,) = db.execute("SELECT change FROM state").fetchone()
            if self._succeeds != (old.number, change):
                self._succeeds = (old.number, change)
                return False
            self.take_over(self._generation, db)
            self._stamp = NO_STAMP
        return True

    def compact(self) -> None:
        """Write all rows anew; what was deleted or replaced leaves the disk.

        Other writers wait for it, readers do not. A killed process leaves the index as it was.
        """
        with self.in_use(Generation.transaction) as (db, old):
            self._copy_to(db, old, old.description)

    def add_columns(self, kinds: Mapping[str, ColumnKind]) -> None:
        """Compact the index into one with further columns. See :meth:`AbstractIndex.add_columns`."""
        if not kinds.keys() <= self.description.columns.keys():
            with self.in_use(Generation.transaction) as (db, old):
                known = old.description
                new = {name: kind for name, kind in kinds.items() if name not in known.columns}
                if new:  # no other process was faster
                    extra = {**known.extra_columns, **new}
                    self._copy_to(db, old, dataclasses.replace(known, extra_columns=extra))
        self.count()  # so that this handle knows them

    def _copy_to(self, db: Connection, old: Generation, description: IndexDescription) -> None:
        noted = old.notes(db, "next").get("generation", {}).get("number", 0)
        self._remove_others(keep=(old.number, noted))
        with self.successor(db, old, description) as fresh:
            with fresh.transaction() as theirs:
                copy_rows(old, fresh, theirs)
            self.take_over(fresh, db, keep=noted)

    @contextlib.contextmanager
    def successor(
        self, db: Connection, old: Generation, description: IndexDescription
    ) -> Iterator[Generation]:
        """An empty generation; its files go again if it does not take over, since the disk may be full."""
        fresh = Generation.create(self.folder, self._new_number(db, old), description)
        try:
            yield fresh
        finally:
            fresh.close()
            if read_description(self.folder)[1] != fresh.number:
                fresh.unlink()

    def take_over(self, fresh: Generation, notes_of: Connection | None = None, *, keep: int = 0) -> None:
        """Let the manifest name another generation.

        The caller holds the lock of the old one, so that nobody writes to it any more. A process that is
        killed here leaves the old manifest or the new one.

        Args:
            fresh: the other generation.
            notes_of: the database whose notes become its own, beside those that it has.
            keep: the generation that a rebuild is making; 0: none.
        """
        if notes_of is not None:
            kept = ("approximate", "codes", *(() if keep else ("next",)))
            marks = ", ".join("?" * len(kept))
            notes = notes_of.execute(f"SELECT * FROM notes WHERE kind NOT IN ({marks})", kept).fetchall()
            with fresh.transaction() as theirs:
                theirs.executemany("INSERT OR IGNORE INTO notes VALUES (?, ?, ?, ?)", notes)
        with disk_errors(self.folder):
            write_manifest(self.folder, new_manifest(fresh.description, fresh.number))
        self._remove_others(keep=(fresh.number, keep))

    def _new_number(self, db: Connection, generation: Generation) -> int:
        """A number that no generation has had, so that no handle takes one for another."""
        last = generation.notes(db, "generations").get("last", 1)
        number: int = 1 + max(last, *generation_numbers(self.folder))
        generation.set_notes(db, "generations", {"last": number})
        return number

    def _remove_others(self, *, keep: tuple[int, ...]) -> None:
        for number in set(generation_numbers(self.folder)) - set(keep):
            Generation(self.folder, number, self.description).unlink()
            graph_path(self.folder, number).unlink(missing_ok=True)

    # ---- changing

    def _upsert(self, vectors: Embeddings, items: Table, regions: Mapping[str, Regions]) -> None:
        rows = items.to_pylist()
        with self.in_use(Generation.transaction) as (db, generation):
            parts = as_kept(generation, regions)
            upsert(generation, db, generation.kept(vectors), generation.rows.stored(rows), parts)

    def _amend(
        self,
        ids: list[str],
        changed: Changed,
        vectors: Mapping[str, Vector] | None,
        regions: Mapping[str, Regions],
    ) -> None:
        with self.in_use(Generation.transaction) as (db, generation):
            slots = generation.rows.slots(db, ids)
            columns = list(generation.description.columns)
            there = generation.rows.read(db, list(slots.values()), columns) if slots else []
            kept, gone = changed(dict(zip(slots, there, strict=True)))
            rows = generation.rows.stored(kept.to_pylist())
            names = [row.values[0] for row in rows]
            if names and vectors is None:
                view = generation.checked(db, generation.looked_at_anew(db))
                upsert(generation, db, view.kept[[slots[name] for name in names]], rows)
            elif names and vectors is not None:
                own = generation.kept(np.stack([vectors[name] for name in names]))
                upsert(generation, db, own, rows, as_kept(generation, regions))
            delete(generation, db, gone)  # of none, too: a failing disk may hold what it refused

    def _delete(self, ids: list[str]) -> None:
        with self.in_use(Generation.transaction) as (db, generation):
            delete(generation, db, ids)

    def notes(self, kind: str) -> dict[str, Json]:
        """See :meth:`AbstractIndex.notes`."""
        with self.in_use(Generation.reading) as ((db, _), generation):
            return generation.notes(db, kind)

    def set_notes(self, kind: str, values: Mapping[str, Json]) -> None:
        """See :meth:`AbstractIndex.set_notes`."""
        with self.in_use(Generation.transaction) as (db, generation):
            generation.set_notes(db, kind, values)

    # ---- asking

    def count(self) -> int:
        """Number of rows."""
        with self.in_use(Generation.reading) as ((_, view), _):
            return view.num_rows

    def _search(self, queries: Queries, k: int, where: dict[str, Condition], columns: list[str]) -> Hits:
        with self.in_use(Generation.reading) as ((db, view), generation):
            if queries.shape[1] != generation.description.dim:
                raise of_another_model(self.location, self.description, generation.description)
            chosen = generation.matching(db, view, where) if where else None
            k = min(k, view.num_rows if chosen is None else len(chosen))
            if k == 0 or len(queries) == 0:
                ids = np.empty((len(queries), k), dtype=object)
                return Hits(ids, ids.astype(float), [], columns, self.description, [])
            if chosen is not None:
                chosen = view.with_regions(chosen)
            stored: dict[int, tuple[Any, ...]] | None = None if columns == ["id"] else {}
            is_few = chosen is None and len(queries) < _MANY_QUERIES
            if is_few and (graph := self._graph(db, generation, view)):
                ids, scores, slots = graph.search(db, generation, view, queries, k, stored)
            else:
                ids, scores, slots = nearest_rows(db, generation, view, queries, k, chosen, stored=stored)
            rows, places, found = [{"id": name} for name in ids.ravel()], [], slots.ravel()
            if view.rows is not None:
                places = sqlite_regions.places(db, found, view.rows[found])
                found = view.rows[found]
            if stored is not None:
                rows = generation.rows.read(db, found.tolist(), columns, stored)
        return Hits(ids, scores, rows, columns, self.description, places)

    def items(self, columns: Sequence[str] | None = None) -> Iterator[RecordBatch]:
        """See :meth:`AbstractIndex.items`."""
        import pyarrow as pa

        chosen = self.description.chosen(columns)
        schema = pa.schema([self.description.item_schema.field(name) for name in chosen])
        with self.in_use(Generation.reading) as ((db, _), generation):
            for values in generation.rows.scan(db, chosen, _ROWS_A_SCAN):
                arrays = [pa.array(part, field.type) for part, field in zip(values, schema, strict=True)]
                yield pa.record_batch(arrays, schema=schema)

    def rows(self, ids: Iterable[str], columns: Sequence[str] | None = None) -> Table:
        """See :meth:`AbstractIndex.rows`."""
        chosen = self.description.chosen(columns)
        with self.in_use(Generation.reading) as ((db, _), generation):
            found = generation.rows.read(db, self._slots(db, ids), chosen)
        return item_rows(found, chosen, self.description)

    def vectors(self, ids: Iterable[str]) -> Embeddings:
        """See :meth:`AbstractIndex.vectors`."""
        with self.in_use(Generation.reading) as ((db, view), generation):
            vectors = generation.checked(db, view).searched.gallery
            return vectors[np.asarray(self._slots(db, ids), dtype=np.int64)]

    def regions(self, ids: Iterable[str]) -> list[Regions]:
        """See :meth:`AbstractIndex.regions`."""
        with self.in_use(Generation.reading) as ((db, view), generation):
            vectors = generation.checked(db, view).searched.gallery
            return [regions_of(generation, db, vectors, slot) for slot in self._slots(db, ids)]

    def _slots(self, db: Connection, ids: Iterable[str]) -> list[int]:
        names = listed(ids)
        slots = RowFormat.slots(db, names)
        self.require_there(names, slots)
        return [slots[name] for name in names]

    # ---- approximate search

    def tune(self, recall: float = 0.98, *, k: int = 5, num_queries: int = 1000) -> RecallReport:
        """Let searches be approximate from now on, at a recall measured on the index's own vectors.

        Args:
            recall: share of the exact nearest rows that is to be found, in (0, 1]; the lower 95 % bound of
                what was measured reaches it.
            k: neighbours per query.
            num_queries: rows of the index to ask for.

        Raises:
            InputError: a recall out of range, or too few rows.
        """
        with self.in_use(Generation.reading) as ((db, view), generation):
            searched = generation.checked(db, view).searched
            slots = np.flatnonzero(~view.is_dead)
            path = graph_path(self.folder, generation.number)
            report = tuned_graph(path, searched, slots, target=recall, k=k, num_queries=num_queries)
        with self.in_use(Generation.transaction) as (db, now):
            if now.number == generation.number:
                note_report(db, now, report)
            else:  # it was compacted meanwhile
                path.unlink(missing_ok=True)
        return report

    def search_exactly(self) -> None:
        """Let searches be exact again."""
        with self.in_use(Generation.transaction) as (db, generation):
            note_report(db, generation, None)

    def recall_report(self) -> RecallReport | None:
        """How approximate searches are, or None where they are exact."""
        found = self.notes("approximate").get("report")
        return None if found is None else RecallReport(**found)

    def _graph(self, db: Connection, generation: Generation, view: View) -> Graph | None:
        """The graph to search, loaded once; which one is looked up after each change."""
        state = (generation.number, view.change)
        with self._guard:
            known, sha256, graph = self._loaded
            if known != state:
                noted = generation.notes(db, "approximate").get("report") or {"sha256": ""}
                if noted["sha256"] != sha256:
                    path = graph_path(self.folder, generation.number)
                    graph = Graph.open(path, RecallReport(**noted)) if noted["sha256"] else None
                self._loaded = (state, noted["sha256"], graph)
            return graph

    # ---- checking and ending

    def verify(self) -> Verification:
        """Compare every row, list, thumbnail and vector with its checksum."""
        try:
            with self.in_use(Generation.reading) as ((db, _), generation):
                num_rows, problems = generation.problems()
                path = graph_path(self.folder, generation.number)
                noted = generation.notes(db, "approximate").get("report")
                if noted and noted["breadth"] and Graph.open(path, RecallReport(**noted)) is None:
                    problems.append(f"{path} is not what was written: tune the index again")
        except ArtefactError as error:
            num_rows, problems = 0, [error.given]
        return Verification(num_rows, tuple(dict.fromkeys(problems)))

    def close(self) -> None:
        """Let go of the vectors and of the files; the index cannot be used afterwards."""
        with self._guard:
            self._is_closed = True
            self._generation.close()

    # ---- the generation in use

    @contextlib.contextmanager
    def in_use(
        self, begin: Callable[[Generation], contextlib.AbstractContextManager[T]]
    ) -> Iterator[tuple[T, Generation]]:
        """A transaction of the generation in use: what ``begin`` gives, and the generation.

        ``Generation.reading`` sees one state of the index as it was last acknowledged, by any process.
        ``Generation.transaction`` holds the lock for one change, which is on disk when the block has ended.

        Whoever changes the manifest holds the lock of the generation that it named, and removes files only
        afterwards. So what a manifest that has not changed since the beginning names is locked, or whole.
        """
        is_inside = False
        while True:
            with self._guard:
                if self._is_closed:
                    raise self.closed
                generation = self._generation
            try:
                with begin(generation) as begun:
                    if self._is_current(generation):
                        is_inside = True
                        yield begun, generation
                        return
            except SamethingError:
                if is_inside or self._is_current(generation):
                    raise
            self._follow()

    def _is_current(self, generation: Generation) -> bool:
        with self._guard:  # another thread may have followed the manifest meanwhile
            return generation is self._generation and self._stamp in (None, manifest_stamp(self.folder))

    def _follow(self) -> None:
        with self._guard:
            while self._stamp not in (None, stamp := manifest_stamp(self.folder)):
                description, number = read_description(self.folder)
                if description.model_fingerprint != self.description.model_fingerprint:
                    raise of_another_model(self.location, self.description, description)
                self._generation.close()
                self._generation = Generation(self.folder, number, description)
                self._stamp, self.description = stamp, description
