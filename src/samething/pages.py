"""What the HTML pages share: templates, and images and drawings inside the page, which is one file."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any, Final

import jinja2

from samething.errors import ImageError
from samething.files import write_text
from samething.images import ImageLike, decode, thumbnail

IMAGE_SIDE: Final = 112
"""Longer side of a page's images, in pixels."""

_GREY_PIXEL: Final = "data:image/gif;base64,R0lGODlhAQABAIAAAJmZmQAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.PackageLoader("samething"), autoescape=True)


def write_page(target: Path, template: str, **values: Any) -> Path:
    """Fill in a template of ``templates/`` and write the page, whole or not at all.

    The template may call ``image(path)`` and ``drawing(figure)`` for the URLs of images and figures.
    """
    page = _environment().get_template(template).render(image=image_url, drawing=drawing_url, **values)
    write_text(target, page)
    return target


def drawing_url(figure: Any) -> str:
    """A matplotlib figure as an image of its own, so that neither its ids nor its style touch the page."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "samething"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_url(path: ImageLike, *, longer_side: int = IMAGE_SIDE) -> str:
    """A small JPEG of an image (mostly a path) inside the page; a grey square where the file is gone."""
    try:
        content = thumbnail(decode(path), longer_side=longer_side)
    except ImageError:
        return _GREY_PIXEL
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def as_drawn(text: str) -> str:
    """Dollars are dollars: matplotlib would read what stands between two of them as a formula.

    >>> as_drawn("$5")
    '\\\\$5'
    """
    return text.replace("$", r"\$")
