"""Training sets rebuilt by their rules from public data sets, and held against the published numbers."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc

from samething.catalog import Catalog
from samething.curate.curate_config import RECIPES, Recipe
from samething.curate.curated import PublishedCounts
from samething.datasets.public import DATASETS, read_dataset
from samething.errors import InputError


def find_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        InputError: there is none.
    """
    if name not in RECIPES:
        raise InputError(
            f"--recipe {name}", expected=f"one of {', '.join(RECIPES)}", next_step="choose one of these"
        )
    return RECIPES[name]


def read_parts(recipe: Recipe, data_root: Path) -> tuple[list[Catalog], list[str]]:
    """The training rows of a recipe's data sets, and what is odd about them.

    Raises:
        ArtefactError: a data set is missing under the data root; says where it comes from.
        InputError: a file is not as its authors promise.
    """
    catalogs: list[Catalog] = []
    notes: list[str] = []
    for key in recipe.parts:
        listing = read_dataset(key, data_root=data_root, part="train" if DATASETS[key].has_roles else "all")
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


def published_counts(recipe: Recipe, catalog: Catalog) -> list[PublishedCounts]:
    """What came out of a recipe beside what was published, a row per data set and one for all."""
    found = []
    for key in (*recipe.parts, ""):
        table = catalog.table
        if key:
            table = table.filter(pc.equal(table["dataset"], key))
        said = recipe.published.get(key)
        found.append(
            PublishedCounts(
                dataset=key or "all",
                classes=pc.count_distinct(table["label"]).as_py(),
                images=table.num_rows,
                published_classes=None if said is None else said.classes,
                published_images=None if said is None else said.images,
            )
        )
    return found
