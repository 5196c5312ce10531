"""What an index folder remembers: where its model is, and which folders and catalogs it follows."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

from samething.embedder import Embedder
from samething.errors import ArtefactError
from samething.index import AbstractIndex, exists_index
from samething.search.collection import Collection

SearchDecoding: TypeAlias = Literal["exact", "scaled"]
"""How the images of an index and its queries are decoded; the values of features, without torch."""
COLLECTIONS: Final = "collections"
"""Notes of an index: the folders and catalogs that it follows."""
_MODELS: Final = "models"
"""Notes of an index: where the folder of a model is, by its fingerprint."""
_DECODINGS: Final = "decoding"
"""Notes of an index: how its images are decoded, by the fingerprint of the model that made it."""
_FROM_HUB: Final = "hub:"


def remembered_model(index: AbstractIndex) -> Path | str:
    """The model folder that an index was made with, or its hub id with the revision.

    Raises:
        ArtefactError: it is not known, or not there any more.
    """
    noted: str | None = index.notes(_MODELS).get(index.description.model_fingerprint)
    if noted is None:
        raise ArtefactError(
            f"{index.location} does not say where its model is",
            expected="the model folder that made it",
            next_step="give the model folder with --model",
        )
    if noted.startswith(_FROM_HUB):
        return noted.removeprefix(_FROM_HUB)
    model = Path(index.location) / noted
    if not model.is_dir():
        raise ArtefactError(
            f"the model of {index.location} is not at {model} any more",
            expected="the model folder that made the index",
            next_step="give its new place with --model",
        )
    return model.resolve()


def remembered_decoding(index: AbstractIndex) -> SearchDecoding:
    """How the images of an index are decoded; ``exact`` where nothing is noted, as by earlier versions."""
    noted: SearchDecoding = index.notes(_DECODINGS).get(index.description.model_fingerprint, "exact")
    return noted


def remember_model(index: AbstractIndex, model: Path | str, embedder: Embedder) -> None:
    """Note in an index folder where a model is and how it decodes; an engine elsewhere keeps no notes."""
    folder = Path(index.location)
    if not folder.is_dir():
        return
    if Path(model).is_dir():
        place = os.path.relpath(Path(model).resolve(), folder.resolve())
    else:  # the folder that the hub's client keeps is named after the revision
        place = f"{_FROM_HUB}{str(model).partition('@')[0]}@{embedder.folder.name}"
    index.set_notes(_MODELS, {embedder.fingerprint: place})
    index.set_notes(_DECODINGS, {embedder.fingerprint: embedder.decoding})


def remembered_collections(index: AbstractIndex) -> list[Collection]:
    """The folders and catalogs that an index follows; an engine elsewhere keeps none."""
    folder = Path(index.location)
    return [Collection.from_json(value, folder) for value in index.notes(COLLECTIONS).values()]


def remember_collections(index: AbstractIndex, collections: Sequence[Collection]) -> None:
    """Note further folders and catalogs that an index follows."""
    parts = [part.to_json(Path(index.location)) for part in collections]
    index.set_notes(COLLECTIONS, {part["location"]: part for part in parts})


def nearby(location: Path | str) -> Path | str:
    """The index that a command means: without one at the default place, this folder or one above it."""
    if str(location) == "index" and not exists_index(location):
        here = Path.cwd()
        for place in (here, *(folder / "index" for folder in here.parents)):
            if exists_index(place):
                return place
    return location


def model_beside(location: str | Path, name: str, *, dim: int | None = None) -> Path:
    """Where an index's model of a plain backbone is kept: ``index-models/NAME`` beside ``index``.

    >>> model_beside("photos/index", "timm:vit_tiny", dim=64).as_posix()
    'photos/index-models/timm-vit_tiny-pca-64'
    """
    plain = str(location).split("?")[0].rstrip("/")
    if "://" in plain:
        plain = plain.rpartition("/")[2]
    return Path(f"{plain}-models") / (re.sub(r"[^\w.+-]", "-", name) + (f"-pca-{dim}" if dim else ""))
