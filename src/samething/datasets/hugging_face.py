"""A Hugging Face data set on disk (``save_to_disk``): its pictures, labels and splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from samething.catalog import Catalog
from samething.datasets.listing import Dropped, Labels, Listing
from samething.errors import ArtefactError, InputError, MissingExtraError
from samething.files import disk_errors
from samething.images import PICTURE_SUFFIXES

if TYPE_CHECKING:
    import datasets

_ROLES: Final[Mapping[str, str]] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "query+index",
    "query": "query", "queries": "query",
    "index": "index", "gallery": "index", "database": "index",
}  # fmt: skip
"""Name of a split → role."""

_SUFFIXES: Final = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"RIFF", ".webp"))

_ROWS_AT_A_TIME: Final = 64


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def list_hugging_face(
    folder: Path, *, pictures: Path, domain: str | None = None, labels: Labels = "folder"
) -> Listing:
    """A row for each picture of a data set, or of all its splits.

    The label is the column of class labels (by name), or one named label; a column domain is kept. Splits
    named train, validation, test, query or index give the roles; other names, or one split alone, give none.

    Args:
        folder: written by ``save_to_disk``.
        pictures: folder for the pictures that are embedded in the tables; those that are there already with
            the same size are left as they are.
        domain: domain of all pictures, where there is no such column.
        labels: ``none`` makes each picture its own thing, for the index only.

    Raises:
        ArtefactError: the folder cannot be read.
        InputError: there is no column of pictures, or none of labels.
        MissingExtraError: the package ``datasets`` is not installed.
    """
    splits = _load(folder)
    role_of = {name: _ROLES.get(name.lower()) for name in splits}
    has_roles = len(splits) > 1 and all(role_of.values())
    rows: list[dict[str, object]] = []
    dropped: list[Dropped] = []
    for name, split in splits.items():
        read = _pictures_of(folder, name, split, pictures, labels=labels)
        for number, (image, label, own_domain) in enumerate(read):
            if image is None or not label:
                what = "picture" if image is None else "label"
                dropped.append(Dropped(image or "", f"row {number} of {name} has no {what}"))
                continue
            role = "index" if labels == "none" else role_of[name] if has_roles else "train"
            rows.append({"image": image, "label": label, "domain": own_domain or domain, "role": role})
    if not rows:
        raise InputError(
            f"{folder} holds no pictures with a label",
            expected="at least one",
            next_step="check the data set",
        )
    for row in rows:
        row["dataset"] = folder.resolve().name
    return Listing(
        catalog=Catalog.from_rows(rows, root=pictures),
        has_roles=has_roles or labels == "none",
        dropped=tuple(dropped),
    )


def _load(folder: Path) -> dict[str, datasets.Dataset]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError("datasets", extra="hf") from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder} cannot be read as a Hugging Face data set ({error})",
            expected="a whole folder written by save_to_disk",
            next_step="write it again with Dataset.save_to_disk or DatasetDict.save_to_disk",
        ) from error
    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _pictures_of(
    folder: Path, name: str, split: datasets.Dataset, pictures: Path, *, labels: Labels
) -> Iterator[tuple[str | None, str, str | None]]:
    """Path, label and domain of each row; writes the pictures that are embedded."""
    import datasets

    features = split.features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = _label_column(features) if labels == "folder" else None
    lacking = [
        what
        for what, column in (("pictures", image), ("labels", label))
        if column is None and not (what == "labels" and labels == "none")
    ]
    if lacking:
        raise InputError(
            f"{folder}: the split {name} has the columns {', '.join(features)}, "
            f"none of {' and none of '.join(lacking)}",
            expected="a column of the type Image, and one of the type ClassLabel or named label",
            next_step="rename the column to label, or give --labels none to index the pictures only",
        )
    kept = [column for column in (image, label, "domain") if column in features]
    split = split.select_columns(kept).cast_column(image, datasets.Image(decode=False))
    row = 0
    for batch in split.iter(batch_size=_ROWS_AT_A_TIME):
        for place, value in enumerate(batch[image]):
            path = _path_of(value, pictures, f"{name}/{row:08}")
            text = path or "" if label is None else _label_text(features[label], batch[label][place])
            yield path, text, batch["domain"][place] if "domain" in kept else None
            row += 1


def _label_column(features: Mapping[str, Any]) -> str | None:
    import datasets

    named = next((name for name in ("label", "labels") if name in features), None)
    return named or next(
        (name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None
    )


def _label_text(kind: Any, value: object) -> str:
    import datasets

    if value is None or (isinstance(kind, datasets.ClassLabel) and isinstance(value, int) and value < 0):
        return ""
    return str(kind.int2str(value)) if isinstance(kind, datasets.ClassLabel) else str(value)


def _path_of(value: Mapping[str, Any] | None, pictures: Path, name: str) -> str | None:
    """The picture's own file, or a new one that holds its bytes."""
    content, own = (value or {}).get("bytes"), (value or {}).get("path")
    if content is None:
        return None if own is None else str(Path(own).resolve())
    suffix = Path(own or "").suffix.lower()
    if suffix not in PICTURE_SUFFIXES:
        suffix = next((ending for start, ending in _SUFFIXES if content.startswith(start)), ".jpg")
    target = pictures / f"{name}{suffix}"
    if not (target.is_file() and target.stat().st_size == len(content)):
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.tmp")
            partial.write_bytes(content)
            partial.replace(target)
    return f"{name}{suffix}"
