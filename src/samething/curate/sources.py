"""What is curated: catalogs put together, their images as one list, finer labels, and known features."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samething.arrays import Float, Int
from samething.catalog import BOX_COLUMNS, Catalog, read_table
from samething.catalog.tables import TYPES
from samething.errors import InputError
from samething.features import FeatureSet
from samething.files import require_same
from samething.images import Source, keyed, located

_ROWS_AT_A_TIME: Final = 1 << 14


def sources_of(catalog: Catalog) -> Iterator[Source]:
    """Where each image is, under its absolute path or its URL, and which part of it is meant; row by row."""
    for start in range(0, len(catalog), _ROWS_AT_A_TIME):
        rows = np.arange(start, min(start + _ROWS_AT_A_TIME, len(catalog)))
        for source in catalog.take(rows).sources:
            place = source.location if source.is_remote else os.path.abspath(source.location)  # noqa: PTH100
            yield dataclasses.replace(source, location=place)


def by_attribute(catalog: Catalog, source: Path) -> tuple[Catalog, str]:
    """Labels become ``label/attribute`` where a table names the image's attribute.

    The paper split cars, labelled by model, by their colour: two cars of one model and another colour are not
    the same thing to a shopper, and a head that has to tell them apart learns more.

    Args:
        catalog: whose labels are refined, whatever their role.
        source: table (.csv, .parquet) with ``image`` (or ``img_path``) as in the catalog, and one further
            column, or one called ``attribute``.

    Returns:
        The catalog with the new labels, and in a sentence what was split.

    Raises:
        ArtefactError: the table is missing or unreadable.
        InputError: it lacks a column, names an image twice, or none of the catalog's.
    """
    table = read_table(source)
    image = next((name for name in ("image", "img_path") if name in table.column_names), None)
    others = [name for name in table.column_names if name != image]
    attribute = "attribute" if "attribute" in others else others[0] if len(others) == 1 else None
    if image is None or attribute is None:
        raise InputError(
            f"{source} has the columns {', '.join(table.column_names)}",
            expected="image (or img_path), and one more: attribute",
            next_step="rename the column that classes are split by to attribute",
        )
    images = table[image].cast(pa.string()).combine_chunks()
    if pc.count_distinct(images).as_py() < len(images):
        raise InputError(
            f"{source} names some images twice",
            expected="a row per image",
            next_step="keep one row of each image",
        )
    places = pc.index_in(catalog.table["image"].combine_chunks(), value_set=images)
    values = table[attribute].cast(pa.string()).combine_chunks().take(places).fill_null("")
    given = pc.not_equal(values, "")
    if not pc.any(given).as_py():
        raise InputError(
            f"{source} names none of the catalog's images "
            f"(for instance {images[0].as_py() if len(images) else '-'})",
            expected=f"paths as in the catalog, such as {catalog.table['image'][0].as_py()}",
            next_step="write the paths relative to the catalog's root",
        )
    old = catalog.table["label"].combine_chunks()
    labels = pc.if_else(given, pc.binary_join_element_wise(old, values, "/"), old)
    pairs = pa.table({"old": old, "new": labels, "domain": catalog.table["domain"].combine_chunks()})
    kinds = pairs.group_by(["domain", "old", "new"]).aggregate([]).group_by(["domain", "old"])
    counts = kinds.aggregate([("new", "count")])["new_count"].to_numpy()
    split = counts[counts > 1]
    note = f"{len(split):,} classes were split into {split.sum():,}"
    named = np.asarray(given.to_numpy(zero_copy_only=False), bool)
    if num_without := int((~named & catalog.has_role("train")).sum()):
        note += f"; {num_without:,} images have no attribute and keep their label"
    position = catalog.table.column_names.index("label")
    return Catalog(catalog.table.set_column(position, "label", labels), catalog.root), note


def together(catalogs: Sequence[Catalog], *, all_columns: bool = True) -> Catalog:
    """The rows of several catalogs one after another, under the deepest folder that holds all their roots.

    Without ``all_columns`` the users' own are left out; they may be of different types.
    """
    if len(catalogs) == 1:
        return catalogs[0]
    roots = [os.path.abspath(catalog.root) for catalog in catalogs]  # noqa: PTH100
    root = os.path.commonpath(roots)
    tables = []
    for catalog, own in zip(catalogs, roots, strict=True):
        prefix = Path(os.path.relpath(own, root))
        images = [located(prefix, image) for image in catalog.strings("image")]
        table = catalog.with_column("image", images).table
        names = [name for name in table.column_names if all_columns or name in TYPES.names]
        tables.append(table.select(names))
    return Catalog(pa.concat_tables(tables, promote_options="permissive"), Path(root))


def joined_catalogs(catalogs: Sequence[Catalog]) -> Catalog:
    """One catalog to choose from, of several.

    A label that several catalogs have in one domain, under different data sets, becomes ``dataset/label`` in
    each: two data sets do not mean the same thing by chance.

    Raises:
        InputError: a label is still met in several domains, and cannot be told apart.
    """
    if len(catalogs) == 1:
        return catalogs[0]
    whole = together(catalogs)
    table = whole.table
    keys = ["domain", "label"]
    triples = table.select([*keys, "dataset"]).group_by([*keys, "dataset"]).aggregate([])
    counts = triples.group_by(keys).aggregate([("dataset", "count")])
    shared = counts.filter(pc.greater(counts["dataset_count"], 1))
    if shared.num_rows:
        wanted = pc.binary_join_element_wise(shared["domain"], shared["label"], "\x1f").combine_chunks()
        own = pc.binary_join_element_wise(table["domain"], table["label"], "\x1f")
        prefixed = pc.binary_join_element_wise(table["dataset"], table["label"], "/")
        labels = pc.if_else(pc.is_in(own, value_set=wanted), prefixed, table["label"])
        table = table.set_column(table.column_names.index("label"), "label", labels)
    return Catalog.from_table(table, root=whole.root, where="the catalogs together")


def evaluation_part(catalog: Catalog) -> Catalog:
    """The rows of a catalog that are measured on: all but training, or all where there is only training."""
    measured = ~catalog.has_role("train")
    return catalog.take(measured) if measured.any() else catalog


def checksums(catalog: Catalog) -> pa.Array | pa.ChunkedArray:
    """SHA-256 of all rows, with the box of a part of an image; empty where the catalog has none."""
    if BOX_COLUMNS[0] not in catalog.table.column_names:
        return catalog.table["sha256"].fill_null("")
    pairs = zip(catalog.strings("sha256"), catalog.boxes, strict=True)
    return pa.array([text and keyed(text, box) for text, box in pairs], pa.string())


class KnownFeatures:
    """Features of rows, from one folder or several of the same backbone.

    An image is known by its SHA-256, or by its path where the catalog has none.

    Args:
        folders: feature folders.
        scratch: folder for a temporary file, where rows have to be put in another order.

    Raises:
        FingerprintError: the folders are of different backbones.
        ArtefactError: a folder is missing or unfinished.
    """

    def __init__(self, folders: Sequence[Path], *, scratch: Path) -> None:
        self.sets = [FeatureSet.open(folder) for folder in folders]
        self.scratch = scratch
        first = self.sets[0]
        for other in self.sets[1:]:
            require_same(
                {"backbone": dict(first.backbone)},
                {"backbone": dict(other.backbone)},
                what=f"{other.folder} is of another backbone than {first.folder}",
                next_step="compute the features of all with one backbone",
            )
        self.places = np.empty(0, np.int64)
        """Of the images that were looked for."""
        self._place: dict[str, int] = {}
        start = 0
        for features in self.sets:
            names = zip(sources_of(features.catalog), checksums(features.catalog).to_pylist(), strict=True)
            for row, (source, sha256) in enumerate(names):
                for name in (source.key, sha256):
                    if name:
                        self._place.setdefault(name, start + row)
            start += len(features.rows)

    def place(self, images: Catalog, sha256: pa.Array | pa.ChunkedArray) -> Int[np.ndarray, " n"]:
        """Find each image's features: their place in all folders, -1 where they have none.

        Args:
            images: what is looked for.
            sha256: their checksums, as :func:`checksums` gives them.
        """
        self.places = np.full(len(images), -1, np.int64)
        for row, (source, name) in enumerate(zip(sources_of(images), sha256.to_pylist(), strict=True)):
            place = self._place.get(name, -1) if name else -1
            self.places[row] = self._place.get(source.key, -1) if place < 0 else place
        return self.places

    def gathered(self, images: Int[np.ndarray, " r"]) -> Float[np.ndarray, "r w"]:
        """The features of some images, memory-mapped: of a folder as it is, or of a file without a name."""
        first, places = self.sets[0].rows, self.places[images]
        if len(self.sets) == 1 and len(places) and (np.diff(places) == 1).all():
            return first[places[0] : places[-1] + 1]
        with tempfile.TemporaryFile(dir=self.scratch) as stream:
            shape = (len(places), first.shape[1])
            rows = (
                np.memmap(stream, dtype=first.dtype, mode="w+", shape=shape)
                if len(places)
                else np.empty(shape, first.dtype)
            )
        starts = np.cumsum([0, *(len(features.rows) for features in self.sets)])
        for part in range(0, len(places), 4096):
            own = places[part : part + 4096]
            for number, features in enumerate(self.sets):
                here = np.flatnonzero((own >= starts[number]) & (own < starts[number + 1]))
                rows[part + here] = features.rows[own[here] - starts[number]]
        return rows
