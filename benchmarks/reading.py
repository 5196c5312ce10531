"""How fast shuffled batches of cached features are read, warm and cold, against plain ways to do it.

    python benchmarks/reading.py                # the tables of docs/benchmarks.md, "Reading cached features"
    python benchmarks/reading.py --folder DISK  # the disk to measure; needs 3 GB for the time of the run

The file is that of a feature folder: 1,000,000 float16 rows of 1,152 (2.3 GB). Batches have 128 rows. All
ways run in turns in one process; figures are medians, ratios are medians of the ratios of each turn.

Warm: the rows are in the page cache and have been touched once; process CPU time on one thread. Rivals are
the same gather from an array in RAM, and torch's DataLoader, which fetches item by item and stacks them,
without worker processes.

Cold: the file's pages are dropped from the page cache before each measurement, which is checked; wall time.
Rivals are a shuffled gather through a memory map, for a few seconds, plain and with the advice that access
is random, and the file read once from front to end in pieces of 8 MiB. The file stands for one larger than
memory, of which a shuffled gather finds almost nothing that earlier batches left. This one would soon be in
memory as a whole, so its pages are dropped again before each batch of the memory maps, off the clock. The
others touch every page once in any case.
A host below a virtual machine may have the file in a cache of its own: then "cold" is the speed of that, and
the rate of sequential reading tells.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from samething.features.row_reader import RowReader
from samething.sampling import epoch_batches

WIDTH, BATCH, NUM_ROWS, NUM_WARM = 1152, 128, 1_000_000, 200_000
FREE_BYTES = 6_000_000_000
WARM_TURNS, COLD_TURNS, PLAIN_SECONDS = 7, 5, 4.0
DEMANDS = {
    ("warm", "gather in RAM"): 0.8,
    ("warm", "DataLoader items"): 7.0,
    ("cold", "plain memory map"): 100.0,
    ("cold", "sequential reading"): 0.8,
}
Batches = list[np.ndarray]
Rate = Callable[[], float]


def write_file(path: Path) -> None:
    rng = np.random.default_rng(0)
    header = {"descr": "<f2", "fortran_order": False, "shape": (NUM_ROWS, WIDTH)}
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for _ in range(0, NUM_ROWS, 50_000):
            # bits of numbers between 2^-14 and 2, without the time that random normal numbers take
            stream.write(rng.integers(1024, 16384, (50_000, WIDTH), np.int16).data)
        stream.flush()
        os.fsync(stream.fileno())


def shuffled(num_rows: int, *, kind: str, epoch: int) -> Batches:
    zeros = np.zeros(num_rows, np.int64)
    return epoch_batches(zeros, zeros, batch_size=BATCH, seed=0, epoch=epoch, kind=kind)


# ---- warm


class Items(torch.utils.data.Dataset):
    """One row an item, as a data set of files or a memory map is usually written."""

    def __init__(self, path: Path) -> None:
        self.rows = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return NUM_WARM

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.rows[index]))


def warm_rates(path: Path, batches: Batches) -> dict[str, Rate]:
    in_ram = np.load(path, mmap_mode="r")[:NUM_WARM].copy()
    reader = RowReader(np.load(path, mmap_mode="r"))
    items = Items(path)
    # a tensor in RAM makes the leanest items: what is left is the loader's own work
    lean = torch.from_numpy(in_ram)

    def rate(gathered: Iterator[object]) -> float:
        start = time.process_time()
        for _ in gathered:
            pass
        return NUM_WARM / (time.process_time() - start)

    def loader(items: torch.utils.data.Dataset) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(items, batch_sampler=[batch.tolist() for batch in batches])

    return {
        "ours": lambda: rate(reader.rows(batch) for batch in batches),
        "gather in RAM": lambda: rate(in_ram.take(batch, axis=0) for batch in batches),
        "DataLoader items": lambda: rate(iter(loader(items))),
        "DataLoader over a tensor in RAM": lambda: rate(iter(loader(lean))),
    }


# ---- cold


def drop_from_cache(path: Path) -> None:
    """Forget the file's pages, and make sure of it."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    offsets = np.random.default_rng(0).integers(0, NUM_ROWS * WIDTH * 2, 500)
    cached, place = 0, bytearray(1)
    for offset in offsets.tolist():
        with contextlib.suppress(BlockingIOError):  # not in the cache
            cached += os.preadv(descriptor, [place], offset, os.RWF_NOWAIT)
    os.close(descriptor)
    if cached > len(offsets) // 100:
        sys.exit(
            f"{cached} of {len(offsets)} places are still in the page cache: cold cannot be measured here"
        )


def cold_rates(path: Path) -> dict[str, Rate]:
    def ours() -> float:
        batches = shuffled(NUM_ROWS, kind="block-shuffled", epoch=0)
        start = time.perf_counter()
        with contextlib.closing(RowReader(np.load(path, mmap_mode="r"))) as reader:
            reader.plan(np.concatenate(batches))
            for batch in batches:
                reader.rows(batch)
        return NUM_ROWS / (time.perf_counter() - start)

    def plain(advice: int) -> float:
        rows = np.load(path, mmap_mode="r")
        rows._mmap.madvise(advice)
        seconds, count = 0.0, 0
        for batch in shuffled(NUM_ROWS, kind="shuffled", epoch=0):
            start = time.perf_counter()
            # eight rows at a time, or one slow batch would overshoot the limit by far
            for part in np.array_split(batch, BATCH // 8):
                rows[part]
                count += len(part)
                if seconds + time.perf_counter() - start > PLAIN_SECONDS:
                    return count / (seconds + time.perf_counter() - start)
            seconds += time.perf_counter() - start
            rows._mmap.madvise(mmap.MADV_DONTNEED)  # pages that are mapped cannot be dropped
            drop_from_cache(path)
        return count / seconds

    def sequential() -> float:
        buffer = bytearray(8 << 20)
        start, count = time.perf_counter(), 0
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while got := stream.readinto(buffer):
                count += got
        return count / (WIDTH * 2) / (time.perf_counter() - start)

    def cold(rate: Rate) -> Rate:
        def measure() -> float:
            drop_from_cache(path)
            return rate()

        return measure

    return {
        "ours": cold(ours),
        "plain memory map": cold(lambda: plain(mmap.MADV_NORMAL)),
        "memory map with MADV_RANDOM": cold(lambda: plain(mmap.MADV_RANDOM)),
        "sequential reading": cold(sequential),
    }


# ---- the table


def report(title: str, rates: dict[str, Rate], *, turns: int) -> bool:
    found: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(turns):
        for name, rate in rates.items():
            found[name].append(rate())
    print(f"\n| {title} | rows/s | GB/s | ours is × | at least | least and most of {turns} |")
    print("| --- | --- | --- | --- | --- | --- |")
    met = True
    for name, values in found.items():
        rate = statistics.median(values)
        ratios = [ours / value for ours, value in zip(found["ours"], values, strict=True)]
        ratio, demand = statistics.median(ratios), DEMANDS.get((title, name))
        met &= demand is None or ratio >= demand
        print(
            f"| {name} | {rate:,.0f} | {rate * WIDTH * 2 / 1e9:.2f} | {ratio:.3g} "
            f"| {demand or ''} | {min(ratios):.3g}–{max(ratios):.3g} |"
        )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to measure")
    arguments = parser.parse_args()
    if shutil.disk_usage(arguments.folder).free < FREE_BYTES:
        sys.exit(f"less than {FREE_BYTES / 1e9:.0f} GB are free in {arguments.folder.resolve()}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "features.npy"
        write_file(path)
        print(f"{path.stat().st_size / 1e9:.2f} GB, {NUM_ROWS:,} × {WIDTH} float16, batches of {BATCH}")
        batches = shuffled(NUM_WARM, kind="shuffled", epoch=0)
        warm = warm_rates(path, batches)
        for rate in warm.values():
            rate()
        met = report("warm", warm, turns=WARM_TURNS)
        del warm  # pages that are mapped cannot be dropped
        met &= report("cold", cold_rates(path), turns=COLD_TURNS)
    print("\nevery demand is met" if met else "\nnot every demand is met")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
