"""Find the same thing: an embedder and an index together."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import rich.table
from rich.markup import escape
from rich.text import Text

from samething.catalog import Catalog
from samething.embedder import Embedder
from samething.errors import ArtefactError, InputError
from samething.files import read_json, write_json
from samething.images import Picture, decode, find_pictures, thumbnail
from samething.index import AbstractIndex, Where, create_index, open_index
from samething.progress import progress_bar

MODEL_NAME: Final = "model.json"
"""File in an index folder that says where its model is."""
THUMBNAIL_SIDE: Final = 160
_ROWS_A_WRITE: Final = 256


@dataclasses.dataclass(frozen=True)
class Match:
    """One picture found."""

    rank: int
    """Place in the result, from 1."""
    score: float
    """Cosine similarity to the query, in [-1, 1]."""
    path: str
    label: str
    domain: str


@dataclasses.dataclass(frozen=True)
class Matches:
    """What a query found, best first."""

    query: str
    matches: tuple[Match, ...]

    def __rich__(self) -> rich.table.Table:
        """A table of the matches."""
        table = rich.table.Table(title=Text(f"most similar to {self.query}"), title_justify="left")
        for name in ("#", "score", "label", "domain", "picture"):
            table.add_column(name, justify="right" if name in ("#", "score") else "left", overflow="fold")
        for match in self.matches:
            names = (Text(name) for name in (match.label, match.domain, match.path))
            table.add_row(str(match.rank), f"{match.score:.3f}", *names)
        return table


@dataclasses.dataclass(frozen=True)
class Searcher:
    """An index with the model that made it."""

    embedder: Embedder
    index: AbstractIndex
    num_added: int = 0
    """Pictures embedded and stored by the call that made this object."""
    num_kept: int = 0
    """Pictures that were in the index already, unchanged."""
    unreadable: tuple[tuple[str, str], ...] = ()
    """Path and reason of each picture that could not be read."""

    @classmethod
    def open(cls, location: Path | str, *, model: Path | str | None = None) -> Searcher:
        """Open an index and the model that made it.

        Args:
            location: the index folder, or the URL of a distributed engine.
            model: the model folder; by default the one the index was made with, where it was then.

        Raises:
            ArtefactError: index or model are missing, unfinished or damaged.
            FingerprintError: the model is not the index's own.
        """
        if model is None:
            open_index(location).close()  # says what is wrong with the index before the model is looked for
            model = _remembered_model(Path(location))
        embedder = Embedder.load(model)
        return cls(
            embedder, open_index(location, model_fingerprint=embedder.fingerprint, model_name=embedder.name)
        )

    def find(self, picture: Picture, *, k: int = 5, where: Where | None = None) -> Matches:
        """The ``k`` pictures of the index that look most like the same thing.

        Args:
            picture: a path, the bytes of a file, a Pillow image or a uint8 array.
            k: number of matches.
            where: columns and the values allowed in them, such as ``{"domain": "cars"}``.

        Raises:
            ImageError: the picture cannot be read.
        """
        vectors = self.embedder.embed([picture])
        hits = self.index.search(vectors, k, where=where).of(0)
        name = str(picture) if isinstance(picture, str | Path) else "the picture given"
        return Matches(
            name,
            tuple(
                Match(rank, hit["score"], hit["path"], hit["label"] or "", hit["domain"] or "")
                for rank, hit in enumerate(hits, start=1)
            ),
        )

    def add(self, pictures: Catalog) -> Searcher:
        """Embed and store the pictures of a catalog that the index does not hold yet.

        What was stored stays stored if the process is killed; the next call goes on after it. A picture whose
        content changed is embedded again.

        Returns:
            This searcher with the counts of what was done.
        """
        known = {
            row["id"]: row["sha256"]
            for batch in self.index.items(columns=["sha256"])
            for row in batch.to_pylist()
        }
        bad: list[tuple[str, str]] = []
        new: list[dict[str, Any]] = []
        num_kept = 0
        for item in _items(pictures):
            if item["sha256"] is None:
                bad.append((item["path"], item.pop("reason")))
            elif known.get(item["id"]) == item["sha256"]:
                num_kept += 1
            else:
                new.append(item)
        with progress_bar("pictures") as progress:
            task = progress.add_task("index", total=len(new))
            num_added = 0
            for start in range(0, len(new), _ROWS_A_WRITE):
                part = new[start : start + _ROWS_A_WRITE]
                num_added += self._add_part(part, bad)
                progress.advance(task, len(part))
        return dataclasses.replace(self, num_added=num_added, num_kept=num_kept, unreadable=tuple(bad))

    def _add_part(self, items: list[dict[str, Any]], bad: list[tuple[str, str]]) -> int:
        vectors, rows = [], []
        for batch in self.embedder.embed_stream([item["path"] for item in items]):
            bad += [(items[position]["path"], error.given) for position, error in batch.unreadable.items()]
            vectors.append(batch.vectors)
            for position in batch.positions:
                image = decode(items[position]["path"])
                rows.append(
                    {
                        **items[position],
                        "width": image.width,
                        "height": image.height,
                        "thumbnail": thumbnail(image, longer_side=THUMBNAIL_SIDE),
                    }
                )
        if rows:
            self.index.add(np.concatenate(vectors), rows, model_fingerprint=self.embedder.fingerprint)
        return len(rows)

    @property
    def exit_status(self) -> int:
        """0, or 3 when pictures were left out."""
        return 3 if self.unreadable else 0

    def __rich__(self) -> str:
        """What a person wants to know of the index, in a few lines."""
        lines = [
            f"[bold]{self.index.count():,}[/bold] pictures in {escape(str(self.index.location))}, embedded "
            f"by {escape(self.embedder.name)} ({self.num_added:,} new, {self.num_kept:,} were there already)"
        ]
        if self.unreadable:
            lines.append(f"[yellow]{len(self.unreadable):,} pictures could not be read:[/yellow]")
            lines += [escape(f"  {path}: {reason}") for path, reason in self.unreadable[:5]]
        return "\n".join(lines)


def index(
    source: Path,
    *,
    model: Path,
    output: Path = Path("index"),
    domain: str = "default",
    root: Path | None = None,
) -> Searcher:
    """Make or grow a searchable index of a folder of pictures, or of a catalog.

    Of a catalog with test roles the index and query+index pictures are taken, of any other all. A killed run
    goes on where it stopped; pictures that cannot be read are listed and left out.

    Args:
        source: a folder of pictures (labels are the sub-folders), or a catalog (.parquet or .csv).
        model: the model folder that embeds the pictures.
        output: the index folder, or the URL of a distributed engine.
        domain: domain of a folder's pictures.
        root: folder of a catalog's pictures, if they were moved.

    Returns:
        The searcher over the index.

    Raises:
        InputError: no pictures.
        FingerprintError: the index was made by another model.
    """
    embedder = Embedder.load(model)
    pictures = _pictures(Path(source), domain=domain, root=root)
    location = str(output)
    is_there = Path(output, "manifest.json").exists()
    opened = (
        open_index(location, model_fingerprint=embedder.fingerprint, model_name=embedder.name)
        if is_there
        else create_index(
            location, dim=embedder.dim, model_fingerprint=embedder.fingerprint, model_name=embedder.name
        )
    )
    if Path(location).is_dir():
        write_json(
            Path(location) / MODEL_NAME, os.path.relpath(embedder.folder.resolve(), Path(location).resolve())
        )
    return Searcher(embedder, opened).add(pictures)


def find(
    picture: Path,
    *,
    index: Path = Path("index"),
    model: Path | None = None,
    k: int = 5,
    domain: str | None = None,
) -> Matches:
    """Find the pictures of an index that show the same thing as a picture.

    Args:
        picture: the picture to look for.
        index: the index folder, or the URL of a distributed engine.
        model: the model folder, if it was moved since the index was made.
        k: number of matches.
        domain: look among the pictures of this domain only.

    Returns:
        The matches, best first.

    Raises:
        ImageError: the picture cannot be read.
        FingerprintError: the model is not the index's own.
    """
    where = {"domain": domain} if domain is not None else None
    return Searcher.open(index, model=model).find(picture, k=k, where=where)


def _remembered_model(folder: Path) -> Path:
    path = folder / MODEL_NAME
    if not path.exists():
        raise ArtefactError(
            f"{folder} does not say where its model is",
            expected="the model folder that made it",
            next_step="give the model folder with --model",
        )
    model = folder / str(read_json(path))
    if not model.is_dir():
        raise ArtefactError(
            f"the model of {folder} is not at {model} any more",
            expected="the model folder that made the index",
            next_step="give its new place with --model",
        )
    return model.resolve()


def _pictures(source: Path, *, domain: str, root: Path | None) -> Catalog:
    if source.is_dir():
        rows = [
            {"image": str(path.relative_to(source)), "label": _label(path, source), "domain": domain}
            for path, is_picture in find_pictures(source)
            if is_picture
        ]
        if not rows:
            raise InputError(
                f"no pictures in {source}",
                expected="a folder with JPEG, PNG, WebP or other pictures, also in sub-folders",
                next_step="check the path",
            )
        return Catalog.from_rows(rows, root=source)
    catalog = Catalog.read(source, root=root)
    catalog.require_files()
    searchable = catalog.has_role("index", "query+index")
    return catalog.take(searchable) if searchable.any() else catalog


def _label(path: Path, source: Path) -> str:
    folder = path.parent.relative_to(source)
    return "" if folder == Path() else folder.as_posix()


def _items(pictures: Catalog) -> Iterator[dict[str, Any]]:
    """The index row of each picture; unreadable files have a reason and no sha256."""
    columns: Sequence[Any] = [pictures.strings(name) for name in ("label", "domain")]
    for path, label, domain in zip(pictures.paths, *columns, strict=True):
        name = str(path.resolve())
        item = {"id": name, "path": name, "label": label, "domain": domain}
        try:
            yield {**item, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        except OSError as error:
            yield {**item, "sha256": None, "reason": error.strerror or str(error)}
