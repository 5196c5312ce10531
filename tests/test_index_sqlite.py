"""The embedded engine on disk: killed writers, writers at once, damaged files, full and read-only disks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import Float

import samething.index.approximate as approximate
from samething.errors import ArtefactError, FingerprintError, InputError
from samething.files import Manifest, write_json, write_manifest
from samething.index import (
    AbstractIndex,
    IndexDescription,
    Regions,
    SqliteIndex,
    back_up,
    create_index,
    open_index,
    restore,
)
from samething.index.approximate import lower_bound
from samething.index.sqlite_folder import bound_to
from samething.retrieval import FlatScan, exact_topk
from samething.retrieval.codes import Coder

DIM = 8
MODEL = {"model_fingerprint": "a1b2c3d4e5f60718", "model_name": "small-64"}

# What the writing processes share with the tests: the vector of an id can be made again from the id alone.
SHARED = """
import sys, zlib
import numpy as np

def rows(names):
    vectors = np.array([np.random.default_rng(zlib.crc32(name.encode())).normal(size=8) for name in names])
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors, [{"id": name, "path": name + ".jpg", "thumbnail": b"x" * 500} for name in names]

def regions_of(index, names):
    from samething.index import Regions
    if index.description.regions is None:
        return None
    halves = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    return [Regions(halves, rows([name + " left", name + " right"])[0]) for name in names]
"""
# Adds batches without end and names each one on stdout when add has returned.
ENDLESS_WRITER = (
    SHARED
    + """
from samething.index import open_index

index = open_index(sys.argv[1])
for batch in range(1_000_000):
    names = [f"{sys.argv[2]}-{batch}-{row}" for row in range(20)]
    index.add(*rows(names), regions=regions_of(index, names))
    print(batch, flush=True)
"""
)
# Writes the same ids as its rivals, starting when all of them are ready.
RIVAL = (
    SHARED
    + """
from samething.index import open_index

index = open_index(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for batch in range(8):
    index.add(*rows([f"{batch}-{row}" for row in range(30)]))
index.delete([f"{batch}-0" for batch in range(8)])
"""
)
# Gives up the power of root to write anywhere, if it has it.
POWERLESS = """
import ctypes, os
if os.geteuid() == 0:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) == 0
"""


def rows(names: list[str]) -> tuple[Float[np.ndarray, "n d"], list[dict[str, object]]]:
    shared: dict[str, object] = {}
    exec(SHARED, shared)  # the very code of the writing processes
    return shared["rows"](names)  # type: ignore[operator]


def run(code: str, *arguments: object, **options) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def coder_of(codes: str) -> Coder | None:
    return None if codes == "float32" else Coder.fit(rows([f"t{row}" for row in range(99)])[0], codes)


def as_kept_by(index: AbstractIndex, vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    coder = index.description.coder
    return vectors if coder is None else coder.decode(coder.encode(vectors))


also_in_codes = pytest.mark.parametrize("index", ["float32", "int4"], indirect=True)


@pytest.fixture
def index(tmp_path: Path, request: pytest.FixtureRequest) -> AbstractIndex:
    """Three batches of 20 rows, one row deleted."""
    coder = coder_of(getattr(request, "param", "float32"))
    made = create_index(tmp_path / "index", dim=DIM, **MODEL, coder=coder)
    for batch in range(3):
        made.add(*rows([f"{batch}-{row:02d}" for row in range(20)]))
    made.delete(["1-07"])
    return made


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x55
    path.write_bytes(content)


def test_a_callers_mistake_is_not_called_damage(index: AbstractIndex) -> None:
    """Every TypeError, ValueError or IndexError while the index was open was reported as damage."""

    def mistaken(name: str, row: object) -> None:
        raise ValueError(f"mine, of {name}")

    with pytest.raises(ValueError, match=r"mine, of 0-03"):
        index.amend(["0-03"], mistaken)
    assert index.count() == 59


def test_listing_all_rows_compares_them(index: AbstractIndex) -> None:
    """A sync took a damaged row for what was written; only a search compared it."""
    index.close()
    with contextlib.closing(sqlite3.connect(Path(index.location) / "rows-1.sqlite")) as db, db:
        db.execute("UPDATE rows SET path = 'elsewhere' WHERE id = '0-03'")
    with open_index(index.location) as opened, pytest.raises(ArtefactError, match="row of '0-03'"):
        list(opened.items(["label"]))


def test_a_failed_compaction_gives_the_disk_back(index: AbstractIndex, monkeypatch) -> None:
    """What it had written stayed on a disk that was full."""
    with monkeypatch.context() as patch:
        patch.setattr("samething.index.row_changes._ROWS_A_COPY", "many")
        with pytest.raises(TypeError):
            index.compact()
    assert len(list(Path(index.location).glob("rows-*.sqlite"))) == 1
    index.compact()
    assert index.count() == 59


def test_rows_change_by_what_they_are_when_they_are_written(index: AbstractIndex, tmp_path: Path) -> None:
    """Two processes read a row, changed it and wrote it back: one of the two changes was lost."""
    code = """
import json, sys
from samething.index import open_index
index = open_index(sys.argv[1])
for number in range(25):
    def more(name, row):
        return {**row, "label": (row["label"] or "") + sys.argv[2]}
    index.amend(["0-03", "nobody"], more)
"""
    finished(*[run(code, index.location, name) for name in "ab"])
    (label,) = index.rows(["0-03"], ["label"])["label"].to_pylist()
    assert sorted(label) == ["a"] * 25 + ["b"] * 25
    np.testing.assert_array_equal(index.vectors(["0-03"]), rows(["0-03"])[0])
    assert index.count() == 59 and index.verify().problems == ()


# ---- killed and rival writers


@pytest.mark.parametrize(
    ("codes", "regions"),
    [("float32", None), ("int4", None), pytest.param("int4", "grid", marks=pytest.mark.slow)],
)
def test_killed_writers_lose_nothing_acknowledged(tmp_path: Path, codes: str, regions: str | None) -> None:
    """Three processes write to one index at once and are killed (SIGKILL) at random moments."""
    folder = tmp_path / "index"
    index = create_index(folder, dim=DIM, **MODEL, coder=coder_of(codes), regions=regions)
    chance = random.Random()  # other moments in every run, on purpose
    writers = {name: run(ENDLESS_WRITER, folder, name) for name in "abc"}
    acknowledged: dict[str, list[int]] = {}

    def listen(name: str) -> None:
        stdout = writers[name].stdout
        assert stdout is not None
        acknowledged[name] = [int(line) for line in stdout]

    listeners = [threading.Thread(target=listen, args=(name,)) for name in writers]
    for listener in listeners:
        listener.start()
    limit = time.monotonic() + 60
    while index.count() < 20 * len(writers):
        assert time.monotonic() < limit
        time.sleep(0.02)
    for writer in chance.sample(list(writers.values()), len(writers)):
        time.sleep(chance.uniform(0, 0.3))
        writer.kill()
    for writer in writers.values():
        assert writer.wait() == -signal.SIGKILL
    for listener in listeners:
        listener.join()
    for writer in writers.values():
        writer.stdin.close(), writer.stdout.close(), writer.stderr.close()

    again = open_index(folder)
    names = [f"{name}-{batch}-{row}" for name in "abc" for batch in acknowledged[name] for row in range(20)]
    assert len(names) >= 40, "the writers were killed before they wrote"
    vectors, metadata = rows(names)
    np.testing.assert_allclose(again.vectors(names), as_kept_by(again, vectors), atol=1e-7)
    assert again.rows(names, ["path"])["path"].to_pylist() == [row["path"] for row in metadata]
    assert again.count() % 20 == 0, "a batch is there as a whole or not at all"
    for name, own in zip(names, again.regions(names), strict=True):
        parts = rows([f"{name} left", f"{name} right"])[0][: 0 if regions is None else 2]
        np.testing.assert_allclose(own.vectors, as_kept_by(again, parts), atol=1e-7)
    assert again.verify().problems == ()
    again.add(*rows(["after", "the kill"]))
    assert index.count() == again.count()
    assert open_index(folder).verify().problems == ()


ADDING_AND_ASKING = """
import sys, threading, time
import numpy as np
from samething.index import open_index
index, name = open_index(sys.argv[1]), sys.argv[2]
is_over = False
def ask():
    while not is_over:
        index.count()
asking = threading.Thread(target=ask)
asking.start()
for number in range(20):
    row = f"{name} {number}"
    index.set_notes("uploads", {row: {"label": "x"}})
    vector = np.eye(index.description.dim, dtype=np.float32)[:1]
    index.amend([row], lambda name, row: {"id": name}, vectors=vector)
    print(row, flush=True)
is_over = True
asking.join()
"""


def test_a_thread_that_reads_does_not_hide_a_compaction_from_one_that_writes(index: AbstractIndex) -> None:
    """The row was acknowledged and went to the old files: an hour of a server lost 6 of 798 images."""
    writers = [run(ADDING_AND_ASKING, index.location, name) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        index.compact()
        time.sleep(0.1)  # or the writers hardly get their turn
    written = {row for writer in writers for row in writer.communicate()[0].splitlines()}
    assert len(written) == 40
    there = {row["id"] for batch in open_index(index.location).items(["id"]) for row in batch.to_pylist()}
    assert written <= there and written <= index.notes("uploads").keys()


def test_two_writers_of_the_same_ids_leave_each_id_once(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = create_index(folder, dim=DIM, **MODEL)
    rivals = [run(RIVAL, folder) for _ in range(2)]
    for rival in rivals:
        assert rival.stdout.readline() == "ready\n", rival.stderr.read()
    for rival in rivals:
        rival.stdin.write("go\n")
        rival.stdin.flush()
    while any(rival.poll() is None for rival in rivals):
        index.search(rows(["x"])[0], 3)  # a reader in the middle of it
        time.sleep(0.01)
    for rival in rivals:
        assert rival.communicate()[1] == ""
        assert rival.returncode == 0
    expected = [f"{batch}-{row}" for batch in range(8) for row in range(1, 30)]
    found = [name for batch in index.items([]) for name in batch["id"].to_pylist()]
    # the later of the two deletes is the last write of all, so the first rows are gone for good
    assert sorted(found) == sorted(expected)
    np.testing.assert_allclose(index.vectors(expected), rows(expected)[0], atol=1e-7)
    assert index.verify().problems == ()


def test_threads_search_while_others_add(index: AbstractIndex) -> None:
    failures: list[BaseException] = []

    def add(name: str) -> None:
        try:
            for batch in range(5):
                index.add(*rows([f"{name}{batch}-{row}" for row in range(5)]))
        except BaseException as error:
            failures.append(error)

    def search() -> None:
        try:
            while any(adder.is_alive() for adder in adders):
                assert index.search(rows(["0-03"])[0], 2).ids[0, 0] == "0-03"
        except BaseException as error:
            failures.append(error)

    adders = [threading.Thread(target=add, args=(name,)) for name in "xy"]
    others = [threading.Thread(target=search) for _ in range(2)]
    for thread in adders + others:
        thread.start()
    for thread in adders + others:
        thread.join()
    assert failures == []
    assert index.count() == 59 + 50


def test_a_killed_create_is_no_obstacle(tmp_path: Path) -> None:
    """All that create makes before the manifest lies there, and a row that was never acknowledged."""
    folder = tmp_path / "index"
    create_index(folder, dim=DIM, **MODEL).add(*rows(["old"]))
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match="not a finished index"):
        open_index(folder)
    index = create_index(folder, dim=DIM, **MODEL)
    assert index.count() == 0
    index.add(*rows(["new"]))
    assert open_index(folder).search(rows(["new"])[0], 5).ids.tolist() == [["new"]]


def test_vectors_of_a_killed_writer_are_overwritten(index: AbstractIndex) -> None:
    """A process killed between vectors and rows leaves vectors at the end of the file."""
    with (Path(index.location) / "vectors-1.f32").open("ab") as stream:
        stream.write(b"\x7f" * (4 * DIM + 5))
    for each in (index, open_index(index.location)):
        assert each.count() == 59
    index.add(*rows(["new"]))
    again = open_index(index.location)
    assert again.search(rows(["new"])[0], 1).ids.tolist() == [["new"]]
    assert again.count() == 60 and again.verify().problems == ()


# ---- damage


@also_in_codes
@pytest.mark.parametrize("name", ["vectors-1.*", "rows-1.sqlite"])
@pytest.mark.parametrize("what", ["truncated", "emptied", "gone"])
def test_damaged_files_are_named(index: AbstractIndex, name: str, what: str) -> None:
    index.close()
    (damaged,) = Path(index.location).glob(name)
    size = damaged.stat().st_size
    if what == "gone":
        damaged.unlink()
    else:
        os.truncate(damaged, size - 40 if what == "truncated" else 0)
    assert str(damaged) in "; ".join(open_or_problem(Path(index.location)))
    if name == "vectors-1.*" or what != "truncated":
        with pytest.raises(ArtefactError) as caught:
            open_index(index.location)
        assert str(damaged) in caught.value.given


def everything(index: AbstractIndex) -> list[object]:
    """All that an index says of its rows, read in every way."""
    names = [f"{batch}-{row:02d}" for batch in range(3) for row in range(20) if (batch, row) != (1, 7)]
    columns = list(index.description.columns)
    hits = index.search(index.vectors(names), 5, columns=columns)
    filtered = index.search(rows(["0-03"])[0], 9, where={"tags": "odd", "label": ["a", "b"]})
    return [
        index.count(), hits.ids.tolist(), hits.scores.tolist(), hits.items.to_pylist(),
        filtered.ids.tolist(), index.rows(names, columns).to_pylist(), index.notes("kept"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("vectors-1.f32", 37),
        pytest.param("vectors-1.int4", 7, marks=pytest.mark.slow),
        ("rows-1.sqlite", 3499),
    ],
)
def test_a_flipped_byte_is_never_served_in_silence(tmp_path: Path, name: str, step: int) -> None:
    """Many bytes of each file in turn: an answer is right or refused, and verify sees what matters."""
    folder = tmp_path / "index"
    coder = coder_of("int4" if name.endswith("int4") else "float32")
    columns = {"tags": "texts", "price": "number"}
    index = create_index(folder, dim=DIM, **MODEL, extra_columns=columns, coder=coder)
    for batch in range(3):
        vectors, items = rows([f"{batch}-{row:02d}" for row in range(20)])
        for number, item in enumerate(items):
            item |= {"label": "abc"[number % 3], "tags": ["even", "odd"][number % 2 :], "price": number / 3}
        index.add(vectors, items)
    index.delete(["1-07"])
    index.set_notes("kept", {"a": {"b": 1}})
    truth = everything(index)
    index.close()
    damaged = folder / name
    content = damaged.read_bytes()
    num_refused = num_seen = 0
    for position in range(0, len(content), step):
        flip(damaged, position)
        seen, refused = bool(open_or_problem(folder)), False
        try:
            with open_index(folder) as opened:
                said = everything(opened)
        except ArtefactError as error:
            refused = True
            assert "index verify" in error.next_step, position
        except InputError as error:  # an id that cannot be found any more
            refused = True
            assert "an id that is in the index" in error.expected, position
        assert refused or said == truth or seen, position
        assert seen or not refused, position
        num_refused += refused
        num_seen += seen
        damaged.write_bytes(content)
        for suffix in ("-wal", "-shm"):
            damaged.with_name(damaged.name + suffix).unlink(missing_ok=True)
    assert num_refused > 10 and num_seen > 10
    with open_index(folder) as opened:
        assert opened.verify().problems == () and everything(opened) == truth


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE rows SET label = 'x' WHERE id = '0-03'", "row of '0-03'"),
        ("UPDATE rows SET path = path || ' ' WHERE id = '0-03'", "row of '0-03'"),
        ("UPDATE rows SET width = 1 WHERE id = '0-03'", "row of '0-03'"),
        ("UPDATE rows SET tags = '[]' WHERE id = '0-03'", "row of '0-03'"),
        ("UPDATE rows SET vector_crc32 = 1 WHERE id = '0-03'", "vector of '0-03'"),
        ("UPDATE rows SET slot = 99 WHERE id = '0-03'", "vector of '0-03'"),
        ("UPDATE blobs SET content = x'00' WHERE slot = 3", "thumbnail of '0-03'"),
        ("UPDATE members SET text = 'z' WHERE slot = 3", "texts to filter by"),
        ("DELETE FROM dead", "counts its rows"),
        ("UPDATE dead SET slot = 3", "name the rows"),
        ("UPDATE segments SET crc32 = 1 WHERE start = 20", "from byte 640 on"),
        ("DELETE FROM segments WHERE start = 20", "not what was written"),
        ("UPDATE spaces SET num_slots = 40", "has no checksum of all vectors"),
    ],
)
def test_a_value_changed_behind_the_checksums_is_found(tmp_path: Path, change: str, words: str) -> None:
    """Somebody who writes to the database with SQLite itself."""
    index = create_index(tmp_path / "i", dim=DIM, **MODEL, extra_columns={"tags": "texts"})
    for batch in range(3):
        vectors, items = rows([f"{batch}-{row:02d}" for row in range(20)])
        index.add(vectors, [{**item, "tags": ["t"]} for item in items])
    index.delete(["1-07"])
    index.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "i" / "rows-1.sqlite")) as db, db:
        db.execute(change)
    assert words in "; ".join(open_or_problem(tmp_path / "i"))


def open_or_problem(folder: Path) -> tuple[str, ...]:
    try:
        with open_index(folder) as opened:
            return opened.verify().problems
    except ArtefactError as error:
        return (error.given,)


def test_damage_done_while_the_index_is_open_is_named(index: AbstractIndex) -> None:
    """Reading the map of a file that has become too short would end the process."""
    query = rows(["0-03"])[0]
    assert index.search(query, 1).ids.tolist() == [["0-03"]]
    os.truncate(Path(index.location) / "vectors-1.f32", 100)
    with pytest.raises(ArtefactError, match=r"vectors-1\.f32 has 100 bytes instead of"):
        index.search(query, 1)
    with pytest.raises(ArtefactError, match=r"vectors-1\.f32 has 100 bytes instead of"):
        index.add(*rows(["new"]))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no json",
        "[]",
        "{}",
        '"text"',
        '{"kind": "index"}',
        '{"kind": "index", "format_version": 1, "made_from": {"dim": "many"}, "content": {}}',
        '{"kind": "index", "format_version": 1, "made_from": [], "content": {}}',
    ],
)
def test_a_damaged_manifest_is_named(index: AbstractIndex, content: str) -> None:
    (Path(index.location) / "manifest.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"manifest\.json"):
        open_index(index.location)


def test_a_manifest_whose_values_were_changed_is_damaged(index: AbstractIndex) -> None:
    path = Path(index.location) / "manifest.json"
    for old, new in [("a1b2c3d4", "a1b2c3d5"), ('"dim": 8', '"dim": 9')]:
        whole = path.read_text()
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(ArtefactError, match="was changed"):
            open_index(index.location)
        path.write_text(whole)
    assert open_index(index.location).count() == 59


def test_an_index_of_the_earlier_engine_is_refused_with_the_command_that_makes_it_again(
    tmp_path: Path,
) -> None:
    model = {"name": "small-64", "fingerprint": "a1b2c3d4e5f60718"}
    made_from = {"engine": "lance", "model": model, "dim": 8, "extra_columns": {}}
    write_manifest(tmp_path, Manifest(kind="index", format_version=1, made_from=made_from))
    with pytest.raises(ArtefactError, match="earlier version") as caught:
        open_index(tmp_path)
    assert "samething index FOLDER --model" in caught.value.next_step


# ---- what is no index


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not exist"):
        open_index(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="not a finished index"):
        open_index(tmp_path)
    write_manifest(tmp_path, Manifest(kind="features", format_version=1, made_from={}))
    with pytest.raises(ArtefactError, match="features folder"):
        open_index(tmp_path)
    (tmp_path / "manifest.json").unlink()
    write_manifest(tmp_path, Manifest(kind="index", format_version=99, made_from={}))
    with pytest.raises(ArtefactError, match="format version 99") as caught:
        open_index(tmp_path)
    assert "upgrade" in caught.value.next_step


def test_a_place_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "cat.jpg").write_bytes(b"...")
    with pytest.raises(InputError, match=r"cat\.jpg"):
        create_index(images, dim=DIM, **MODEL)
    assert [path.name for path in images.iterdir()] == ["cat.jpg"]
    for place in (images / "cat.jpg", images / "cat.jpg" / "index"):
        with pytest.raises(InputError, match=r"cat\.jpg"):
            create_index(place, dim=DIM, **MODEL)


# ---- disks


@pytest.mark.parametrize("name", ["two words", "ünï çödé 図", "%41 a#b?c", "it's", "a:b"])
def test_odd_folder_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    create_index(Path(name) / "index", dim=DIM, **MODEL).add(*rows(["a", "b"]))
    index = open_index(str(tmp_path / name / "index"))
    assert index.search(rows(["b"])[0], 1).ids.tolist() == [["b"]]
    assert (tmp_path / name / "index" / "vectors-1.f32").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_read_only_index_is_searched_and_not_written(index: AbstractIndex) -> None:
    folder = Path(index.location)
    everything = [folder, *folder.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = (
        SHARED
        + POWERLESS
        + """
from samething.errors import InputError
from samething.index import create_index, open_index
index = open_index(sys.argv[1])
assert index.search(rows(["0-03"])[0], 1).ids.tolist() == [["0-03"]]
for write in (
    lambda: index.add(*rows(["new"])),
    lambda: index.delete(["0-03"]),
    lambda: create_index(sys.argv[1] + "/inner", dim=8, model_fingerprint="f", model_name="m"),
):
    try:
        write()
    except InputError as error:
        assert "cannot write" in error.given and "permissions" in error.next_step, error
    else:
        raise AssertionError("it could write")
assert index.count() == 59
"""
    )
    try:
        done = run(code, folder)
        assert done.communicate() == ("", "")
        assert done.returncode == 0
    finally:
        for path in everything:
            path.chmod(0o755)


def test_a_full_disk_is_said_and_nothing_is_lost(index: AbstractIndex) -> None:
    """A limit on the size of a file stands for the full disk: the kernel refuses the write in mid-file."""
    code = (
        SHARED
        + """
import resource
from samething.errors import InputError
from samething.index import open_index
index = open_index(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
vectors, items = rows([f"big-{row}" for row in range(300)])
try:
    for seed, row in enumerate(items):
        row["thumbnail"] = np.random.default_rng(seed).bytes(2_000)  # not to be compressed
    index.add(vectors, items)
except InputError as error:
    assert "no space left" in error.given and "free some space" in error.next_step, error
else:
    raise AssertionError("it could write")
assert index.count() == 59
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
index.add(vectors, items)
assert index.count() == 359
"""
    )
    done = run(code, index.location)
    assert done.communicate() == ("", "")
    assert done.returncode == 0
    assert index.count() == 359
    assert index.verify().problems == ()


def test_a_moved_index_is_the_same(index: AbstractIndex, tmp_path: Path) -> None:
    shutil.copytree(index.location, tmp_path / "copy")
    shutil.rmtree(index.location)
    moved = SqliteIndex.open(tmp_path / "copy")
    assert moved.verify().problems == ()
    moved.add(*rows(["new"]))
    assert moved.count() == 60


def test_the_files_are_what_the_documentation_says(index: AbstractIndex) -> None:
    folder = Path(index.location)
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.startswith(".")} == {
        "manifest.json", "rows-1.sqlite", "rows-1.sqlite-shm", "rows-1.sqlite-wal", "vectors-1.f32",
    }  # fmt: skip
    index.close()
    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        "manifest.json", "rows-1.sqlite", "vectors-1.f32",
    }  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "index"
    assert manifest["made_from"]["model"] == {"name": "small-64", "fingerprint": "a1b2c3d4e5f60718"}
    write_json(folder / "model.json", "../model")  # others may keep their own files beside it
    assert open_index(folder).count() == 59


def test_importing_the_index_loads_nothing_heavy() -> None:
    code = """
import sys, samething.index
print(sorted({"faiss", "pyarrow", "torch", "pandas"} & set(sys.modules)))
"""
    done = run(code)
    assert done.communicate() == ("[]\n", "")


# ---- approximate search


def near_centres(num_rows: int, seed: int) -> Float[np.ndarray, "n d"]:
    centres = np.random.default_rng(3).normal(size=(200, 16))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(0, 200, num_rows)] + 0.5 * random.normal(size=(num_rows, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("codes", "largest_graph"),
    [
        ("int4", 10**6),
        ("float32", 3_000),
        pytest.param("float32", 10**6, marks=pytest.mark.slow),
        pytest.param("int4", 3_000, marks=pytest.mark.slow),
    ],
)
def test_approximate_search_reaches_the_recall_it_was_tuned_to(
    tmp_path: Path,
    codes: str,
    largest_graph: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also on queries that are not rows, which is what the lower bound promises; more rows are in lists.

    The bar of lists said "graph".
    """
    monkeypatch.setattr(approximate, "LARGEST_GRAPH", largest_graph)
    vectors = near_centres(4000, seed=4)
    rows = [{"id": f"r{row:05d}", "domain": "rare" if row % 500 == 0 else "it's"} for row in range(4000)]
    coder = None if codes == "float32" else Coder.fit(vectors, codes)
    index = create_index(tmp_path / "i", dim=16, model_fingerprint="f", model_name="m", coder=coder)
    index.add(vectors, rows)
    queries = np.concatenate([vectors[:50], near_centres(150, seed=5)])
    exact = [index.search(query[None], 6) for query in queries]
    report = index.tune(0.95, num_queries=400)
    assert report.recall >= report.lower_bound >= 0.95 and report.breadth > 0
    assert index.recall_report() == report
    assert ("candidates" if largest_graph > 4000 else "lists") in report.__rich__()
    assert ("graph" if largest_graph > 4000 else "lists") in capsys.readouterr().err
    near = [index.search(query[None], 6) for query in queries]
    shares = [len({*a.ids[0]} & {*b.ids[0]}) / 6 for a, b in zip(exact, near, strict=True)]
    assert np.mean(shares) >= 0.95
    for one, other in zip(exact, near, strict=True):  # what is found has the exact search's scores
        scores = dict(zip(one.ids[0], one.scores[0], strict=True))
        for name, score in zip(other.ids[0], other.scores[0], strict=True):
            assert scores.get(name, score) == score
    # twice as broad as needed was read before: a breadth little below it does not do
    short = [int(breadth) for breadth, bound in report.tried.items() if bound < 0.95]
    assert not short or report.breadth <= max(short) * 9 / 8 + 1
    index.search_exactly()
    wanted = {"domain": ["rare"]}
    filtered = index.search(vectors[:3], 4, where=wanted)
    index.tune(0.9, num_queries=200)
    assert index.search(vectors[:3], 4, where=wanted).ids.tolist() == filtered.ids.tolist()
    index.add(vectors[:1], [{"id": "new", "domain": "it's"}])
    assert "new" in index.search(vectors[:1], 2).ids[0]  # rows added later are found
    index.delete(["r00000"])
    assert "r00000" not in index.search(vectors[:1], 9).ids[0]  # deleted ones are not
    assert index.search(vectors[:1], 3, where={"domain": "no"}).ids.shape == (1, 0)
    again = SqliteIndex.open(tmp_path / "i")
    assert again.recall_report() is not None and again.verify().problems == ()
    assert again.search(queries[:1], 9).ids.tolist() == index.search(queries[:1], 9).ids.tolist()
    index.compact()
    assert index.recall_report() is None and not list((tmp_path / "i").glob("*.faiss"))
    assert again.search(queries[:1], 9).ids.shape == (1, 9)


def test_a_graph_finds_rows_whatever_regions_are_in_their_way(tmp_path: Path) -> None:
    """The nearest vectors are all of one row, more than a search begins with; the next rows are asked for."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(1802, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    index = create_index(tmp_path / "index", dim=DIM, **MODEL, regions="grid")
    near = vectors[:1] + random.normal(scale=0.05, size=(400, DIM)).astype(np.float32)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    places = [(0.0, 0.0, 1.0, (number + 1) / 400) for number in range(400)]
    parts = [Regions(places[:2], vectors[row : row + 2]) for row in range(600, 1800, 2)]
    parts[0] = Regions(places, near)
    index.add(vectors[:600], [{"id": f"{row:03d}"} for row in range(600)], regions=parts)
    exact = index.search(vectors[:40], 5)
    report = index.tune(0.95)
    assert report.breadth > 0
    index.add(vectors[1800:1801], [{"id": "newer"}], regions=[Regions(places[:1], vectors[1801:])])
    index.delete(["001"])
    found = index.search(vectors[:40], 5)
    gone = exact.ids == "001"
    assert (found.ids[~gone.any(axis=1)] == exact.ids[~gone.any(axis=1)]).mean() > 0.9
    assert found.ids[0, 0] == "000" and len(set(found.ids[0])) == 5
    hit = index.search(vectors[1801:], 1).of(0)[0]
    assert (hit["id"], hit["place"]) == ("newer", places[0])
    assert not index.verify().problems


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE regions SET top = 0.25 WHERE slot = 3", "region in slot 3 is damaged"),
        ("DELETE FROM regions WHERE slot = 3", "does not name the rows"),
        ("UPDATE regions SET row = 0, region_crc32 = region_crc32 WHERE slot = 3", "slot 3 is damaged"),
        ("DROP TABLE regions", "tables are not those"),
    ],
)
def test_a_changed_region_is_found(tmp_path: Path, change: str, words: str) -> None:
    """As for rows; a search that meets it says so, too."""
    index = create_index(tmp_path / "index", dim=DIM, **MODEL, regions="grid")
    vectors, metadata = rows(["a", "b"])
    parts = rows(["x", "y"])[0]
    places = [(0.0, 0.0, 0.5, 0.5)]
    index.add(vectors, metadata, regions=[Regions(places, parts[:1]), Regions(places, parts[1:])])
    index.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "index" / "rows-1.sqlite")) as db, db:
        db.execute(change)
    if "tables" in words:
        with pytest.raises(ArtefactError, match=words):
            open_index(tmp_path / "index")
        return
    with open_index(tmp_path / "index") as again:
        assert any(words in problem for problem in again.verify().problems)
        with pytest.raises(ArtefactError):
            again.search(parts[1:], 2)


def test_an_approximate_search_asks_the_database_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read a note, and each row twice: half of its time. What another handle tunes is noticed anyway."""
    vectors = near_centres(1200, seed=4)
    index = create_index(tmp_path / "i", dim=16, model_fingerprint="f", model_name="m")
    index.add(vectors, [{"id": f"{row:04d}", "path": f"/{row}"} for row in range(1200)])
    said: list[str] = []
    breadths: list[int] = []
    connect, candidates = sqlite3.connect, approximate.candidates

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **options)
        db.set_trace_callback(said.append)
        return db

    def counted(*args: Any, breadth: int) -> Any:
        breadths.append(breadth)
        return candidates(*args, breadth=breadth)

    monkeypatch.setattr(sqlite3, "connect", traced)
    monkeypatch.setattr(approximate, "candidates", counted)
    reader = SqliteIndex.open(tmp_path / "i")
    exact = reader.search(vectors[:1], 3)
    for _ in range(2):
        report = index.tune(0.5)
        breadths.clear()
        reader.search(vectors[:1], 3)
        said.clear()
        found = reader.search(vectors[:1], 3)
        assert breadths == [report.breadth] * 2
        assert [text.split()[0] for text in said] == ["BEGIN", "SELECT", "SELECT", "COMMIT"]
        assert (found.of(0), found.ids.tolist()) == (exact.of(0), exact.ids.tolist())
        index.search_exactly()
        reader.search(vectors[:1], 3)
        assert len(breadths) == 2


def test_a_recall_that_cannot_be(tmp_path: Path) -> None:
    """All breadths are tried for it."""
    index = create_index(tmp_path / "s", dim=16, model_fingerprint="f", model_name="m")
    with pytest.raises(InputError, match="at least"):
        index.tune(0.9)
    with pytest.raises(InputError, match=r"recall of 1\.5"):
        index.tune(1.5)
    index.add(near_centres(1200, seed=4), [{"id": str(row)} for row in range(1200)])
    report = index.tune(0.99, num_queries=50)  # of so few nobody can promise that much
    assert (report.breadth, report.recall) == (0, 1.0) and "exact search" in report.__rich__()
    assert [*report.tried] == [str(2**power) for power in range(4, 13)]
    assert not list((tmp_path / "s").glob("*.faiss"))


def test_a_damaged_graph_is_named_and_not_used(tmp_path: Path) -> None:
    vectors = near_centres(1500, seed=4)
    index = create_index(tmp_path / "i", dim=16, model_fingerprint="f", model_name="m")
    index.add(vectors, [{"id": f"{row:04d}"} for row in range(1500)])
    exact = index.search(vectors[:1], 9).ids.tolist()
    index.tune(0.5)
    graph = tmp_path / "i" / "approximate-1.faiss"
    flip(graph, graph.stat().st_size // 2)
    (problem,) = open_index(tmp_path / "i").verify().problems
    assert str(graph) in problem
    assert open_index(tmp_path / "i").search(vectors[:1], 9).ids.tolist() == exact
    index.tune(0.5)
    assert open_index(tmp_path / "i").verify().problems == ()


def test_the_promise_of_a_recall_holds() -> None:
    """Of samples of a known recall, the lower bound is above it in at most 5 % of the cases."""
    random = np.random.default_rng(0)
    for recall, num_queries in [(0.9, 100), (0.98, 1000), (0.999, 200)]:
        samples = random.binomial(5, recall, size=(2000, num_queries)).mean(axis=1) / 5
        broken = np.mean([lower_bound(sample, num_queries) > recall for sample in samples])
        assert broken <= 0.05


# ---- other generations

# Adds numbered batches until it is told to stop, and names each when add has returned.
STEADY_WRITER = (
    SHARED
    + """
import os
from samething.index import open_index

index = open_index(sys.argv[1])
print("ready", flush=True)
batch = 0
while not os.path.exists(sys.argv[3]):
    index.add(*rows([f"{sys.argv[2]}-{batch}-{row}" for row in range(5)]))
    print(batch, flush=True)
    batch += 1
"""
)
# Compacts so many times.
COMPACTER = """
import sys
from samething.index import open_index

index = open_index(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    index.compact()
"""
# Makes the index anew with the vectors it has, as a rebuild does.
REBUILDER = """
import sys
from samething.index import open_index

old = open_index(sys.argv[1])
fresh = old.beside(old.description)
print("ready", flush=True)
sys.stdin.readline()
while True:
    names = [name for batch in old.items([]) for name in batch["id"].to_pylist()]
    for start in range(0, len(names), 50):
        part = names[start : start + 50]
        fresh.add(old.vectors(part), old.rows(part, list(old.description.columns)))
        if len(sys.argv) > 2 and start == 50:
            print("half", flush=True)
            sys.stdin.readline()
    if fresh.swap(old):
        break
"""


def ids_of(index: AbstractIndex) -> list[str]:
    return sorted(name for batch in index.items([]) for name in batch["id"].to_pylist())


def finished(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0


def started(*processes: subprocess.Popen[str]) -> None:
    """Let processes that wait for it go on, all at once."""
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


@also_in_codes
def test_compaction_keeps_every_row_and_drops_old_files(index: AbstractIndex) -> None:
    folder = Path(index.location)
    vectors, items = rows([f"c{start:02d}" for start in range(40)])
    index.add(vectors, [{**item, "thumbnail": b"y" * 2000} for item in items])
    index.delete([f"c{start:02d}" for start in range(30)])
    index.set_notes("collections", {"a": {"domain": "cars"}, "b": 1})
    index.set_notes("collections", {"b": None})
    before, other = ids_of(index), open_index(folder)
    assert other.count() == len(before)
    size = sum(path.stat().st_size for path in folder.iterdir())
    index.compact()
    for each in (index, other, open_index(folder)):
        assert ids_of(each) == before
        assert each.verify().problems == ()
        assert each.notes("collections") == {"a": {"domain": "cars"}}
    assert sum(path.stat().st_size for path in folder.iterdir()) < size
    assert {path.name for path in folder.glob("*-1.*")} == set()
    (kept,) = folder.glob("vectors-2.*")
    num_bytes = 4 * DIM if index.description.coder is None else DIM // 2
    assert kept.stat().st_size == num_bytes * len(before)
    np.testing.assert_array_equal(other.vectors(["c35"]), as_kept_by(index, rows(["c35"])[0]))
    assert other.search(rows(["c35"])[0], 1).ids.tolist() == [["c35"]]
    assert other.rows(["c35"], ["thumbnail"])["thumbnail"].to_pylist() == [b"y" * 2000]
    other.add(*rows(["late"]))
    assert index.count() == len(before) + 1


@pytest.mark.parametrize("again", ["compact", "beside", "add"])
def test_a_handle_from_before_a_compaction_loses_nothing(index: AbstractIndex, again: str) -> None:
    """It used to remove the table in use as if it were its own leftover."""
    stale = open_index(index.location)
    before = ids_of(stale)
    index.compact()
    if again == "compact":
        stale.compact()
    elif again == "beside":
        fresh = stale.beside(IndexDescription(dim=DIM, **MODEL))
        fresh.add(stale.vectors(before), stale.rows(before))
        assert fresh.swap(stale)
    else:
        stale.add(*rows(["0-03"]))
    for each in (stale, index, open_index(index.location)):
        assert ids_of(each) == before and each.verify().problems == ()


def test_compactions_beside_compactions_and_writers(index: AbstractIndex, tmp_path: Path) -> None:
    """Four processes at once; a reader in the middle never sees anything else than whole batches."""
    stop, folder = tmp_path / "stop", index.location
    writers = [run(STEADY_WRITER, folder, name, stop) for name in "ab"]
    compacters = [run(COMPACTER, folder, 5) for _ in range(2)]
    started(*compacters)
    while any(process.poll() is None for process in compacters):
        assert (index.count() - 59) % 5 == 0
        index.search(rows(["x"])[0], 3)
    stop.touch()
    finished(*compacters)
    acknowledged = [process.communicate(timeout=60) for process in writers]
    names = ids_of(open_index(folder))
    for name, process, (said, errors) in zip("ab", writers, acknowledged, strict=True):
        assert (errors, process.returncode) == ("", 0)
        batches = said.split()[1:]
        assert {f"{name}-{batch}-{row}" for batch in batches for row in range(5)} <= set(names)
    assert len(names) > 59
    assert index.count() == len(names)
    assert open_index(folder).verify().problems == () == index.verify().problems


def test_a_rebuild_beside_compactions_and_a_writer_loses_nothing(
    index: AbstractIndex, tmp_path: Path
) -> None:
    stop, folder = tmp_path / "stop", index.location
    writer, rebuilder = run(STEADY_WRITER, folder, "w", stop), run(REBUILDER, folder)
    compacter = run(COMPACTER, folder, 4)
    started(rebuilder, compacter)
    finished(compacter)
    time.sleep(0.3)
    stop.touch()
    said, errors = writer.communicate(timeout=60)
    assert (errors, writer.returncode) == ("", 0)
    finished(rebuilder)
    names = {f"w-{batch}-{row}" for batch in said.split()[1:] for row in range(5)}
    assert names and names <= set(ids_of(index)) and index.count() == 59 + len(names)
    assert index.verify().problems == () == open_index(folder).verify().problems


@also_in_codes
def test_a_killed_rebuild_goes_on_with_what_it_had(index: AbstractIndex) -> None:
    """Also when the index was compacted in between."""
    rebuilder = run(REBUILDER, index.location, "stop in the middle")
    started(rebuilder)
    assert rebuilder.stdout.readline() == "half\n"
    rebuilder.kill()
    rebuilder.communicate()
    index.compact()
    fresh = index.beside(IndexDescription(dim=DIM, **MODEL, coder=index.description.coder))
    assert fresh.count() == 59  # 50 and 9
    fresh.delete(["0-00"])
    assert (
        not open_index(index.location)
        .beside(IndexDescription(dim=4, model_fingerprint="g", model_name="m"))
        .count()
    )
    assert not index.beside(
        IndexDescription(dim=DIM, **MODEL, coder=index.description.coder)
    ).count()  # begun anew, since the other one took its place
    with pytest.raises(ArtefactError, match="another process"):
        fresh.swap(index)
    assert index.count() == 59 and index.verify().problems == ()


@also_in_codes
@pytest.mark.parametrize("moment", [0.0, 0.01])
def test_a_killed_compaction_leaves_the_index_as_it_was(index: AbstractIndex, moment: float) -> None:
    before = ids_of(index)
    compacter = run(COMPACTER, index.location, 1000)
    started(compacter)
    time.sleep(0.1 + moment)
    compacter.kill()
    compacter.communicate()
    for each in (index, open_index(index.location)):
        assert ids_of(each) == before and each.verify().problems == ()
    index.compact()
    assert len(list(Path(index.location).glob("rows-*.sqlite"))) == 1
    assert ids_of(index) == before


def test_an_index_of_floats_becomes_one_of_codes_and_back(index: AbstractIndex, tmp_path: Path) -> None:
    """By a rebuild; the least length of what was there before would have ended searches too early."""
    for codes, suffix in (("int4", "int4"), ("int8", "int8"), ("float32", "f32")):
        names = ids_of(index)
        fresh = index.beside(IndexDescription(dim=DIM, **MODEL, coder=coder_of(codes)))
        fresh.add(rows(names)[0], index.rows(names, list(index.description.columns)))
        assert fresh.swap(index)
        again = open_index(index.location)
        vectors, truth = as_kept_by(again, rows(names)[0]), rows(names)[0]
        assert again.description.codes == codes and again.verify().problems == ()
        assert index.count() == 59, "a handle from before follows"
        for each in (again, index):
            hits = each.search(truth[:7], 3)
            cosines = np.round(truth[:7].astype(float) @ vectors.astype(float).T, 6)
            np.testing.assert_allclose(hits.scores, -np.sort(-cosines, axis=1)[:, :3], atol=1e-6)
        assert {path.suffix[1:] for path in Path(index.location).glob("vectors-*")} == {suffix}
        assert back_up(again, tmp_path / codes) == 59
        copy = open_index(tmp_path / codes)
        assert restore(copy, index) == 59 and bound_to(index.description) == bound_to(again.description)
        assert index.search(truth[:7], 3).scores.tolist() == hits.scores.tolist()


def test_another_model_ends_the_handles_of_the_first(index: AbstractIndex) -> None:
    reader = open_index(index.location)
    fresh = index.beside(IndexDescription(dim=4, model_fingerprint="new0", model_name="new-4"))
    fresh.add(np.eye(4, dtype=np.float32), [{"id": f"n{row}"} for row in range(4)])
    assert fresh.swap(index)
    for use in (reader.count, lambda: reader.search(rows(["x"])[0], 1), lambda: reader.add(*rows(["x"]))):
        with pytest.raises(FingerprintError, match="new-4"):
            use()
    again = open_index(index.location)
    again.require_model("new0")
    assert again.count() == 4


@also_in_codes
def test_equal_vectors_are_written_once(index: AbstractIndex) -> None:
    """Other metadata of a row, as a moved file has, cost no place in the file of vectors."""
    (kept,) = Path(index.location).glob("vectors-1.*")
    size = kept.stat().st_size
    vectors, items = rows(["0-03", "1-07"])
    index.add(vectors, [{**item, "label": "moved"} for item in items])
    assert kept.stat().st_size == size + index.description.vector_bytes
    assert index.search(vectors, 2, where={"label": "moved"}).ids.tolist() == [
        ["0-03", "1-07"], ["1-07", "0-03"],
    ]  # fmt: skip


def test_a_change_costs_a_reader_what_it_changes(tmp_path: Path) -> None:
    """Nothing that was looked at is read again: neither vectors nor rows."""
    index = create_index(tmp_path / "i", dim=DIM, **MODEL)
    index.add(*rows([f"r{row}" for row in range(2000)]))
    reader = open_index(tmp_path / "i")
    assert isinstance(reader, SqliteIndex)
    reader.search(rows(["r3"])[0], 1)
    looked_at: list[int] = []
    crc32 = zlib.crc32

    def counted(content: object, start: int = 0) -> int:
        looked_at.append(memoryview(content).nbytes)  # type: ignore[arg-type]
        return crc32(content, start)  # type: ignore[arg-type]

    index.add(*rows(["new"]))
    index.delete(["r4"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samething.index.generation.zlib.crc32", counted)
        assert reader.search(rows(["new"])[0], 1, columns=[]).ids.tolist() == [["new"]]
    assert sum(looked_at) < 4 * DIM * 10
    assert "r4" not in reader.search(rows(["r4"])[0], 5).ids


def test_notes_of_several_processes_are_all_kept(index: AbstractIndex) -> None:
    code = """
import sys
from samething.index import open_index
index = open_index(sys.argv[1])
for number in range(20):
    index.set_notes("uploads", {f"{sys.argv[2]}{number}": {"label": "x"}})
"""
    finished(*[run(code, index.location, name) for name in "abc"])
    assert sorted(index.notes("uploads")) == sorted(f"{n}{number}" for n in "abc" for number in range(20))


# ---- many threads, one gallery


def test_threads_search_one_gallery_at_the_same_time() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((5000, 32)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    gallery[100:140] = gallery[0]  # ties, more than FAISS is asked for at first
    gallery[2000:2300] = gallery[1]  # and more than it is asked for at last
    queries = np.concatenate([gallery[:2], gallery[rng.integers(0, 5000, 38)]])
    scan = FlatScan(gallery)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda query: scan.nearest(query[None], 5), queries))
    expected = exact_topk(queries, gallery, 5, normalised=True)
    np.testing.assert_array_equal(np.concatenate([one.indices for one in found]), expected.indices)
    np.testing.assert_array_equal(np.concatenate([one.scores for one in found]), expected.scores)
