"""Search and sync of the embedded index against their rivals and limits, ratios in one run.

    python benchmarks/search.py query --rows 100000 1000000   # latency and recall
    python benchmarks/search.py query --rows 100000 --dim 512 --exact   # 2,048 bytes or 256
    python benchmarks/search.py large --rows 10000000         # one tuned index, opened by another process
    python benchmarks/search.py changes --rows 1000000        # what a change costs an open searcher
    python benchmarks/search.py sync --images 100000        # bringing an unchanged folder up to date

Query: vectors around 35,000 centres, and queries around the same centres. Each engine
answers the same queries in turns (a slice of them a round), with one client and with eight threads.
Recall@5 is the share of the five nearest rows, by float64, that an engine returns. The floor is the bytes
of the float32 vectors over the rate at which this machine reads memory, measured between the rounds.

Large: an index is filled and tuned to 0.98, then a new process opens it and answers queries that are no rows.

Changes: one handle asks without end, another adds or deletes rows; the first question after it is timed.

Sync: a folder of small files that all have the names of images and different content; no image is opened,
because none changed. The rival is our own writing of what rclip (github.com/yurijmikhalevich/rclip) does at
every start: flag all rows as gone, walk the folder, look each path up in SQLite, compare size and time of
change, take the flag off. The floor is walking the folder and asking the disk for size and time.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from samething.index import AbstractIndex, SqliteIndex, create_index, open_index
from samething.retrieval import FlatScan, exact_topk
from samething.retrieval.codes import Coder, StoredCodes

DIM, NUM_CENTRES, K = 64, 35_000, 5
NOISE = 0.7
"""Length of what is added to a centre of length 1: two rows of a centre have a cosine of 0.67 on average."""
IDENTITY = {"model_fingerprint": "benchmark", "model_name": "benchmark"}

Ask = Callable[[np.ndarray], list[int]]


# ---- vectors


def clustered(num_rows: int, seed: int, dim: int = DIM) -> np.ndarray:
    """Unit float32 rows around the same centres whatever the seed."""
    centres = _unit(np.random.default_rng(0).standard_normal((NUM_CENTRES, dim), dtype=np.float32))
    random = np.random.default_rng(seed)
    noise = random.standard_normal((num_rows, dim), dtype=np.float32) * np.float32(NOISE / dim**0.5)
    return _unit(centres[random.integers(0, NUM_CENTRES, num_rows)] + noise)


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def read_rate(rows: np.ndarray) -> float:
    """Bytes a second at which one thread reads memory: the best of three sums of squares by the BLAS."""
    flat, times = rows.ravel(), []
    for _ in range(3):
        started = time.perf_counter()
        np.dot(flat, flat)
        times.append(time.perf_counter() - started)
    return flat.nbytes / min(times)


# ---- engines: each a function from a query to row numbers


def filled_index(folder: Path, rows: np.ndarray, codes: StoredCodes = "float32") -> SqliteIndex:
    """Our index with a path and a label per row."""
    coder = None if codes == "float32" else Coder.fit(clustered(20_000, 3, rows.shape[1]), codes)
    index = create_index(folder, dim=rows.shape[1], **IDENTITY, coder=coder)
    assert isinstance(index, SqliteIndex)
    add_rows(index, rows)
    return index


def add_rows(index: AbstractIndex, rows: np.ndarray, first: int = 0) -> None:
    """Rows named by their numbers, which begin with ``first``."""
    for start in range(0, len(rows), 50_000):
        part = rows[start : start + 50_000]
        numbers = range(first + start, first + start + len(part))
        index.add(part, [{"id": f"{n:09d}", "path": f"/images/{n}.jpg", "label": str(n)} for n in numbers])


def by_index(index: SqliteIndex, columns: list[str]) -> Ask:
    """The whole search as users call it."""
    return lambda query: [int(name) for name in index.search(query[None], K, columns=columns).ids[0]]


def by_faiss(index: Any) -> Ask:
    """FAISS."""
    return lambda query: index.search(query[None], K)[1][0].tolist()


def engines(rows: np.ndarray, scratch: Path, *, graphs: bool) -> dict[str, Ask]:
    """All of them, made from the same vectors; those that search a graph take minutes to build."""
    import faiss

    dim = rows.shape[1]
    flat, graph = faiss.IndexFlatIP(dim), faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
    _timed("FAISS flat", lambda: flat.add(rows))
    if graphs:
        _timed("FAISS HNSW", lambda: graph.add(rows))
        graph.hnsw.efSearch = 64
    faiss.omp_set_num_threads(1)  # both were built on all cores; a query gets one, as ours does
    exact = _timed("our index", lambda: filled_index(scratch / "exact", rows))
    kinds: tuple[StoredCodes, ...] = ("int8", "int4")
    made = {kind: _timed(kind, partial(filled_index, scratch / kind, rows, kind)) for kind in kinds}
    coded = {f"ours, exact among {kind}": by_index(made[kind], ["path", "label"]) for kind in kinds}
    near: dict[str, Ask] = {}
    if graphs:
        tuned = _timed("our index to be tuned", lambda: filled_index(scratch / "tuned", rows))
        print("   ", _timed("tuning", lambda: tuned.tune(0.98, k=K)).__rich__())
        near["ours, tuned to 0.98"] = by_index(tuned, ["path", "label"])
        near["FAISS HNSW (M 32, ef 64)"] = by_faiss(graph)
    alone = FlatScan(rows)
    return {
        "ours, exact": by_index(exact, ["path", "label"]),
        "ours, exact, ids only": by_index(exact, []),
        "ours, exact, the search alone": lambda query: alone.nearest(query[None], K).indices[0].tolist(),
        **coded,
        "FAISS flat": by_faiss(flat),
        **near,
    }


def _timed(name: str, make: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    made = make()
    print(f"    {name}: {time.perf_counter() - started:.1f} s", flush=True)
    return made


# ---- measuring


def latencies(ask: Ask, queries: np.ndarray, num_clients: int) -> tuple[list[float], list[list[int]], float]:
    """Seconds and answer of each query, the clients taking turns at the next one; and the wall time."""
    times, answers = [0.0] * len(queries), [[]] * len(queries)
    waiting: Iterator[int] = iter(range(len(queries)))
    turn = threading.Lock()

    def client() -> None:
        while True:
            with turn:
                number = next(waiting, None)
            if number is None:
                return
            started = time.perf_counter()
            answers[number] = ask(queries[number])
            times[number] = time.perf_counter() - started

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, answers, time.perf_counter() - started


def compare_queries(
    num_rows: int, *, dim: int, num_queries: int, graphs: bool, rounds: int, scratch: Path
) -> None:
    """Print the table of one size."""
    print(f"\n{num_rows:,} rows of {dim} dimensions around {NUM_CENTRES:,} centres", flush=True)
    rows, queries = clustered(num_rows, 1, dim), clustered(num_queries, 2, dim)
    truth = exact_topk(queries, rows, K, normalised=True).indices
    asked = engines(rows, scratch, graphs=graphs)
    for ask in asked.values():  # loads what is loaded once
        for query in queries[:5]:
            ask(query)
    found: dict[tuple[str, int], list[float]] = {(name, n): [] for name in asked for n in (1, 8)}
    walls = dict.fromkeys(found, 0.0)
    shares: dict[str, list[float]] = {name: [] for name in asked}
    rates = []
    for part in np.array_split(np.arange(num_queries), rounds):
        rates.append(read_rate(rows))
        for name, ask in asked.items():
            for num_clients in (1, 8):
                times, answers, wall = latencies(ask, queries[part], num_clients)
                found[name, num_clients] += times
                walls[name, num_clients] += wall
                if num_clients == 1:
                    pairs = zip(answers, truth[part], strict=True)
                    shares[name] += [len(set(answer) & set(best)) / K for answer, best in pairs]
    floor = rows.nbytes / statistics.median(rates)
    flat = statistics.median(found["FAISS flat", 1])
    print(
        f"memory is read at {statistics.median(rates) / 1e9:.1f} GB/s; floor {1e3 * floor:.2f} ms per query"
    )
    print(
        "| engine | recall@5 | p50 ms | p95 ms | × floor | × FAISS flat "
        "| 8 clients: p50 ms | p95 ms | queries/s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in asked:
        one, eight = found[name, 1], found[name, 8]
        print(
            f"| {name} | {statistics.mean(shares[name]):.3f} | {_ms(one, 50)} | {_ms(one, 95)} "
            f"| {statistics.median(one) / floor:.2f} | {flat / statistics.median(one):.2f} "
            f"| {_ms(eight, 50)} | {_ms(eight, 95)} | {num_queries / walls[name, 8]:,.0f} |"
        )
    sys.stdout.flush()


def _ms(seconds: list[float], percentile: int) -> str:
    return f"{1e3 * np.percentile(seconds, percentile):.2f}"


# ---- one large index


def compare_large(num_rows: int, *, num_queries: int, scratch: Path) -> None:
    """Print what tuning costs, and what a process that opens the index waits for and holds in memory."""
    queries = clustered(num_queries, 2)
    index = create_index(scratch / "index", dim=DIM, **IDENTITY)
    scores, truth = np.zeros((num_queries, 0), np.float32), np.zeros((num_queries, 0), np.int64)
    started = time.perf_counter()
    for start in range(0, num_rows, 500_000):
        rows = clustered(min(500_000, num_rows - start), 10 + start)
        add_rows(index, rows, start)
        top = exact_topk(queries, rows, K, normalised=True)
        scores, truth = np.hstack([scores, top.scores]), np.hstack([truth, top.indices + start])
        best = np.argsort(-scores, axis=1)[:, :K]
        scores, truth = (np.take_along_axis(each, best, 1) for each in (scores, truth))
    print(f"\n{num_rows:,} rows written in {time.perf_counter() - started:.0f} s", flush=True)
    started = time.perf_counter()
    assert isinstance(index, SqliteIndex)
    print(index.tune(0.98, k=K).__rich__())
    print(f"tuned in {time.perf_counter() - started:.0f} s", flush=True)
    index.close()
    for columns in ([], ["path", "label"]):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(answer_alone, (scratch / "index", queries, truth, columns))


def answer_alone(folder: Path, queries: np.ndarray, truth: np.ndarray, columns: list[str]) -> None:
    """Print what a new process that opens an index measures."""
    marks = [time.perf_counter()]
    with open_index(folder) as index:
        marks.append(time.perf_counter())
        assert isinstance(index, SqliteIndex)
        ask = by_index(index, columns)
        ask(queries[0])
        marks.append(time.perf_counter())
        times, answers, _ = latencies(ask, queries, 1)
    share = np.mean([len(set(a) & set(b)) / K for a, b in zip(answers, truth.tolist(), strict=True)])
    opening, first = np.diff(marks)
    # ru_maxrss would count the memory of the process that started this one
    status = Path("/proc/self/status").read_text()
    used = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e6  # type: ignore[index]
    print(
        f"columns {columns}: opened in {opening:.2f} s, first answer after {first:.2f} s more, "
        f"p50 {_ms(times, 50)} ms, p95 {_ms(times, 95)} ms, recall@5 {share:.4f}, memory {used:.2f} GB",
        flush=True,
    )


# ---- changes


def compare_changes(num_rows: int, *, dim: int, rounds: int, scratch: Path) -> None:
    """Print what the first question after a change costs beyond any other."""
    print(f"\n{num_rows:,} rows of {dim} dimensions, {rounds} changes each; milliseconds\n")
    print("| kept as | change | a question | the first one after it, median | worst |")
    print("| --- | --- | --- | --- | --- |")
    rows, queries = clustered(num_rows, 1, dim), clustered(200, 2, dim)
    kinds: tuple[StoredCodes, ...] = ("float32", "int4")
    for kind in kinds:
        writer = filled_index(scratch / kind, rows, kind)
        asking = open_index(scratch / kind)

        def ask(number: int) -> float:
            started = time.perf_counter()
            asking.search(queries[number % 200][None], K, columns=["path"])  # noqa: B023
            return 1e3 * (time.perf_counter() - started)

        for number in range(5):
            ask(number)
        for name, size in (("one row added", 1), ("256 rows added", 256), ("one row deleted", 0)):
            usual, first = [], []
            for number in range(rounds):
                if size:
                    names = [f"{name} {number} {row}" for row in range(size)]
                    writer.add(clustered(size, 10 + number, dim), [{"id": each} for each in names])
                else:
                    writer.delete([f"{number:09d}"])
                first.append(ask(number))
                usual += [ask(number + again) for again in range(5)]
            print(
                f"| {kind} | {name} | {statistics.median(usual):.1f} | {statistics.median(first):.1f} "
                f"| {max(first):.1f} |",
                flush=True,
            )


# ---- sync


def make_folder(folder: Path, num_images: int) -> None:
    """Files with the names of images, a thousand folders of them."""
    for number in range(num_images):
        place = folder / f"{number % 1000:03d}"
        if number < 1000:
            place.mkdir(parents=True)
        (place / f"{number:07d}.jpg").write_bytes(b"\xff\xd8\xff\xe0" + f"{number:0600d}".encode())


class AsRclip:
    """What rclip does at every start, in our own words: a row per file in SQLite, found by its path."""

    IMAGE = re.compile(r"^.+\.(jpe?g|png)$", re.IGNORECASE)
    LEFT_OUT = re.compile(r"^.+/(@eaDir|node_modules|\.git)(/.+)?$")

    def __init__(self, database: Path) -> None:
        self.database = sqlite3.connect(database)
        self.database.row_factory = sqlite3.Row
        self.database.execute(
            "CREATE TABLE images (id INTEGER PRIMARY KEY, deleted BOOLEAN, path TEXT NOT NULL UNIQUE, "
            "modified REAL NOT NULL, size INTEGER NOT NULL, vector BLOB NOT NULL)"
        )
        self.database.execute("CREATE UNIQUE INDEX present ON images(path) WHERE deleted IS NULL")

    def fill(self, folder: Path) -> None:
        """A vector of 512 float32 numbers per image, which is rclip's."""
        for entry in self.walk(folder):
            status = entry.stat()
            self.database.execute(
                "INSERT INTO images(path, modified, size, vector) VALUES (?, ?, ?, ?)",
                (entry.path, status.st_mtime, status.st_size, bytes(2048)),
            )
        self.database.commit()

    def walk(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        """Images by their suffix, in the order of the disk."""
        waiting = [str(folder)]
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if not self.LEFT_OUT.match(entry.path):
                            waiting.append(entry.path)
                    elif self.IMAGE.match(entry.name):
                        yield entry

    def sync(self, folder: Path) -> int:
        """Returns the number of images that would be embedded."""
        num_new = 0
        self.database.execute("UPDATE images SET deleted = 1 WHERE path LIKE ?", (f"{folder}/%",))
        for entry in self.walk(folder):
            row = self.database.execute(
                "SELECT * FROM images WHERE path = ? LIMIT 1", (entry.path,)
            ).fetchone()
            status = entry.stat()
            if row and (row["modified"], row["size"]) == (status.st_mtime, status.st_size):
                self.database.execute("UPDATE images SET deleted = NULL WHERE path = ?", (entry.path,))
            else:
                num_new += 1
        self.database.commit()
        return num_new


def compare_syncs(num_images: int, *, rounds: int, scratch: Path) -> None:
    """Print seconds of bringing an unchanged folder up to date."""
    from samething.search import Searcher
    from samething.search.collection import FILE_COLUMNS, Collection, row_of

    folder = scratch / "images"
    make_folder(folder, num_images)
    collection = Collection(folder)
    index = create_index(scratch / "index", dim=DIM, **IDENTITY, extra_columns=FILE_COLUMNS)
    files = collection.files(scratch / "index")
    for start in range(0, num_images, 20_000):
        part = files[start : start + 20_000]
        names = [hashlib.sha256(Path(file.location).read_bytes()).hexdigest() for file in part]
        index.add(
            clustered(len(part), start),
            [row_of(name, [file]) for name, file in zip(names, part, strict=True)],
        )
    rclip = AsRclip(scratch / "rclip.sqlite3")
    rclip.fill(folder)
    # no image is new, so the model is never asked
    searcher = Searcher(embedder=None, index=index)  # type: ignore[arg-type]

    def ours() -> None:
        done = searcher.sync([collection]).changes
        assert (done.num_kept, done.num_read, done.num_added) == (num_images, 0, 0), done

    def theirs() -> None:
        assert rclip.sync(folder) == 0

    def floor() -> None:
        assert sum(1 for entry in rclip.walk(folder) if entry.stat()) == num_images

    times: dict[str, list[float]] = {"ours": [], "as rclip": [], "floor": []}
    for _ in range(rounds):
        for name, do in (("ours", ours), ("as rclip", theirs), ("floor", floor)):
            started = time.perf_counter()
            do()
            times[name].append(time.perf_counter() - started)
    print(f"\nsync of {num_images:,} unchanged images, {rounds} rounds\n")
    print("| way | median s | least s | × as rclip | share of the floor |\n| --- | --- | --- | --- | --- |")
    for name, own in times.items():
        faster = statistics.median(b / a for a, b in zip(own, times["as rclip"], strict=True))
        share = statistics.median(b / a for a, b in zip(own, times["floor"], strict=True))
        print(f"| {name} | {statistics.median(own):.2f} | {min(own):.2f} | {faster:.2f} | {share:.2f} |")


def main(arguments: list[str] | None = None) -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    query, large, changes, sync = (parts.add_parser(name) for name in ("query", "large", "changes", "sync"))
    large.add_argument("--rows", type=int, nargs="+", default=[10_000_000])
    for part in (query, changes):
        part.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
        part.add_argument("--dim", type=int, default=DIM)
    query.add_argument("--exact", action="store_false", dest="graphs", help="leave graphs out")
    for part in (query, large):
        part.add_argument("--queries", type=int, dest="num_queries", default=300)
    sync.add_argument("--images", type=int, nargs="+", dest="rows", default=[100_000])
    for part in (query, changes, sync):
        part.add_argument("--rounds", type=int, default=5)
    asked = vars(parser.parse_args(arguments))
    compare: Callable[..., None] = {
        "query": compare_queries,
        "large": compare_large,
        "changes": compare_changes,
        "sync": compare_syncs,
    }[asked.pop("part")]
    for size in asked.pop("rows"):
        with tempfile.TemporaryDirectory() as scratch:
            compare(size, **asked, scratch=Path(scratch))


if __name__ == "__main__":
    main()
