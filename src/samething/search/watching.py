"""Keeping an index current while its folders change."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from samething.errors import SamethingError, needed
from samething.progress import Terminal
from samething.search.remembered import remembered_collections
from samething.search.searcher import Searcher

_LOOK_AGAIN_MS = 2000
"""Another command may let the index follow more, and a folder that was gone may be there again."""


def watch_collections(searcher: Searcher) -> Searcher:
    """Sync whenever something changes below what the index follows, until the process is interrupted.

    A sync that fails is reported and tried again at the next change. The index may be rebuilt meanwhile, also
    with another model.

    Raises:
        MissingExtraError: the package watchfiles is not installed.
    """
    watchfiles = needed("watchfiles", extra="watch")
    console = Terminal(stderr=True)
    console.print(searcher, highlight=False)
    own = Path(searcher.index.location).absolute()

    def concerns_images(change: object, path: str) -> bool:
        del change
        return not Path(path).is_relative_to(own)  # an index inside the folder it follows

    def places() -> list[str]:
        found = (part.location for part in remembered_collections(searcher.index))
        return sorted({str(place if place.is_dir() else place.parent) for place in found if place.exists()})

    try:
        while True:
            watched = places()
            console.print(f"watching {', '.join(watched)}; stop with Ctrl-C", highlight=False)
            is_due = True  # something may have changed before the watch began
            for seen in watchfiles.watch(
                *watched,
                watch_filter=concerns_images,
                debounce=500,
                rust_timeout=_LOOK_AGAIN_MS,
                yield_on_timeout=True,
            ):
                try:
                    searcher = searcher.current()
                    is_other = places() != watched
                    if seen or is_due or is_other:
                        is_due = False
                        searcher = searcher.sync()
                        if searcher.changes.has_news:
                            console.print(searcher, highlight=False)
                    if is_other:
                        break
                except SamethingError as error:
                    console.print(f"[yellow]{escape(error.given)}[/yellow]; trying again")
                    is_due = True
    except KeyboardInterrupt:
        pass
    return searcher
