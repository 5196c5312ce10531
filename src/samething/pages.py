"""What the HTML reports share: one file per page, with its tables, figures and images inside."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import rich.box
import rich.table
from PIL import Image, ImageDraw, ImageOps
from rich.text import Text

from samething.errors import ImageError
from samething.files import write_text
from samething.images import ImageLike, decode, thumbnail

IMAGE_SIDE: Final = 112
"""Longer side of a page's images, in pixels."""

_PAIR_SIDE: Final = 260
"""Pixels of the longer side of each image of a pair."""
_GAP: Final = 8
"""Pixels between two images of a pair."""
_GREY_PIXEL: Final = "data:image/gif;base64,R0lGODlhAQABAIAAAJmZmQAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="


@functools.cache
def _environment() -> Any:
    import jinja2  # an answer in a terminal needs none

    return jinja2.Environment(loader=jinja2.PackageLoader("samething"), autoescape=True)


def write_page(target: Path, template: str, **values: Any) -> Path:
    """Fill in a template of ``templates/`` and write the page, whole or not at all.

    The macros of ``parts.html`` lay out a :class:`Table`, figures, and rows of :class:`Thumbnail`.
    """
    write_text(target, _environment().get_template(template).render(**values))
    return target


def image_url(path: ImageLike) -> str:
    """A small JPEG of an image (mostly a path) inside the page; a grey square where the file is gone."""
    try:
        content = thumbnail(decode(path, least_side=2 * IMAGE_SIDE), longer_side=IMAGE_SIDE)
    except ImageError:
        return _GREY_PIXEL
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def pair_url(first: ImageLike, second: ImageLike, points: Sequence[Sequence[float]]) -> str:
    """Two images side by side inside the page, with lines between places that agree.

    Args:
        first: the left image.
        second: the right one.
        points: x and y in the first and in the second, as shares of their sides.

    Returns:
        The URL of a JPEG; a grey square where a file is gone.
    """
    try:
        one, other = (ImageOps.contain(decode(image), (_PAIR_SIDE, _PAIR_SIDE)) for image in (first, second))
    except ImageError:
        return _GREY_PIXEL
    both = Image.new("RGB", (one.width + _GAP + other.width, max(one.height, other.height)), "white")
    both.paste(one, (0, 0))
    both.paste(other, (one.width + _GAP, 0))
    pen = ImageDraw.Draw(both)
    for x, y, right, down in points:
        start = (x * one.width, y * one.height)
        end = (one.width + _GAP + right * other.width, down * other.height)
        pen.line((start, end), fill=(26, 170, 90), width=1)
        for place in (start, end):
            pen.circle(place, 2, outline=(26, 170, 90), fill="white")
    buffer = io.BytesIO()
    both.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """An image on a page, with what stands below it."""

    url: str
    label: str
    text: str = ""
    """Above the label."""
    small: str = ""
    """Below it, in small letters."""
    kind: str = ""
    """Class of the figure: ``right``, ``wrong`` or another of the page's."""
    mark: str = ""
    """In the colour of its class."""
    alt: str = ""
    """What it is to those who do not see it; by default the label."""


# ---- tables


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell that is more than its text."""

    text: str
    small: str = ""
    """Behind the text, in small letters."""
    kind: str = ""
    """Class of the cell: ``best``, or ``text`` where it is not a number."""
    style: str = ""


Cells: TypeAlias = list[str | Cell]
"""A row, while it is put together."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it is printed: every cell is text already."""

    title: str
    columns: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    featured: int | None = None
    """Row that is marked."""

    def markdown(self) -> str:
        """As Markdown, without what is small."""
        lines = [_line(self.columns), _line(["---"] * len(self.columns))]
        for number, row in enumerate(self.rows):
            mark = "**" if number == self.featured else ""
            lines.append(_line([f"{mark}{cell}{mark}" if cell else cell for cell in map(_text, row)]))
        return "\n".join(lines) + (f"\n\n{self.note}" if self.note else "")

    def printed(self) -> rich.table.Table:
        """For the terminal: what is no number to the left, the first column and those of kind ``text``."""
        printed = rich.table.Table(
            title=Text(self.title), caption=Text(self.note) if self.note else None, box=rich.box.SIMPLE_HEAD
        )
        for place, column in enumerate(self.columns):
            if place == 0 or (isinstance(column, Cell) and column.kind == "text"):
                printed.add_column(_printed(column), overflow="fold")
            else:
                words = [word for row in self.rows for word in _printed(row[place]).plain.split()]
                width = max(map(len, words), default=0)
                printed.add_column(_printed(column), justify="right", min_width=width)
        for number, row in enumerate(self.rows):
            printed.add_row(*map(_printed, row), style="bold" if number == self.featured else None)
        return printed


def _line(cells: Sequence[str | Cell]) -> str:
    return "| " + " | ".join(_text(cell).replace("|", r"\|") for cell in cells) + " |"


def _text(cell: str | Cell) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def _printed(cell: str | Cell) -> Text:
    if isinstance(cell, str) or not cell.small:
        return Text(_text(cell))
    return Text(f"{cell.text} ({cell.small})", style="bold" if cell.kind == "best" else "")


# ---- figures

Interval: TypeAlias = tuple[float, float, float]
"""A share, and the lower and upper end of its interval."""


def new_axes(width: float, height: float, **labels: Any) -> tuple[Any, Any]:
    """A matplotlib figure of this size in inches, and its axes, with labels, titles and limits."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.set(**labels)
    return figure, axes


def drawing_url(figure: Any) -> str:
    """A matplotlib figure as an image of its own, so that neither its ids nor its style touch the page."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "samething"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def bars_url(names: Sequence[str], series: Mapping[str, Sequence[Interval]], *, label: str) -> str:
    """Horizontal bars with intervals, of shares in percent: a group per name, a colour per series."""
    import matplotlib

    height = 0.34 if len(series) == 1 else 0.17 * len(series) + 0.1
    figure, axes = new_axes(9.0, 1 + height * len(names), xlabel=label)
    # twenty colours where ten would come again
    colours = matplotlib.colormaps["tab10" if len(series) <= 10 else "tab20"]
    for number, (name, found) in enumerate(series.items()):
        axes.barh(
            [place + (number + 0.5) * 0.8 / len(series) - 0.4 for place in range(len(names))],
            [100 * value for value, _, _ in found],
            0.8 / len(series),
            xerr=[
                [100 * (value - low) for value, low, _ in found],
                [100 * (high - value) for value, _, high in found],
            ],
            label=as_drawn(name),
            color=colours(number % colours.N),
            error_kw={"elinewidth": 0.8},
        )
    axes.set_yticks(range(len(names)), [as_drawn(name) for name in names])
    axes.invert_yaxis()
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return drawing_url(figure)


def lines_url(
    lines: Mapping[str, Sequence[tuple[float, float, float, float]]], *, x_label: str, y_label: str
) -> str:
    """Lines with intervals, of shares in percent: (x, share, low, high) per point."""
    figure, axes = new_axes(8.0, 3.6, xlabel=x_label, ylabel=y_label)
    for name, points in lines.items():
        x, *percent = zip(*((x, *(100 * share for share in shares)) for x, *shares in points), strict=True)
        (drawn,) = axes.plot(x, percent[0], marker="o", label=as_drawn(name))
        axes.fill_between(x, percent[1], percent[2], alpha=0.15, color=drawn.get_color())
    axes.legend(frameon=False)
    return drawing_url(figure)


def as_drawn(text: str) -> str:
    """Dollars are dollars: matplotlib would read what stands between two of them as a formula.

    >>> as_drawn("$5")
    '\\\\$5'
    """
    return text.replace("$", r"\$")
