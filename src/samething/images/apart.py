"""Decoding in processes of its own, which can be ended: at a deadline, beyond a limit of memory, by a crash.

A decoder in a thread can be stopped by nobody. These processes are started when they are first needed, and
end with the process that started them. Not multiprocessing: that would run the caller's script again, and
refuses to start anything from a worker.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from PIL import Image

from samething.errors import ImageError, SamethingError

MEMORY_BYTES: Final = 3 << 30
"""What one image may take in such a process, on Linux."""
_PIPE_BYTES: Final = 2**20
"""A small image goes through at once; with the system's own 64 KiB both sides wait for each other."""
_COMMAND: Final = "from samething.images.apart import answer_requests; answer_requests({})"


class Decoders:
    """A few processes that work on one image each.

    Args:
        num_processes: at work at once, at most; further calls wait.
        deadline_s: seconds after which a process is ended.
        memory_bytes: what a process may take beside itself.
    """

    def __init__(self, num_processes: int, *, deadline_s: float, memory_bytes: int = MEMORY_BYTES) -> None:
        self.deadline_s = deadline_s
        self.memory_bytes = memory_bytes
        self._ends: dict[subprocess.Popen[bytes], float] = {}
        """When each process that is at work will be ended."""
        self._guard = threading.Condition()
        self._watched_until = 0.0
        self._watcher: threading.Thread | None = None
        self._places: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(num_processes):
            self._places.put(None)

    def call(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What a function of a module returns, called in one of the processes.

        Raises:
            ImageError: the function raised it, or the process had to be ended, or ended by itself; then
                ``name`` is what the message calls the image.
        """
        process = self._places.get()
        try:
            process = process or self._start()
            is_right, answer = self._ask(process, name, (name, function, args, options))
        except BaseException:
            if process is not None:
                _end(process)
            process = None
            raise
        finally:
            self._places.put(process)
        if is_right:
            return answer
        raise answer

    def close(self) -> None:
        """End the processes, and forget them."""
        for _ in range(self._places.qsize()):
            process = self._places.get()
            if process is not None:
                _end(process)
        self._places.put(None)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", _COMMAND.format(self.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=_PIPE_BYTES,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )

    def _ask(self, process: subprocess.Popen[bytes], name: str, request: object) -> tuple[bool, Any]:
        assert process.stdin is not None and process.stdout is not None
        self._end_later(process)
        answer: tuple[bool, Any] | None = None
        cause: Exception | None = None
        try:
            pickle.dump(request, process.stdin, protocol=5)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            cause = error
        finally:
            with self._guard:
                was_ended = self._ends.pop(process, None) is None
        if answer is not None and not was_ended:
            return answer
        if was_ended:
            reason = f"takes longer than {self.deadline_s:g} seconds to decode"
        else:
            reason = f"ended the process that decoded it (status {process.wait()})"
        raise _refused(name, reason) from cause

    def _end_later(self, process: subprocess.Popen[bytes]) -> None:
        with self._guard:
            self._ends[process] = end = time.monotonic() + self.deadline_s
            if self._watcher is None:  # one for all: starting one took a fifth of each call
                self._watcher = threading.Thread(target=self._watch, name="deadlines", daemon=True)
                self._watcher.start()
            elif end < self._watched_until:
                self._guard.notify()

    def _watch(self) -> None:
        """End what is too late, until at a deadline nothing is at work."""
        with self._guard:
            while self._ends:
                now = time.monotonic()
                for process in [process for process, end in self._ends.items() if end <= now]:
                    del self._ends[process]
                    process.kill()
                self._watched_until = min(self._ends.values(), default=now)
                self._guard.wait(self._watched_until - now)
            self._watcher = None


def answer_requests(memory_bytes: int) -> None:
    """What such a process does until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints does not come between the answers
    Image.init()  # what is loaded before counts as what the process takes for itself
    _limit_memory(memory_bytes)
    while True:
        try:
            name, function, args, options = pickle.load(requests)
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            answer = True, function(*args, **options)
        except SamethingError as error:
            answer = False, error
        except MemoryError:
            answer = False, _refused(name, f"takes more than {memory_bytes >> 20:,} MiB to decode")
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


def _limit_memory(memory_bytes: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # elsewhere than on Linux
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory_bytes, resource.RLIM_INFINITY))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # it holds nothing that must be put away
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


def _refused(name: str, reason: str) -> ImageError:
    return ImageError.of(
        name,
        reason,
        expected="an image that is decoded within the limits of time and memory",
        next_step="save the image again in a program that you trust, or scale it down",
    )
