"""The embedded engine: LanceDB keeps the rows, our own exact search reads its vectors from memory.

The folder::

    manifest.json       what the index is bound to; written last when it is made
    checksums.jsonl     size and SHA-256 of every file of the table
    vectors.lance/      the table: metadata, vector, and a CRC-32 over id and vector
    .lock               held by the process that is writing

A batch is acknowledged when the table's new files and their checksums are on disk. Writers take turns by the
lock, because LanceDB lets two of them add the same id at once. Readers take no lock: the growth of
``checksums.jsonl`` tells them to load anew.

At 64 dimensions, searching a matrix in memory beats every store's own search up to some millions of rows, and
filters keep their full recall.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Int, UInt

from samething.arrays import Embeddings, Queries
from samething.errors import ArtefactError, InputError, SamethingError
from samething.files import disk_errors, is_finished, write_manifest
from samething.index.checksums import Checksums, vector_crc32
from samething.index.description import ColumnKind, IndexDescription, RecordBatch, Schema, Table
from samething.index.interface import AbstractIndex, Condition, Hits, Verification
from samething.index.lance_approximate import (
    RecallReport,
    build_cells,
    choose_probes,
    filter_sql,
    require_recall,
    search_cells,
)
from samething.index.lance_folder import (
    TABLE,
    checksums_of,
    is_noted_next,
    manifest_stamp,
    new_manifest,
    noted_next,
    read_description,
    remove_tables,
    require_free,
    turn_to_write,
)
from samething.index.lance_view import Matrix, View, matrix_of, meets
from samething.retrieval import nearest_units

_MANY_QUERIES: Final = 64
"""From so many queries at once on, exact search in memory is the quicker one."""
_LEAST_FOR_CELLS: Final = 1000
_ROWS_A_COPY: Final = 10_000
_ROWS_IN_MEMORY: Final = 100_000
"""Up to so many rows their metadata is kept in memory, but for the thumbnails: some 50 MB."""
_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class LanceIndex(AbstractIndex):
    """An index in a folder. See :class:`AbstractIndex` for what it does and the module for how.

    It may be used by several threads. Memory: the vectors as float32 and the ids, from the first search on
    (about 350 MB for a million rows of 64 dimensions, and three times that for the seconds of loading them,
    which happens again at the first search after a change).
    """

    def __init__(self, folder: Path, description: IndexDescription, table_name: str) -> None:
        """Use ``create`` or ``open``."""
        super().__init__(str(folder), description)
        self.folder = folder
        self.table_name = table_name
        self._checksums = Checksums(folder / checksums_of(table_name), folder / f"{table_name}.lance")
        self._unchecked: list[str] = []
        self._view: View | None = None
        self._is_closed = False
        self._guard = threading.RLock()
        self._manifest = manifest_stamp(folder)
        self.succeeds = -1
        """State of the index that this one is made beside, when it was last looked at."""

    # ---- making and opening

    @classmethod
    def create(
        cls,
        location: str | Path,
        *,
        dim: int,
        model_fingerprint: str,
        model_name: str,
        extra_columns: Mapping[str, ColumnKind] | None = None,
    ) -> LanceIndex:
        """Make an empty index in a new or empty folder. See :meth:`AbstractIndex.create`."""
        folder = Path(location)
        description = IndexDescription(
            dim=dim,
            model_name=model_name,
            model_fingerprint=model_fingerprint,
            extra_columns=dict(extra_columns or {}),
        )
        require_free(folder)
        with turn_to_write(folder):
            require_free(folder)  # another process may have made one while this one waited
            index = cls(folder, description, TABLE)
            # what is here was left by a process that was killed before it could finish an empty index
            shutil.rmtree(index._checksums.folder, ignore_errors=True)
            index._checksums.listing.unlink(missing_ok=True)
            index._make_table()
            with disk_errors(folder):
                write_manifest(folder, new_manifest(description))
        return index

    def _make_table(self) -> None:
        with self._store_errors(writing=True):
            shutil.rmtree(self._checksums.folder, ignore_errors=True)  # of a process that was killed here
            schema = _table_schema(self.description)
            _connect(self.folder).create_table(self.table_name, schema=schema)
        self._checksums.add_new_files()

    @classmethod
    def open(
        cls, location: str | Path, *, model_fingerprint: str | None = None, model_name: str | None = None
    ) -> LanceIndex:
        """Open the index in a folder. See :meth:`AbstractIndex.open`."""
        folder = Path(location)
        index = cls(folder, *read_description(folder))
        if model_fingerprint is not None:
            index.require_model(model_fingerprint, model_name)
        index._current()  # finds truncated and missing files now rather than later
        return index

    @classmethod
    def exists(cls, location: str | Path) -> bool:
        """Whether there is a manifest. See :meth:`AbstractIndex.exists`."""
        return is_finished(Path(location))

    # ---- being replaced

    def beside(self, *, dim: int, model_fingerprint: str, model_name: str) -> LanceIndex:
        """Another table in the same folder. See :meth:`AbstractIndex.beside`."""
        description = dataclasses.replace(
            self.description, dim=dim, model_fingerprint=model_fingerprint, model_name=model_name
        )
        with turn_to_write(self.folder):
            table_name = noted_next(self.folder, description, instead_of=self.table_name)
            successor = LanceIndex(self.folder, description, table_name)
            if not successor._checksums.listing.exists():
                successor._make_table()
            successor.succeeds = self._checksums.size()
        return successor

    def take_place(self, of: AbstractIndex) -> bool:
        """Write a manifest that names this table. See :meth:`AbstractIndex.take_place`."""
        assert isinstance(of, LanceIndex)
        with turn_to_write(self.folder):
            state = of._checksums.size()
            if state != self.succeeds:
                self.succeeds = state
                return False
            with disk_errors(self.folder):
                write_manifest(self.folder, new_manifest(self.description, self.table_name))
            self._manifest = manifest_stamp(self.folder)
            remove_tables(self.folder, keep=self.table_name)
        return True

    def compact(self) -> LanceIndex:
        """Write all rows anew into as few files as need be; what was deleted or replaced leaves the disk.

        A killed process leaves the index as it was.

        Returns:
            The index to use from now on; this handle says that it was replaced.
        """
        identity = {"model_fingerprint": self.model_fingerprint, "model_name": self.model_name}
        fresh = self.beside(dim=self.dim, **identity)
        while True:
            fresh.delete([name for batch in fresh.items([]) for name in batch["id"].to_pylist()])
            names = [name for batch in self.items([]) for name in batch["id"].to_pylist()]
            for start in range(0, len(names), _ROWS_A_COPY):
                part = names[start : start + _ROWS_A_COPY]
                fresh.add(self.vectors(part), self.rows(part, list(self.description.columns)))
            if fresh.take_place(self):
                return fresh

    # ---- changing

    def _upsert(self, vectors: Embeddings, items: Table) -> None:
        import pyarrow as pa

        checks = pa.array(vector_crc32(items["id"].to_pylist(), vectors), pa.uint32())
        flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self.dim)
        columns = [*items.columns, flat, checks]
        rows = pa.table(columns, schema=_table_schema(self.description))
        with self._writing() as table:
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def _delete(self, ids: list[str]) -> None:
        # the only escape that a text has in the store's SQL is the doubled quote
        names = ", ".join("'" + name.replace("'", "''") + "'" for name in ids)
        with self._writing() as table:
            table.delete(f"id IN ({names})")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """The newest state of the table, for one change that is on disk when the block has ended."""
        with turn_to_write(self.folder):
            self._current()  # refuses to build on damage
            with self._store_errors(writing=True):
                yield self._open_table()
            with self._guard:
                self._checksums.add_new_files()

    # ---- asking

    def count(self) -> int:
        """Number of rows."""
        with self._store_errors():
            return int(self._current().table.count_rows())

    def _search(self, queries: Queries, k: int, where: dict[str, Condition], columns: list[str]) -> Hits:
        report = self.recall_report()
        if report is not None and len(queries) < _MANY_QUERIES:
            return self._search_cells(report, queries, k, where, columns)
        view, matrix = self._loaded()
        rows = self._matching(view, where) if where else None
        gallery = matrix.vectors if rows is None else matrix.vectors[rows]
        k = min(k, len(gallery))
        if k == 0 or len(queries) == 0:
            shape = (len(queries), k)
            found = self.description.item_schema.empty_table().select(columns)
            return Hits(np.empty(shape, dtype=object), np.empty(shape), found)
        top = nearest_units(queries, gallery, k, products=matrix.products if rows is None else None)
        hits = top.indices if rows is None else rows[top.indices]
        found = self._take(view, matrix, hits.ravel(), columns)
        ids = np.array(found["id"].to_pylist(), dtype=object).reshape(hits.shape)
        return Hits(ids, top.scores, found)

    def _search_cells(
        self,
        report: RecallReport,
        queries: Queries,
        k: int,
        where: dict[str, Condition],
        columns: list[str],
    ) -> Hits:
        table = self._current().table
        chosen = filter_sql(where, self.description.columns) if where else None
        with self._store_errors():
            found = search_cells(table, queries, k, num_probes=report.num_probes, where=chosen)
        if found is None:
            raise self._damaged("vectors differ from their checksums")
        ids, scores, row_ids = found
        if ids.size == 0:
            return Hits(ids, scores, self.description.item_schema.empty_table().select(columns))
        return Hits(ids, scores, self._taken(table, row_ids.ravel(), ids.ravel().tolist(), columns))

    def tune(self, recall: float = 0.98, *, k: int = 5, num_queries: int = 200) -> RecallReport:
        """Let searches be approximate from now on, at a recall measured on the index's own vectors.

        The measurement needs all vectors in memory once; searches after it do not.

        Args:
            recall: share of the exact nearest rows that is to be found, in (0, 1].
            k: neighbours per query.
            num_queries: rows of the index to ask for.

        Raises:
            InputError: a recall out of range, or too few rows.
        """
        require_recall(recall)
        _, matrix = self._loaded()
        if len(matrix.vectors) < _LEAST_FOR_CELLS:
            raise InputError(
                f"an index of {len(matrix.vectors)} rows",
                expected=f"at least {_LEAST_FOR_CELLS:,}: smaller ones are searched exactly in no time",
                next_step="leave it as it is",
            )
        with self._writing() as table:
            num_cells = build_cells(table, num_rows=len(matrix.vectors))
        random = np.random.default_rng(0)
        sample = random.choice(len(matrix.vectors), min(num_queries, len(matrix.vectors)), replace=False)
        with self._store_errors():
            report = choose_probes(
                self._open_table(),
                matrix.ids.to_pylist(),
                matrix.vectors,
                sample,
                target=recall,
                num_cells=num_cells,
                k=k,
            )
        with disk_errors(self.folder):
            report.write(self._report_path)
        self._view = None  # lets go of the vectors
        return report

    def search_exactly(self) -> None:
        """Let searches be exact again."""
        self._report_path.unlink(missing_ok=True)

    def recall_report(self) -> RecallReport | None:
        """How approximate searches are, or None where they are exact."""
        return RecallReport.read(self._report_path)

    @property
    def _report_path(self) -> Path:
        return self.folder / f"recall-{self.table_name}.json"

    def _matching(self, view: View, where: dict[str, Condition]) -> Int[np.ndarray, " n"]:
        """Rows of the matrix that the filter lets through."""
        import pyarrow.compute as pc

        keep: Any = None
        for name, condition in where.items():
            with self._guard, self._store_errors():
                column = view.column(name)
            one = meets(column, condition)
            keep = one if keep is None else pc.and_(keep, one)
        return np.flatnonzero(keep.to_numpy(zero_copy_only=False)).astype(np.int64)

    def _items(self, columns: list[str]) -> Iterator[RecordBatch]:
        with self._store_errors():
            # one state of the table, whatever is written while the caller reads
            yield from self._current().table.search().select(columns).limit(None).to_batches()

    def _rows(self, ids: list[str], columns: list[str]) -> Table:
        view, matrix = self._loaded()
        return self._take(view, matrix, self._positions(matrix, ids), columns)

    def _vectors(self, ids: list[str]) -> Embeddings:
        _, matrix = self._loaded()
        return np.take(matrix.vectors, self._positions(matrix, ids), axis=0)

    def _positions(self, matrix: Matrix, ids: list[str]) -> Int[np.ndarray, " n"]:
        positions = np.empty(len(ids), dtype=np.int64)
        stored = range(len(matrix.ids))
        for number, name in enumerate(ids):
            position = bisect.bisect_left(stored, name, key=lambda row: matrix.ids[row].as_py())
            if position == len(stored) or matrix.ids[position].as_py() != name:
                raise InputError(
                    f"the id {name!r}",
                    expected=f"an id that is in the index {self.location}",
                    next_step="list the ids with items()",
                )
            positions[number] = position
        return positions

    def _take(
        self, view: View, matrix: Matrix, positions: Int[np.ndarray, " n"], columns: list[str]
    ) -> Table:
        """Metadata of rows of the matrix, in the order given."""
        if len(positions) == 0:
            return self.description.item_schema.empty_table().select(columns)
        names = matrix.ids.take(positions)
        # the store takes milliseconds to fetch a row
        if columns == ["id"]:
            import pyarrow as pa

            return pa.table([names], names=columns)
        if len(matrix.ids) <= _ROWS_IN_MEMORY and "thumbnail" not in columns:
            with self._guard, self._store_errors():
                return view.columns(columns).take(positions)
        return self._taken(view.table, matrix.row_ids[positions], names, columns)

    def _taken(self, table: Any, row_ids: UInt[np.ndarray, " n"], ids: Any, columns: list[str]) -> Table:
        """Metadata of rows by their place in the table, in the order of their ids."""
        import pyarrow as pa
        import pyarrow.compute as pc

        with self._store_errors():
            found = table.take_row_ids(np.unique(row_ids).tolist()).select(columns).to_arrow()
        # the store returns each row once and in its own order
        names = pa.array(ids, pa.string()) if isinstance(ids, list) else ids
        order = pc.index_in(names, value_set=found["id"].combine_chunks())
        if order.null_count:
            raise self._damaged("ids read at different times differ")
        return found.take(order)

    # ---- the state of the table

    def _current(self) -> View:
        """The table as it was last acknowledged, by any process."""
        with self._guard:
            if self._is_closed:
                raise InputError(
                    f"the index {self.location} was closed",
                    expected="an open index",
                    next_step="open it again",
                )
            self._require_in_place()
            size = self._checksums.size()
            if self._view is None or self._view.checksums_size != size:
                self._unchecked += self._checksums.read_on()
                damage = self._checksums.damage(self._unchecked)
                if damage:
                    raise self._damaged("; ".join(damage))
                self._unchecked.clear()
                with self._store_errors():
                    self._view = View(self._open_table(), size)
            return self._view

    def _require_in_place(self) -> None:
        stamp = manifest_stamp(self.folder)
        if stamp == self._manifest:
            return
        table_name = read_description(self.folder)[1]
        if table_name != self.table_name and not is_noted_next(self.folder, self.table_name):
            raise ArtefactError(
                f"the index {self.location} was rebuilt or compacted since it was opened",
                expected="a handle of the index as it is now",
                next_step="open it again",
            )
        self._manifest = stamp

    def _loaded(self) -> tuple[View, Matrix]:
        with self._guard:
            view = self._current()
            with self._store_errors():
                matrix = view.matrix()
            if matrix is None:
                raise self._damaged("vectors differ from their checksums")
            return view, matrix

    def _open_table(self) -> Any:
        return _connect(self.folder).open_table(self.table_name)

    @contextlib.contextmanager
    def _store_errors(self, *, writing: bool = False) -> Iterator[None]:
        """Turn the store's errors into ours, with the name of the file to blame."""
        try:
            yield
        except (SamethingError, MemoryError, GeneratorExit, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the store's Rust code is not an Exception
            number = re.search(r"\(os error (\d+)\)", str(error))
            if writing and number and int(number[1]) in _DISK_ERRORS:
                with disk_errors(self.folder):
                    raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise self._damaged("; ".join(self._checksums.damage()) or str(error)) from error

    def _damaged(self, what: str) -> ArtefactError:
        return ArtefactError(
            f"the index {self.location} cannot be used: {what}",
            expected="files as they were written",
            next_step="verify() names every damaged file: restore them from a copy, or make the index again",
        )

    def verify(self) -> Verification:
        """Compare every file with its checksum and, when they are whole, every vector with its own.

        A damaged file is not given to LanceDB to read, which it might not survive.
        """
        checksums = Checksums(self._checksums.listing, self._checksums.folder)
        checksums.read_on()
        problems = checksums.damage(all_content=True)
        num_rows = 0
        if not problems:
            try:
                num_rows, problems = self._verify_rows()
            except ArtefactError as error:
                problems = [error.given]
        return Verification(num_rows, len(checksums.entries), tuple(problems))

    def _verify_rows(self) -> tuple[int, list[str]]:
        view = self._current()
        problems: list[str] = []
        seen: set[str] = set()
        with self._store_errors():
            names = [*self.description.columns, "vector", "vector_crc32"]
            for batch in view.table.search().select(names).limit(None).to_batches():
                ids = batch["id"].to_pylist()
                wrong = (
                    vector_crc32(ids, matrix_of(batch["vector"], self.dim))
                    != batch["vector_crc32"].to_numpy()
                )
                problems += [
                    f"the vector of {ids[row]!r} is not what was written" for row in wrong.nonzero()[0]
                ]
                problems += [f"the id {name!r} is there twice" for name in ids if name in seen]
                seen.update(ids)
        return len(seen), problems

    def close(self) -> None:
        """Let go of the vectors in memory; the index cannot be used afterwards."""
        with self._guard:
            self._view = None
            self._is_closed = True


def _table_schema(description: IndexDescription) -> Schema:
    import pyarrow as pa

    vector = pa.field("vector", pa.list_(pa.float32(), description.dim), nullable=False)
    check = pa.field("vector_crc32", pa.uint32(), nullable=False)
    return pa.schema([*description.item_schema, vector, check])


def _connect(folder: Path) -> Any:
    import lancedb

    return lancedb.connect(str(folder.absolute()))
