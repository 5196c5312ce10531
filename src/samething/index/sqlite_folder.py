"""The folder of the embedded engine: what lies in it, and what its manifest says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, TypeAlias

from samething.errors import ArtefactError, FingerprintError, InputError
from samething.files import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    Json,
    Manifest,
    disk_errors,
    is_finished,
    read_manifest,
)
from samething.index.description import IndexDescription
from samething.retrieval.codes import Coder

Stamp: TypeAlias = tuple[int, int]
NO_STAMP: Final[Stamp] = (-1, -1)
"""That of no manifest."""

FORMAT_VERSION: Final = 4
"""Version 4 keeps regions, 3 codes; one with neither is written as version 2, which earlier programs read."""
_ENGINE: Final = "sqlite"


def manifest_stamp(folder: Path) -> Stamp:
    """Changes when the manifest is written anew; quick to ask for."""
    try:
        status = os.stat(f"{folder}/{MANIFEST_NAME}")  # noqa: PTH116 - at each search
    except OSError:
        return (0, 0)
    return (status.st_ino, status.st_mtime_ns)


def graph_path(folder: Path, number: int) -> Path:
    """File of a generation's graph."""
    return folder / f"approximate-{number}.faiss"


def generation_numbers(folder: Path) -> list[int]:
    """Numbers of the generations whose files are there, those in the making and those left over included."""
    names = [path.name.removeprefix("rows-").removesuffix(".sqlite") for path in folder.glob("rows-*.sqlite")]
    return [int(name) for name in names if name.isdigit()]


def require_free(folder: Path) -> None:
    """Refuse a place that holds something else; what a killed ``create`` left behind is no obstacle."""
    if is_finished(folder):
        raise ArtefactError(
            f"{folder} holds a finished artefact already",
            expected="a new or empty folder",
            next_step="open the index that is there, or choose another output with -o",
        )
    with disk_errors(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    ours = ("rows-1.sqlite", "vectors-1.", ".lock")
    foreign = [name for name in names if not name.startswith(ours) and not name.endswith(PARTIAL_SUFFIX)]
    if foreign:
        raise InputError(
            f"{folder} holds other files, such as {foreign[0]}",
            expected="a new or empty folder",
            next_step="choose another output with -o",
        )


def bound_to(description: IndexDescription) -> dict[str, Json]:
    """What a generation is bound to, for a manifest."""
    model = {"name": description.model_name, "fingerprint": description.model_fingerprint}
    return {
        "engine": _ENGINE,
        "model": model,
        "dim": description.dim,
        "extra_columns": dict(description.extra_columns),
        **({} if description.coder is None else {"codes": description.coder.to_json()}),
        **({} if description.regions is None else {"regions": description.regions}),
    }


def new_manifest(description: IndexDescription, number: int) -> Manifest:
    """The manifest of an index. Its rows change, so their number is not in it."""
    return Manifest(
        kind="index",
        format_version=FORMAT_VERSION if description.regions else 2 if description.coder is None else 3,
        made_from=bound_to(description),
        content={"generation": number},
    )


def read_description(folder: Path) -> tuple[IndexDescription, int]:
    """What an index is bound to, and the number of the generation in use.

    Raises:
        ArtefactError: no index, unfinished, damaged, of a newer format, or of an earlier engine.
    """
    manifest = read_manifest(folder, kind="index", format_version=FORMAT_VERSION)
    made_from = manifest.made_from
    if made_from.get("engine", _ENGINE) != _ENGINE:
        raise ArtefactError(
            f"{folder} was made by an earlier version, with the engine {made_from['engine']!r}",
            expected=f"an index of the engine {_ENGINE!r}",
            next_step="make it again beside it: samething index FOLDER --model MODEL -o NEW-INDEX",
        )
    try:
        description = IndexDescription(
            dim=int(made_from["dim"]),
            model_name=str(made_from["model"]["name"]),
            model_fingerprint=str(made_from["model"]["fingerprint"]),
            extra_columns=dict(made_from["extra_columns"]),
            coder=Coder.from_json(made_from["codes"]) if "codes" in made_from else None,
            regions=str(made_from["regions"]) if "regions" in made_from else None,
        )
        return description, int(manifest.content["generation"])
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise ArtefactError(
            f"{folder / MANIFEST_NAME} is damaged ({error})",
            expected="the manifest that was written with the index",
            next_step="restore it from a copy, or make the index again",
        ) from error


def of_another_model(location: str, known: IndexDescription, found: IndexDescription) -> FingerprintError:
    """The error of a handle whose index was rebuilt with another model."""
    return FingerprintError(
        f"the index {location} was rebuilt with the model {found.model_name!r} "
        f"({found.model_fingerprint}) since it was opened",
        expected=f"vectors of {known.model_name!r} ({known.model_fingerprint})",
        next_step="open it again with the new model",
    )
