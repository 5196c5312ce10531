"""What a reader of images hands over, the catalog that is written of it, and what was left out and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import rich.console
import rich.markup

from samething.arrays import Int
from samething.catalog import Catalog, Dropped
from samething.errors import ImageError, InputError
from samething.files import require_writable, write_csv
from samething.images import Source, identify, in_threads, located
from samething.pages import Cell, Cells, Table
from samething.progress import progress_bar

Labels: TypeAlias = Literal["folder", "none"]

_DROPPED_SUFFIX: Final = ".dropped.csv"

_LINES_SHOWN: Final = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """Images found, not yet opened."""

    catalog: Catalog
    has_roles: bool
    """Whether the source says itself which images are for training, queries and the index."""
    dropped: tuple[Dropped, ...] = ()
    rows: Int[np.ndarray, " n"] | None = None
    """Row of the source table for each row of the catalog; none for a folder."""
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of other files by suffix, and of folders that were not looked into by what they are."""
    warnings: tuple[str, ...] = ()
    """What looks odd: missing images, numbers that are not the published ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatalogReport:
    """A catalog that was written, with everything that a person should know about it."""

    catalog: Catalog
    path: Path
    """The file written."""
    dropped: tuple[Dropped, ...]
    """Images left out; also in ``PATH.dropped.csv``."""
    warnings: tuple[str, ...]
    """What looks odd: the same image under two labels, labels with one image only, …"""
    passed_over: Mapping[str, int]
    """Number of files that are no images, by suffix, and of folders that were not looked into."""

    @property
    def counts(self) -> list[dict[str, object]]:
        """Rows of ``domain``, ``role``, ``instances`` and ``images``."""
        return self.catalog.counts()

    @property
    def exit_status(self) -> int:
        """0 when every image is in the catalog, 3 when some were dropped."""
        return 3 if self.dropped else 0

    def __rich__(self) -> rich.console.Group:
        escape = rich.markup.escape
        rows = [
            [str(row["domain"]), str(row["role"]), f"{row['instances']:,}", f"{row['images']:,}"]
            for row in self.counts
        ]
        columns: Cells = ["domain", Cell("role", kind="text"), "things", "images"]
        table = Table(f"{len(self.catalog):,} images in {self.path}", columns, rows)
        lines = [f"[yellow]warning[/yellow] {escape(line)}" for line in _shortened(self.warnings)]
        if self.passed_over:
            kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in self.passed_over.items())
            lines.append(f"[dim]passed over: {escape(kinds)}[/dim]")
        if self.dropped:
            where = escape(f"{self.path}{_DROPPED_SUFFIX}")
            lines.append(f"[red]images dropped: {len(self.dropped):,}[/red], listed in {where}:")
            reasons = list(map(str, self.dropped))
            lines += [f"  {escape(line)}" for line in _shortened(reasons)]
        return rich.console.Group(table.printed(), *lines)


def _shortened(lines: Sequence[str]) -> list[str]:
    """The first lines and how many more there are."""
    more = len(lines) - _LINES_SHOWN
    return [*lines[:_LINES_SHOWN], f"… and {more:,} more"] if more > 0 else list(lines)


def write_catalog(
    listing: Listing,
    what: str,
    *,
    opened: bool,
    max_pixels: int,
    labels: Labels,
    output: Path,
    val: float,
    test: float,
    seed: int,
) -> CatalogReport:
    """Open the images if wanted, divide the things, write the catalog and what was left out.

    Args:
        listing: the images.
        what: where they come from, for messages.
        opened: take each image's checksum and sides, and leave out what cannot be opened.
        max_pixels: larger images cannot.
        labels: as the images were listed.
        output: the catalog to write, and beside it the list of what was left out.
        val: share of each domain's things for validation.
        test: share for the test.
        seed: of the division.

    Raises:
        InputError: no image can be read.
    """
    require_writable(output)
    result, dropped = listing.catalog, listing.dropped
    if opened:
        result, unreadable = _opened(listing, max_pixels)
        dropped = (*dropped, *unreadable)
    list_of_dropped = Path(f"{output}{_DROPPED_SUFFIX}")
    if dropped:
        write_csv(list_of_dropped, ["image", "reason"], [(entry.image, entry.reason) for entry in dropped])
    else:
        list_of_dropped.unlink(missing_ok=True)  # of an earlier run
    if not len(result):
        raise InputError(
            f"none of the {len(listing.catalog)} images of {what} can be read "
            f"(for instance {dropped[-1].image}: {dropped[-1].reason})",
            expected="at least one readable image",
            next_step=f"look at the reasons in {list_of_dropped}",
        )
    if not listing.has_roles:
        result = result.split_by_class(val=val, test=test, seed=seed)
    warnings = [*listing.warnings]
    if opened and labels != "none":
        warnings += [str(problem) for problem in result.problems(check_files=False)]
    training = result.take(result.has_role("train"))
    classes = training.class_ids()
    single = training.strings("label")[np.bincount(classes)[classes] == 1]
    if len(single) and (labels != "none" or not opened):
        examples = ", ".join(single[:3]) + (", …" if len(single) > 3 else "")
        warnings.append(f"labels with one image only, which cannot be trained on: {len(single)} ({examples})")
    if opened and labels != "none" and len(np.unique(result.class_ids())) < 2:
        warnings.append("there is one label only; training needs at least two")
    if not listing.has_roles and test > 0 and not result.has_role("query+index").any():
        warnings.append("too few labels with two images or more to set any aside for the test")
    result.write(output)
    return CatalogReport(
        catalog=result,
        path=output,
        dropped=dropped,
        warnings=tuple(warnings),
        passed_over=listing.passed_over,
    )


def _opened(listing: Listing, max_pixels: int) -> tuple[Catalog, list[Dropped]]:
    """Width, height and SHA-256 filled in, without what has no readable image header."""
    catalog = listing.catalog
    images = catalog.strings("image")
    # an image of several rows (its boxes, its roles) is opened once
    once, rows_once = np.unique(images, return_inverse=True)
    sources = [Source(located(catalog.root, image)) for image in once]
    read = in_threads(lambda source: identify(source, max_pixels), sources)
    with progress_bar("images", only_on_terminal=True) as progress:
        results = list(progress.track(read, total=len(sources), description="read"))
    seen: list[tuple[int, int, str]] = []
    kept: list[int] = []
    dropped: list[Dropped] = []
    for row, number in enumerate(rows_once):
        result = results[number]
        if isinstance(result, ImageError):
            place = "" if listing.rows is None else f"row {listing.rows[row]}: "
            dropped.append(Dropped(images[row], place + result.reason))
        else:
            kept.append(row)
            seen.append(result)
    widths, heights, hashes = zip(*seen, strict=True) if seen else ((), (), ())
    surveyed = catalog.take(np.asarray(kept, np.int64))
    surveyed = surveyed.with_column("width", widths).with_column("height", heights)
    return surveyed.with_column("sha256", hashes), dropped
