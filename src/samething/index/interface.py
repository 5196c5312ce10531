"""What every index can do, whatever engine keeps it: the interface, its checks and its results.

What changes or searches an index is checked here, and an engine's methods with an underscore get what was
checked. So a wrong vector, an unknown column or another model is refused with the same words everywhere.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from samething.arrays import Embeddings, Float, Queries
from samething.errors import FingerprintError, InputError
from samething.files import Json
from samething.index.conditions_and_hits import Condition, Hits, Verification, Where, conditions
from samething.index.description import (
    ColumnKind,
    IndexDescription,
    Items,
    RecordBatch,
    Regions,
    Table,
    checked_regions,
    item_table,
    unit_vectors,
)

Row: TypeAlias = Mapping[str, Any]
Vector: TypeAlias = Float[np.ndarray, " d"]
Changed: TypeAlias = Callable[[Mapping[str, Row]], tuple[Table, list[str]]]
"""Rows as they are -> rows as they are to be, and ids to go."""


class AbstractIndex(abc.ABC):
    """Vectors and metadata of an image collection, bound to the model that made the vectors.

    When ``add`` or ``delete`` returns, the change outlives the process. Other processes may read and write
    the same index at the same time; every call sees all that was acknowledged before it began.
    """

    location: str
    """Where it is, as messages show it."""
    description: IndexDescription
    """What it is bound to."""

    # ---- making and opening

    @classmethod
    @abc.abstractmethod
    def create(cls, location: str | Path, description: IndexDescription) -> AbstractIndex:
        """Make an empty index.

        Args:
            location: a folder or a URL, as the engine has it.
            description: what it is bound to; an engine may keep floats where that has a coder.

        Raises:
            InputError: there is something else at this place, or it cannot be written to.
            ArtefactError: there is an index already.
        """

    @classmethod
    @abc.abstractmethod
    def open(cls, location: str | Path) -> AbstractIndex:
        """Open the index that was made at a location.

        Raises:
            ArtefactError: there is none, or it is unfinished, damaged or of a newer format.
        """

    @classmethod
    @abc.abstractmethod
    def exists(cls, location: str | Path) -> bool:
        """Whether there is a finished index at this place."""

    # ---- being replaced

    @abc.abstractmethod
    def beside(self, description: IndexDescription) -> AbstractIndex:
        """An index that is to take this one's place: empty, or as far as a killed process came with it.

        It has the extra columns of this one. Nobody finds it until :meth:`swap` is called on it.
        """

    @abc.abstractmethod
    def swap(self, of: AbstractIndex) -> bool:
        """Take the place of the index that this one was made beside, in one step.

        Returns:
            Whether it happened; False when rows of the other one changed after :meth:`beside`, or after the
            last call that returned False.
        """

    def add_columns(self, kinds: Mapping[str, ColumnKind]) -> None:
        """Have further metadata columns, null in all rows so far; those that are there keep their kinds.

        Raises:
            InputError: a name or kind that cannot be, or an engine whose columns are fixed.
        """
        new = {name: kind for name, kind in kinds.items() if name not in self.description.columns}
        if new:
            raise InputError(
                f"the new columns {', '.join(new)} for the index {self.location}",
                expected=f"columns of this index, which are fixed: {', '.join(self.description.columns)}",
                next_step="leave them out, or make the index again",
            )

    # ---- what it is

    def require_model(self, fingerprint: str, name: str | None = None) -> None:
        """Refuse another model's vectors.

        Raises:
            FingerprintError: names both models.
        """
        own = self.description
        if fingerprint != own.model_fingerprint:
            theirs = f"{name!r} ({fingerprint})" if name else f"with the fingerprint {fingerprint}"
            ours = f"{own.model_name!r} ({own.model_fingerprint})"
            raise FingerprintError(
                f"vectors of the model {theirs} for the index {self.location}, which was made by {ours}",
                expected=f"vectors of {ours}: vectors of different models cannot be compared",
                next_step=f"use the model {own.model_name!r}, or make an index with the other model",
            )

    # ---- changing

    def add(
        self,
        vectors: Embeddings,
        items: Items,
        *,
        regions: Sequence[Regions] | None = None,
    ) -> None:
        """Add rows; a row whose id is there already takes the old one's place.

        The batch is stored as a whole or not at all. Of several rows with the same id the last one counts.

        Args:
            vectors: float, finite, of length 1 within ``NORM_TOLERANCE``; scaled to length 1 and kept as
                float32, or in the codes of the index.
            items: metadata, one row per vector.
            regions: parts of each row's image; by default none.

        Raises:
            InputError: vectors or metadata that do not fit, or a disk that is full or read-only.
        """
        vectors = unit_vectors(vectors, dim=self.description.dim)
        table = item_table(items, self.description)
        if table.num_rows != len(vectors):
            raise InputError(
                f"{len(vectors)} vectors and {table.num_rows} rows of metadata",
                expected="one row per vector",
                next_step="check how the two were made",
            )
        names = table["id"].to_pylist()
        parts = checked_regions(names, regions, self.description)
        last_of_id = {name: row for row, name in enumerate(names)}
        if len(last_of_id) < len(vectors):
            kept = sorted(last_of_id.values())
            vectors, table = vectors[kept], table.take(kept)
        if len(vectors):
            self._upsert(vectors, table, parts)

    def amend(
        self,
        ids: Sequence[str],
        amended: Callable[[str, Row | None], Row | None],
        *,
        vectors: Embeddings | None = None,
        regions: Sequence[Regions] | None = None,
    ) -> None:
        """Change rows by what they are when they are written.

        In the embedded engine no other process changes them in between; Milvus cannot promise that.

        Args:
            ids: of the rows; each once.
            amended: given an id and its row with all columns (None: there is none), says what the row is to
                be (None: none).
            vectors: of the ids, as for :meth:`add`. Without them rows keep theirs and their regions, and ids
                without a row are passed over.
            regions: with vectors, as for :meth:`add`.

        Raises:
            InputError: as for :meth:`add`.
        """
        names, by_id = listed(ids), None
        if vectors is not None:
            by_id = dict(zip(names, unit_vectors(vectors, dim=self.description.dim), strict=True))

        def changed(there: Mapping[str, Row]) -> tuple[Table, list[str]]:
            rows = {name: amended(name, there.get(name)) for name in names if by_id or name in there}
            kept = [row for row in rows.values() if row is not None]
            return item_table(kept, self.description), [name for name in there if rows[name] is None]

        if names:
            parts = checked_regions(names, regions, self.description)
            self._amend(names, changed, by_id, parts)

    def delete(self, ids: Iterable[str]) -> None:
        """Delete the rows with these ids; ids that are not there are no error."""
        names = list(dict.fromkeys(listed(ids)))
        if names:
            self._delete(names)

    def notes(self, kind: str) -> dict[str, Json]:
        """What is kept beside the rows, such as the folders that a sync follows; an engine may keep nothing.

        Args:
            kind: what the notes are about.
        """
        del kind
        return {}

    def set_notes(self, kind: str, values: Mapping[str, Json]) -> None:
        """Set some notes in one step and leave the others; None removes one. Nothing where none are kept."""
        del kind, values

    # ---- asking

    def search(
        self,
        queries: Queries,
        k: int = 5,
        *,
        where: Where | None = None,
        columns: Sequence[str] | None = None,
    ) -> Hits:
        """The ``k`` nearest rows of each query by cosine similarity, or by that of their best region.

        Rows in codes are compared as they come back from them; a query is never coded.

        Args:
            queries: float vectors of length 1 within ``NORM_TOLERANCE``.
            k: number of hits, at least 1.
            where: columns and what a hit may have there, such as ``{"domain": ["cars", "art"]}`` or
                ``{"width": Between(640)}``.
            columns: metadata to bring along besides the id; by default all but the thumbnail.

        Raises:
            InputError: queries, ``k`` or columns that do not fit.
            FingerprintError: another process rebuilt the index with another model.
            ArtefactError: what the index has on disk is damaged.
        """
        queries = unit_vectors(queries, dim=self.description.dim)
        if k < 1:
            raise InputError(f"k={k}", expected="at least 1 hit", next_step="give a larger k")
        checked = conditions(where, self.description.columns) if where else {}
        return self._search(queries, k, checked, self.description.chosen(columns))

    @abc.abstractmethod
    def count(self) -> int:
        """Number of rows."""

    def __len__(self) -> int:
        return self.count()

    @abc.abstractmethod
    def items(self, columns: Sequence[str] | None = None) -> Iterator[RecordBatch]:
        """The metadata of all rows, a batch at a time, in no particular order.

        Args:
            columns: which to bring besides the id; by default all but the thumbnail.
        """

    @abc.abstractmethod
    def rows(self, ids: Iterable[str], columns: Sequence[str] | None = None) -> Table:
        """The metadata of some rows, in the order of ``ids``.

        Raises:
            InputError: an id that is not there.
        """

    @abc.abstractmethod
    def vectors(self, ids: Iterable[str]) -> Embeddings:
        """The vectors of some rows, float32 of length 1, in the order of ``ids``; those in codes come back.

        Raises:
            InputError: an id that is not there.
        """

    @abc.abstractmethod
    def regions(self, ids: Iterable[str]) -> list[Regions]:
        """The parts of some rows that have vectors of their own, in the order of ``ids``.

        Raises:
            InputError: an id that is not there.
        """

    @abc.abstractmethod
    def verify(self) -> Verification:
        """Read everything and compare it with its checksums."""

    def require_there(self, ids: Iterable[str], found: Container[str]) -> None:
        """Refuse ids of which nothing was found.

        Raises:
            InputError: names the first.
        """
        for name in ids:
            if name not in found:
                raise InputError(
                    f"the id {name!r} is not in the index {self.location}",
                    expected="ids of rows that are there",
                    next_step="list the ids with items()",
                )

    # ---- ending

    @property
    def closed(self) -> InputError:
        """The error of an index that was closed."""
        return InputError(
            f"the index {self.location} was closed", expected="an open index", next_step="open it again"
        )

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of memory and connections; the index cannot be used afterwards."""

    def __enter__(self) -> AbstractIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what an engine adds; arguments were checked before

    @abc.abstractmethod
    def _upsert(self, vectors: Embeddings, items: Table, regions: Mapping[str, Regions]) -> None:
        """Store rows with distinct ids in one step; return when they outlive the process."""

    @abc.abstractmethod
    def _amend(
        self,
        ids: list[str],
        changed: Changed,
        vectors: Mapping[str, Vector] | None,
        regions: Mapping[str, Regions],
    ) -> None:
        """Ask for the rows to be and the ids to go, given the rows that are there; store both in one step.

        ``vectors`` and ``regions`` are by id; without vectors rows keep theirs, and their regions.
        """

    @abc.abstractmethod
    def _delete(self, ids: list[str]) -> None:
        """Delete rows; return when that outlives the process."""

    @abc.abstractmethod
    def _search(self, queries: Queries, k: int, where: dict[str, Condition], columns: list[str]) -> Hits:
        """The nearest rows; all of ``where`` must hold."""


def listed(ids: Iterable[str]) -> list[str]:
    """Ids as a list; a single text is refused.

    Raises:
        InputError: it is one.
    """
    if isinstance(ids, str):
        raise InputError(f"ids={ids!r}", expected="a list of ids", next_step="give [id] for a single one")
    return list(ids)
