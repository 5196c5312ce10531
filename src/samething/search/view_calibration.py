"""A calibration without labels: views of the index's own images, each asked for among all of them.

A view is a cropped, turned and recoloured copy, in place of a second photograph. It is easier to find; on
the other hand other photographs of the same thing count as wrong. What is left of the two errors was measured
(docs/searching.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageEnhance

from samething.arrays import Bool, Float
from samething.calibration import Calibration
from samething.embedder import Embedder
from samething.errors import ImageError, InputError
from samething.images import Source, in_threads
from samething.index import AbstractIndex
from samething.search.collection import FILE_COLUMNS, files_of

CALIBRATIONS: Final = "calibration"
"""Notes of an index: fingerprint of a model -> the number of images it was tried at, and the calibration."""
NUM_VIEWS: Final = 128
LEAST_VIEWS: Final = 100
"""Views that must be read and have something else to be told from."""
LEAST_FOUND: Final = 0.5
"""Share of the views that must find their own image first; below, nothing can be told from scores."""
NEAR_DUPLICATE: Final = 0.95
"""Similarity from which another image is a near-duplicate, and neither right nor wrong."""
_NEIGHBOURS: Final = 20
_AT_ONCE: Final = 16


def view_of(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A part of 40 to 90 % of the area, turned by up to 10°, in other brightness, contrast and colour."""
    area, aspect = generator.uniform(0.4, 0.9), math.exp(generator.uniform(-0.29, 0.29))
    width = max(1, min(image.width, round(image.width * math.sqrt(area * aspect))))
    height = max(1, min(image.height, round(image.height * math.sqrt(area / aspect))))
    left = int(generator.integers(image.width - width + 1))
    top = int(generator.integers(image.height - height + 1))
    red, green, blue = np.asarray(image.resize((1, 1))).reshape(3).tolist()
    angle = generator.uniform(-10, 10)
    view = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(red, green, blue))
    view = view.crop((left, top, left + width, top + height))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = change(view).enhance(generator.uniform(0.7, 1.3))
    return view


def calibrate(index: AbstractIndex, embedder: Embedder) -> None:
    """Note in an index a calibration for its model, where that can be told.

    Nothing is done where the model brings one, or where it was tried when the index had half as many images.
    """
    knows_files = FILE_COLUMNS.keys() <= index.description.extra_columns.keys()
    keeps_notes = Path(index.location).is_dir()  # an engine elsewhere keeps none
    if embedder.config.get("calibration") or not (knows_files and keeps_notes):
        return
    known, count = index.notes(CALIBRATIONS).get(embedder.fingerprint), index.count()
    if count < LEAST_VIEWS or (known and count < 2 * known["tried_at"]):
        return
    found = by_views(index, embedder, count)
    content = None if found is None else found.to_json()
    index.set_notes(CALIBRATIONS, {embedder.fingerprint: {"tried_at": count, "calibration": content}})


def by_views(index: AbstractIndex, embedder: Embedder, count: int) -> Calibration | None:
    """A calibration from views of some of an index's ``count`` images; None where it cannot be told."""
    own: list[float] = []
    other: list[float] = []
    for ids, vectors in _views(index, embedder, count):
        originals = index.vectors(ids)
        hits = index.search(vectors, min(_NEIGHBOURS, count), columns=["id"])
        for place, name in enumerate(ids):
            near = {hit["id"]: hit["score"] for hit in hits.of(place)}
            mine = near.pop(name, -1.0)  # one that is not found is not the first
            if not near:
                continue
            wrong = index.vectors(near) @ originals[place] < NEAR_DUPLICATE
            if wrong.any():
                own.append(mine)
                other.append(float(np.array(list(near.values()))[wrong].max()))
    is_first: Bool[np.ndarray, " n"] = np.array(own) >= np.array(other)
    if len(own) < LEAST_VIEWS or is_first.mean() < LEAST_FOUND:
        return None
    # each view is asked twice, as validation images are: with its image in the index, and without it
    scores: Float[np.ndarray, " q"] = np.concatenate([np.maximum(own, other), other])
    try:
        found = Calibration.fit(
            scores, np.concatenate([is_first, np.zeros(len(own), bool)]),
            num_with_positive=len(own), target_precision=0.5, index_size=count,
        )  # fmt: skip
    except InputError:
        return None
    return found if found.slope > 0 else None


def some_rows(index: AbstractIndex, count: int, most: int) -> list[dict[str, Any]]:
    """Rows of an index of ``count`` images, evenly over it, and not more than ``most``."""
    step = max(1, count // most)
    rows = (row for batch in index.items() for row in batch.to_pylist())
    return list(islice(rows, 0, step * most, step))


def _views(
    index: AbstractIndex, embedder: Embedder, count: int
) -> Iterator[tuple[list[str], Float[np.ndarray, "n d"]]]:
    """Ids of some images, evenly over the index, and the vectors of a view of each, a few at a time."""
    chosen = [(row["id"], files_of(row["files"])[0]) for row in some_rows(index, count, NUM_VIEWS)]

    def prepared(numbered: tuple[int, Source]) -> np.ndarray:
        number, source = numbered
        return embedder.prepare(view_of(embedder.unpacked(source), np.random.default_rng(number)))

    for start in range(0, len(chosen), _AT_ONCE):
        part = chosen[start : start + _AT_ONCE]
        tasks = [(start + place, source) for place, (_, source) in enumerate(part)]
        made = [
            (name, pixels)
            for (name, _), pixels in zip(part, in_threads(prepared, tasks), strict=True)
            if not isinstance(pixels, ImageError)
        ]
        if made:
            vectors = embedder.embed_prepared([pixels for _, pixels in made])
            yield [name for name, _ in made], vectors
