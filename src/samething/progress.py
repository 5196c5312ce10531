"""What is shown on a terminal: names that cannot act on it, and the one progress bar, on standard error."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Final

import rich.console
import rich.progress
from rich.segment import Segment

from samething.errors import visible

_IS_SILENT: Final = contextvars.ContextVar("is_silent", default=False)


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """Bars that are made inside show nothing: the parts of a job that has a bar of its own.

    >>> with without_progress(), progress_bar("images") as progress:
    ...     progress.disable
    True
    """
    token = _IS_SILENT.set(True)
    try:
        yield
    finally:
        _IS_SILENT.reset(token)


class Terminal(rich.console.Console):
    """A console on which names of files and labels cannot act."""

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As it was, with control characters escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def say(text: str) -> None:
    """A line for the person who waits; standard output is for results."""
    Terminal(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def progress_bar(
    unit: str,
    *columns: rich.progress.ProgressColumn | str,
    disable: bool = False,
    only_on_terminal: bool = False,
) -> rich.progress.Progress:
    """A bar that counts ``unit`` (images, steps, rows, …) and shows the rate and the time left.

    Args:
        unit: what is counted, in the plural.
        columns: further columns between the rate and the time left.
        disable: show nothing, such as in all processes but the first.
        only_on_terminal: show nothing in a file or a pipe either, where otherwise the last line appears.

    >>> with progress_bar("images", disable=True) as progress:
    ...     task = progress.add_task("features", total=2)
    ...     progress.advance(task)
    """
    console = Terminal(stderr=True)
    return rich.progress.Progress(
        rich.progress.TextColumn("[progress.description]{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(unit),
        _Rate(),
        *columns,
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=disable or _IS_SILENT.get() or (only_on_terminal and not console.is_terminal),
    )


class _Rate(rich.progress.ProgressColumn):
    """Units per second."""

    def render(self, task: rich.progress.Task) -> str:
        return f"{task.speed:,.0f}/s" if task.speed else ""
