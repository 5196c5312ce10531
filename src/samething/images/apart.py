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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from PIL import Image

from samething.errors import ImageError, SamethingError

MEMORY_BYTES: Final = 3 << 30
"""What one image may take in such a process, on Linux."""

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
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )

    def _ask(self, process: subprocess.Popen[bytes], name: str, request: object) -> tuple[bool, Any]:
        assert process.stdin is not None and process.stdout is not None
        too_late = threading.Event()

        def end() -> None:
            too_late.set()
            process.kill()

        timer = threading.Timer(self.deadline_s, end)
        timer.start()
        try:
            pickle.dump(request, process.stdin, protocol=5)
            process.stdin.flush()
            answer: tuple[bool, Any] = pickle.load(process.stdout)
            return answer
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            if too_late.is_set():
                reason = f"takes longer than {self.deadline_s:g} seconds to decode"
            else:
                reason = f"ended the process that decoded it (status {process.wait()})"
            raise _refused(name, reason) from error
        finally:
            timer.cancel()


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
