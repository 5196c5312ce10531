"""Exact top-k search in float32 against the matrix product's peak, FAISS and the naive way.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py           # the tables
    OMP_NUM_THREADS=1 python benchmarks/retrieval.py --full    # and UnED's size, once: 242k × 1.4 M × 64-d

Every way runs on one thread, in turns, in this process (FAISS in its own, started in the same run, because
OpenBLAS chooses its kernel when it is loaded); process CPU time. The peak is the rate of torch's float32
matrix product: *square* of 2,048 x 2,048, *as here* of the blocks that the search multiplies.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from samething.retrieval import exact_topk, tiles

K = 5
WIDTH = 64
FAISS_KERNELS = ("unset", "Haswell", "SkylakeX")


def unit_rows(num_rows: int, seed: int) -> np.ndarray:
    """Random directions, made a part at a time."""
    generator = np.random.default_rng(seed)
    rows = np.empty((num_rows, WIDTH), dtype=np.float32)
    for start in range(0, num_rows, 65_536):
        part = generator.standard_normal((min(65_536, num_rows - start), WIDTH), dtype=np.float32)
        rows[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def rate(work: Callable[[], object], operations: float) -> float:
    """Thousand million operations per second of CPU."""
    started = time.process_time()
    work()
    return operations / (time.process_time() - started) / 1e9


def peak_square() -> float:
    import torch

    rows = torch.randn(2048, 2048)
    out = torch.empty_like(rows)
    return max(rate(lambda: torch.mm(rows, rows, out=out), 2 * 2048**3) for _ in range(5))


def peak_of_blocks() -> float:
    import torch

    entries, queries = torch.randn(512, WIDTH), torch.randn(WIDTH, 512)
    out = torch.empty(512, 512)

    def many() -> None:
        for _ in range(200):
            torch.mm(entries, queries, out=out)

    return max(rate(many, 200 * 2 * 512 * 512 * WIDTH) for _ in range(5))


def ours_with(torch_or_not: Callable[[float], Any]) -> Callable[..., object]:
    def search(queries: np.ndarray, gallery: np.ndarray) -> object:
        chosen, tiles._torch_if_it_pays = tiles._torch_if_it_pays, torch_or_not
        try:
            return exact_topk(queries, gallery, K, precision="float32")
        finally:
            tiles._torch_if_it_pays = chosen

    return search


def naive_torch(queries: np.ndarray, gallery: np.ndarray) -> object:
    import torch

    entries = torch.from_numpy(gallery).T
    return [
        torch.topk(torch.from_numpy(queries[start : start + 64]) @ entries, K)
        for start in range(0, len(queries), 64)
    ]


def naive_numpy(queries: np.ndarray, gallery: np.ndarray) -> object:
    found = []
    for start in range(0, len(queries), 64):
        scores = queries[start : start + 64] @ gallery.T
        best = np.argpartition(scores, -K, axis=1)[:, -K:]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
        found.append(np.take_along_axis(best, order, 1))
    return found


def faiss_rates(kernel: str, num_queries: int, num_entries: int, rounds: int) -> dict[str, object]:
    """FAISS in a process of its own, with OPENBLAS_CORETYPE as given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("OPENBLAS_CORETYPE", None)
    if kernel != "unset":
        environment["OPENBLAS_CORETYPE"] = kernel
    command = [sys.executable, __file__, "--faiss", str(num_queries), str(num_entries), str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"rates": [], "problem": done.stderr.strip().splitlines()[-1:]}
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def run_faiss(num_queries: int, num_entries: int, rounds: int) -> None:
    import faiss

    faiss.omp_set_num_threads(1)
    queries, gallery = unit_rows(num_queries, 1), unit_rows(num_entries, 2)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(gallery)
    index.search(queries[:256], K)
    operations = 2.0 * num_queries * num_entries * WIDTH
    rates = [rate(lambda: index.search(queries, K), operations) for _ in range(rounds)]
    scores, rows = index.search(queries[:64], K)
    print(json.dumps({"rates": rates, "rows": rows.tolist(), "scores": scores.tolist()}))


def table(num_queries: int, num_entries: int, rounds: int) -> None:
    queries, gallery = unit_rows(num_queries, 1), unit_rows(num_entries, 2)
    operations = 2.0 * num_queries * num_entries * WIDTH
    ways: dict[str, Callable[..., object]] = {
        "ours": ours_with(lambda _: importlib.import_module("torch")),
        "ours without torch": ours_with(lambda _: None),
        "torch mm + topk": naive_torch,
        "numpy matmul + argpartition": naive_numpy,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    faiss: dict[str, list[float]] = {kernel: [] for kernel in FAISS_KERNELS}
    peaks: dict[str, list[float]] = {"square": [], "as here": []}
    for way in ways.values():  # warm
        way(queries[:256], gallery)
    for _ in range(rounds):
        peaks["square"].append(peak_square())
        peaks["as here"].append(peak_of_blocks())
        for name, way in ways.items():
            rates[name].append(rate(lambda way=way: way(queries, gallery), operations))
        for kernel in FAISS_KERNELS:
            found = faiss_rates(kernel, num_queries, num_entries, 1)
            faiss[kernel] += found["rates"]
            if found["rates"]:
                own = exact_topk(queries[:64], gallery, K, precision="float32")
                assert np.allclose(own.scores, found["scores"], atol=1e-5), "FAISS found other entries"
    print(
        f"\n{num_queries:,} queries x {num_entries:,} entries x {WIDTH}-d, k = {K}, median of {rounds} rounds\n"  # noqa: E501
    )
    print(
        "| way | GFLOP/s | of the peak, square | of the peak, as here | ours is × |\n| --- | --- | --- | --- | --- |"  # noqa: E501
    )
    everything = rates | {
        f"FAISS IndexFlatIP, OPENBLAS_CORETYPE {kernel}": found for kernel, found in faiss.items()
    }
    everything |= {f"peak, {name}": found for name, found in peaks.items()}
    for name, found in everything.items():
        if len(found) < rounds:
            print(f"| {name} | not run |")
            continue
        shares = [
            statistics.median(one / top for one, top in zip(found, peaks[peak], strict=True))
            for peak in peaks
        ]
        ahead = statistics.median(mine / one for mine, one in zip(rates["ours"], found, strict=True))
        print(
            f"| {name} | {statistics.median(found):.0f} | {shares[0]:.2f} | {shares[1]:.2f} | {ahead:.2f} |"
        )


def full() -> None:
    num_queries, num_entries = 242_000, 1_400_000
    queries, gallery = unit_rows(num_queries, 1), unit_rows(num_entries, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.monotonic(), time.process_time()
    found = exact_topk(queries, gallery, K, precision="float32")
    wall, cpu = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    operations = 2.0 * num_queries * num_entries * WIDTH
    own = np.random.default_rng(0).choice(num_queries, 40, replace=False)
    exact = exact_topk(queries[own], gallery, K)
    assert np.allclose(found.scores[own], exact.scores, atol=1e-6)
    same = float(np.mean(found.indices[own] == exact.indices))
    print(
        f"\nUnED's size, {num_queries:,} x {num_entries:,} x {WIDTH}-d, top-{K}: {wall:.0f} s, {cpu:.0f} s of CPU, "  # noqa: E501
        f"{operations / cpu / 1e9:.0f} GFLOP/s; embeddings {(queries.nbytes + gallery.nbytes) / 2**20:,.0f} MiB, "  # noqa: E501
        f"peak of the process {peak / 2**10:,.0f} MiB, of which {before / 2**10:,.0f} before the search; "
        f"40 queries searched again in float64: {same:.1%} of the entries are the same"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--entries", type=int, default=1_400_000)
    parser.add_argument("--full", action="store_true", help="also UnED's size, once")
    parser.add_argument("--faiss", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.faiss:
        run_faiss(*options.faiss)
        return
    import torch

    torch.set_num_threads(1)
    with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    print(
        f"{platform.system()} {platform.release()}, {name}, torch {torch.__version__}, NumPy {np.__version__}"
    )
    table(options.queries, options.entries, options.rounds)
    if options.full:
        full()


if __name__ == "__main__":
    main()
