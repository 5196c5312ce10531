"""The one progress bar: done, rate and time left, on standard error, so that output can be piped."""

from __future__ import annotations

import rich.console
import rich.progress


def progress_bar(
    unit: str, *columns: rich.progress.ProgressColumn | str, disable: bool = False
) -> rich.progress.Progress:
    """A bar that counts ``unit`` (pictures, steps, rows, …) and shows the rate and the time left.

    Args:
        unit: what is counted, in the plural.
        columns: further columns between the rate and the time left.
        disable: show nothing, such as in all processes but the first.

    >>> with progress_bar("pictures", disable=True) as progress:
    ...     task = progress.add_task("features", total=2)
    ...     progress.advance(task)
    """
    return rich.progress.Progress(
        rich.progress.TextColumn("[progress.description]{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(unit),
        _Rate(),
        *columns,
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
        disable=disable,
    )


class _Rate(rich.progress.ProgressColumn):
    """Units a second."""

    def render(self, task: rich.progress.Task) -> str:
        return f"{task.speed:,.0f}/s" if task.speed else ""
