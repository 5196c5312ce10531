"""What a search found, and how it shows itself: a table, JSON, CSV or a page."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import rich.table
from rich.console import Group
from rich.style import Style
from rich.text import Text

from samething.calibration import Calibrator
from samething.errors import InputError, needed
from samething.files import Json, plain_cell, write_json, write_text
from samething.images import ImageLike, is_url
from samething.pages import image_url, pair_url, write_page
from samething.search.region_choice import label_at

Band: TypeAlias = Literal["the same", "perhaps", "no match"]
BANDS: Final[Mapping[Band, tuple[float, str]]] = {
    "the same": (0.7, "Probably the same thing. Compare a detail, such as a text, before you rely on it."),
    "perhaps": (0.1, "Perhaps the same thing: look at these yourself."),
    "no match": (
        0.0,
        "Probably not the same thing. Look for a part of the image, or take another photo of the thing.",
    ),
}
"""Name of each band -> its least probability, and what to do. How often each is right: docs/searching.md."""

_NOT_METADATA: Final = frozenset(
    {
        "id",
        "score",
        "path",
        "label",
        "domain",
        "paths",
        "files",
        "folders",
        "labels",
        "domains",
        "added",
        "evidence",
        "place",
    }
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
    place: tuple[float, float, float, float] | None = None
    """The part of it that is more like the query than the whole, in an index with regions: left, top, right
    and bottom as shares of its sides. None: the whole is."""
    evidence: Mapping[str, Json] | None = None
    """What a second look found (:meth:`SecondLook.at`); None where there was none."""

    @property
    def band(self) -> Band | None:
        """The calibrated probability in words; None where there is none.

        >>> Match(1, 0.9, "a.jpg", "", "", probability=0.4).band
        'perhaps'
        """
        if self.probability is None:
            return None
        return next(name for name, (least, _) in BANDS.items() if self.probability >= least)

    @classmethod
    def of(cls, hit: Mapping[str, Any], *, rank: int, probability: float | None) -> Match:
        """A row of the index with its score as a match; what has no value is left out of ``metadata``."""
        path = hit["path"] or ""
        of_region = label_at(hit) if hit.get("place") else None
        label, domain = of_region or (hit["label"] or "", hit["domain"] or "")
        return cls(
            rank=rank,
            score=hit["score"],
            path=path,
            label=label,
            domain=domain,
            id=hit["id"],
            probability=probability,
            place=hit.get("place"),
            evidence=hit.get("evidence"),
            copies=tuple(other for other in hit.get("paths") or () if other != path),
            metadata={
                name: value for name, value in hit.items() if name not in _NOT_METADATA and value is not None
            },
        )

    def to_json(self) -> dict[str, Json]:
        """Plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        place = None if self.place is None else list(self.place)
        own = {"band": self.band, "copies": list(self.copies), "place": place}
        return {**values, **own, "metadata": dict(self.metadata)}

    @property
    def where(self) -> str:
        """The part of the image that was found, in words; empty where it is the whole.

        >>> Match(1, 0.9, "a.jpg", "", "", place=(0.25, 0.0, 0.75, 0.4)).where
        'at 25–75 % of the width, 0–40 % of the height'
        """
        if self.place is None:
            return ""
        left, top, right, bottom = (round(100 * share) for share in self.place)
        return f"at {left}–{right} % of the width, {top}–{bottom} % of the height"

    @property
    def verified(self) -> str:
        """In words what a second look found; empty where that is nothing.

        >>> Match(1, 0.9, "a.jpg", "", "", evidence={"verified": True, "agreeing": 34}).verified
        'verified: 34 points agree'
        """
        if not self.evidence or not self.evidence["agreeing"]:
            return ""
        return f"{'verified: ' * self.evidence['verified']}{self.evidence['agreeing']} points agree"


@dataclasses.dataclass(frozen=True)
class Matches:
    """What a query found, best first."""

    query: str
    """How the query was given."""
    matches: tuple[Match, ...]
    calibrated_by: Calibrator | None = None
    """What the probabilities were learned from: labelled images, or views of the index's own; None: no
    probabilities."""
    looked_for: tuple[str, ...] = ()
    """Ids of images of the index that were looked for, which are no matches; at most 24 of them."""

    @property
    def is_no_match(self) -> bool:
        """Whether nothing found is likely to be the same thing."""
        return self.calibrated_by is not None and self.band in ("no match", None)

    @property
    def band(self) -> Band | None:
        """That of the best match."""
        return self.matches[0].band if self.matches else None

    @property
    def advice(self) -> str:
        """What to do with what was found, in a sentence or two; empty without a calibration."""
        if self.calibrated_by is None:
            return ""
        by_views = " Learned from the images alone, without labels: a rough guide."
        return BANDS[self.band or "no match"][1] + (by_views if self.calibrated_by == "views" else "")

    def sections(self) -> list[tuple[Band | None, list[Match]]]:
        """The matches by band, best first; one section without a name where nothing was calibrated."""
        return [
            (band, list(part)) for band, part in itertools.groupby(self.matches, lambda match: match.band)
        ]

    def to_json(self) -> dict[str, Json]:
        """Plain values."""
        return {
            "query": self.query,
            "no_match": self.is_no_match,
            "band": self.band,
            "advice": self.advice,
            "calibrated_by": self.calibrated_by,
            "looked_for": list(self.looked_for),
            "matches": [match.to_json() for match in self.matches],
        }

    def to_csv(self) -> str:
        """A line a match, with a heading."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        heading = ("rank", "score", "probability", "band", "label", "domain", "path", "copies", "place")
        writer.writerow(heading)
        for match in self.matches:
            probability = "" if match.probability is None else f"{match.probability:.4f}"
            writer.writerow(
                (
                    *(match.rank, f"{match.score:.6f}", probability, match.band or ""),
                    *map(plain_cell, (match.label, match.domain, match.path)),
                    json.dumps(match.copies, ensure_ascii=False),
                    "" if match.place is None else json.dumps([round(share, 4) for share in match.place]),
                )
            )
        return stream.getvalue()

    def write(self, target: Path, *, query_image: ImageLike | None = None) -> Path:
        """Write the matches in the format that the file's name asks for: .json, .csv or .html.

        Raises:
            InputError: another suffix.
        """
        suffix = target.suffix.lower()
        if suffix == ".json":
            write_json(target, self.to_json())
        elif suffix == ".csv":
            write_text(target, self.to_csv())
        elif suffix in (".html", ".htm"):
            drawn = {"image": image_url, "pair": pair_url, "path": Path}
            write_page(target, "matches.html", found=self, query_image=query_image, **drawn)
        else:
            raise InputError(
                f"the output {target}",
                expected="a name that ends in .json, .csv or .html",
                next_step="rename it",
            )
        return target

    def __rich__(self) -> Group:
        """The matches by band, each path whole and on a line of its own, so that it can be copied."""
        lines = [Text(f"most similar to {_short(self.query)}", style="italic", **_WHOLE)]
        for band, matches in self.sections():
            if band is not None:
                lines.append(Text(band, style="bold"))
            for match in matches:
                chance = "" if match.probability is None else f"  {match.probability:4.0%}"
                shows = "  ".join(filter(None, (match.label, match.domain, match.where, match.verified)))
                lines.append(Text(f"{match.rank:>3}  {match.score:.3f}{chance}  {shows}", **_WHOLE))
                is_address = is_url(match.path)
                link = match.path if is_address else Path(match.path).absolute().as_uri()
                is_link = not is_address or match.path.startswith("http")  # in terminals that can
                line = Text("     ", **_WHOLE)
                line.append(_short(match.path), Style(link=link) if is_link else None)
                if more := len(match.copies):
                    line.append(f"  (and {more} {'copy' if more == 1 else 'copies'})")
                lines.append(line)
        if not self.matches:
            lines.append(Text("nothing to show: no image meets the filter, or the index is empty"))
        if self.advice and self.matches:
            lines.append(Text(self.advice, style="yellow" if self.is_no_match else ""))
        return Group(*lines)


_WHOLE: Final[Mapping[str, Any]] = {"no_wrap": True, "overflow": "ignore"}


def _short(path: str) -> str:
    """A path as it is written from the current folder, where it lies in there; anything else as it is.

    >>> _short(str(Path.cwd() / "a" / "b.jpg")), _short("s3://bucket/a.jpg"), _short("/")
    ('a/b.jpg', 's3://bucket/a.jpg', '/')
    """
    return path.removeprefix(f"{Path.cwd()}{os.sep}")


NO_THUMBNAIL: Final = "the terminal shows no images"


def with_thumbnails(found: Matches) -> Any:
    """The matches with small images beside them, in a terminal that can (kitty, iTerm, sixel).

    Raises:
        MissingExtraError: the package textual-image is not installed.
    """
    shown_image = needed("textual_image.renderable", extra="terminal").Image
    table = rich.table.Table.grid(padding=(0, 2))
    for match in found.matches:
        shown = (
            Text(NO_THUMBNAIL)
            if is_url(match.path) or not Path(match.path).is_file()
            else shown_image(match.path, width=24, height="auto")
        )
        table.add_row(Text(str(match.rank)), shown, Text(f"{match.score:.3f}\n{match.label}\n{match.path}"))
    return Group(table, Text(found.advice))
