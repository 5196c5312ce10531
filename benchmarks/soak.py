"""A server that is used, changed, restarted and killed for a long time: nothing acknowledged may be lost.

    python benchmarks/soak.py MODEL IMAGES --minutes 60

IMAGES is copied, indexed and served. Then, at the same time: clients search; one adds images and deletes
some of its own; one sends what is no image, and images that were damaged; files of the folder come, change
and go; ``index sync`` and ``index compact`` run as processes of their own; the server is stopped by SIGTERM,
started again, and now and then killed. At the end every acknowledged image has to be found, every deleted
one gone, and ``index verify`` clean.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from samething.images import find_files

PROGRAM = [sys.executable, "-c", "from samething.cli import main; main()"]
TOKEN = "a token for the soak alone"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Soak:
    """The server, what its callers were told, and what was counted."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.index = folder / "index"
        self.end = time.monotonic() + seconds
        self.counts: collections.Counter[str] = collections.Counter()
        self.acknowledged: set[str] = set()
        self.deleted: set[str] = set()
        self.memory_mb: list[list[float]] = []
        self.problems: list[str] = []
        self.address = ""
        self.server: subprocess.Popen[str] | None = None
        self.is_up = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.end

    def start(self) -> None:
        """Start the server and wait until it answers."""
        environment = {**os.environ, "SAMETHING_TOKEN": TOKEN}
        self.server = subprocess.Popen(
            [*PROGRAM, "serve", str(self.index), "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.server.stderr is not None
        for line in self.server.stderr:
            found = re.search(r"serving on (\S+)/ ", line)
            if found:
                threading.Thread(target=self.server.stderr.read, daemon=True).start()
                self.address = found[1]
                self.memory_mb.append([])
                self.is_up.set()
                return
        sys.exit("the server did not start")

    def ask(self, method: str, path: str, **what: object) -> httpx.Response | None:
        """One request; None where the server went away. Server errors are problems."""
        self.is_up.wait()
        try:
            answer = httpx.request(method, self.address + path, headers=BEARER, timeout=90, **what)  # type: ignore[arg-type]
        except httpx.TransportError:
            self.counts["cut off by a restart"] += 1
            return None
        self.counts[f"{method} {path.split('/')[1].partition('?')[0]} {answer.status_code}"] += 1
        if answer.status_code >= 500:
            self.problems.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer

    def run(self, *command: object) -> None:
        """A command of the program as a process of its own."""
        done = subprocess.run([*PROGRAM, *map(str, command)], capture_output=True, text=True, check=False)
        self.counts[f"{command[0]} {command[1]}: status {done.returncode}"] += 1
        if done.returncode not in (0, 3):
            self.problems.append(f"{command}: {done.returncode} {done.stderr[-300:]}")

    # ---- what goes on at the same time

    def search(self, contents: list[bytes], rng: random.Random) -> None:
        """Searches, one a second and caller."""
        while not self.is_over:
            self.ask("POST", "/search", files={"image": rng.choice(contents)}, data={"k": 5})
            time.sleep(1)

    def change(self, rng: random.Random) -> None:
        """Images of noise are added; of those that were acknowledged some are deleted."""
        while not self.is_over:
            content = io.BytesIO()
            noise = np.random.default_rng(rng.getrandbits(60)).integers(0, 255, (96, 96, 3), np.uint8)
            Image.fromarray(noise).save(content, "PNG")
            answer = self.ask("POST", "/add", files={"image": content.getvalue()}, data={"label": "soak"})
            if answer is not None and answer.status_code == 201:
                self.acknowledged.add(answer.json()["id"])
            if self.acknowledged and rng.random() < 0.2:
                row = rng.choice(sorted(self.acknowledged))
                answer = self.ask("POST", "/delete", json={"ids": [row]})
                self.acknowledged.discard(row)  # where the answer was cut off, it may be either
                if answer is not None and answer.status_code == 200:
                    self.deleted.add(row)
            time.sleep(1.5)

    def harm(self, contents: list[bytes], rng: random.Random) -> None:
        """What is no image, images cut off, and images with turned bits."""
        while not self.is_over:
            content = bytearray(rng.choice(contents))
            kind = rng.randrange(3)
            if kind == 0:
                content = bytearray(rng.randbytes(2000))
            elif kind == 1:
                del content[rng.randrange(len(content)) :]
            else:
                for _ in range(20):
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            self.ask("POST", "/search", files={"image": bytes(content) or b"\0"})
            time.sleep(2)

    def files(self, contents: list[bytes], rng: random.Random) -> None:
        """Files come, change and go, and processes of their own sync and compact."""
        number = 0
        while not self.is_over:
            place = self.folder / "images" / "coming" / f"{rng.randrange(30)}.jpg"
            place.parent.mkdir(exist_ok=True)
            if place.exists() and rng.random() < 0.4:
                place.unlink()
            else:
                place.write_bytes(rng.choice(contents))
            number += 1
            if number % 10 == 0:
                self.run("index", "sync", self.index)
            if number % 25 == 0:
                self.run("index", "compact", self.index)
            if number % 7 == 0:
                self.ask("POST", "/sync")
            time.sleep(4)

    def restart(self, every_s: float, rng: random.Random) -> None:
        """Memory is written down; the server is stopped, and every third time killed."""
        times = 0
        while not self.is_over:
            until = min(self.end, time.monotonic() + every_s)
            while time.monotonic() < until:
                assert self.server is not None
                status = Path(f"/proc/{self.server.pid}/status").read_text()
                self.memory_mb[-1].append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)  # type: ignore[index]
                time.sleep(min(5, max(0.1, until - time.monotonic())))
            if self.is_over:
                return
            times += 1
            self.is_up.clear()
            is_kill = times % 3 == 0
            self.server.send_signal(signal.SIGKILL if is_kill else signal.SIGTERM)  # type: ignore[union-attr]
            status_code = self.server.wait(60)  # type: ignore[union-attr]
            self.counts["killed" if is_kill else f"stopped: status {status_code}"] += 1
            self.start()

    # ---- the end

    def check(self) -> None:
        """Everything acknowledged is there, everything deleted is gone, and nothing is damaged."""
        self.run("index", "verify", self.index)
        for row in sorted(self.acknowledged):
            answer = self.ask("GET", f"/images/{row}")
            if answer is None or answer.status_code != 200:
                self.problems.append(f"lost: {row}")
        for row in sorted(self.deleted - self.acknowledged):
            answer = self.ask("GET", f"/thumbnails/{row}")
            if answer is None or answer.status_code != 404:
                self.problems.append(f"deleted and still there: {row}")


def main() -> None:
    """Soak, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--restart-minutes", type=float, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(Path(scratch), arguments.minutes * 60)
        shutil.copytree(arguments.images, soak.folder / "images")
        contents = [
            Path(file.path).read_bytes() for file in find_files(soak.folder / "images") if file.is_image
        ][:200]
        soak.run("index", soak.folder / "images", "--model", arguments.model, "-o", soak.index)
        soak.start()
        jobs = [
            *((soak.search, contents, random.Random(seed)) for seed in range(3)),
            (soak.change, random.Random(10)),
            (soak.harm, contents, random.Random(11)),
            (soak.files, contents, random.Random(12)),
            (soak.restart, arguments.restart_minutes * 60, random.Random(13)),
        ]
        threads = [threading.Thread(target=job, args=given) for job, *given in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        soak.check()
        assert soak.server is not None
        soak.server.terminate()
        soak.server.wait(60)
    for what, count in sorted(soak.counts.items()):
        print(f"{count:8,}  {what}")
    for number, life in enumerate(soak.memory_mb, 1):
        if life:
            third = max(1, len(life) // 3)
            first, last = np.mean(life[:third]), np.mean(life[-third:])
            print(f"server {number}: {first:.0f} MB at first, {last:.0f} MB at last")
    print(f"{len(soak.acknowledged):,} images acknowledged and there; {len(soak.problems)} problems")
    for problem in soak.problems:
        print(" ", problem)
    sys.exit(1 if soak.problems else 0)


if __name__ == "__main__":
    main()
