"""The distributed engine: a Milvus server or cluster by URL, through pymilvus; or Milvus Lite, in a file.

``milvus://[USER:PASSWORD@]HOST[:PORT]/[DATABASE/]COLLECTION[?index=flat|hnsw][&ef=N][&tls=1]``
    A server. ``index=flat`` (the default) finds every nearest row; ``hnsw`` is for many millions.
``milvus-lite://FILE.db/COLLECTION``
    A file of this machine, which one process at a time may use.

The name in the URL is an alias, so that a rebuilt collection can take the place of the old one in one step.
Vectors are kept as float32, also those of a model that has codes.
Every read is ``Strong``: it sees all that was acknowledged before. What Milvus finds is scored again from the
stored vectors in float64, so scores and ties are those of the embedded engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from samething.arrays import Embeddings, Queries
from samething.errors import ArtefactError, SamethingError, first_line
from samething.images.parts import Place
from samething.index.conditions_and_hits import Condition, Hits, Verification
from samething.index.description import (
    IndexDescription,
    RecordBatch,
    Regions,
    Table,
    item_rows,
    vector_crc32,
)
from samething.index.interface import AbstractIndex, Changed, Vector, listed
from samething.index.milvus_place import MilvusPlace, without_password
from samething.index.milvus_schema import (
    bound_to,
    collection_schema,
    entities,
    expression,
    item_of,
    key,
    read_description,
)
from samething.retrieval import exact_topk

_PROPERTY: Final = "samething"
_ROWS_A_WRITE: Final = 500
"""Milvus takes messages of 64 MB; rows with a thumbnail have some 20 kB."""
_ROWS_A_READ: Final = 1000
_QUERIES_A_SEARCH: Final = 32
_SPARE: Final = 16
"""Rows fetched beyond the k asked for."""
_MOST_FETCHED: Final = 16_384
"""The largest limit of a search in Milvus."""
_MARGIN: Final = 1e-5
"""Ten times the error of a float32 score."""


class MilvusIndex(AbstractIndex):
    """An index in a Milvus collection. See the module."""

    def __init__(self, location: str, place: MilvusPlace, client: Any, description: IndexDescription) -> None:
        """Use ``create`` or ``open``."""
        # its fields for fewer bits are float16 and, of late, int8 of one scale: a coder's steps fit neither
        self.description = dataclasses.replace(description, coder=None)
        self.location = without_password(location)
        self._place = place
        self._client: Any = client
        self._alias = place.collection
        self._succeeds = -1

    # ---- making and opening

    @classmethod
    def create(cls, location: str | Path, description: IndexDescription) -> MilvusIndex:
        """Make an empty one. See :meth:`AbstractIndex.create`."""
        place = MilvusPlace.of(str(location))
        client = place.connect()
        index = cls(str(location), place, client, description)
        with _server_errors(index.location):
            if client.has_collection(place.collection):
                raise ArtefactError(
                    f"{index.location} is there already",
                    expected="the name of a new collection",
                    next_step="open the index that is there, or choose another name",
                )
            name = new_collection(client, place, description)
            client.create_alias(name, place.collection)
        return index

    @classmethod
    def open(cls, location: str | Path) -> MilvusIndex:
        """Open one. See :meth:`AbstractIndex.open`."""
        place = MilvusPlace.of(str(location))
        client = place.connect()
        shown = without_password(str(location))
        with _server_errors(shown):
            if not client.has_collection(place.collection):
                raise ArtefactError(
                    f"{shown} does not exist",
                    expected="a collection that samething index made",
                    next_step=f"make it with: samething index FOLDER --model MODEL -o {shown}",
                )
            found = client.describe_collection(place.collection)
            # Lite forgets descriptions and keeps properties; Milvus 2.3 knows few properties
            text = found["description"] or found.get("properties", {}).get(_PROPERTY, "")
            index = cls(str(location), place, client, read_description(text, shown))
            client.load_collection(place.collection)
        return index

    @classmethod
    def exists(cls, location: str | Path) -> bool:
        """Whether there is a collection of this name. See :meth:`AbstractIndex.exists`."""
        place = MilvusPlace.of(str(location))
        client = place.connect()
        with _server_errors(without_password(str(location))), contextlib.closing(client):
            return bool(client.has_collection(place.collection))

    # ---- being replaced

    def beside(self, description: IndexDescription) -> MilvusIndex:
        """One to take this one's place. See :meth:`AbstractIndex.beside`."""
        with _server_errors(self.location):
            name = new_collection(self._connected, self._place, description, resume=True)
        place = dataclasses.replace(self._place, collection=name)
        successor = MilvusIndex(self.location, place, place.connect(), description)
        successor._alias = self._place.collection
        successor._succeeds = self.count()
        return successor

    def swap(self, of: AbstractIndex) -> bool:
        """Let the alias name this collection. See :meth:`AbstractIndex.swap`.

        Changes of the other one are noticed by its number of rows, which is less than the embedded engine
        notices: let no other process write while an index of Milvus is rebuilt.
        """
        assert isinstance(of, MilvusIndex)
        num_rows = of.count()
        if num_rows != self._succeeds:
            self._succeeds = num_rows
            return False
        with _server_errors(self.location):
            old = self._connected.describe_collection(self._alias)["collection_name"]
            self._connected.alter_alias(self._place.collection, self._alias)
            self._connected.drop_collection(old)
        self._place = dataclasses.replace(self._place, collection=self._alias)
        return True

    # ---- changing

    def _upsert(self, vectors: Embeddings, items: Table, regions: Mapping[str, Regions]) -> None:
        rows = entities(vectors, items, regions, self.description)
        with _server_errors(self.location):
            # the rows come last: who is killed before has not noted what they are of, and will do it again
            self._delete_regions(items["id"].to_pylist())
            for start in range(0, len(rows), _ROWS_A_WRITE):
                self._connected.upsert(self._name, rows[start : start + _ROWS_A_WRITE])

    def _amend(
        self,
        ids: list[str],
        changed: Changed,
        vectors: Mapping[str, Vector] | None,
        regions: Mapping[str, Regions],
    ) -> None:
        found = self._found(ids, ["metadata", "thumbnail", "vector"])
        kept, gone = changed({name: item_of(row) for name, row in found.items()})
        own = vectors or {name: row["vector"] for name, row in found.items()}
        if vectors is None:
            regions = dict(zip(found, self.regions(found), strict=True))
        if kept.num_rows:
            names = kept["id"].to_pylist()
            self._upsert(np.asarray([own[name] for name in names], dtype=np.float32), kept, regions)
        self._delete(gone)

    def _delete(self, ids: list[str]) -> None:
        keys = [key(name) for name in ids]
        with _server_errors(self.location):
            for start in range(0, len(keys), _ROWS_A_READ):
                self._connected.delete(self._name, ids=keys[start : start + _ROWS_A_READ])
            self._delete_regions(ids)

    def _delete_regions(self, ids: list[str]) -> None:
        for chosen in self._of_rows(ids):
            self._connected.delete(self._name, filter=chosen)

    def _of_rows(self, ids: list[str]) -> Iterator[str]:
        """What chooses the regions of rows, some of them at a time; nothing in an index without regions."""
        if self.description.regions is not None:
            for start in range(0, len(ids), _ROWS_A_READ):
                keys = ", ".join(f'"{key(name)}"' for name in ids[start : start + _ROWS_A_READ])
                yield f"region > 0 and row in [{keys}]"

    # ---- asking

    def count(self) -> int:
        """Number of rows."""
        with _server_errors(self.location):
            found = self._connected.query(self._name, filter=self._only_rows, output_fields=["count(*)"])
        return int(found[0]["count(*)"])

    def _search(self, queries: Queries, k: int, where: dict[str, Condition], columns: list[str]) -> Hits:
        nothing = any(isinstance(condition, list) and not condition for condition in where.values())
        parts: list[list[_Scored]] = []
        if not nothing:
            chosen = expression(where, self.description)
            for start in range(0, len(queries), _QUERIES_A_SEARCH):
                parts += self._nearest(queries[start : start + _QUERIES_A_SEARCH], k, chosen)
        found = self._found([name for part in parts for name, _, _ in part], _fields(columns))
        # of a row that is being written its regions may be there already
        parts = [[hit for hit in part if hit[0] in found] for part in parts]
        width = min(map(len, parts), default=0)
        shape = (len(queries), width)
        hits = [hit for part in parts for hit in part[:width]]
        return Hits(
            np.array([name for name, _, _ in hits], dtype=object).reshape(shape),
            np.array([score for _, score, _ in hits], dtype=float).reshape(shape),
            [item_of(found[name]) for name, _, _ in hits],
            columns,
            self.description,
            [place for _, _, place in hits],
        )

    def _nearest(self, queries: Queries, k: int, chosen: str) -> list[list[_Scored]]:
        """The hits of each query; asks for more where copies or regions of one image fill the list."""
        limit = min(k + _SPARE, _MOST_FETCHED)
        while True:
            with _server_errors(self.location):
                answers = self._connected.search(
                    self._name,
                    queries.tolist(),
                    filter=chosen,
                    limit=limit,
                    output_fields=["vector", "metadata"],
                    search_params={"params": {"ef": max(self._place.ef, limit)}},
                    consistency_level="Strong",
                )
            settled = [
                len(found) < limit or found[-1]["distance"] < _kth_distance(found, k) - _MARGIN
                for found in answers
            ]
            if all(settled) or limit == _MOST_FETCHED:
                break
            limit = min(4 * limit, _MOST_FETCHED)
        # an approximate index may return fewer rows for one query than for another; _search sees to that
        return [_scored(query, found, k) for query, found in zip(queries, answers, strict=True)]

    def items(self, columns: Sequence[str] | None = None) -> Iterator[RecordBatch]:
        """See :meth:`AbstractIndex.items`."""
        chosen = self.description.chosen(columns)
        for rows in self._stream(_fields(chosen), self._only_rows):
            yield from item_rows([item_of(row) for row in rows], chosen, self.description).to_batches()

    @property
    def _only_rows(self) -> str:
        """What leaves out regions."""
        return "" if self.description.regions is None else "region == 0"

    def _stream(self, fields: list[str], chosen: str = "") -> Iterator[list[Any]]:
        with _server_errors(self.location):
            iterator = self._connected.query_iterator(
                self._name, batch_size=_ROWS_A_READ, filter=chosen, output_fields=fields
            )
            with contextlib.closing(iterator):
                while rows := iterator.next():
                    yield list(rows)

    def rows(self, ids: Iterable[str], columns: Sequence[str] | None = None) -> Table:
        """See :meth:`AbstractIndex.rows`."""
        chosen = self.description.chosen(columns)
        found = self._get(ids, _fields(chosen))
        return item_rows([item_of(row) for row in found], chosen, self.description)

    def vectors(self, ids: Iterable[str]) -> Embeddings:
        """See :meth:`AbstractIndex.vectors`."""
        rows = [row["vector"] for row in self._get(ids, ["vector"])]
        vectors: Embeddings = np.asarray(rows, dtype=np.float32).reshape(-1, self.description.dim)
        return vectors

    def regions(self, ids: Iterable[str]) -> list[Regions]:
        """See :meth:`AbstractIndex.regions`."""
        ids = [item_of(row)["id"] for row in self._get(ids, ["metadata"])]
        parts: dict[str, list[Any]] = {name: [] for name in ids}
        for chosen in self._of_rows(list(parts)):
            for part in chain.from_iterable(self._stream(["metadata", "vector"], chosen)):
                parts[item_of(part)["id"]].append(part)
        found = []
        for name in ids:
            own = sorted(parts[name], key=lambda part: item_of(part)["region"])
            vectors = np.asarray([part["vector"] for part in own], np.float32)
            places = [tuple(item_of(part)["place"]) for part in own]
            found.append(Regions(places, vectors.reshape(-1, self.description.dim)))
        return found

    def _get(self, ids: Iterable[str], fields: list[str]) -> list[Any]:
        names = listed(ids)
        found = self._found(names, fields)
        self.require_there(names, found)
        return [found[name] for name in names]

    def _found(self, ids: Sequence[str], fields: list[str]) -> dict[str, Any]:
        wanted = list(dict.fromkeys(ids))
        names = {key(name): name for name in wanted}
        found: dict[str, Any] = {}
        with _server_errors(self.location):
            for start in range(0, len(wanted), _ROWS_A_READ):
                keys = list(names)[start : start + _ROWS_A_READ]
                for row in self._connected.get(self._name, ids=keys, output_fields=[*fields, "id"]):
                    found[names[row["id"]]] = row
        return found

    def verify(self) -> Verification:
        """Read every row and compare its vector with the checksum that was stored with it."""
        problems: list[str] = []
        num_rows = 0
        for rows in self._stream(["vector", "vector_crc32", "metadata"]):
            ids = [item_of(row)["id"] for row in rows]
            vectors = np.asarray([row["vector"] for row in rows], dtype=np.float32)
            problems += [
                f"the vector of {name!r} is not what was written"
                for name, check, row in zip(ids, vector_crc32(ids, vectors), rows, strict=True)
                if check != row["vector_crc32"]
            ]
            num_rows += sum("place" not in item_of(row) for row in rows)
        return Verification(num_rows, tuple(problems))

    # ---- the connection

    @property
    def _connected(self) -> Any:
        if self._client is None:
            raise self.closed
        return self._client

    @property
    def _name(self) -> str:
        return self._place.collection

    def close(self) -> None:
        """Let go of the connection; the index cannot be used afterwards."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


def new_collection(
    client: Any, place: MilvusPlace, description: IndexDescription, *, resume: bool = False
) -> str:
    """Make the collection behind an alias, named after alias and model; returns its name.

    A process that was killed may have left one; it is gone on with, or else made anew.
    """
    bound = f"{description.model_fingerprint}{description.regions or ''}"
    name = f"{place.collection}__{key(bound)[:8]}"
    if client.has_collection(name):
        if resume:
            client.load_collection(name)
            return name
        client.drop_collection(name)
    parameters = client.prepare_index_params()
    graph = {"M": 16, "efConstruction": 200} if place.index == "hnsw" else {}
    parameters.add_index("vector", index_type=place.index.upper(), metric_type="IP", params=graph)
    client.create_collection(
        name,
        schema=collection_schema(description),
        index_params=parameters,
        consistency_level="Strong",
        properties={_PROPERTY: bound_to(description)},
    )
    return name


_Scored: TypeAlias = tuple[str, float, Place | None]
"""The id of a row, its score, and the region that gave it."""


def _kth_distance(found: list[Any], k: int) -> float:
    """What the k-th row of a search's answer has; of fewer rows more than anything."""
    best: dict[str, float] = {}
    for entity in found:
        best.setdefault(item_of(entity["entity"])["id"], entity["distance"])
    return list(best.values())[k - 1] if len(best) >= k else math.inf


def _scored(query: Any, found: list[Any], k: int) -> list[_Scored]:
    """The k best rows of what a search found, by the float64 score and then by id."""
    if not found:
        return []
    items = [item_of(row["entity"]) for row in found]
    by_id = sorted(range(len(found)), key=lambda row: (items[row]["id"], items[row].get("region", 0)))
    gallery = np.asarray([found[row]["entity"]["vector"] for row in by_id], dtype=np.float32)
    top = exact_topk(query[None], gallery, len(found), normalised=True)
    best: dict[str, _Scored] = {}
    for place, score in zip(top.indices[0], top.scores[0].tolist(), strict=True):
        item = items[by_id[place]]
        best.setdefault(item["id"], (item["id"], score, tuple(item["place"]) if "place" in item else None))
    return list(best.values())[:k]


def _fields(columns: list[str]) -> list[str]:
    return ["metadata", *(["thumbnail"] if "thumbnail" in columns else [])]


@contextlib.contextmanager
def _server_errors(shown: str) -> Iterator[None]:
    """Turn the client's errors into ours."""
    try:
        yield
    except (SamethingError, MemoryError):
        raise
    except Exception as error:
        raise ArtefactError(
            f"the index {shown} cannot be used: {first_line(error) or type(error).__name__}",
            expected="a Milvus server that answers",
            next_step="check that it runs and has memory and disk left; what was acknowledged is kept",
        ) from error
