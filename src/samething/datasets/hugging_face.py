"""A Hugging Face data set on disk (``save_to_disk``): its images, labels and splits.

Written is a folder a split with ``dataset_info.json`` (the types of the columns), ``state.json`` (the names
of the Arrow files) and the files, and above several splits a ``dataset_dict.json``. Images are structs of
bytes and path inside the files. They stay there: the catalog names cells, which are read where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samething.catalog import Catalog, Dropped
from samething.datasets.listing import Labels, Listing
from samething.errors import ArtefactError, InputError
from samething.files import read_json

_ROLES: Final[Mapping[str, str]] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "query+index",
    "query": "query", "queries": "query",
    "index": "index", "gallery": "index", "database": "index",
}  # fmt: skip
"""Name of a split → role."""


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def list_hugging_face(folder: Path, *, domain: str | None = None, labels: Labels = "folder") -> Listing:
    """A row for each image of a data set, or of all its splits; no image is opened.

    The label is the column named label, or the first of class labels, by name; a column domain is kept.
    Splits named train, validation, test, query or index give the roles; other names, or one split alone, give
    none.

    Args:
        folder: written by ``save_to_disk``; the catalog's root.
        domain: domain of all images, where there is no such column.
        labels: ``none`` makes each image its own thing, for the index only.

    Raises:
        ArtefactError: a file is missing or cannot be read.
        InputError: there is no column of images, or none of labels, or no row has both.
    """
    names: Any = [""]  # a data set without splits
    if (folder / "dataset_dict.json").is_file():
        names = read_json(folder / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not names:
        raise _unreadable(folder / "dataset_dict.json", "it names no splits")
    role_of = {name: _ROLES.get(name.lower()) for name in names}
    has_roles = len(names) > 1 and all(role_of.values())
    tables: list[pa.Table] = []
    dropped: list[Dropped] = []
    for name in names:
        role = "index" if labels == "none" else (role_of[name] or "train") if has_roles else "train"
        row = 0
        for part in _parts(folder, name, domain=domain, labels=labels):
            table = part.append_column("role", pa.repeat(pa.scalar(role), part.num_rows))
            kept = np.ones(len(table), dtype=bool)
            for column, what in (("image", "image"), ("label", "label")):
                blank = pc.equal(pc.fill_null(table[column], ""), "").to_numpy()
                for number in np.flatnonzero(blank & kept):
                    image = table["image"][int(number)].as_py() or ""
                    dropped.append(Dropped(image, f"row {row + number} of {name or folder} has no {what}"))
                kept &= ~blank
            tables.append(table.filter(pa.array(kept)))
            row += len(table)
    rows = pa.concat_tables(tables)
    if not rows.num_rows:
        raise InputError(
            f"{folder} holds no images with a label",
            expected="at least one",
            next_step="check the data set",
        )
    name = folder.resolve().name
    return Listing(
        catalog=Catalog.from_table(rows, root=folder, where=str(folder), dataset=name),
        has_roles=has_roles or labels == "none",
        dropped=tuple(dropped),
    )


def _parts(folder: Path, split: str, *, domain: str | None, labels: Labels) -> Iterator[pa.Table]:
    """Image, label and domain of the rows of each Arrow file of a split."""
    info, state = read_json(folder / split / "dataset_info.json"), read_json(folder / split / "state.json")
    features, files = info.get("features") or {}, state.get("_data_files") or []
    if state.get("_indices_files"):
        raise _unreadable(folder / split, "it is a selection of the rows of its files")
    image, label = _columns(folder / split, features, labels)
    for file in files:
        below = f"{split}/{file['filename']}".lstrip("/")
        table = _open(folder / below)
        # structs of bytes and path; plain bytes and plain paths are taken too
        cells, kind = table[image], table[image].type
        if not pa.types.is_struct(kind):
            whole, nothing = cells.combine_chunks(), pa.nulls(len(cells), pa.null())
            is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            both = [nothing.cast(pa.binary()), whole] if is_text else [whole, nothing]
            cells = pa.chunked_array([pa.StructArray.from_arrays(both, ["bytes", "path"])])
        own_path = pc.struct_field(cells, "path").cast(pa.string())
        has_bytes = pc.is_valid(pc.struct_field(cells, "bytes"))
        address = [f"arrow://{image}/{row}::{below}" for row in range(table.num_rows)]
        # an image that is only referred to is a file of its own
        place = pc.if_else(has_bytes, pa.array(address, pa.string()), own_path)
        own_domain = table["domain"].cast(pa.string()) if "domain" in table.column_names else None
        yield pa.table(
            {
                "image": place,
                "label": place if label is None else _texts(table[label], features[label]),
                "domain": pa.repeat(pa.scalar(domain or ""), table.num_rows)
                if own_domain is None
                else own_domain,
            }
        )


def _columns(folder: Path, features: Mapping[str, Any], labels: Labels) -> tuple[str, str | None]:
    """The columns of images and of labels."""
    kinds = {name: kind.get("_type") if isinstance(kind, dict) else None for name, kind in features.items()}
    image = next((name for name, kind in kinds.items() if kind == "Image"), None)
    label = next(
        (name for name in ("label", "labels") if name in kinds),
        next((name for name, kind in kinds.items() if kind == "ClassLabel"), None),
    )
    lacking = [
        *(["images"] if image is None else []),
        *(["labels"] if label is None and labels != "none" else []),
    ]
    if image is None or lacking:
        raise InputError(
            f"{folder} has the columns {', '.join(features)}, none of {' and none of '.join(lacking)}",
            expected="a column of the type Image, and one of the type ClassLabel or named label",
            next_step="rename the column to label, or give --labels none to index the images only",
        )
    return image, None if labels == "none" else label


def _texts(column: pa.ChunkedArray, kind: Mapping[str, Any]) -> pa.ChunkedArray:
    """Labels as texts: class numbers by their names; a number without a name is no label."""
    names = kind.get("names")
    if kind.get("_type") != "ClassLabel" or not names:
        try:
            return column.cast(pa.string())
        except pa.ArrowException as error:
            raise InputError(
                f"its labels are {column.type} ({error})",
                expected="texts or numbers, one per image",
                next_step="write a column label with one label per image",
            ) from error
    number = column.cast(pa.int64())
    is_named = pc.and_(pc.greater_equal(number, 0), pc.less(number, len(names)))
    return pa.chunked_array(
        [pa.array(names, pa.string()).take(pc.if_else(is_named, number, None).combine_chunks())]
    )


def _open(path: Path) -> pa.Table:
    """An Arrow file, mapped and not read into memory."""
    try:
        with pa.memory_map(str(path)) as stream:
            table: pa.Table = pa.ipc.open_stream(stream).read_all()
            return table
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, why: str) -> ArtefactError:
    return ArtefactError(
        f"{path} cannot be read as a Hugging Face data set ({why})",
        expected="a whole folder written by save_to_disk",
        next_step="write it again with Dataset.save_to_disk or DatasetDict.save_to_disk",
    )
