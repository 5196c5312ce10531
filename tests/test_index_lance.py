"""The embedded engine on disk: killed writers, writers at once, damaged files, full and read-only disks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float

from samething.errors import ArtefactError, InputError
from samething.files import Manifest, write_json, write_manifest
from samething.index import AbstractIndex, LanceIndex, create_index, open_index
from samething.retrieval import SharedProducts, exact_topk, nearest_units

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
"""
# Adds batches without end and names each one on stdout when add has returned.
ENDLESS_WRITER = (
    SHARED
    + """
from samething.index import open_index

index = open_index(sys.argv[1])
for batch in range(1_000_000):
    index.add(*rows([f"{sys.argv[2]}-{batch}-{row}" for row in range(20)]))
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


@pytest.fixture
def index(tmp_path: Path) -> AbstractIndex:
    """Three batches of 20 rows, one row deleted."""
    made = create_index(tmp_path / "index", dim=DIM, **MODEL)
    for batch in range(3):
        made.add(*rows([f"{batch}-{row:02d}" for row in range(20)]))
    made.delete(["1-07"])
    return made


def table_files(index: AbstractIndex, folder: str) -> list[Path]:
    return sorted((Path(index.location) / "vectors.lance" / folder).iterdir())


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x55
    path.write_bytes(content)


# ---- killed and rival writers


def test_killed_writers_lose_nothing_acknowledged(tmp_path: Path) -> None:
    """Three processes write to one index at once and are killed (SIGKILL) at random moments."""
    folder = tmp_path / "index"
    index = create_index(folder, dim=DIM, **MODEL)
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
    np.testing.assert_allclose(again.vectors(names), vectors, atol=1e-7)
    assert again.rows(names, ["path"])["path"].to_pylist() == [row["path"] for row in metadata]
    assert again.count() % 20 == 0, "a batch is there as a whole or not at all"
    assert again.verify().problems == ()
    again.add(*rows(["after", "the kill"]))
    assert index.count() == again.count()
    assert open_index(folder).verify().problems == ()


def test_two_writers_of_the_same_ids_leave_each_id_once(tmp_path: Path) -> None:
    """LanceDB alone adds an id twice when two processes insert it at the same moment."""
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


def test_an_unfinished_line_of_checksums_is_dropped(index: AbstractIndex) -> None:
    """A process killed in the middle of appending leaves half a line; its change was not acknowledged."""
    with (Path(index.location) / "checksums.jsonl").open("a") as stream:
        stream.write('{"file": "data/half')
    for each in (index, open_index(index.location)):
        assert each.count() == 59
    index.add(*rows(["new"]))
    assert open_index(index.location).count() == 60
    assert index.verify().problems == ()


# ---- damage


@pytest.mark.parametrize("where", ["data", "_versions", "_deletions"])
@pytest.mark.parametrize("what", ["truncated", "emptied", "gone", "flipped"])
def test_damaged_files_are_named(index: AbstractIndex, where: str, what: str) -> None:
    """Some flipped bytes end the whole process if LanceDB gets to read them, so it must not."""
    damaged = table_files(index, where)[0]
    size = damaged.stat().st_size
    if what == "gone":
        damaged.unlink()
    elif what == "flipped":
        flip(damaged, size // 2)
    else:
        os.truncate(damaged, size - 1 if what == "truncated" else 0)
    report = index.verify()
    assert len(report.problems) == 1
    assert str(damaged) in report.problems[0]
    if what == "flipped" and where == "data":
        return  # found by verify, and by search where it is a vector: see the next test
    with pytest.raises(ArtefactError) as caught:
        open_index(index.location)
    assert str(damaged) in caught.value.given


def test_a_flipped_byte_is_never_served_in_silence(index: AbstractIndex) -> None:
    """Every 37th byte of a data file in turn: a search is right or refused, and verify always sees it."""
    damaged = table_files(index, "data")[0]
    content = damaged.read_bytes()
    names = [f"{batch}-{row:02d}" for batch in range(3) for row in range(20) if (batch, row) != (1, 7)]
    queries = rows(names)[0]
    truth = index.search(queries, 5)
    num_refused = num_right = 0
    for position in range(0, len(content), 37):
        flip(damaged, position)
        assert str(damaged) in "".join(index.verify().problems), position
        try:
            found = open_index(index.location).search(queries, 5, columns=[])
        except ArtefactError as error:
            num_refused += 1
            assert error.next_step.startswith("verify()")
        else:
            num_right += 1
            assert found.ids.tolist() == truth.ids.tolist(), position
            np.testing.assert_array_equal(found.scores, truth.scores)
        damaged.write_bytes(content)
    assert num_refused > 10
    assert num_right > 10  # metadata that this search does not read
    assert index.verify().problems == ()


def test_a_row_changed_behind_the_checksums_is_found(index: AbstractIndex) -> None:
    """Somebody who writes to the table with LanceDB itself, files and all."""
    import lancedb

    table = lancedb.connect(index.location).open_table("vectors")
    table.update(where="id = '0-03'", values={"vector": [1.0] + [0.0] * (DIM - 1)})
    (problem,) = open_index(index.location).verify().problems
    assert "0-03" in problem
    with pytest.raises(ArtefactError, match="checksum"):
        open_index(index.location).search(rows(["x"])[0], 1)


def test_damage_done_while_the_index_is_open_is_named(index: AbstractIndex) -> None:
    query = rows(["0-03"])[0]
    assert index.search(query, 1).ids.tolist() == [["0-03"]]
    for path in table_files(index, "data"):
        os.truncate(path, 100)
    assert index.search(query, 1).ids.tolist() == [["0-03"]]  # what was read whole is in memory
    with pytest.raises(ArtefactError, match=r"\.lance has 100 bytes instead of"):
        index.search(query, 1, columns=["thumbnail"])
    with pytest.raises(ArtefactError, match=r"\.lance has 100 bytes instead of"):
        list(index.items())


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


def test_the_list_of_checksums_is_needed(index: AbstractIndex) -> None:
    path = Path(index.location) / "checksums.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"size"', '"siez"', 1))
    with pytest.raises(ArtefactError, match=r"checksums\.jsonl is damaged"):
        open_index(index.location)
    path.unlink()
    for use in (lambda: open_index(index.location), index.count, index.verify):
        with pytest.raises(ArtefactError, match=r"checksums\.jsonl does not exist"):
            use()


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
    assert (tmp_path / name / "index" / "vectors.lance").is_dir()
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
    moved = LanceIndex.open(tmp_path / "copy")
    assert moved.verify().problems == ()
    assert moved.verify().num_files >= 8
    moved.add(*rows(["new"]))
    assert moved.count() == 60


def test_the_files_are_what_the_documentation_says(index: AbstractIndex) -> None:
    folder = Path(index.location)
    names = {path.name for path in folder.iterdir()}
    assert names - {".lock"} == {"manifest.json", "checksums.jsonl", "vectors.lance"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "index"
    assert manifest["made_from"]["model"] == {"name": "small-64", "fingerprint": "a1b2c3d4e5f60718"}
    write_json(folder / "model.json", "../model")  # others may keep their own files beside it
    assert open_index(folder).count() == 59


def test_importing_the_index_loads_nothing_heavy() -> None:
    code = """
import sys, samething.index
print(sorted({"lancedb", "pyarrow", "torch", "pandas"} & set(sys.modules)))
"""
    done = run(code)
    assert done.communicate() == ("[]\n", "")


# ---- approximate search


def test_approximate_search_reaches_the_recall_it_was_tuned_to(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    centres = random.normal(size=(200, 16))
    vectors = centres[random.integers(0, 200, 4000)] + 0.5 * random.normal(size=(4000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = [{"id": f"r{row:05d}", "domain": "rare" if row % 500 == 0 else "it's"} for row in range(4000)]
    index = LanceIndex.create(tmp_path / "i", dim=16, model_fingerprint="f", model_name="m")
    index.add(vectors, rows)
    exact = index.search(vectors[:50], 6)
    report = index.tune(0.95, num_queries=100)
    assert report.recall >= 0.95 and 0 < report.num_probes < report.num_cells
    assert index.recall_report() == report and "cells" in report.__rich__()
    near = index.search(vectors[:50], 6)
    shares = [len({*a} & {*b}) / 6 for a, b in zip(exact.ids, near.ids, strict=True)]
    assert np.mean(shares) > 0.9
    for query in range(50):  # what is found has the exact search's scores
        scores = dict(zip(exact.ids[query], exact.scores[query], strict=True))
        for name, score in zip(near.ids[query], near.scores[query], strict=True):
            assert scores.get(name, score) == score
    index.search_exactly()
    wanted = {"domain": ["rare"]}
    filtered = index.search(vectors[:3], 4, where=wanted)
    index.tune(0.95, num_queries=20)
    assert index.search(vectors[:3], 4, where=wanted).ids.tolist() == filtered.ids.tolist()
    index.add(vectors[:1], [{"id": "new", "domain": "it's"}])
    assert "new" in index.search(vectors[:1], 2).ids[0]  # rows added later are found
    assert index.search(vectors[:1], 3, where={"domain": "no"}).ids.shape == (1, 0)
    again = LanceIndex.open(tmp_path / "i")
    assert again.recall_report() is not None and again.verify().problems == ()
    smaller = LanceIndex.create(tmp_path / "s", dim=16, model_fingerprint="f", model_name="m")
    with pytest.raises(InputError, match="at least"):
        smaller.tune(0.9)
    with pytest.raises(InputError, match=r"recall of 1\.5"):
        index.tune(1.5)


def test_compaction_keeps_every_row_and_drops_old_files(index: AbstractIndex) -> None:
    folder = Path(index.location)
    for start in range(20):
        index.add(*rows([f"c{start:02d}"]))
    index.delete(["c00"])
    before = sorted(name for batch in index.items([]) for name in batch["id"].to_pylist())
    num_files = len(list(folder.rglob("*.lance")))
    fresh = index.compact()
    assert sorted(name for batch in fresh.items([]) for name in batch["id"].to_pylist()) == before
    assert len(list(folder.rglob("*.lance"))) < num_files / 2
    np.testing.assert_array_equal(fresh.vectors(["c05"]), rows(["c05"])[0])
    with pytest.raises(ArtefactError, match="rebuilt or compacted"):
        index.count()
    assert open_index(folder).verify().problems == ()
    assert fresh.compact().count() == len(before)


# ---- many threads, one gallery


def test_threads_share_one_reading_of_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one product is under way the other queries gather, and are then computed together."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((5000, 32)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    gallery[100:140] = gallery[0]  # ties
    queries = gallery[rng.integers(0, 5000, 40)].copy()
    products = SharedProducts(gallery)
    compute, sizes = SharedProducts._compute, []

    def counted(self: SharedProducts, mine: object) -> None:
        before = len(self._waiting)
        compute(self, mine)  # type: ignore[arg-type]
        sizes.append(before - len(self._waiting))

    monkeypatch.setattr(SharedProducts, "_compute", counted)
    found: list[object] = [None] * len(queries)

    def ask(number: int) -> None:
        found[number] = nearest_units(queries[number : number + 1], gallery, 5, products=products)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(queries))]
    with products._computing:  # as if another thread computed, until all of them wait
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while len(products._waiting) < len(queries) and time.monotonic() < end:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    expected = exact_topk(queries, gallery, 5, normalised=True)
    np.testing.assert_array_equal(np.concatenate([one.indices for one in found]), expected.indices)
    np.testing.assert_array_equal(np.concatenate([one.scores for one in found]), expected.scores)
    assert sizes == [16, 16, 8]


def test_a_product_that_fails_fails_for_its_own_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = np.eye(300, 32, dtype=np.float32)
    products = SharedProducts(gallery)
    compute, calls = SharedProducts._compute, []

    def first_fails(self: SharedProducts, mine: object) -> None:
        calls.append(mine)
        if len(calls) == 1:
            time.sleep(0.1)
            with self._guard:
                self._waiting.clear()
            raise MemoryError
        compute(self, mine)  # type: ignore[arg-type]

    monkeypatch.setattr(SharedProducts, "_compute", first_fails)
    ended: list[object] = []

    def ask() -> None:
        try:
            ended.append(products.of(gallery[3]).argmax())
        except MemoryError:
            ended.append("failed")

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, ended)) == ["3"] * 5 + ["failed"]
