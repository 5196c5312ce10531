"""Splitting classes: by a second attribute from a table, or by what a backbone sees in them.

The paper split cars, labelled by model, by their colour: two cars of one model and another colour are not the
same thing to a shopper, and a head that has to tell them apart learns more.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from samething.arrays import FeatureRows, unit
from samething.catalog import Catalog, read_table
from samething.errors import InputError, MissingExtraError
from samething.progress import progress_bar

MOST_PARTS: Final = 8
"""Parts that a class is split into at most."""

LEAST_SILHOUETTE: Final = 0.25
"""Mean silhouette (Rousseeuw 1987) from which a class is split; see docs/curation.md."""

LARGEST_CLASS: Final = 2000
"""Images of a class that are compared with each other at most; larger classes are left whole."""


@dataclasses.dataclass(frozen=True)
class Refined:
    """A catalog whose classes were split."""

    catalog: Catalog
    num_split: int
    """Classes that were split."""
    num_parts: int
    """What they became."""
    num_without: int = 0
    """Training images whose label stayed because nothing says to which part they belong."""

    def describe(self) -> str:
        """What happened, in a sentence."""
        text = f"{self.num_split:,} classes were split into {self.num_parts:,}"
        return (
            f"{text}; {self.num_without:,} images have no attribute and keep their label"
            if (self.num_without)
            else text
        )


def by_attribute(catalog: Catalog, source: Path) -> Refined:
    """Labels become ``label/attribute`` where a table names the image's attribute.

    Args:
        catalog: whose labels are refined, whatever their role.
        source: table (.csv, .parquet) with ``image`` (or ``img_path``) as in the catalog, and one further
            column, or one called ``attribute``.

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
    joined = pc.binary_join_element_wise(catalog.table["label"].combine_chunks(), values, "/")
    labels = pc.if_else(given, joined, catalog.table["label"].combine_chunks())
    named = np.asarray(given.to_numpy(zero_copy_only=False), bool)
    num_without = int((~named & catalog.has_role("train")).sum())
    return _refined(catalog, labels, num_without)


def by_clusters(
    catalog: Catalog, rows: Int[np.ndarray, " r"], features: FeatureRows, *, least: int, silhouette: float
) -> Refined:
    """Labels become ``label/1``, ``label/2``, … where a class falls into clearly separate parts.

    Average linkage over cosine distances, for 2 to 8 parts; the number with the best mean silhouette wins, if
    it reaches ``silhouette`` and every part has ``least`` images.

    Args:
        catalog: whose labels are refined.
        rows: rows that are clustered, of training; others of their classes keep the label.
        features: of those rows.
        least: images that a part must have.
        silhouette: mean silhouette from which a class is split, in (-1, 1).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        import sklearn.cluster  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", extra="train") from error
    classes = catalog.class_ids()[rows]
    order = np.argsort(classes, kind="stable")
    bounds = np.flatnonzero(np.diff(classes[order])) + 1
    parts = np.zeros(len(catalog), np.int64)
    members_of = [own for own in np.split(order, bounds) if 2 * least <= len(own) <= LARGEST_CLASS]
    with progress_bar("classes", disable=not members_of) as progress:
        task = progress.add_task("clustering", total=len(members_of))
        for own in members_of:
            parts[rows[own]] = _parts(np.asarray(features[own], np.float64), least, silhouette)
            progress.advance(task)
    texts = pa.array(np.char.mod("%d", parts)).cast(pa.string())
    old = catalog.table["label"].combine_chunks()
    labels = pc.if_else(pa.array(parts > 0), pc.binary_join_element_wise(old, texts, "/"), old)
    return _refined(catalog, labels, 0)


def _parts(features: FeatureRows, least: int, silhouette: float) -> Int[np.ndarray, " n"]:
    """Part of each image, from 1, in the order of their first images; 0 for a class that stays whole."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    rows = unit(features)
    distances = np.clip(1 - rows @ rows.T, 0, 2)
    np.fill_diagonal(distances, 0)
    best, chosen = silhouette, None
    for number in range(2, min(MOST_PARTS, len(features) // least) + 1):
        clustering = AgglomerativeClustering(n_clusters=number, metric="precomputed", linkage="average")
        found = clustering.fit_predict(distances)
        if np.bincount(found).min() < least:
            continue
        score = float(silhouette_score(distances, found, metric="precomputed"))
        if score >= best:
            best, chosen = score, found
    if chosen is None:
        return np.zeros(len(features), np.int64)
    _, firsts, numbers = np.unique(chosen, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(firsts)) + 1
    return np.asarray(place[numbers], np.int64)


def _refined(catalog: Catalog, labels: pa.Array, num_without: int) -> Refined:
    """The catalog with new labels, and how many classes they split."""
    pairs = pa.table(
        {
            "old": catalog.table["label"].combine_chunks(),
            "new": labels,
            "domain": catalog.table["domain"].combine_chunks(),
        }
    )
    kinds = pairs.group_by(["domain", "old", "new"]).aggregate([]).group_by(["domain", "old"])
    counts = kinds.aggregate([("new", "count")])["new_count"].to_numpy()
    position = catalog.table.column_names.index("label")
    table = catalog.table.set_column(position, "label", labels)
    return Refined(
        Catalog(table, catalog.root),
        num_split=int((counts > 1).sum()),
        num_parts=int(counts[counts > 1].sum()),
        num_without=num_without,
    )
