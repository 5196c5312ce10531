"""Requests a second of the server against the embedder's own rate, and a soak that watches its memory.

Server and clients are processes of their own on the same machine. Both sides get the same files: the embedder
as a list in one call, as fast as it can; the server over HTTP from several clients at once, each image
uploaded, decoded, embedded, searched for, and answered in JSON. Rounds take turns, the ratio is the median of
the rounds' ratios.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from multiprocessing.synchronize import Barrier
from pathlib import Path

import httpx

from samething.embedder import Embedder
from samething.images import find_files
from samething.search import Searcher

START = "from samething.cli import main; main()"


def started(index: Path, max_waiting: int) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address."""
    command = ["serve", str(index), "--port", "0", "--max-waiting", str(max_waiting)]
    server = subprocess.Popen(
        [sys.executable, "-c", START, *command], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert server.stderr is not None
    for line in server.stderr:
        found = re.search(r"serving on (\S+)/ ", line)
        if found:
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, found[1]
    sys.exit("the server did not start")


def client(
    address: str,
    bodies: list[tuple[bytes, str]],
    results: multiprocessing.Queue,
    seconds: float,
    start: Barrier,
) -> None:
    """One process with one connection: a request after the other, once all clients are there."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc)
    connection.connect()
    times, refused = [], 0
    start.wait()
    end = time.perf_counter() + seconds
    number = 0
    while time.perf_counter() < end if seconds else number < len(bodies):
        body, kind = bodies[number % len(bodies)]
        number += 1
        began = time.perf_counter()
        connection.request("POST", "/search", body, {"Content-Type": kind})
        answer = connection.getresponse()
        answer.read()
        if answer.status == 429:
            refused += 1
            time.sleep(0.1)
        elif answer.status != 200:
            sys.exit(f"the server answered {answer.status}")
        else:
            times.append(time.perf_counter() - began)
    results.put((times, refused))


def asked(
    address: str, files: list[Path], num_clients: int, seconds: float = 0
) -> tuple[float, list[float], int]:
    """Requests a second of several clients, the time of each request, and how many were told to come back."""
    bodies = []
    for path in files:
        form = httpx.Request("POST", address, data={"k": "5"}, files={"image": path.read_bytes()})
        bodies.append((form.read(), form.headers["content-type"]))
    results: multiprocessing.Queue = multiprocessing.Queue()
    parts = [bodies[start::num_clients] for start in range(num_clients)]
    start = multiprocessing.Barrier(num_clients + 1)
    clients = [
        multiprocessing.Process(target=client, args=(address, part, results, seconds, start))
        for part in parts
    ]
    for process in clients:
        process.start()
    start.wait()
    began = time.perf_counter()
    found = [results.get() for _ in clients]
    spent = time.perf_counter() - began
    for process in clients:
        process.join()
    times = sorted(one for part, _ in found for one in part)
    return len(times) / spent, times, sum(refused for _, refused in found)


def resident_mb(pid: int) -> float:
    """Memory that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def rates(embedder: Embedder, address: str, files: list[Path], num_clients: int, rounds: int) -> None:
    """Compare the rates, in turns."""
    ratios = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        embedder.embed(files)
        own = len(files) / (time.perf_counter() - began)
        served, times, refused = asked(address, files, num_clients)
        if number == 0:
            continue  # warming up
        ratios.append(served / own)
        p50, p95 = times[len(times) // 2], times[int(len(times) * 0.95)]
        print(
            f"round {number}: embedder {own:6.1f}/s   server {served:6.1f}/s   ratio {served / own:.2f}   "
            f"p50 {p50 * 1e3:.0f} ms   p95 {p95 * 1e3:.0f} ms   429: {refused}",
            flush=True,
        )
    print(f"{num_clients} clients, {len(files)} images: median ratio {statistics.median(ratios):.2f}")


def soak(address: str, pid: int, files: list[Path], num_clients: int, seconds: float) -> None:
    """Ask for a while and watch the server's memory and threads, in ten parts after one to warm up."""
    asked(address, files, num_clients, seconds / 10)
    first = resident_mb(pid)
    for part in range(10):
        rate, times, refused = asked(address, files, num_clients, seconds / 10)
        num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        num_threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        memory = resident_mb(pid)
        print(
            f"part {part + 1:2}: {len(times):6,} answers   {rate:6.1f}/s   429: {refused}   {memory:7.1f} MB "
            f"({memory - first:+.1f})   {num_threads} threads   {num_files} files",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=Path, help="an index folder")
    parser.add_argument("images", type=Path, help="a folder of images to ask with")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak", type=float, default=0, help="seconds to soak instead")
    arguments = parser.parse_args()
    found = [Path(file.path) for file in find_files(arguments.images) if file.is_image]
    files = found[:: max(1, len(found) // arguments.count)][: arguments.count]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the server is stopped too
    began = time.perf_counter()
    server, address = started(arguments.index, max_waiting=4 * arguments.clients)
    try:
        asked(address, files[:1], num_clients=1)
        print(f"the first answer came {time.perf_counter() - began:.1f} s after the start", flush=True)
        if arguments.soak:
            soak(address, server.pid, files, arguments.clients, arguments.soak)
        else:
            embedder = Searcher.open(arguments.index).embedder.fastest(files)  # as the server takes it
            rates(embedder, address, files, arguments.clients, arguments.rounds)
    finally:
        began = time.perf_counter()
        server.send_signal(signal.SIGINT)
        server.wait(60)
        print(f"the server stopped in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
