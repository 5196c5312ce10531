"""The contract of every index engine, each compared with a plain reference that shares no code with them."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtyping import Float, TypeCheckError

from samething.errors import ArtefactError, FingerprintError, InputError
from samething.index import (
    ENGINES,
    AbstractIndex,
    Between,
    Hits,
    IndexDescription,
    MilvusIndex,
    Regions,
    Verification,
    create_index,
    open_index,
)
from samething.index.interface import listed
from samething.index.sqlite_folder import bound_to
from samething.retrieval import FlatScan, code_scan, exact_topk, nearest_units
from samething.retrieval.codes import Coder

DIM = 8
MILVUS_SERVER = "SAMETHING_TEST_MILVUS"
"""Environment variable with the address, HOST:PORT, of a Milvus server that may be written to."""
MODEL = {"model_fingerprint": "a1b2c3d4e5f60718", "model_name": "small-64"}
NO_REGIONS = Regions((), np.empty((0, DIM), np.float32))
REFUSED = (InputError, TypeCheckError)  # the type checks of the test run see wrong types first
AWKWARD_IDS = ["a'b", "''", '"', "\\'", "%", "--", "'); drop", " ", "a\nb", "x\x00y", "é", "💥", "?", "$1"]


Stored = tuple[list[float], dict[str, Any], Regions]


class MemoryIndex(AbstractIndex):
    """The reference: a dict of rows, searched by sorting Python floats."""

    stores: ClassVar[dict[str, tuple[IndexDescription, dict[str, Stored]]]] = {}

    @classmethod
    def create(cls, location, description):
        if str(location) in cls.stores:
            raise ArtefactError("twice", expected="once", next_step="open it")
        cls.stores[str(location)] = (description, {})
        return cls(str(location), description)

    def __init__(self, location, description):
        self.location, self.description = location, description

    @classmethod
    def open(cls, location):
        if str(location) not in cls.stores:
            raise ArtefactError("nothing there", expected="an index", next_step="make one")
        return cls(str(location), cls.stores[str(location)][0])

    @classmethod
    def exists(cls, location):
        return str(location) in cls.stores

    def beside(self, description):
        successor = type(self).create(f"{self.location} next {description.model_fingerprint}", description)
        successor.known = dict(self.store)
        return successor

    def swap(self, of):
        if self.known != of.store:
            self.known = dict(of.store)
            return False
        self.stores[of.location] = self.stores.pop(self.location)
        self.location = of.location
        return True

    @property
    def store(self) -> dict[str, Stored]:
        if self.__dict__.get("is_closed"):
            raise InputError("closed", expected="open", next_step="open it again")
        return self.stores[self.location][1]

    def count(self) -> int:
        return len(self.store)

    def verify(self) -> Verification:
        return Verification(self.count(), ())

    def close(self) -> None:
        self.is_closed = True

    def _upsert(self, vectors, items, regions):
        for vector, row in zip(self.kept(vectors).tolist(), items.to_pylist(), strict=True):
            own = regions.get(row["id"], NO_REGIONS)
            self.store[row["id"]] = (vector, row, Regions(own.places, self.kept(own.vectors)))

    def kept(self, vectors):
        coder = self.description.coder
        return vectors if coder is None else coder.decode(coder.encode(vectors))

    def _amend(self, ids, changed, vectors, regions):
        kept, gone = changed({name: self.store[name][1] for name in ids if name in self.store})
        for row in kept.to_pylist():
            name = row["id"]
            if vectors:
                self._upsert(vectors[name][None], pa.Table.from_pylist([row], schema=kept.schema), regions)
            else:
                self.store[name] = (self.store[name][0], row, self.store[name][2])
        self._delete(gone)

    def _delete(self, ids):
        for name in ids:
            self.store.pop(name, None)

    def _search(self, queries, k, where, columns):
        ids, scores, rows, places = [], [], [], []
        for query in queries.tolist():
            found = [
                (*best_of(query, [(vector, None), *zip(own.vectors.tolist(), own.places, strict=True)]), name)
                for name, (vector, row, own) in self.store.items()
                if all(meets(row[column], values) for column, values in where.items())
            ]
            ranked = sorted(found, key=lambda entry: (entry[0], entry[2]))[:k]
            ids.append([name for _, _, name in ranked])
            scores.append([-score for score, _, _ in ranked])
            places += [place for _, place, _ in ranked]
            rows += [{column: self.store[name][1][column] for column in columns} for _, _, name in ranked]
        width = len(ids[0]) if ids else 0
        matrix = np.empty((len(ids), width), dtype=object)
        for number, names in enumerate(ids):
            matrix[number, :] = names
        score_matrix = np.array(scores, dtype=np.float64).reshape(len(ids), width)
        return Hits(matrix, score_matrix, rows, columns, self.description, places)

    def items(self, columns=None):
        yield from self.rows(list(self.store), columns).to_batches()

    def rows(self, ids, columns=None):
        chosen = self.description.chosen(columns)
        schema = pa.schema([self.description.item_schema.field(name) for name in chosen])
        return pa.Table.from_pylist([row for _, row, _ in self.found(ids)], schema=schema)

    def vectors(self, ids):
        found = [vector for vector, _, _ in self.found(ids)]
        return np.array(found, dtype=np.float32).reshape(-1, self.description.dim)

    def regions(self, ids):
        return [regions for _, _, regions in self.found(ids)]

    def found(self, ids):
        names = listed(ids)
        self.require_there(names, self.store)
        return [self.store[name] for name in names]


def best_of(query, vectors):
    """Minus the best score, and where that is; of equal ones the whole image, then the first region."""
    scores = [
        round(math.fsum(a * b for a, b in zip(query, vector, strict=True)), 10) for vector, _ in vectors
    ]
    best = scores.index(max(scores))
    return -scores[best], vectors[best][1]


def meets(value: Any, condition: Any) -> bool:
    if isinstance(condition, Between):
        low = -math.inf if condition.low is None else condition.low
        high = math.inf if condition.high is None else condition.high
        return value is not None and low <= value <= high
    return any(text in condition for text in (value if isinstance(value, list) else [value]))


@dataclasses.dataclass
class Engine:
    """One engine under test, and where its next index goes."""

    kind: type[AbstractIndex]
    new_location: Callable[[], Any]
    coder: Coder | None = None

    def create(self, **options) -> AbstractIndex:
        bound = {"dim": DIM, **MODEL, "coder": self.coder, **options}
        return self.kind.create(self.new_location(), IndexDescription(**bound))

    def open(self, location: str, **model: str) -> AbstractIndex:
        index = self.kind.open(location)
        if model:
            index.require_model(model["model_fingerprint"], model["model_name"])
        return index

    def kept(self, vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """What comes back of vectors that were added."""
        return vectors if self.coder is None else self.coder.decode(self.coder.encode(vectors))


@pytest.fixture(params=["memory", *ENGINES, "sqlite int4", "sqlite int8"])
def engine(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Every engine in turn; a test that passes here with ``memory`` alone has a mistake in an engine.

    Rows of 4 bits are scanned here, few as they are; those of 8 bits are decoded.

    A Milvus server is asked where the environment names one; ``tests/test_index_milvus.py`` starts one.
    """
    numbers = iter(range(1_000_000))
    if request.param == "milvus":
        server = os.environ.get(MILVUS_SERVER)
        if not server:
            pytest.skip(f"no Milvus server in {MILVUS_SERVER}; tests/test_index_milvus.py starts one")
        prefix = f"milvus://{server}/t{secrets.token_hex(6)}_"
        yield Engine(MilvusIndex, lambda: f"{prefix}{next(numbers)}")
    elif request.param == "milvus-lite":
        yield Engine(MilvusIndex, lambda: f"milvus-lite://{tmp_path}/lite.db/index_{next(numbers)}")
    elif request.param.startswith("sqlite "):
        coder = Coder.fit(unit(500, seed=7), request.param.removeprefix("sqlite "))
        if coder.kind == "int4":
            monkeypatch.setattr(code_scan, "_FEW_BYTES", 0)
        yield Engine(ENGINES["sqlite"], lambda: tmp_path / f"index {next(numbers)}", coder)
    else:
        kind = MemoryIndex if request.param == "memory" else ENGINES[request.param]
        yield Engine(kind, lambda: tmp_path / f"index {next(numbers)}")
    MemoryIndex.stores.clear()


def unit(num_rows: int, seed: int = 0) -> Float[np.ndarray, "n d"]:
    rows = np.random.default_rng(seed).normal(size=(num_rows, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def named(num_rows: int, prefix: str = "p") -> list[dict[str, Any]]:
    return [
        {
            "id": f"{prefix}{number:03d}",
            "path": f"bilder/ä {number}.jpg",
            "label": f"thing {number // 3}",
            "domain": ["cars", "art", None][number % 3],
            "width": 640 + number,
            "height": 480,
            "sha256": f"{number:064x}",
            "thumbnail": bytes([255, 216, number % 256]),
        }
        for number in range(num_rows)
    ]


# ---- the empty index


def test_a_new_index_is_empty_and_can_be_searched(engine: Engine) -> None:
    index = engine.create()
    assert (index.count(), len(index), index.description.dim) == (0, 0, DIM)
    bound = index.description
    assert (bound.model_fingerprint, bound.model_name) == ("a1b2c3d4e5f60718", "small-64")
    hits = index.search(unit(3), 5, where={"domain": "cars"})
    assert len(hits) == 3
    assert hits.ids.shape == hits.scores.shape == (3, 0)
    assert hits.of(2) == []
    assert list(index.items()) == [] or sum(len(batch) for batch in index.items()) == 0
    assert index.vectors([]).shape == (0, DIM)
    assert index.rows([]).num_rows == 0
    assert index.verify().problems == ()


def test_adding_and_deleting_nothing_changes_nothing(engine: Engine) -> None:
    index = engine.create()
    index.add(unit(0), [])
    index.delete([])
    index.delete(["not there"])
    assert index.count() == 0


# ---- adding and finding


def test_a_row_comes_back_with_its_metadata(engine: Engine) -> None:
    index = engine.create()
    vectors, rows = unit(20), named(20)
    index.add(vectors, rows)
    hits = index.search(vectors[[7, 11]], 3)
    assert hits.ids[:, 0].tolist() == ["p007", "p011"]
    cosines = (vectors * engine.kept(vectors)).sum(axis=1)
    np.testing.assert_allclose(hits.scores[:, 0], cosines[[7, 11]], atol=1e-6)
    (first, *_) = hits.of(1)
    assert first.pop("score") == hits.scores[1, 0]
    assert first == {name: value for name, value in rows[11].items() if name != "thumbnail"}
    assert [row["id"] for row in hits.of(0)] == hits.ids[0].tolist()


def test_columns_are_chosen_and_the_id_always_comes(engine: Engine) -> None:
    index = engine.create()
    index.add(unit(4), named(4))
    hits = index.search(unit(1), 2, columns=["thumbnail"])
    assert hits.items.column_names == ["id", "thumbnail"]
    assert index.rows(["p002"], ["label"]).to_pylist() == [{"id": "p002", "label": "thing 0"}]
    assert {row["id"] for batch in index.items([]) for row in batch.to_pylist()} == {
        "p000",
        "p001",
        "p002",
        "p003",
    }
    with pytest.raises(InputError, match="colour"):
        index.search(unit(1), 2, columns=["colour"])


def test_the_same_id_replaces_and_the_last_of_a_batch_counts(engine: Engine) -> None:
    index = engine.create()
    vectors = unit(6)
    index.add(vectors[:3], named(3))
    index.add(vectors[3:5], [{"id": "p001", "path": "new"}, {"id": "p900"}])
    index.add(
        vectors[[0, 5]], [{"id": "p900", "path": "not this"}, {"id": "p900", "path": "the last of them"}]
    )
    assert index.count() == 4
    np.testing.assert_array_equal(index.vectors(["p900", "p001"]), index.vectors(["p900", "p001"]))
    np.testing.assert_allclose(index.vectors(["p900", "p001"]), engine.kept(vectors)[[5, 3]], atol=1e-7)
    rows = index.rows(["p900", "p001", "p000"], ["path", "label"]).to_pylist()
    assert [row["path"] for row in rows] == ["the last of them", "new", "bilder/ä 0.jpg"]
    assert [row["label"] for row in rows] == [None, None, "thing 0"]  # replaced as a whole, not merged


def test_rows_are_amended_by_what_they_are(engine: Engine) -> None:
    """Changed, deleted, passed over and, with vectors, added."""
    index = engine.create()
    vectors = unit(6)
    index.add(vectors[:3], named(3))

    def relabelled(name: str, row: Any) -> Any:
        return None if name == "p001" else {**row, "label": f"was {row['label']}"}

    index.amend(["p000", "p001", "nobody"], relabelled)
    assert index.rows(["p000", "p002"], ["label"])["label"].to_pylist() == ["was thing 0", "thing 0"]
    assert index.rows(["p000"], ["thumbnail"])["thumbnail"].to_pylist() == [bytes([255, 216, 0])]
    assert index.count() == 2
    np.testing.assert_allclose(index.vectors(["p000"]), engine.kept(vectors)[:1], atol=1e-7)

    def counted(name: str, row: Any) -> Any:
        return None if name == "never" else {"id": name, "width": 0 if row is None else row["width"] + 1}

    index.amend(["p002", "new", "never"], counted, vectors=vectors[3:])
    assert index.count() == 3
    assert index.rows(["p002", "new"], ["width"])["width"].to_pylist() == [643, 0]
    np.testing.assert_allclose(index.vectors(["p002", "new"]), engine.kept(vectors)[3:5], atol=1e-7)
    assert index.search(vectors[4:5], 1).ids.tolist() == [["new"]]
    with pytest.raises(InputError, match="colour"):
        index.amend(["new"], lambda name, row: {**row, "colour": "red"})
    index.amend([], counted)
    assert index.count() == 3 and index.verify().problems == ()


def test_rows_are_deleted_by_id_whatever_is_in_it(engine: Engine) -> None:
    index = engine.create()
    num_rows = len(AWKWARD_IDS)
    index.add(unit(num_rows), [{"id": name} for name in AWKWARD_IDS])
    index.add(unit(2, seed=1), [{"id": "kept"}, {"id": "'); DROP TABLE vectors; --"}])
    assert index.count() == num_rows + 2
    np.testing.assert_allclose(index.vectors(AWKWARD_IDS), engine.kept(unit(num_rows)), atol=1e-7)
    for number, name in enumerate(AWKWARD_IDS):
        index.delete([name, name])
        assert index.count() == num_rows + 1 - number, name
    assert sorted(index.search(unit(1), 9).ids[0]) == ["'); DROP TABLE vectors; --", "kept"]


def test_vectors_and_rows_keep_the_order_of_the_ids_asked_for(engine: Engine) -> None:
    index = engine.create()
    vectors = unit(30)
    index.add(vectors, pa.Table.from_pylist(named(30)))
    asked = ["p017", "p003", "p029", "p003"]
    np.testing.assert_allclose(index.vectors(asked), engine.kept(vectors)[[17, 3, 29, 3]], atol=1e-7)
    assert index.rows(asked)["id"].to_pylist() == asked
    assert index.rows(asked)["width"].to_pylist() == [657, 643, 669, 643]
    for ask in (index.vectors, index.rows):
        with pytest.raises(InputError, match="p999"):
            ask(["p001", "p999"])


def test_items_streams_every_row_once(engine: Engine) -> None:
    index = engine.create()
    rows = named(50)
    for start in range(0, 50, 10):
        index.add(unit(10, seed=start), rows[start : start + 10])
    index.delete(["p004"])
    streamed = [row for batch in index.items(list(rows[0])) for row in batch.to_pylist()]
    assert sorted(streamed, key=lambda row: row["id"]) == rows[:4] + rows[5:]


def test_more_hits_than_rows(engine: Engine) -> None:
    index = engine.create()
    index.add(unit(3), named(3))
    assert index.search(unit(2), 100).ids.shape == (2, 3)
    assert index.search(unit(0), 100).ids.shape[0] == 0
    with pytest.raises(InputError, match="k=0"):
        index.search(unit(1), 0)


@pytest.mark.parametrize("num_copies", [3, 100])
def test_rows_of_equal_score_come_in_the_order_of_their_ids(engine: Engine, num_copies: int) -> None:
    """100 copies are more than the fast search fetches beyond k, so its way out is taken as well."""
    index = engine.create()
    copies = np.repeat(unit(1), num_copies, axis=0)
    names = [f"c{number:03d}" for number in np.random.default_rng(0).permutation(num_copies)]
    index.add(copies, [{"id": name} for name in names])
    index.add(unit(500, seed=5), named(500))
    expected = sorted(names)[:7]
    query = engine.kept(unit(1))
    assert index.search(query, 7).ids[0, : len(expected)].tolist() == expected
    index.delete(expected[:1])
    assert index.search(query, 2).ids[0].tolist() == expected[1:3]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_vectors_of_any_float_type(engine: Engine, dtype: type) -> None:
    index = engine.create()
    index.add(unit(5).astype(dtype), named(5))
    kept = index.vectors(["p003"])
    assert kept.dtype == np.float32
    np.testing.assert_allclose(kept, engine.kept(unit(5)[3:4]), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(kept.astype(float)), 1, atol=1e-7)
    hits = index.search(unit(5)[:2].astype(dtype), 1)
    assert hits.ids[:, 0].tolist() == ["p000", "p001"]
    assert hits.scores.dtype == np.float64


# ---- filters


def test_filters_keep_their_full_recall(engine: Engine) -> None:
    index = engine.create()
    vectors, rows = unit(300), named(300)
    index.add(vectors, rows)
    query = unit(1, seed=9)
    order = np.argsort(-(engine.kept(vectors).astype(float) @ query[0].astype(float)))

    def expected(keep: Callable[[dict[str, Any]], bool], k: int) -> list[str]:
        return [rows[row]["id"] for row in order if keep(rows[row])][:k]

    hits = index.search(query, 9, where={"domain": "art"})
    assert hits.ids[0].tolist() == expected(lambda row: row["domain"] == "art", 9)
    assert {row["domain"] for row in hits.of(0)} == {"art"}
    labels = ["thing 4", "thing 50", "thing 99", "there is none"]
    hits = index.search(query, 9, where={"label": labels, "domain": ["art", "cars"]})
    assert hits.ids[0].tolist() == expected(lambda row: row["label"] in labels and bool(row["domain"]), 9)
    assert hits.ids.shape == (1, 6)
    assert index.search(query, 9, where={"id": "p123"}).ids.tolist() == [["p123"]]
    assert index.search(query, 9, where={"domain": []}).ids.shape == (1, 0)
    assert index.search(query, 9, where={"domain": "' OR 1=1 --"}).ids.shape == (1, 0)
    assert index.search(query, 9, where={}).ids.shape == (1, 9)


@pytest.mark.parametrize(
    "where",
    [
        {"colour": "red"},
        {"width": "640"},
        {"thumbnail": "x"},
        {"domain": [1]},
        {"label": Between(1, 2)},
    ],
)
def test_filters_that_cannot_be(engine: Engine, where: dict[str, Any]) -> None:
    index = engine.create()
    with pytest.raises(REFUSED, match=next(iter(where))):
        index.search(unit(1), 1, where=where)


def test_extra_columns_are_kept_and_filtered(engine: Engine) -> None:
    index = engine.create(extra_columns={"season": "text", "size_bytes": "integer", "quality": "number"})
    index.add(unit(2), [{"id": "a", "season": "été", "size_bytes": 2**40, "quality": 0.5}, {"id": "b"}])
    assert index.search(unit(1), 5, where={"season": "été"}).ids.tolist() == [["a"]]
    again = engine.open(index.location)
    row = {"id": "a", "season": "été", "size_bytes": 2**40, "quality": 0.5}
    assert again.rows(["a"], ["season", "size_bytes", "quality"]).to_pylist() == [row]
    assert bound_to(again.description) == bound_to(index.description)


def test_ranges_and_lists_of_texts(engine: Engine) -> None:
    index = engine.create(extra_columns={"tags": "texts", "quality": "number"})
    rows = [
        {"id": "a", "tags": ["red", "é'; --"], "quality": -0.5, "width": 10},
        {"id": "b", "tags": [], "quality": 2.5, "width": -(2**62)},
        {"id": "c", "tags": ["blue", "red"], "quality": None, "width": 2**62},
        {"id": "d", "tags": None, "quality": 0.0},
    ]
    index.add(unit(4), rows)
    assert index.rows(["a", "b", "d"], ["tags"])["tags"].to_pylist()[0] == ["red", "é'; --"]
    for where, expected in [
        ({"tags": "red"}, "ac"),
        ({"tags": ["blue", "é'; --"]}, "ac"),
        ({"tags": "re"}, ""),
        ({"quality": Between(-0.5, 0)}, "ad"),
        ({"quality": Between(0.25)}, "b"),
        ({"quality": Between(high=0.25)}, "ad"),
        ({"quality": Between()}, "abd"),
        ({"width": Between(9.5, 10.5)}, "a"),
        ({"width": Between(10.5)}, "c"),
        ({"width": Between(high=10)}, "ab"),
        ({"width": Between(3, 1)}, ""),
        ({"width": Between(1), "tags": "red", "quality": Between(-9, 9)}, "a"),
    ]:
        assert sorted(index.search(unit(1), 9, where=where).ids[0]) == list(expected), where


@pytest.mark.parametrize(
    "extra", [{"id": "text"}, {"vector": "number"}, {"Bad Name": "text"}, {"a": "date"}, {"score": "number"}]
)
def test_extra_columns_that_cannot_be(engine: Engine, extra: dict[str, str]) -> None:
    with pytest.raises(REFUSED, match=r"extra.column"):
        engine.create(extra_columns=extra)


# ---- what is refused


def test_vectors_that_do_not_fit_are_refused_and_nothing_is_added(engine: Engine) -> None:
    index = engine.create()
    index.add(unit(2), named(2))
    good = unit(3)
    not_finite, short, long = good.copy(), good.copy(), good.copy()
    not_finite[1, 2] = np.nan
    short[2] *= 0.99
    long[0] *= 1.002
    for vectors, words in [
        (not_finite, "vector 1 holds NaN"),
        (np.where(good == good[0, 0], np.inf, good), "vector 0 holds NaN or infinity"),
        (short, "vector 2 has the length 0.99"),
        (long, "vector 0 has the length"),
        (np.zeros_like(good), "vector 0 has the length 0, and 2 more"),
        (good[:, :4], r"shape \(3, 4\)"),
    ]:
        with pytest.raises(InputError, match=words):
            index.add(vectors, named(3, "bad"))
        with pytest.raises(InputError, match=words):
            index.search(vectors, 1)
    with pytest.raises(InputError, match="3 vectors and 2 rows"):
        index.add(good, named(2, "bad"))
    assert sorted(index.search(good, 9).ids[0]) == ["p000", "p001"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "a", "colour": "red"}], "colour"),
        ([{"path": "a.jpg"}], "row 0 of the metadata has no id"),
        ([{"id": ""}], "row 0 of the metadata has no id"),
        ([{"id": None, "path": "x"}], "row 0 of the metadata has no id"),
        ([{"id": "a", "width": "wide"}], "does not fit"),
        ([{"id": "a", "width": 2**70}], "does not fit"),
        ([{"id": "\ud800"}], "does not fit"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    engine: Engine, rows: list[dict[str, Any]], words: str
) -> None:
    index = engine.create()
    with pytest.raises(InputError, match=words):
        index.add(unit(1), rows)
    assert index.count() == 0


def test_another_models_vectors_are_refused_and_both_models_named(engine: Engine) -> None:
    index = engine.create()
    index.add(unit(1), named(1))
    assert engine.open(index.location, **MODEL).count() == 1
    for refused in (
        lambda: engine.open(index.location, model_fingerprint="ffff", model_name="other-64"),
        lambda: index.require_model("ffff", "other-64"),
    ):
        with pytest.raises(FingerprintError, match=r"ffff.*small-64.*a1b2c3d4e5f60718"):
            refused()
    with pytest.raises(FingerprintError, match=r"other-64.*small-64"):
        engine.open(index.location, model_fingerprint="ffff", model_name="other-64")
    assert index.count() == 1


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"model_name": ""}, {"model_fingerprint": ""}])
def test_descriptions_that_cannot_be(engine: Engine, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        engine.kind.create(engine.new_location(), IndexDescription(**{"dim": DIM, **MODEL, **wrong}))


# ---- opening again


def test_everything_is_there_after_opening_again(engine: Engine) -> None:
    index = engine.create()
    index.add(unit(10), named(10))
    index.delete(["p003"])
    before = index.search(unit(4, seed=2), 5)
    index.close()
    with engine.open(index.location) as again:
        after = again.search(unit(4, seed=2), 5)
        assert after.ids.tolist() == before.ids.tolist()
        np.testing.assert_array_equal(after.scores, before.scores)
        assert after.items.equals(before.items)
        assert again.verify() == dataclasses.replace(again.verify(), num_rows=9, problems=())


def test_two_handles_see_each_others_changes_at_once(engine: Engine) -> None:
    one = engine.create()
    two = engine.open(one.location)
    one.add(unit(4), named(4))
    assert two.count() == 4
    assert two.search(unit(4)[2:3], 1).ids.tolist() == [["p002"]]
    two.delete(["p002"])
    two.add(unit(1, seed=3), [{"id": "p000"}])
    assert one.count() == 3
    assert one.search(unit(1, seed=3), 1).ids.tolist() == [["p000"]]
    assert "p002" not in one.search(unit(4)[2:3], 9).ids


def test_a_closed_index_says_so(engine: Engine) -> None:
    index = engine.create()
    index.close()
    index.close()
    for use in (
        index.count,
        lambda: index.search(unit(1), 1),
        lambda: index.add(unit(1), named(1)),
        lambda: index.delete(["a"]),
    ):
        with pytest.raises(InputError, match="closed"):
            use()


def test_an_index_is_not_made_twice_nor_found_where_none_is(engine: Engine) -> None:
    index = engine.create()
    index.add(unit(1), named(1))
    with pytest.raises(ArtefactError):
        engine.kind.create(index.location, IndexDescription(dim=DIM, **MODEL))
    assert index.count() == 1
    with pytest.raises(ArtefactError):
        engine.open(engine.new_location())


# ---- being replaced


def test_another_index_takes_the_place_in_one_step(engine: Engine) -> None:
    """Until then the old one is found; a change of it in the meantime is noticed."""
    old = engine.create(extra_columns={"season": "text"})
    old.add(unit(3), named(3))
    new_model = {"model_fingerprint": "new0", "model_name": "new-4"}
    new = old.beside(dataclasses.replace(old.description, dim=4, **new_model, coder=None))
    new.add(np.eye(4, dtype=np.float32), [{"id": f"n{row}", "season": "été"} for row in range(4)])
    assert engine.open(old.location, **MODEL).count() == 3
    old.add(unit(1), [{"id": "late"}])
    assert not new.swap(old)
    assert new.swap(old)
    found = engine.open(old.location, **new_model)
    assert (found.count(), found.description.dim, found.description.model_name) == (4, 4, "new-4")
    assert found.search(np.eye(4, dtype=np.float32)[1:2], 1, where={"season": "été"}).ids.tolist() == [["n1"]]
    assert new.count() == 4
    with pytest.raises(FingerprintError, match="new-4"):
        engine.open(old.location, **MODEL)
    again = found.beside(dataclasses.replace(found.description, dim=DIM, **MODEL, coder=engine.coder))
    again.add(unit(2), named(2))
    assert again.swap(found)
    assert engine.open(old.location, **MODEL).count() == 2
    assert again.verify().problems == ()


# ---- against the reference


names = st.sampled_from([f"n{number}" for number in range(12)])
changes = st.one_of(
    st.tuples(st.just("add"), st.lists(st.tuples(names, st.integers(0, 5)), min_size=1, max_size=6)),
    st.tuples(st.just("delete"), st.lists(names, max_size=4)),
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(changes, min_size=1, max_size=6), k=st.integers(1, 15))
def test_any_sequence_of_changes_gives_what_the_reference_gives(engine: Engine, steps, k: int) -> None:
    """Six different vectors among twelve names: ties are the rule here."""
    pool = unit(6, seed=42)
    index = engine.create()
    reference = MemoryIndex.create(f"reference of {index.location}", index.description)
    for step, (what, arguments) in enumerate(steps):
        for each in (index, reference):
            if what == "delete":
                each.delete(arguments)
            else:
                rows = [{"id": name, "label": f"{number}", "width": step} for name, number in arguments]
                each.add(pool[[number for _, number in arguments]], rows)
        assert index.count() == reference.count()
        for where in (None, {"label": ["1", "3"]}):
            ours, theirs = (each.search(pool[:3], k, where=where) for each in (index, reference))
            assert ours.ids.tolist() == theirs.ids.tolist()
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=2e-10)
            assert ours.items.to_pylist() == theirs.items.to_pylist()


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 400),
    num_distinct=st.integers(1, 400),
    k=st.integers(1, 60),
    noise=st.sampled_from([0.0, 1e-8, 1e-6, 1e-4]),
    seed=st.integers(0, 10),
)
def test_the_fast_search_is_the_exact_one(
    num_rows: int, num_distinct: int, k: int, noise: float, seed: int
) -> None:
    """With copies and near copies of a few vectors, which is where float32 alone gives another order."""
    random = np.random.default_rng(seed)
    gallery = unit(num_distinct, seed)[random.integers(0, num_distinct, num_rows)].astype(float)
    gallery += noise * random.normal(size=gallery.shape)
    gallery = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32)
    queries = np.concatenate([gallery[:2], unit(2, seed + 100)])
    k = min(k, num_rows)
    fast, exact = nearest_units(queries, gallery, k), exact_topk(queries, gallery, k, normalised=True)
    np.testing.assert_array_equal(fast.indices, exact.indices)
    np.testing.assert_array_equal(fast.scores, exact.scores)
    scan = FlatScan(gallery)
    scan.nearest(queries[:1], k)  # by NumPy, the others by FAISS
    for number in range(len(queries)):
        found = scan.nearest(queries[number : number + 1], k)
        np.testing.assert_array_equal(found.indices[0], exact.indices[number])
        np.testing.assert_array_equal(found.scores[0], exact.scores[number])


# ---- choosing the engine


def test_the_location_chooses_the_engine(tmp_path: Path) -> None:
    made = create_index(tmp_path / "a", dim=DIM, **MODEL)
    made.add(unit(1), named(1))
    folder = str(tmp_path / "a")
    for location in (tmp_path / "a", folder, f"sqlite://{folder}", f"SQLITE://{folder}"):
        opened = open_index(location)
        opened.require_model(MODEL["model_fingerprint"])
        assert opened.count() == 1
    for location in (
        "milvsu://host:19530/images",
        "milvus://host",
        "milvus://h/a-b",
        "milvus-lite:///x/y",
        "http://host/x",
    ):
        with pytest.raises(InputError, match=r"sqlite://|milvus://"):
            open_index(location)
        with pytest.raises(InputError, match=r"sqlite://|milvus://"):
            create_index(location, dim=DIM, **MODEL)


# ---- regions


PLACES = [(0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75), (0.5, 0.5, 1.0, 1.0)]
region_steps = st.one_of(
    st.tuples(
        st.just("add"),
        st.lists(
            st.tuples(names, st.integers(0, 5), st.lists(st.integers(0, 5), max_size=3)),
            min_size=1,
            max_size=6,
        ),
    ),
    st.tuples(st.just("delete"), st.lists(names, max_size=3)),
    st.tuples(st.just("relabel"), st.lists(names, min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("replace"), st.lists(names, min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("compact"), st.just([])),
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(region_steps, min_size=1, max_size=5), k=st.integers(1, 15))
def test_a_row_is_as_near_as_the_best_of_its_regions(engine: Engine, steps, k: int) -> None:
    """MaxSim against sorted Python floats, after any changes; ties between rows, and within a row, abound."""
    pool = unit(6, seed=42)
    index = engine.create(regions="grid")
    reference = MemoryIndex.create(f"reference of {index.location}", index.description)
    for step, (what, arguments) in enumerate(steps):
        for each in (index, reference):
            if what == "add":
                rows = [{"id": name, "label": f"{number}", "width": step} for name, number, _ in arguments]
                regions = [Regions(PLACES[: len(own)], pool[own]) for _, _, own in arguments]
                each.add(pool[[number for _, number, _ in arguments]], rows, regions=regions)
            elif what == "delete":
                each.delete(arguments)
            elif what == "relabel":
                each.amend(arguments, lambda name, row: {**row, "label": "1"})
            elif what == "replace":
                regions = [Regions(PLACES[2:], pool[[(step + 1) % 6]])] * len(arguments)
                vectors = pool[[step % 6] * len(arguments)]
                each.amend(
                    arguments, lambda name, row: {"id": name, "label": "3"}, vectors=vectors, regions=regions
                )
            elif isinstance(each, ENGINES["sqlite"]):
                each.compact()
        assert index.count() == reference.count() == sum(map(len, index.items([])))
        for where in (None, {"label": ["1", "3"]}):
            ours, theirs = (each.search(pool[:3], k, where=where) for each in (index, reference))
            assert ours.ids.tolist() == theirs.ids.tolist()
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=2e-10)
            assert ours.items.to_pylist() == theirs.items.to_pylist()
            assert list(ours.places) == list(theirs.places)
    ids = sorted(row["id"] for batch in index.items([]) for row in batch.to_pylist())
    for ours, theirs in zip(index.regions(ids), reference.regions(ids), strict=True):
        assert list(ours.places) == list(theirs.places)
        np.testing.assert_allclose(ours.vectors, theirs.vectors.reshape(-1, DIM), atol=1e-7)
    assert index.verify().problems == () and index.verify().num_rows == len(ids)


def test_an_index_with_regions_is_the_same_after_opening_and_being_replaced(engine: Engine) -> None:
    index = engine.create(regions="grid")
    index.add(unit(2), named(2), regions=[Regions(PLACES, unit(3, seed=1)), Regions((), unit(0))])
    again = engine.open(index.location, **MODEL)
    assert again.description.regions == "grid"
    (hit,) = again.search(unit(3, seed=1)[1:2], 1).of(0)
    assert (hit["id"], hit["place"]) == ("p000", PLACES[1])
    (hit,) = again.search(unit(2)[1:2], 1).of(0)
    assert (hit["id"], hit["place"]) == ("p001", None)
    plain = again.beside(dataclasses.replace(again.description, regions=None))
    plain.add(unit(2), named(2))
    assert plain.swap(again)
    found = engine.open(index.location, **MODEL)
    assert found.description.regions is None and "place" not in found.search(unit(1), 1).of(0)[0]


@pytest.mark.parametrize(
    ("places", "vectors", "words"),
    [
        ([(0.5, 0.0, 0.5, 1.0)], unit(1), "0.5,0,0.5,1"),
        ([(0.0, 0.0, 1.0, 1.1)], unit(1), "of 'p000'"),
        ([(0.0, float("nan"), 1.0, 1.0)], unit(1), "shares of the sides"),
        (PLACES, unit(2), "3 regions and 2 vectors"),
        (PLACES[:1], 2 * unit(1), "length 2"),
    ],
)
def test_regions_that_do_not_fit_are_refused(engine: Engine, places, vectors, words: str) -> None:
    index = engine.create(regions="grid")
    with pytest.raises(InputError, match=words):
        index.add(unit(1), named(1), regions=[Regions(places, vectors)])
    assert index.count() == 0
    with pytest.raises(InputError, match="made with regions"):
        engine.create().add(unit(1), named(1), regions=[Regions(PLACES[:1], unit(1))])
