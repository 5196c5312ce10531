"""Training sets rebuilt by their rules from public data sets, and held against the published numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow.compute as pc

from samething.catalog import Catalog
from samething.datasets.dataset import Part, Published
from samething.datasets.public import DATASETS, read_dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training set put together by rules from public data sets."""

    parts: tuple[str, ...]
    """Keys of the data sets that it is made from."""
    changes: Mapping[str, Any]
    """Fields of :class:`samething.curate.CurateConfig` that it sets."""
    published: Mapping[str, Published]
    """What its authors say came out, by data set; the empty key is for all."""
    note: str
    """What to know when numbers are compared."""

    def read(self, data_root: Path) -> tuple[list[Catalog], list[str]]:
        """The training rows of its data sets, and what is odd about them.

        Raises:
            ArtefactError: a data set is missing under the data root; says where it comes from.
            InputError: a file is not as its authors promise.
        """
        catalogs: list[Catalog] = []
        notes: list[str] = []
        for key in self.parts:
            part: Part = "train" if DATASETS[key].has_roles else "all"
            listing = read_dataset(key, data_root=data_root, part=part)
            rows = listing.catalog
            catalogs.append(rows.with_column("role", ["train"] * len(rows)))
            notes += listing.warnings
            if listing.dropped:
                first = listing.dropped[0]
                notes.append(
                    f"{key}: {len(listing.dropped):,} rows of the annotation were left out, for instance "
                    f"{first.image}: {first.reason}"
                )
        return catalogs, notes

    def counts(self, catalog: Catalog) -> dict[str, tuple[int, int | None, int, int | None]]:
        """Of each data set and of ``all``: classes and those published, images and those published."""
        found = {}
        for key in (*self.parts, ""):
            table = catalog.table
            if key:
                table = table.filter(pc.equal(table["dataset"], key))
            said = self.published.get(key)
            classes, images = (None, None) if said is None else (said.classes, said.images)
            num_classes = pc.count_distinct(table["label"]).as_py()
            found[key or "all"] = num_classes, classes, table.num_rows, images
        return found


RECIPES: Final[Mapping[str, Recipe]] = {
    "m4d-35k": Recipe(
        # Florek et al., GCPR 2024
        parts=("products_10k", "gldv2", "deep_fashion", "stanford_cars_refined"),
        changes={
            "min_images": (3,),
            "max_images": ("gldv2=100",),
            "max_classes": ("gldv2=10000",),
            # the paper's rules are these alone; give --duplicates or --against to go beyond them
            "duplicates": "none",
        },
        published={
            # the published table calls the refined cars by the name of their images
            name.replace("stanford_cars", "stanford_cars_refined"): row
            for row in DATASETS["m4d_35k"].published
            for name in [row.where.get("dataset", "")]
        },
        note="The paper's draw of 10,000 landmarks is not published, so their images differ by chance; "
        "published numbers are rounded to 100.",
    ),
}
"""Name → recipe. To add one, put a row here."""
