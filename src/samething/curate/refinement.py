"""Splitting classes by a second attribute from a table.

The paper split cars, labelled by model, by their colour: two cars of one model and another colour are not the
same thing to a shopper, and a head that has to tell them apart learns more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samething.catalog import Catalog, read_table
from samething.errors import InputError


def by_attribute(catalog: Catalog, source: Path) -> tuple[Catalog, str]:
    """Labels become ``label/attribute`` where a table names the image's attribute.

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
