"""Find the same thing: an index is made, kept current, rebuilt with another model, and asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts

from samething.embedder import Embedder
from samething.embedder.devices import Device
from samething.errors import InputError
from samething.files import write_json
from samething.images import Box, Source
from samething.images.decoding import pixels_of
from samething.index import AbstractIndex, Where, create_index, exists_index, open_index
from samething.progress import Terminal
from samething.search.collection import CAPTURE_COLUMNS, FILE_COLUMNS, Collection, fitted
from samething.search.feature_vectors import KnownVectors, is_feature_folder, known_vectors
from samething.search.looking_again import SecondLook
from samething.search.matches import Match, Matches, with_thumbnails
from samething.search.near_duplicates import Duplicates, near_duplicates
from samething.search.queries import conditions, query_images
from samething.search.region_choice import named, require_regions, require_same
from samething.search.remembered import (
    SearchDecoding,
    nearby,
    remember_collections,
    remember_model,
    remembered_decoding,
)
from samething.search.searcher import Searcher
from samething.search.syncing import Changes, known_rows
from samething.search.upkeep import (
    Prepared,
    Verified,
    backup,
    compact,
    prepare,
    restore,
    tune,
    verify,
)
from samething.search.view_calibration import calibrate

__all__ = [
    "Changes",
    "Duplicates",
    "Match",
    "Matches",
    "Prepared",
    "Searcher",
    "Verified",
    "backup",
    "compact",
    "duplicates",
    "find",
    "index",
    "prepare",
    "rebuild",
    "restore",
    "sync",
    "tune",
    "verify",
]


def index(
    *source: Path,
    model: str | Path | None = None,
    dim: int | None = None,
    runtime: Literal["float32", "int8"] = "float32",
    device: Device | None = None,
    output: str | Path = "index",
    domain: str = "default",
    root: Path | None = None,
    exclude: list[str] | None = None,
    max_megapixels: float | None = None,
    decoding: SearchDecoding | None = None,
    regions: str | None = None,
    yes: Annotated[bool, cyclopts.Parameter(negative=())] = False,
    vectors_of: Annotated[Path | None, cyclopts.Parameter(parse=False)] = None,
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
        runtime: int8 is faster on a CPU; refused if it does not find nearly as well here (docs/export.md).
        device: what computes the model; by default what SAMETHING_DEVICE names, or for many images the
            fastest that is here and gives the CPU's vectors (docs/serving.md).
        output: the index folder, or the URL of a distributed engine: milvus://HOST:PORT/COLLECTION.
        domain: domain of a folder's images.
        root: folder of a catalog's images, if they were moved.
        exclude: names, or paths below a folder, to pass over, with * and ?; kept for samething index sync.
            Hidden files and folders, links to folders and folders of the system are passed over anyway.
        max_megapixels: leave out larger images; by default 89, and 358 of JPEG files.
        decoding: scaled (the default of a new index folder) unpacks of a large JPEG file only as much as its
            neighbours need; exact unpacks all. The index keeps to it, for queries and samething index sync.
        regions: also find things inside bigger images: keep vectors of parts of each image besides the whole.
            The parts are a grid of 25, the catalog's boxes, up to 8 proposals that stand out, or what a
            detector finds, NAME.onnx (docs/second-look.md). What that takes is said after the first images.
        yes: fetch the weights of a model from the hub without asking, where none is named or on this disk.
        vectors_of: a feature folder of the same images; only what it cannot give is embedded.

    Returns:
        The searcher over the index.

    Raises:
        InputError: no images, no model can be had, or an index with another decoding or other regions.
        FingerprintError: the index was made by another model.
    """
    from samething.search.model_choice import model_for  # reads the table of backbones

    _require(source)
    noted = None if regions is None else named(regions)
    plain = [
        Collection(Path(place), domain, root, tuple(exclude or ()))
        for place in source
        if not is_feature_folder(Path(place))
    ]
    files = [file for part in plain for file in part.some_files(output)]  # before anything is made
    model = model_for(model, output, files, dim=dim, yes=yes, runtime=runtime)
    embedder = dataclasses.replace(Embedder.load(model, device=device), max_pixels=pixels_of(max_megapixels))
    known = [KnownVectors(embedder, Path(place)) for place in source if is_feature_folder(Path(place))]
    collections = [*plain, *(part.collection for part in known)]
    files += [file for part in known for file in part.collection.files(output)]
    opened, files, decoding = _opened(output, embedder, files, decoding, noted, has_features=bool(known))
    embedder = dataclasses.replace(embedder, decoding=decoding)
    remember_model(opened, model, embedder)
    remember_collections(opened, collections)
    known += [] if vectors_of is None else known_vectors(embedder, vectors_of)
    searcher = Searcher(embedder, opened).update_files(files, known=known).with_passed_over(collections)
    calibrate(opened, embedder)
    return searcher


def _require(source: tuple[Path, ...]) -> None:
    if not source:
        raise InputError(
            "no images to index",
            expected="one or more folders or catalogs",
            next_step="samething index FOLDER",
        )


def _opened(
    output: str | Path,
    embedder: Embedder,
    files: list[Source],
    decoding: SearchDecoding | None,
    regions: str | None,
    *,
    has_features: bool,
) -> tuple[AbstractIndex, list[Source], SearchDecoding]:
    """An index, made where there is none; the files with values that fit its columns; how it decodes."""
    is_new = not exists_index(output)
    if is_new:
        require_regions(regions, files=files, has_features=has_features)
        files, kinds = fitted(files, {})
        extra = {**CAPTURE_COLUMNS, **kinds, **FILE_COLUMNS}
        opened = create_index(
            output, dim=embedder.dim, model_fingerprint=embedder.fingerprint, model_name=embedder.name,
            extra_columns=extra, coder=embedder.coder, regions=regions,
        )  # fmt: skip
    else:
        opened = open_index(output)
        opened.require_model(embedder.fingerprint, embedder.name)
        require_same(regions, opened)
        require_regions(opened.description.regions, files=None, has_features=has_features)
        files, kinds = fitted(files, opened.description.columns)
    decoding = _decoding(opened, decoding, is_new=is_new)
    opened.add_columns(kinds)
    return opened, files, decoding


def _decoding(index: AbstractIndex, wanted: SearchDecoding | None, *, is_new: bool) -> SearchDecoding:
    """How an index decodes its images: as it notes, which cannot be changed for some of them.

    A new one must be able to note it, so that queries do the same; an engine elsewhere cannot.
    """
    if is_new and Path(index.location).is_dir():
        return wanted or ("scaled" if index.description.regions is None else "exact")
    kept = remembered_decoding(index)
    if wanted not in (None, kept):
        raise InputError(
            f"--decoding {wanted} for the index {index.location}, whose images are decoded {kept}",
            expected="one way for all images of an index, and exact ones in an engine elsewhere",
            next_step=f"leave it out, or rebuild an index folder: samething index rebuild {index.location} "
            f"--model MODEL --decoding {wanted}",
        )
    return kept


def sync(
    index: str | Path = "index",
    *source: Path,
    model: str | Path | None = None,
    domain: str = "default",
    exclude: list[str] | None = None,
    max_megapixels: float | None = None,
    drop: bool = False,
    forget: list[Path] | None = None,
    watch: bool = False,
) -> Searcher:
    """Bring an index up to date with its folders and catalogs.

    New and changed images are embedded, deleted ones are dropped, moved and renamed ones are followed by
    their content. Files whose size and time of change are as they were are not read. What a catalog says
    of an image is taken up without embedding it again.

    A folder that is not there keeps its images, and so does one that lost a large share of them at once, or
    all of a sub-folder: its disk may not be mounted. The rest is synced, and the exit status is 3.

    Args:
        index: the index folder, or the URL of a distributed engine.
        source: folders and catalogs to sync, and to follow from now on; by default all that the index
            follows. Images of others are left alone.
        model: the model folder, if it was moved since the index was made.
        domain: domain of the images of folders named here.
        exclude: of folders named here, names or paths to pass over; others keep what they were indexed with.
        max_megapixels: leave out larger images; by default 89, and 358 of JPEG files.
        drop: let images leave the index also where so many are gone at once.
        forget: folders and catalogs to follow no more; their images leave the index.
        watch: go on watching the folders and keep the index current until interrupted.

    Returns:
        The searcher over the index, with what was done.

    Raises:
        InputError: no folder is named and the index follows none, or not the one that is to be forgotten.
        FingerprintError: the model is not the index's own.
    """
    searcher = Searcher.open(index, model=model)
    embedder = dataclasses.replace(searcher.embedder, max_pixels=pixels_of(max_megapixels))
    searcher = dataclasses.replace(searcher, embedder=embedder)
    given = [Collection(Path(place), domain, exclude=tuple(exclude or ())) for place in source]
    for part in given:
        part.require_there()
    remember_collections(searcher.index, given)
    searcher.require_collections(given)
    searcher = searcher.sync(given or None, drop=drop, forget=forget or ())
    calibrate(searcher.index, searcher.embedder)
    if watch:
        from samething.search.watching import watch_collections

        return watch_collections(searcher)
    return searcher


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
    rerank: str | None = None,
    budget_ms: float | None = None,
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
            stand for a number: taken=2024-01..2024-06 (of EXIF data: taken, camera, latitude, longitude).
        rerank: look at the best hundred again before the answer: geometry, regions, query-expansion or
            k-reciprocal (docs/second-look.md).
        budget_ms: begin to look at no further image after so many milliseconds; by default look at all.
        output: also write the matches here, as .json, .csv or .html.
        thumbnails: show the images, in a terminal that can.
        open: open the best match in the program that this computer shows images with.

    Returns:
        The matches, best first.

    Raises:
        ImageError: an image cannot be read.
        FingerprintError: the model is not the index's own.
    """
    if not image and label is None:
        raise InputError("nothing to look for", expected="an image, or --label", next_step="name an image")
    searcher = Searcher.open(index, model=model)
    chosen: Where = conditions(
        searcher.index.description, domain=domain, label=with_label, folder=folder, where=where or ()
    )
    look = None if rerank is None else searcher.second_look(rerank, budget_ms=budget_ms)
    box = None if crop is None else Box(*crop)
    asked: dict[str, Any] = {"k": k, "where": chosen, "combine": combine, "rerank": look}
    if label is not None:
        if image or crop is not None:
            raise InputError(
                f"--label {label} and an image", expected="one of them", next_step="leave one out"
            )
        found = searcher.find_label(label, **asked)
    else:
        found = searcher.find(*image, crop=box, **asked)
    if output is not None:
        is_file = bool(image) and Path(image[0]).is_file()
        first = query_images(searcher.embedder, image[:1], crop=box)[0] if is_file else None
        found.write(output, query_image=first)
    if thumbnails:
        Terminal().print(with_thumbnails(found))
    if open and found.matches:
        from samething.search.opening import open_image

        open_image(found.matches[0].path)
    return found


def duplicates(
    index: str | Path = "index",
    *,
    min_score: float | None = None,
    verify: Literal["geometry"] | None = None,
    output: Path | None = None,
) -> Duplicates:
    """Group the near-duplicates of a whole index.

    Args:
        index: the index folder, or the URL of a distributed engine.
        min_score: similarity from which two images count as near-duplicates, at most 1; by default 0.95, and
            0.4 where candidates are verified.
        verify: geometry: candidates count only where one was made of the other, also by cropping, in
            perspective, or with something laid over it; needs the extra rerank.
        output: also write the groups here, as JSON.

    Raises:
        InputError: a similarity out of range.
        MissingExtraError: OpenCV is not installed.
    """
    opened = open_index(nearby(index))
    look = None if verify is None else SecondLook.without_model(opened, verify)
    if min_score is None:
        min_score = 0.95 if look is None else 0.4
    found = near_duplicates(opened, min_score=min_score, look=look)
    if output is not None:
        write_json(output, found.to_json())
    return found


def rebuild(
    index: str | Path = "index",
    *,
    model: str | Path,
    source: list[Path] | None = None,
    domain: str = "default",
    decoding: SearchDecoding | None = None,
    regions: str | None = None,
) -> Searcher:
    """Embed all images of an index anew with another model, then let the result take the index's place.

    The old index is searched until the new one is whole; the change is one step. A killed rebuild goes on
    where it stopped when it is run again with the same model. Images that are gone are left out.

    Args:
        index: the index folder, or the URL of a distributed engine.
        model: the new model's folder, its hub id, or a backbone's name.
        source: the folders and catalogs to take the images from, instead of the files that the index knows.
        domain: domain of the images of folders named with --source.
        decoding: as for samething index; by default as in a new index.
        regions: as for samething index, or none; by default as they are.

    Returns:
        The searcher over the new index.

    Raises:
        InputError: none of the images can be read.
    """
    from samething.search.model_choice import model_for

    old = open_index(index)
    noted = old.description.regions if regions is None else None if regions == "none" else named(regions)
    collections = [Collection(place, domain) for place in source or ()]

    def there() -> list[Source]:
        found = [file for part in collections for file in part.files(index)]
        return found or [file for files in known_rows(old).values() for file in files]

    files = there()
    model = model_for(model, index, files, dim=None, yes=False)
    embedder = Embedder.load(model)
    capture = CAPTURE_COLUMNS if Path(old.location).is_dir() else {}
    old.add_columns({**capture, **fitted(files, {**capture, **old.description.columns})[1]})
    new = old.beside(
        dataclasses.replace(
            old.description,
            dim=embedder.dim,
            model_fingerprint=embedder.fingerprint,
            model_name=embedder.name,
            coder=embedder.coder,
            regions=noted,
        )
    )
    embedder = dataclasses.replace(embedder, decoding=_decoding(new, decoding, is_new=new.count() == 0))
    remember_model(new, model, embedder)
    successor = Searcher(embedder, new)
    added = 0
    while True:
        # anew, since what came in between is not in the successor
        files, _ = fitted(there(), successor.index.description.columns)
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
    remember_collections(successor.index, collections)
    calibrate(successor.index, embedder)
    return dataclasses.replace(successor, changes=dataclasses.replace(successor.changes, num_added=added))
