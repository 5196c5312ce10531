"""Which parts of an image an index keeps vectors of, besides that of the whole: its regions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from samething.errors import ArtefactError, InputError
from samething.files import file_sha256
from samething.images import Source
from samething.images.parts import WINDOWS, Place, standing_out
from samething.index import AbstractIndex
from samething.search.collection import files_of
from samething.sessions import open_session

BOXES: Final = "boxes"
Chooser: TypeAlias = Callable[[Image.Image, Sequence[Source]], Sequence[Place]]
"""A decoded image and its files -> the parts of it that get vectors of their own."""
CHOOSERS: Final[dict[str, Chooser]] = {
    "grid": lambda image, files: WINDOWS,
    BOXES: lambda image, files: places_of(image, files),
    "proposals": lambda image, files: standing_out(image),
}
_MOST_OF_A_DETECTOR: Final = 16
_LEAST_SCORE: Final = 0.1


def named(regions: str) -> str:
    """What an index notes of the way to choose regions that a user names.

    Args:
        regions: a key of ``CHOOSERS``, or the path of a detector (NAME.onnx).

    Raises:
        InputError: neither.
        ArtefactError: a detector that cannot be read.
    """
    if regions in CHOOSERS:
        return regions
    if not regions.endswith(".onnx"):
        raise InputError(
            f"--regions {regions}",
            expected=f"{', '.join(CHOOSERS)}, or a detector's file, NAME.onnx",
            next_step="correct the name",
        )
    if not Path(regions).is_file():
        raise InputError(
            f"the detector {regions}", expected="a file that is there", next_step="check the path"
        )
    return f"{file_sha256(Path(regions))} {Path(regions).resolve()}"


def require_regions(noted: str | None, *, files: Sequence[Source] | None, has_features: bool) -> None:
    """Refuse images that give no regions.

    Args:
        noted: the way to choose regions; None: there are none.
        files: the images of a new index; None: it is there already.
        has_features: whether vectors of some come from a feature folder.

    Raises:
        InputError: they come from features, which are of whole images; or a catalog without boxes.
    """
    if noted is not None and has_features:
        raise InputError(
            "a feature folder for an index with regions",
            expected="images: features are of whole ones",
            next_step="index the catalog or the folder of the images",
        )
    if noted == BOXES and files is not None and not any(file.box for file in files):
        raise InputError(
            "--regions boxes, and images without boxes",
            expected="a catalog with the columns box_left, box_top, box_right and box_bottom",
            next_step="take --regions proposals or grid",
        )


def require_same(noted: str | None, index: AbstractIndex) -> None:
    """Refuse another way to choose regions than that of an index; None: whatever that is.

    Raises:
        InputError: it is another.
    """
    if noted not in (None, index.description.regions):
        raise InputError(
            f"--regions {noted} for the index {index.location}, whose regions are "
            f"{index.description.regions or 'none'}",
            expected="one way for all images of an index",
            next_step=f"leave it out, or: samething index rebuild {index.location} --model MODEL --regions …",
        )


def chooser(noted: str) -> Chooser:
    """The way to choose regions that an index notes.

    Raises:
        ArtefactError: a detector that is gone, or is not the one that was noted.
    """
    if noted in CHOOSERS:
        return CHOOSERS[noted]
    sha256, _, path = noted.partition(" ")
    return _detector(Path(path), sha256)


def as_kept(files: Sequence[Source], noted: str | None) -> list[Source]:
    """Files as an index sees them: a catalog's box is an image, or with ``boxes`` a region of one."""
    found = []
    for file in files:
        if part := file.box or file.region:
            box, region = (None, part) if noted == BOXES else (part, None)
            file = dataclasses.replace(file, box=box, region=region)
        found.append(file)
    return found


def places_of(image: Image.Image, files: Sequence[Source]) -> list[Place]:
    """The boxes of a catalog, each once."""
    sides = image.info.get("full_size", image.size)
    found = (place_of_box(file.region, sides) for file in files if file.region is not None)
    return list(dict.fromkeys(place for place in found if place is not None))


def label_at(hit: Mapping[str, Any]) -> tuple[str, str] | None:
    """Label and domain of the catalog's box that a hit was found by; None where that was no box."""
    for file in files_of(hit.get("files") or "[]"):
        if file.region and place_of_box(file.region, (hit["width"], hit["height"])) == hit["place"]:
            return file.label, file.domain
    return None


def place_of_box(box: Sequence[int | float], sides: tuple[int, int]) -> Place | None:
    """A box in pixels as shares of the sides; None where it holds nothing of the image."""
    width, height = sides
    left, right = (min(max(x / width, 0.0), 1.0) for x in box[::2])
    top, bottom = (min(max(y / height, 0.0), 1.0) for y in box[1::2])
    return (left, top, right, bottom) if left < right and top < bottom else None


@functools.lru_cache(maxsize=2)
def _detector(graph: Path, sha256: str) -> Chooser:
    """A detector: the 16 surest of its boxes.

    Its input is one image, uint8 or float32 in [0, 1], (1, 3, height, width), squashed to its size (640 where
    it has none). Its outputs are ``boxes`` (n, 4), left, top, right and bottom in pixels of the input, and
    ``scores`` (n,); or one of (n, 6) with box, score and class, as YOLO exports with its own suppression.
    Any of them may have a further first dimension of 1.
    """
    if not graph.is_file() or file_sha256(graph) != sha256:
        raise ArtefactError(
            f"the detector {graph} of this index is gone, or another one by now",
            expected="the file that chose the regions of the images so far",
            next_step="bring it back, or: samething index rebuild INDEX --model MODEL --regions NAME.onnx",
        )
    session = open_session(graph)
    (given,) = session.get_inputs()
    height, width = (side if isinstance(side, int) else 640 for side in given.shape[2:])
    names = [output.name for output in session.get_outputs()]

    def found(image: Image.Image, files: Sequence[Source]) -> list[Place]:
        pixels = np.asarray(image.convert("RGB").resize((width, height))).transpose(2, 0, 1)[None]
        if "float" in given.type:
            pixels = (pixels / 255).astype(np.float16 if "float16" in given.type else np.float32)
        answers = session.run(None, {given.name: np.ascontiguousarray(pixels)})
        boxes, scores = _boxes_and_scores(dict(zip(names, answers, strict=True)), graph)
        best = np.argsort(-scores, kind="stable")[:_MOST_OF_A_DETECTOR]
        surest = boxes[best[scores[best] >= _LEAST_SCORE]].tolist()
        places = (place_of_box(box, (width, height)) for box in surest)
        return [place for place in places if place is not None]

    return found


def _boxes_and_scores(answers: dict[str, Any], graph: Path) -> tuple[np.ndarray, np.ndarray]:
    if {"boxes", "scores"} <= answers.keys():
        return answers["boxes"].reshape(-1, 4).astype(float), answers["scores"].reshape(-1).astype(float)
    only = next(iter(answers.values()))
    if len(answers) == 1 and only.shape[-1] == 6:
        rows = only.reshape(-1, 6).astype(float)
        return rows[:, :4], rows[:, 4]
    raise InputError(
        f"{graph} has the outputs {', '.join(f'{name} {value.shape}' for name, value in answers.items())}",
        expected="boxes (n, 4) and scores (n,), or one of (n, 6): box, score and class",
        next_step="export the detector with its own suppression of overlapping boxes, or wrap it",
    )
