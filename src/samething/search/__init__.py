"""Find the same thing: an index is made, kept current, rebuilt with another model, and asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
from rich.markup import escape

from samething.catalog.tables import verify_catalog
from samething.checksums import damages
from samething.embedder import Embedder
from samething.errors import InputError
from samething.files import read_manifest
from samething.images import Box
from samething.images.decoding import pixels_of
from samething.index import (
    RecallReport,
    SqliteIndex,
    Where,
    create_index,
    exists_index,
    open_index,
)
from samething.progress import Terminal
from samething.search.collection import FILE_COLUMNS, Collection, uploaded_files
from samething.search.feature_vectors import KnownVectors, is_feature_folder
from samething.search.matches import Match, Matches
from samething.search.model_choice import model_for
from samething.search.near_duplicates import Duplicates, near_duplicates
from samething.search.searcher import (
    Searcher,
    remember_collections,
    remember_model,
    remembered_collections,
)
from samething.search.syncing import Changes

__all__ = [
    "Changes",
    "Duplicates",
    "Match",
    "Matches",
    "Searcher",
    "compact",
    "duplicates",
    "find",
    "index",
    "rebuild",
    "sync",
    "tune",
    "verify",
]


def index(
    *source: Path,
    model: str | Path | None = None,
    dim: int | None = None,
    output: str | Path = "index",
    domain: str = "default",
    root: Path | None = None,
    exclude: list[str] | None = None,
    max_megapixels: float | None = None,
    yes: Annotated[bool, cyclopts.Parameter(negative=())] = False,
) -> Searcher:
    """Make or grow a searchable index of folders of images, or of catalogs.

    No labels and no training are needed: the model may be the name of a backbone, and without --model the
    best one that can be had here is taken (docs/searching.md). Its model folder is kept beside the index.

    Of a catalog with test roles the index and query+index images are taken, of any other all. The same
    image in several places is stored once. A killed run goes on where it stopped; images that cannot be
    read are listed and left out. What was indexed stays: samething index sync also drops what was deleted.
    Of a feature folder the images' features go through the model's head, which skips its backbone.

    Args:
        source: folders of images (labels are the sub-folders), catalogs (.parquet or .csv), or feature
            folders of the model's own backbone.
        model: what embeds the images: a model folder, a model's hub id, or a backbone's name (samething
            backbones lists them; also timm:NAME, open_clip:NAME/WEIGHTS, hf:NAME).
        dim: of a backbone, keep so many principal components, fitted to up to 2,048 of the images; 64 need
            a twelfth of the memory of 768.
        output: the index folder, or the URL of a distributed engine: milvus://HOST:PORT/COLLECTION.
        domain: domain of a folder's images.
        root: folder of a catalog's images, if they were moved.
        exclude: names, or paths below a folder, to pass over, with * and ?; kept for samething index sync.
            Hidden files and folders, links to folders and folders of the system are passed over anyway.
        max_megapixels: leave out larger images; by default 89, and 358 of JPEG files.
        yes: fetch the weights of a model from the hub without asking, where none is named or on this disk.

    Returns:
        The searcher over the index.

    Raises:
        InputError: no images, or no model can be had.
        FingerprintError: the index was made by another model.
    """
    if not source:
        raise InputError(
            "no images to index",
            expected="one or more folders or catalogs",
            next_step="samething index FOLDER",
        )
    folders = {
        place: Collection(Path(place), domain, root, tuple(exclude or ()))
        for place in source
        if not is_feature_folder(Path(place))
    }
    images = [file for part in folders.values() for file in part.files()]
    model = model_for(model, output, images, dim=dim, yes=yes)
    embedder = dataclasses.replace(Embedder.load(model), max_pixels=pixels_of(max_megapixels))
    known = {place: KnownVectors(embedder, Path(place)) for place in source if place not in folders}
    collections = [known[place].collection if place in known else folders[place] for place in source]
    files = [file for part in collections for file in part.files()]  # before anything is made
    identity = {"model_fingerprint": embedder.fingerprint, "model_name": embedder.name}
    if exists_index(output):
        opened = open_index(output, **identity)
    else:
        kinds = {name: kind for part in collections for name, kind in part.metadata_kinds().items()}
        opened = create_index(output, dim=embedder.dim, **identity, extra_columns={**kinds, **FILE_COLUMNS})
    remember_model(output, model, embedder)
    remember_collections(opened, collections)
    done = Searcher(embedder, opened).update_files(files, known=list(known.values()))
    return done.with_passed_over(collections)


def sync(
    index: str | Path = "index",
    *source: Path,
    model: str | Path | None = None,
    domain: str = "default",
    exclude: list[str] | None = None,
    max_megapixels: float | None = None,
    watch: bool = False,
) -> Searcher:
    """Bring an index up to date with its folders and catalogs.

    New and changed images are embedded, deleted ones are dropped, moved and renamed ones are followed by
    their content. Files whose size and time of change are as they were are not read.

    Args:
        index: the index folder, or the URL of a distributed engine.
        source: all its folders and catalogs; by default those that the index folder remembers.
        model: the model folder, if it was moved since the index was made.
        domain: domain of the images of folders named here.
        exclude: of folders named here, names or paths to pass over; others keep what they were indexed with.
        max_megapixels: leave out larger images; by default 89, and 358 of JPEG files.
        watch: go on watching the folders and keep the index current until interrupted.

    Returns:
        The searcher over the index, with what was done.

    Raises:
        InputError: a folder is not there (nothing is dropped then), or none is known.
        FingerprintError: the model is not the index's own.
    """
    searcher = Searcher.open(index, model=model)
    embedder = dataclasses.replace(searcher.embedder, max_pixels=pixels_of(max_megapixels))
    searcher = dataclasses.replace(searcher, embedder=embedder)
    given = [Collection(Path(place), domain, exclude=tuple(exclude or ())) for place in source]
    collections = given or remembered_collections(searcher.index)
    if not collections and not uploaded_files(searcher.index):
        raise InputError(
            f"{index} does not say which folders it follows",
            expected="the folders and catalogs whose images it holds",
            next_step=f"name all of them: samething index sync {index} FOLDER …",
        )
    searcher = searcher.update(collections, drop=True).with_passed_over(collections)
    remember_collections(searcher.index, given)
    if watch:
        from samething.search.watching import watch_collections

        return watch_collections(searcher, collections)
    return searcher


def tune(
    index: str | Path = "index", *, recall: float = 0.98, k: int = 5, exact: bool = False
) -> RecallReport | str:
    """Choose how a large index is searched, by a recall measured on its own vectors.

    Searches are exact until this is called, which reads all vectors for each. Afterwards they follow a graph;
    those with a filter stay exact.

    Args:
        index: the index folder.
        recall: share of the exact nearest images that is to be found; it is kept with 95 % confidence.
        k: neighbours per query that the recall is about.
        exact: search exactly again, instead.

    Raises:
        InputError: an engine elsewhere, which has its own settings; or a recall out of range.
    """
    opened = _embedded(index, otherwise="a Milvus index is chosen by its URL: ?index=hnsw&ef=NUMBER")
    if exact:
        opened.search_exactly()
        return f"{index} is searched exactly"
    return opened.tune(recall, k=k)


def compact(index: str | Path = "index") -> str:
    """Write an index anew; what was deleted or replaced leaves the disk.

    The old files are searched meanwhile, and writers wait. A killed process leaves them as they were. A tuned
    index is exact afterwards: tune it again.

    Args:
        index: the index folder.

    Raises:
        InputError: an engine elsewhere, which does this by itself.
    """
    old = _embedded(index, otherwise="a Milvus server compacts its collections by itself")
    before = _num_bytes(Path(index))
    old.compact()
    after = _num_bytes(Path(index))
    return f"{old.count():,} rows in {after / 1e6:,.1f} MB; before {before / 1e6:,.1f} MB"


@dataclasses.dataclass(frozen=True)
class Verified:
    """What a complete check of an artefact found."""

    location: str
    checked: str
    """What was compared, with its number."""
    problems: tuple[str, ...]
    """A sentence for each damage."""

    @property
    def exit_status(self) -> int:
        """0, or 1 when something is damaged."""
        return 1 if self.problems else 0

    def __rich__(self) -> str:
        """A line, and one for each damage."""
        line = f"{escape(self.location)}: {self.checked}, {len(self.problems):,} damages"
        return "\n".join([line, *map(escape, self.problems)])


def verify(path: str | Path = "index") -> Verified:
    """Read all of an artefact and compare it with its checksums; name every damaged file and row.

    Args:
        path: a catalog (.parquet), a folder of features, a run, a study, a model or an index, or the URL of a
            distributed engine's index.

    Raises:
        ArtefactError: there is no such artefact, it is unfinished, or it holds no checksums.
    """
    place = Path(path)
    if place.is_file():
        verify_catalog(place)
        return Verified(str(path), "1 file", ())
    if "://" in str(path) or read_manifest(place).kind == "index":
        with open_index(path) as opened:
            found = opened.verify()
        return Verified(str(path), f"{found.num_rows:,} rows", found.problems)
    num_files, problems = damages(place)
    return Verified(str(path), f"{num_files:,} files", tuple(problems))


def _embedded(index: str | Path, *, otherwise: str) -> SqliteIndex:
    opened = open_index(index)
    if not isinstance(opened, SqliteIndex):
        raise InputError(
            f"{index} is not an index folder", expected="an index of the embedded engine", next_step=otherwise
        )
    return opened


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def find(
    *image: str | Path,
    index: str | Path = "index",
    model: str | Path | None = None,
    k: int = 5,
    label: str | None = None,
    crop: tuple[int, int, int, int] | None = None,
    combine: Literal["mean", "max"] = "mean",
    domain: list[str] | None = None,
    with_label: list[str] | None = None,
    folder: Path | None = None,
    where: list[str] | None = None,
    output: Path | None = None,
    thumbnails: bool = False,
    open: Annotated[bool, cyclopts.Parameter(negative=())] = False,  # noqa: A002 (the option's name)
) -> Matches:
    """Find the images of an index that show the same thing as an image.

    Args:
        image: the image to look for: a file, an address (docs/file-formats.md), or the
            word clipboard; several of one thing are one query.
        index: the index folder, or the URL of a distributed engine; by default ./index, the current folder
            itself, or an index folder beside one above it.
        model: the model folder, if it was moved since the index was made.
        k: number of matches.
        label: look for what the index knows by this label, instead of an image.
        crop: the part of the image to look for: left, top, right and bottom in pixels.
        combine: what several images ask for: what is like all of them (mean), or like any of them (max).
        domain: look among the images of these domains only.
        with_label: look among the images of these labels only.
        folder: look among the images below this folder only.
        where: further conditions: COLUMN=TEXT, or for numbers COLUMN=LOW..HIGH, either end open; a date may
            stand for a number, such as modified=2024-01-01.. .
        output: also write the matches here, as .json, .csv or .html.
        thumbnails: show the images, in a terminal that can.
        open: open the best match in the program that this computer shows images with.

    Returns:
        The matches, best first.

    Raises:
        ImageError: an image cannot be read.
        FingerprintError: the model is not the index's own.
    """
    from samething.search.conditions import conditions

    if not image and label is None:
        raise InputError("nothing to look for", expected="an image, or --label", next_step="name an image")
    searcher = Searcher.open(index, model=model)
    chosen: Where = conditions(
        searcher.index.description,
        domain=domain,
        label=with_label,
        folder=folder,
        where=where or (),
    )
    if label is not None:
        if image or crop is not None:
            raise InputError(
                f"--label {label} and an image", expected="one of them", next_step="leave one out"
            )
        found = searcher.find_label(label, k=k, where=chosen, combine=combine)
    else:
        box = None if crop is None else Box(*crop)
        found = searcher.find(*image, k=k, where=chosen, crop=box, combine=combine)
    if output is not None:
        first = Path(image[0]) if image and Path(image[0]).is_file() else None
        found.write(output, query_image=first)
    if thumbnails:
        from samething.search.matches import with_thumbnails

        Terminal().print(with_thumbnails(found))
    if open and found.matches:
        from samething.search.opening import open_image

        open_image(found.matches[0].path)
    return found


def duplicates(
    index: str | Path = "index", *, min_score: float = 0.95, output: Path | None = None
) -> Duplicates:
    """Group the near-duplicates of a whole index.

    Args:
        index: the index folder, or the URL of a distributed engine.
        min_score: similarity from which two images count as near-duplicates, at most 1.
        output: also write the groups here, as JSON.

    Raises:
        InputError: a similarity out of range.
    """
    from samething.files import write_json

    found = near_duplicates(open_index(index), min_score=min_score)
    if output is not None:
        write_json(output, found.to_json())
    return found


def rebuild(
    index: str | Path = "index",
    *,
    model: str | Path,
    source: list[Path] | None = None,
    domain: str = "default",
) -> Searcher:
    """Embed all images of an index anew with another model, then let the result take the index's place.

    The old index is searched until the new one is whole; the change is one step. A killed rebuild goes on
    where it stopped when it is run again with the same model. Images that are gone are left out.

    Args:
        index: the index folder, or the URL of a distributed engine.
        model: the new model's folder, its hub id, or a backbone's name.
        source: the folders and catalogs to take the images from, instead of the files that the index knows.
        domain: domain of the images of folders named with --source.

    Returns:
        The searcher over the new index.

    Raises:
        InputError: none of the images can be read.
    """
    from samething.search.syncing import known_files

    old = open_index(index)
    model = model_for(model, index, known_files(old), dim=None, yes=False)
    embedder = Embedder.load(model)
    identity = {"model_fingerprint": embedder.fingerprint, "model_name": embedder.name}
    successor = Searcher(embedder, old.beside(dim=embedder.dim, **identity))
    added = 0
    while True:
        collections = [Collection(place, domain) for place in source or ()]
        files = [file for part in collections for file in part.files()] or known_files(old)
        successor = successor.update_files(files, drop=True)
        added += successor.num_added
        if successor.index.count() == 0 and files:
            raise InputError(
                f"none of the {len(files):,} images of {index} can be read",
                expected="the images where the index knows them",
                next_step=f"name their new place: samething index rebuild {index} --model {model} --source …",
            )
        if successor.index.swap(old):
            break
    remember_model(index, model, embedder)
    return dataclasses.replace(successor, changes=dataclasses.replace(successor.changes, num_added=added))
