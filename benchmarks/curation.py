"""Curating a synthetic catalog of millions of rows: seconds and memory, step by step.

    python benchmarks/curation.py                  # 5,000,000 rows; the figures of docs/benchmarks.md
    python benchmarks/curation.py --rows 200000    # quicker
    python benchmarks/curation.py --hashes         # near hashes among a million, and against all pairs
    python benchmarks/curation.py --embeddings 100000   # near embeddings, 1,280 numbers each

No image is opened: the rows have checksums, of which some are those of other rows, planted as copies under
the same label, under another label, and in the evaluation rows. Curation runs in a process of its own, whose
peak memory is that of everything it did: reading, finding copies and leaks, the rules, the report, writing.
Asked for: under 4 GiB and 3 minutes.

Every number that curation reports is compared with what was planted. The rival is the same least and most
images per class by plain pandas, where pandas is installed; the floor is reading and writing the catalog.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from samething.catalog import Catalog

DOMAINS = ("packaged goods", "landmarks", "apparel", "cars", "furniture")
LIMIT_S, LIMIT_GIB = 180, 4
PLANTED = 0.01
"""Share of the training rows that are planted, of each kind."""


def synthetic(num_rows: int, root: Path) -> tuple[Catalog, dict[str, int]]:
    """A catalog with class sizes that fall off as real ones do, and how many of each kind are planted."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(1 + rng.zipf(1.7, num_rows), 3000)
    classes = np.repeat(np.arange(len(sizes)), sizes)[:num_rows]
    domains = classes % len(DOMAINS)
    evaluation = rng.random(classes[-1] + 1)[classes] < 0.1
    contents = np.arange(num_rows)
    training = np.flatnonzero(~evaluation)
    chosen = rng.permutation(training)
    number = int(PLANTED * num_rows)
    leaks, copies = chosen[:number], chosen[number : 2 * number]
    contents[leaks] = rng.choice(np.flatnonzero(evaluation), number)
    # a copy has the content of the row before it, where that is of the same class and not planted itself
    planted = np.zeros(num_rows, bool)
    planted[chosen[: 2 * number]] = True
    before = copies - 1
    fits = (before >= 0) & (classes[before] == classes[copies]) & ~planted[before]
    copies, before = copies[fits], before[fits]
    contents[copies] = before
    digits = np.char.mod("%064x", contents) if num_rows < 100_000 else None
    names = {
        "image": _numbered("images/class_", classes, "/image_", np.arange(num_rows), ".jpg"),
        "label": _numbered("class_", classes),
        "domain": pa.DictionaryArray.from_arrays(pa.array(domains.astype(np.int8)), list(DOMAINS)).cast(
            pa.string()
        ),
        "dataset": _numbered("set_", domains),
        "role": pa.DictionaryArray.from_arrays(
            pa.array(evaluation.astype(np.int8)), ["train", "query+index"]
        ).cast(pa.string()),
        "width": pa.array(np.full(num_rows, 640, np.int32)),
        "height": pa.array(np.full(num_rows, 480, np.int32)),
        "sha256": pa.array(digits.tolist()) if digits is not None else _padded(contents),
    }
    return Catalog(pa.table(names), root), {"leak": len(leaks), "duplicate": len(copies)}


def _numbered(*parts: object) -> pa.Array:
    import pyarrow.compute as pc

    texts = [part if isinstance(part, str) else pa.array(part).cast(pa.string()) for part in parts]
    return pc.binary_join_element_wise(*texts, "")


def _padded(contents: np.ndarray) -> pa.Array:
    import pyarrow.compute as pc

    return pc.utf8_lpad(pa.array(contents).cast(pa.string()), 64, "0")


CURATE = """
import json, resource, sys, time
from pathlib import Path
started = time.perf_counter()
from samething.curate import curate
result = curate(
    [Path(sys.argv[1])], output=Path(sys.argv[2]), duplicates="exact", min_images=(3,), max_images=(100,),
    max_classes=("set_1=100000",), budget_images=int(sys.argv[3]), share="temperature",
)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "dropped": result.dropped, "kept": len(result.catalog),
}))
"""


def curation(num_rows: int) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        catalog, planted = synthetic(num_rows, folder)
        pq.write_table(catalog.table, folder / "plain.parquet", compression="zstd")
        source = folder / "all.parquet"
        catalog.write(source)
        print(f"made {num_rows:,} rows in {time.perf_counter() - started:.0f} s")
        num_evaluation = int(catalog.has_role("query+index").sum())
        del catalog
        digests = []
        for run in range(2):
            target = folder / f"curated{run}.parquet"
            done = subprocess.run(
                [sys.executable, "-c", CURATE, source, target, str(num_rows // 4)],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                print(done.stderr)
                return False
            found = json.loads(done.stdout.splitlines()[-1])
            digests.append(target.read_bytes())
            print(f"curation: {found['seconds']:.1f} s, peak {found['gib']:.2f} GiB; kept {found['kept']:,}")
            print(
                "  dropped: " + ", ".join(f"{rule} {number:,}" for rule, number in found["dropped"].items())
            )
        table_seconds = timed(lambda: rewritten(source, folder / "again.parquet"))
        print(
            f"floor: reading and writing the same table {table_seconds:.1f} s, "
            f"ratio {found['seconds'] / table_seconds:.1f}"
        )
        pandas_rival(source)
        checks = {
            "leaks found as planted": found["dropped"]["leak"] == planted["leak"],
            "copies found as planted": found["dropped"]["duplicate"] == planted["duplicate"],
            "budget kept": num_rows // 4 - 10 <= found["kept"] - num_evaluation <= num_rows // 4,
            "twice the same bytes": digests[0] == digests[1],
            f"under {LIMIT_S} s": found["seconds"] < LIMIT_S,
            f"under {LIMIT_GIB} GiB": found["gib"] < LIMIT_GIB,
        }
        for name, is_met in checks.items():
            print(f"{'met' if is_met else 'MISSED'}: {name}")
        return all(checks.values())


def rewritten(source: Path, target: Path) -> None:
    table = pq.read_table(source)
    pq.write_table(table.combine_chunks(), target, compression="zstd")


def pandas_rival(source: Path) -> None:
    """Least 3 and most 100 images per class, by pandas, in this process."""
    try:
        import pandas as pd
    except ImportError:
        print("rival: pandas is not installed")
        return
    from samething.curate.rules import Limit, Population

    catalog = Catalog.read(source)
    training = catalog.take(catalog.has_role("train"))
    frame = training.table.select(["domain", "label", "image"]).to_pandas()

    def by_pandas() -> int:
        groups = frame.groupby(["domain", "label"], sort=False)["image"]
        enough = frame[groups.transform("size") >= 3]
        drawn = enough.sample(frac=1, random_state=0)
        return len(drawn.groupby(["domain", "label"], sort=False).head(100))

    def ours() -> int:
        population = Population.of(training)
        rows = population.with_enough_images(population.rows, Limit(3))
        return len(population.with_capped_images(rows, Limit(100)))

    assert by_pandas() == ours()
    theirs, own = timed(by_pandas), timed(ours)
    print(
        f"rules alone: ours {own:.1f} s, pandas {theirs:.1f} s ({pd.__version__}), ratio {theirs / own:.2f}"
    )


def hashes(num_hashes: int) -> None:
    """Pairs of near hashes among many, against comparing all pairs of a part of them."""
    from samething.curate.near_hashes import near_pairs

    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**63, num_hashes, np.int64).astype(np.uint64)
    planted = rng.permutation(num_hashes)[: num_hashes // 100]
    flips = np.zeros(len(planted), np.uint64)
    for _ in range(10):
        flips ^= np.uint64(1) << rng.integers(0, 64, len(planted)).astype(np.uint64)
    copies = np.concatenate([values, values[planted] ^ flips])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for distance in (6, 8, 10):
        started = time.perf_counter()
        found = near_pairs(copies, distance=distance)
        seconds = time.perf_counter() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        reached = int((np.bitwise_count(flips) <= distance).sum())
        print(
            f"{len(copies):,} hashes, up to {distance} bits: {seconds:.1f} s, {len(found):,} pairs "
            f"({reached:,} planted), {grown:,.0f} MiB more than before"
        )
    part = copies[:20_000]

    def all_pairs() -> int:
        return sum(
            int((np.bitwise_count(part[row] ^ part[row + 1 :]) <= 8).sum()) for row in range(len(part))
        )

    number = all_pairs()
    assert number == len(near_pairs(part, distance=8))
    plain = timed(all_pairs) * (len(copies) / len(part)) ** 2
    print(f"comparing all pairs, 20,000 measured and the rest reckoned: {plain:,.0f} s")


def anonymous_mib() -> float:
    """Memory of this process that no file stands behind, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(found) / 2**10


class Watched(threading.Thread):
    """Looks at this process's memory every 50 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0
        self.is_done = threading.Event()

    def run(self) -> None:
        """Until it is told that all is done."""
        while not self.is_done.wait(0.05):
            self.most = max(self.most, anonymous_mib())


def embeddings(num_rows: int, width: int = 1280) -> None:
    """Candidates by embedding among many: seconds, and memory beyond the features, which are on disk."""
    from samething.curate.curate_config import CurateConfig
    from samething.curate.hashes import Hashes
    from samething.curate.pairs import embedding_pairs

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        rows = np.lib.format.open_memmap(Path(name) / "f.npy", "w+", np.float16, (num_rows, width))
        for start in range(0, num_rows, 10_000):
            rows[start : start + 10_000] = rng.normal(size=(len(rows[start : start + 10_000]), width))
        copies = num_rows // 100
        rows[-copies:] = rows[:copies] + np.float16(0.05)
        no_hashes = Hashes(
            sha256=np.full(num_rows, "", object), is_hashed=np.zeros(num_rows, bool), unreadable={},
            **{name: np.zeros(num_rows, np.uint64) for name in ("perceptual", "mirrored", "inner")},
        )  # fmt: skip
        before = anonymous_mib()
        watched = Watched()
        watched.start()
        started = time.perf_counter()
        pairs, _ = embedding_pairs(
            np.arange(num_rows), rows, no_hashes, lambda row: None,
            CurateConfig(similarity=0.95, closeness=0.0),
        )  # fmt: skip
        seconds = time.perf_counter() - started
        watched.is_done.set()
        watched.join()
        print(
            f"{num_rows:,} features of {width} numbers: {seconds:.0f} s, {len(pairs):,} pairs ({copies:,} "
            f"planted), at most {watched.most - before:,.0f} MiB more than before; a million, "
            f"reckoned: {seconds * (1e6 / num_rows) ** 2 / 3600:.1f} hours"
        )


def timed(work: object) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--hashes", action="store_true")
    parser.add_argument("--embeddings", type=int, default=0, metavar="ROWS")
    arguments = parser.parse_args()
    if arguments.embeddings:
        embeddings(arguments.embeddings)
    elif arguments.hashes:
        hashes(1_000_000)
    else:
        sys.exit(0 if curation(arguments.rows) else 1)


if __name__ == "__main__":
    main()
