"""What the server does in the background: one of each kind at a time, and how far it is."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from samething.errors import SamethingError
from samething.files import Json


@dataclasses.dataclass
class Job:
    """Something that goes on in the background."""

    state: str = "never run"
    """``never run``, ``running``, ``done`` or ``failed``."""
    done: int = 0
    total: int = 0
    message: str = ""

    def to_json(self) -> dict[str, Json]:
        """Plain values."""
        return dataclasses.asdict(self)


class Jobs(dict[str, Job]):
    """The last job of each name."""

    def __init__(self, *names: str) -> None:
        super().__init__({name: Job() for name in names})
        self._starting = threading.Lock()

    def start(self, name: str, work: Callable[[Job], str]) -> Job:
        """Start a job, or give the one of this name that is running; ``work`` returns its last message."""
        with self._starting:
            if self[name].state == "running":
                return self[name]
            job = self[name] = Job("running")

        def run() -> None:
            try:
                job.message = work(job)
                job.state = "done"
            except SamethingError as error:
                job.message, job.state = error.given, "failed"
            except Exception as error:
                job.message, job.state = f"{type(error).__name__}: {error}", "failed"

        threading.Thread(target=run, name="background", daemon=True).start()
        return job
