"""The table of public data sets, and the reading of one of them."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samething.catalog import BOX_COLUMNS, Catalog, Dropped
from samething.datasets.boxes import coco, read_deep_fashion2
from samething.datasets.dataset import Dataset, Part, Published, Reader
from samething.datasets.ground_truth import read_forb, read_instre, revisited
from samething.datasets.ilias import read_ilias, read_ilias_core, read_mini_ilias
from samething.datasets.listing import Listing
from samething.datasets.lists import (
    class_folders,
    grouped,
    listed,
    read_cars196,
    read_cub_200,
    read_fashion200k,
    read_gldv2,
    read_gpr1200,
    read_guiec,
    read_hm,
    read_in_shop,
    read_m4d_35k,
    read_met,
    read_sop,
)
from samething.datasets.official import OfficialFiles
from samething.datasets.uned import PUBLISHED, read_uned
from samething.errors import ArtefactError, InputError
from samething.images import container_of

_CARS: Final = "stanford_cars/cars_train/cars_train/"

_READERS: Final[Mapping[str, Reader]] = {
    "products_10k": listed("products-10k/train.csv", "products-10k/train/", "name", "class"),
    "gldv2": read_gldv2,
    "deep_fashion": grouped("deepfashion/deepfashion_train.json", "deepfashion/", levels=2),
    "met_art": read_met,
    "shopee": listed("shopee/train.csv", "shopee/train_images/", "image", "label_group"),
    "hm": read_hm,
    "rp2k": listed("rp2k/train.csv", "rp2k/train/", "img_path", "img_id"),
    "sop": read_sop,
    "fashion200k": read_fashion200k,
    "food_rec22": coco("fr22_train_v2/annotations.json", "fr22_train_v2/images/"),
    "stanford_cars": listed("stanford_cars/sc_train.csv", _CARS, "image", "Class", "Label"),
    "deep_fashion2": read_deep_fashion2,
    # the paper trains on the test part, whose labels were cleaned
    "food101": grouped("food-101/meta/test.json", "food-101/images/", ".jpg"),
    "furniture180": class_folders("furniture_180", "furniture180_train.csv"),
    "storefronts146": class_folders("storefronts_146", "storefronts146_train.csv"),
    "stanford_cars_refined": listed("stanford_cars/refined_train.csv", _CARS, "image", "Class"),
    "m4d_35k": read_m4d_35k,
    "uned": read_uned,
    "ilias_core": read_ilias_core,
    "mini_ilias": read_mini_ilias,
    "ilias": read_ilias,
    "gpr1200": read_gpr1200,
    "cub_200": read_cub_200,
    "cars196": read_cars196,
    "in_shop": read_in_shop,
    "guiec": read_guiec,
    "roxford": revisited("roxford5k"),
    "rparis": revisited("rparis6k"),
    "instre": read_instre,
    "forb": read_forb,
}


DATASETS: Final[dict[str, Dataset]] = {
    key: Dataset(
        key=key,
        reader=_READERS[key],
        files=tuple(row.pop("files")),
        published=tuple(Published(**part) for part in row.pop("published", ())),
        **row,
    )
    for key, row in tomllib.loads(Path(__file__).with_name("public.toml").read_text(encoding="utf-8")).items()
}
"""Key → data set. To add one, put a row here: ``DATASETS["mine"] = Dataset(…)``."""

DATASETS["uned"] = dataclasses.replace(DATASETS["uned"], published=PUBLISHED)

# Images that are looked for, evenly spaced; looking for millions takes minutes on a network disk.
_IMAGES_LOOKED_AT: Final = 64

_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train",),
    "val": ("val",),
    "test": ("query", "index", "query+index"),
}


def find_dataset(key: str) -> Dataset:
    """The row of a data set.

    Raises:
        InputError: there is none of that name; names the nearest ones.
    """
    if key not in DATASETS:
        near = difflib.get_close_matches(key.lower().replace("-", "_"), DATASETS, n=3, cutoff=0.5)
        raise InputError(
            f"there is no data set {key!r}",
            expected=f"one of {', '.join(DATASETS)}",
            next_step=f"did you mean {' or '.join(near)}?" if near else "samething datasets describes them",
        )
    return DATASETS[key]


def read_dataset(
    key: str,
    *,
    data_root: Path,
    part: Part = "all",
    domains: tuple[str, ...] = (),
    margin: float | None = None,
    check_files: bool = False,
) -> Listing:
    """Read a public data set from its official layout; no image is opened.

    Args:
        key: a key of :data:`DATASETS`.
        data_root: folder that holds the folders of all data sets; the catalog's paths start there.
        part: ``train``, ``val``, ``test`` (queries and index), or ``all`` of them.
        domains: for a data set of several domains, those wanted; empty for all.
        margin: around boxes, in percent of the box; by default the data set's own.
        check_files: look for every image, and leave out those that are missing.

    Returns:
        The catalog with what was left out and why. Where the numbers are not the published ones, or images
        looked at are missing, the warnings say so.

    Raises:
        ArtefactError: a file or folder of the official layout is missing, or all images looked at are.
        InputError: a file is not as promised, or the arguments do not fit together.
    """
    dataset = find_dataset(key)
    data_root = Path(data_root)
    takes_margin = dataset.margin_percent is not None
    if margin is not None and not (takes_margin and 0 <= margin <= 100):
        raise InputError(
            f"--margin {margin:g} for {dataset.title}",
            expected="a percentage in [0, 100]"
            if takes_margin
            else "no margin: its rows are whole images, not boxes",
            next_step="give another margin" if takes_margin else "leave --margin away",
        )
    if domains and dataset.domain != "several":
        raise InputError(
            f"--domain {','.join(domains)} for {dataset.title}, which is all {dataset.domain}",
            expected="a choice of domains for a data set of several",
            next_step="leave --domain away",
        )
    if margin is not None:
        dataset = dataclasses.replace(dataset, margin_percent=margin)
    source = OfficialFiles(dataset=dataset, data_root=data_root, part=part, domains=domains)
    missing = dataset.missing(data_root)
    if missing:
        raise source.missing(*missing)
    table = dataset.reader(source)
    if not table.num_rows:
        raise source.malformed(
            dataset.files[0], "lists nothing that can be seen", expected="at least one row"
        )
    table = _of_part(source, table)
    warnings = [
        f"{dataset.title}, {published.describe()} are published; here there are "
        "{:,} classes, {:,} images".format(*published.count(table))
        for published in dataset.published
        if _is_read(published.where, source, table) and published.differs(table)
    ]
    table, dropped = _without_repeats(table)
    if check_files:
        table, gone = _without_missing(table, data_root)
        dropped += gone
    else:
        warnings += _look_at_some(source, table)
    if not table.num_rows:
        raise source.missing(dropped[0].image)
    catalog = Catalog.from_table(table, root=data_root, where=dataset.title, dataset=dataset.key)
    return Listing(
        catalog=catalog, has_roles=dataset.has_roles, dropped=tuple(dropped), warnings=tuple(warnings)
    )


def _of_part(source: OfficialFiles, table: pa.Table) -> pa.Table:
    """The rows of the part and the domains wanted."""
    kept = np.ones(table.num_rows, dtype=bool)
    # a reader that reads a part alone gives its images the roles they have there
    if source.part != "all" and "split" not in table.column_names:
        roles = pa.array(_PARTS[source.part])
        kept &= pc.is_in(table["role"], value_set=roles).to_numpy()
    if source.domains:
        kept &= pc.is_in(table["domain"], value_set=pa.array(source.domains)).to_numpy()
    if kept.all():
        return table
    if not kept.any():
        have = {name: ", ".join(sorted(pc.unique(table[name]).to_pylist())) for name in ("role", "domain")}
        raise InputError(
            f"{source.dataset.title} has no rows for --part {source.part}"
            + (f" --domain {','.join(source.domains)}" if source.domains else ""),
            expected=f"some of its roles ({have['role']}) and domains ({have['domain']})",
            next_step="leave --part or --domain away",
        )
    return table.filter(pa.array(kept))


def _is_read(where: Mapping[str, str], source: OfficialFiles, table: pa.Table) -> bool:
    """Whether a published part is among what was read: all was wanted, or rows of the part are there."""
    if not where:
        return source.part == "all" and not source.domains
    return all(
        column in table.column_names and pc.any(pc.equal(table[column], value)).as_py()
        for column, value in where.items()
    )


def _without_repeats(table: pa.Table) -> tuple[pa.Table, list[Dropped]]:
    """The rows without those that repeat another's image, box, role and domain."""
    keys = ["image", "role", "domain", *(name for name in BOX_COLUMNS if name in table.column_names)]
    rows = np.arange(table.num_rows)
    numbered = table.select(keys).append_column("row", pa.array(rows))
    kept = np.sort(numbered.group_by(keys).aggregate([("row", "min")])["row_min"].to_numpy())
    again = np.setdiff1d(rows, kept, assume_unique=True)
    if not len(again):
        return table, []
    kept_table, repeated = table.take(pa.array(kept)), table.take(pa.array(again))
    place = pc.index_in(repeated["image"], value_set=kept_table["image"].combine_chunks())
    labels = zip(repeated["label"].to_pylist(), kept_table["label"].take(place).to_pylist(), strict=True)
    dropped = []
    for row, image, (own, first) in zip(again, repeated["image"].to_pylist(), labels, strict=True):
        other = "" if first == own else f", with the label {first!r} and not {own!r}"
        dropped.append(Dropped(image, f"row {row}: listed before{other}"))
    return kept_table, dropped


def _without_missing(table: pa.Table, data_root: Path) -> tuple[pa.Table, list[Dropped]]:
    """The rows whose images are there; each folder is listed once, faster than asking for each file."""
    names: dict[str, frozenset[str]] = {}
    there = np.ones(table.num_rows, dtype=bool)
    row = 0
    for batch in table["image"].chunks:
        for image in batch.to_pylist():
            folder, _, name = container_of(image).rpartition("/")
            if folder not in names:
                names[folder] = _listed(data_root / folder)
            there[row] = name in names[folder]
            row += 1
    gone = table["image"].filter(pa.array(~there)).to_pylist()
    rows = np.flatnonzero(~there)
    dropped = [Dropped(image, f"row {row}: does not exist") for row, image in zip(rows, gone, strict=True)]
    return table.filter(pa.array(there)), dropped


def _listed(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except OSError:
        return frozenset()


def _look_at_some(source: OfficialFiles, table: pa.Table) -> list[str]:
    """Look for images evenly spaced over the rows.

    Raises:
        ArtefactError: none of them is there.
    """
    places = np.unique(np.linspace(0, table.num_rows - 1, _IMAGES_LOOKED_AT).astype(np.int64))
    images = table["image"].take(pa.array(places)).to_pylist()
    gone = [image for image in images if not source.exists(container_of(image))]
    if len(gone) == len(images):
        raise ArtefactError(
            f"{source.dataset.title}: none of {len(images)} images looked for is there, for instance "
            f"{source.path(gone[0])}",
            expected="the images beside the annotation, as in the official layout: "
            + ", ".join(source.dataset.files),
            next_step=source.how_to_get(),
        )
    if not gone:
        return []
    return [
        f"of {len(images)} images looked for, {len(gone)} are missing, for instance {gone[0]}; "
        "--check-files looks for all and leaves the missing ones out"
    ]
