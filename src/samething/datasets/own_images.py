"""One's own images: a folder whose sub-folders show a thing each, or a table with an image per row."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from samething.catalog import Catalog, Dropped, is_own_format, read_table
from samething.datasets.listing import Labels, Listing
from samething.errors import InputError, is_utf8, visible
from samething.images import Box, find_files, is_url


def list_folder(
    folder: Path,
    *,
    domain: str | None = None,
    labels: Labels = "folder",
    root: Path | None = None,
    exclude: Sequence[str] = (),
) -> Listing:
    """List the images of a folder and its sub-folders, in sorted order.

    Args:
        folder: where to look; see :func:`samething.images.find_files` for what is passed over.
        domain: domain of all images.
        labels: ``folder`` takes the path of the sub-folder as the label, ``a/b`` for nested ones, and drops
            images that lie in no sub-folder; ``none`` makes each image its own thing, for the index only.
        root: the folder that the catalog's paths start from, this one or one above it.
        exclude: patterns of names or paths that are passed over.

    Raises:
        InputError: no images, none in a sub-folder, or a root that does not hold the folder.
    """
    root = folder if root is None else root
    if not folder.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{folder} does not lie in the root {root}",
            expected="the same folder or one above it",
            next_step="leave --root away, or give a folder that holds the images",
        )
    prefix = folder.resolve().relative_to(root.resolve())
    rows: list[dict[str, object]] = []
    dropped: list[Dropped] = []
    passed_over: Counter[str] = Counter()
    for found in find_files(folder, exclude):
        if not found.is_image:
            passed_over[visible(found.passed_over)] += 1
            continue
        below = Path(found.path).relative_to(folder)
        image, label = (prefix / below).as_posix(), below.parent.as_posix()
        if not is_utf8(image):
            dropped.append(Dropped(visible(image), "its path is not UTF-8; rename it"))
        elif labels == "none":
            rows.append({"image": image, "label": image, "role": "index"})
        elif label == ".":
            dropped.append(Dropped(image, "it lies in no sub-folder, so it has no label"))
        else:
            rows.append({"image": image, "label": label})
    if not rows and dropped:
        raise InputError(
            f"{folder} holds {len(dropped)} images, but none with a label "
            f"(for instance {dropped[0].image}: {dropped[0].reason})",
            expected="one sub-folder for each thing, with the images of it inside",
            next_step="sort the images into sub-folders; or give --labels none, to index them only",
        )
    if not rows:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(5))
        seen = f"{passed_over.total()} other files were seen ({kinds})" if passed_over else "it is empty"
        raise InputError(
            f"{folder} holds no images: {seen}",
            expected="JPEG, PNG, WebP or other images in it or in its sub-folders",
            next_step="check the path",
        )
    for row in rows:
        row.update(domain=domain, dataset=visible(folder.resolve().name))
    return Listing(
        catalog=Catalog.from_rows(rows, root=root),
        has_roles=labels == "none",
        dropped=tuple(dropped),
        passed_over=dict(sorted(passed_over.items())),
    )


def list_table(
    source: Path, *, domain: str | None = None, labels: Labels = "folder", root: Path | None = None
) -> Listing:
    """Read ``img_path,label[,domain,dataset,role]`` and leave out the rows that cannot be used.

    A row without a path or label, and every further row of the same path, is dropped with its row number
    (counted from 0; in a CSV file without line breaks in its cells, line = row + 2).

    Args:
        source: a ``.csv`` or ``.parquet`` file.
        domain: domain of all images, for a table that has no such column.
        labels: ``folder`` reads the column ``label``; ``none`` makes each image its own thing, for the
            index only.
        root: the folder that relative paths in the table start from; by default the table's own, or the one
            that a catalog names.

    Raises:
        ArtefactError: the table is missing or unreadable.
        InputError: it lacks columns, has no usable rows, or names domains although ``domain`` is given.
    """
    table = read_table(source)
    if domain is not None and "domain" in table.column_names:
        raise InputError(
            f"--domain {domain}, and {source} has a column domain",
            expected="one of the two",
            next_step="leave --domain away, or remove the column",
        )
    whole = _without_labels(source, table, root) if labels == "none" else Catalog.read(source, root=root)
    images, folder = whole.strings("image"), whole.root.resolve()
    if any(image.startswith("/") for image in images):
        # relative below the root, so that the folder can be moved with its catalog
        relative = [
            Path(image).relative_to(folder).as_posix() if Path(image).is_relative_to(folder) else image
            for image in images
        ]
        whole = whole.with_column("image", relative)
    if domain is not None:
        whole = whole.with_column("domain", [domain] * len(whole))
    kept, dropped = _usable_rows(whole)
    if not len(kept):
        found = f"{len(dropped)} rows, but none that can be used" if dropped else "no rows"
        raise InputError(
            f"{source} has {found}",
            expected="rows with a path and a label",
            next_step=f"correct the table: {dropped[0].reason}" if dropped else "fill the table",
        )
    return Listing(
        catalog=whole.take(kept),
        has_roles=labels == "none" or "role" in table.column_names,
        dropped=tuple(dropped),
        rows=kept,
    )


def _without_labels(source: Path, table: pa.Table, root: Path | None) -> Catalog:
    """The table's images, each its own thing, in the index; its labels and roles are left aside."""
    if is_own_format(table):
        root = Catalog.read(source, root=root).root
    column = next((name for name in ("image", "img_path") if name in table.column_names), None)
    for name in ("label", "role"):
        if name in table.column_names:
            table = table.drop_columns([name])
    if column is not None:
        table = table.append_column("label", table[column])
        table = table.append_column("role", pa.array(["index"] * table.num_rows))
    return Catalog.from_table(table, root=root or source.parent, where=str(source), dataset=source.stem)


def _usable_rows(catalog: Catalog) -> tuple[np.ndarray, list[Dropped]]:
    kept: list[int] = []
    dropped: list[Dropped] = []
    first_row: dict[tuple[str, Box | None], int] = {}
    boxes = catalog.boxes
    labels = catalog.strings("label")
    for row, (image, label) in enumerate(zip(catalog.strings("image"), labels, strict=True)):
        place = image if is_url(image) else os.path.normpath(image)
        if not image.strip():
            dropped.append(Dropped(image, f"row {row}: the path is empty"))
        elif not label.strip():
            dropped.append(Dropped(image, f"row {row}: the label is empty"))
        elif (first := first_row.setdefault((place, boxes[row]), row)) != row:
            reason = f"row {row}: listed before in row {first}"
            if labels[first] != label:
                reason += f", with the label {labels[first]!r} and not {label!r}"
            dropped.append(Dropped(image, reason))
        else:
            kept.append(row)
    return np.asarray(kept, np.int64), dropped
