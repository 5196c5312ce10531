"""What a search found, and how it shows itself: a table, JSON, CSV or a page."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import rich.table
from rich.console import Group
from rich.text import Text

from samething.errors import InputError
from samething.files import Json
from samething.images import is_url
from samething.pages import write_page

_NOT_METADATA: Final = frozenset(
    {"id", "score", "path", "label", "domain", "paths", "files", "folders", "labels", "domains"}
)


@dataclasses.dataclass(frozen=True)
class Match:
    """One image found."""

    rank: int
    """Place in the result, from 1."""
    score: float
    """Cosine similarity to the query, in [-1, 1]."""
    path: str
    """Where it is: a path or a URL."""
    label: str
    domain: str
    id: str = ""
    """Identity of its row in the index."""
    probability: float | None = None
    """Probability that it shows the same thing, where the model was calibrated."""
    copies: tuple[str, ...] = ()
    """Other places with the same image."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further columns of the index."""

    @classmethod
    def of(cls, hit: Mapping[str, Any], *, rank: int, probability: float | None) -> Match:
        """A row of the index with its score as a match; what has no value is left out of ``metadata``."""
        path = hit["path"] or ""
        return cls(
            rank=rank,
            score=hit["score"],
            path=path,
            label=hit["label"] or "",
            domain=hit["domain"] or "",
            id=hit["id"],
            probability=probability,
            copies=tuple(other for other in hit.get("paths") or () if other != path),
            metadata={
                name: value for name, value in hit.items() if name not in _NOT_METADATA and value is not None
            },
        )

    def to_json(self) -> dict[str, Json]:
        """Plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "copies": list(self.copies), "metadata": dict(self.metadata)}


@dataclasses.dataclass(frozen=True)
class Matches:
    """What a query found, best first."""

    query: str
    """How the query was given."""
    matches: tuple[Match, ...]
    threshold: float | None = None
    """Score below which the model says that there is no match; None where it was not calibrated."""
    looked_for: tuple[str, ...] = ()
    """Ids of images of the index that were looked for, which are no matches; at most 24 of them."""

    @property
    def is_no_match(self) -> bool:
        """Whether nothing found is likely to be the same thing: the model's "no match"."""
        return self.threshold is not None and not any(match.score >= self.threshold for match in self.matches)

    def to_json(self) -> dict[str, Json]:
        """Plain values."""
        return {
            "query": self.query,
            "no_match": self.is_no_match,
            # a model that is never sure has no finite threshold, which JSON could not say
            "threshold": self.threshold if self.threshold is None or math.isfinite(self.threshold) else None,
            "looked_for": list(self.looked_for),
            "matches": [match.to_json() for match in self.matches],
        }

    def to_csv(self) -> str:
        """A line a match, with a heading."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("rank", "score", "probability", "label", "domain", "path", "copies"))
        for match in self.matches:
            probability = "" if match.probability is None else f"{match.probability:.4f}"
            writer.writerow(
                (
                    *(match.rank, f"{match.score:.6f}", probability, match.label, match.domain, match.path),
                    json.dumps(match.copies, ensure_ascii=False),
                )
            )
        return stream.getvalue()

    def write(self, target: Path, *, query_image: Path | None = None) -> Path:
        """Write the matches in the format that the file's name asks for: .json, .csv or .html.

        Raises:
            InputError: another suffix.
        """
        from samething.files import write_json, write_text

        suffix = target.suffix.lower()
        if suffix == ".json":
            write_json(target, self.to_json())
        elif suffix == ".csv":
            write_text(target, self.to_csv())
        elif suffix in (".html", ".htm"):
            write_page(target, "matches.html", found=self, query_image=query_image, path=Path)
        else:
            raise InputError(
                f"the output {target}",
                expected="a name that ends in .json, .csv or .html",
                next_step="rename it",
            )
        return target

    def __rich__(self) -> Group:
        """A table of the matches, and a word where they are rather none."""
        table = rich.table.Table(title=Text(f"most similar to {_short(self.query)}"), title_justify="left")
        has_probability = any(match.probability is not None for match in self.matches)
        columns: dict[str, Callable[[Match], str]] = {
            "#": lambda match: str(match.rank),
            "score": lambda match: f"{match.score:.3f}",
            **({"same thing": _percent} if has_probability else {}),
            "label": lambda match: match.label,
            "domain": lambda match: match.domain,
            "image": _image,
        }
        for name in columns:
            is_number = name in ("#", "score", "same thing")
            table.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for match in self.matches:
            table.add_row(*(Text(show(match)) for show in columns.values()))
        lines: list[Any] = [table]
        if self.is_no_match:
            lines.append(Text("no match: nothing here is likely to be the same thing", style="yellow"))
        return Group(*lines)


def _percent(match: Match) -> str:
    return "" if match.probability is None else f"{match.probability:.0%}"


def _short(path: str) -> str:
    """A path as it is written from the current folder, where it lies in there; anything else as it is.

    >>> _short(str(Path.cwd() / "a" / "b.jpg")), _short("s3://bucket/a.jpg"), _short("/")
    ('a/b.jpg', 's3://bucket/a.jpg', '/')
    """
    return path.removeprefix(f"{Path.cwd()}{os.sep}")


def _image(match: Match) -> str:
    more = len(match.copies)
    return _short(match.path) + (f"  (and {more} {'copy' if more == 1 else 'copies'})" if more else "")


NO_THUMBNAIL: Final = "the terminal shows no images"


def with_thumbnails(found: Matches, *, width: int = 24) -> Any:
    """The matches with small images beside them, in a terminal that can (kitty, iTerm, sixel).

    Raises:
        MissingExtraError: the package textual-image is not installed.
    """
    try:
        from textual_image.renderable import Image
    except ImportError as error:
        from samething.errors import MissingExtraError

        raise MissingExtraError("textual_image", extra="terminal") from error
    table = rich.table.Table.grid(padding=(0, 2))
    for match in found.matches:
        shown = (
            Text(NO_THUMBNAIL)
            if is_url(match.path) or not Path(match.path).is_file()
            else Image(match.path, width=width, height="auto")
        )
        table.add_row(Text(str(match.rank)), shown, Text(f"{match.score:.3f}\n{match.label}\n{match.path}"))
    return Group(table, *([Text("no match")] if found.is_no_match else []))
