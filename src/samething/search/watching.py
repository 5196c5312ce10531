"""Keeping an index current while its folders change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from samething.errors import InputError, MissingExtraError
from samething.progress import Terminal
from samething.search.collection import Collection
from samething.search.searcher import Searcher, remembered_collections


def watch_collections(searcher: Searcher, collections: Sequence[Collection]) -> Searcher:
    """Sync whenever something changes below the collections, until the process is interrupted.

    A sync that fails (a disk that is not there for a moment) is reported and tried again at the next change.

    Raises:
        MissingExtraError: the package watchfiles is not installed.
    """
    try:
        import watchfiles
    except ImportError as error:
        raise MissingExtraError("watchfiles", extra="watch") from error
    console = Terminal(stderr=True)
    console.print(searcher, highlight=False)
    places = sorted(
        {str(part.location if part.location.is_dir() else part.location.parent) for part in collections}
    )
    console.print(f"watching {', '.join(places)}; stop with Ctrl-C", highlight=False)
    own = Path(searcher.index.location).absolute()

    def concerns_images(change: object, path: str) -> bool:
        del change
        return not Path(path).is_relative_to(own)  # an index inside the folder it follows

    try:
        for _ in watchfiles.watch(*places, watch_filter=concerns_images, debounce=500, raise_interrupt=False):
            try:
                # another command may have added folders, whose rows are not to go
                collections = remembered_collections(searcher.index) or collections
                searcher = searcher.update(collections, drop=True)
            except InputError as error:
                console.print(f"[yellow]{error.given}[/yellow]; trying again at the next change")
                continue
            console.print(searcher, highlight=False)
    except KeyboardInterrupt:
        pass
    return searcher
