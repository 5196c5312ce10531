"""Which rows of a feature folder are trained on, and which validate."""

from __future__ import annotations

import dataclasses

import numpy as np

from samething.arrays import Int
from samething.catalog import Catalog
from samething.errors import InputError
from samething.features import FeatureSet


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The training rows of a feature folder, and the images that validate."""

    rows: Int[np.ndarray, " n"]
    """Rows of the feature folder that are trained on."""
    classes: Int[np.ndarray, " n"]
    """Their classes, 0…."""
    domains: Int[np.ndarray, " n"]
    """Their domains, 0…."""
    class_counts: Int[np.ndarray, " c"]
    """Images a class."""
    val_rows: Int[np.ndarray, " v"]
    """Rows of the validation images."""
    val_catalog: Catalog
    notes: tuple[str, ...]
    """What was left out, and why."""

    @classmethod
    def of(cls, features: FeatureSet) -> TrainingData:
        """Choose the rows; classes with a single image cannot be learned from and are left out.

        Raises:
            InputError: fewer than two classes remain.
        """
        catalog = features.catalog
        rows = np.flatnonzero(catalog.has_role("train"))
        ids = catalog.class_ids()
        sizes = np.bincount(ids[rows], minlength=ids.max() + 1)
        kept = rows[sizes[ids[rows]] > 1]
        notes = []
        if len(kept) < len(rows):
            notes.append(f"{len(rows) - len(kept):,} labels with one image only were left out of training")
        labels, classes = np.unique(ids[kept], return_inverse=True)
        if len(labels) < 2:
            raise InputError(
                f"{len(labels)} classes with at least two training images in {features.folder}",
                expected="at least two",
                next_step="check the labels and roles of the catalog: samething catalog prints their counts",
            )
        val_rows = np.flatnonzero(catalog.has_role("val"))
        if len(val_rows) == 0:
            notes.append("no validation images: the last head is kept, not the best")
        domains = np.unique(catalog.strings("domain")[kept].astype(str), return_inverse=True)[1]
        return cls(
            rows=kept,
            classes=classes.astype(np.int64),
            domains=domains.astype(np.int64),
            class_counts=np.bincount(classes).astype(np.int64),
            val_rows=val_rows,
            val_catalog=catalog.take(val_rows),
            notes=tuple(notes),
        )
