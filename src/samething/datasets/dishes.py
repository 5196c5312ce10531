"""Dishes: Food Recognition 2022 (boxes) and Food-101."""

from __future__ import annotations

import pyarrow as pa

from samething.datasets.boxes import coco_rows
from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles


def read_food_rec22(source: OfficialFiles) -> pa.Table:
    """``annotations.json`` (COCO); a row for each box, labelled by its category."""
    return coco_rows(source, "fr22_train_v2/annotations.json", "fr22_train_v2/images/", names=False)


def read_food101(source: OfficialFiles) -> pa.Table:
    """``meta/test.json``: class → images; the paper trains on this part, whose labels were cleaned."""
    where = "food-101/meta/test.json"
    content = source.json(where)
    expected = "{class: [class/image, …], …}"
    if not isinstance(content, dict):
        raise source.malformed(where, f"is a {type(content).__name__}", expected=expected)
    images: list[str] = []
    labels: list[str] = []
    for name, entries in content.items():
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise source.malformed(where, f"class {name!r} is {entries!r}", expected=expected)
        images += [f"food-101/images/{entry}.jpg" for entry in entries]
        labels += [name] * len(entries)
    return source.rows(where, image=pa.array(images, pa.string()), label=pa.array(labels, pa.string()))


FOOD_REC22 = Dataset(
    key="food_rec22",
    title="Food Recognition Benchmark 2022 (training set 2.0)",
    domain="dishes",
    classes=498,
    images=76_491,
    licence="CC BY 4.0",
    source="https://www.aicrowd.com/challenges/food-recognition-benchmark-2022#datasets",
    get="unpack public_training_set_release_2.0.tar.gz as fr22_train_v2/",
    files=("fr22_train_v2/annotations.json", "fr22_train_v2/images/"),
    layout="dataset page of the challenge (COCO)",
    reader=read_food_rec22,
    margin_percent=2.0,
    note="a row is a dish: a box in one of 39,962 images",
)

FOOD101 = Dataset(
    key="food101",
    title="Food-101 (test part)",
    domain="dishes",
    classes=101,
    images=25_250,
    gigabytes=5.0,
    licence="fair use for research; images belong to Foodspotting's users",
    source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    get="unpack food-101.tar.gz as food-101/",
    files=("food-101/meta/test.json", "food-101/images/"),
    layout="README of the archive",
    reader=read_food101,
    published=(Published(classes=101, images=25_250),),
)
