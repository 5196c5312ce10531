"""Apparel: DeepFashion (consumer-to-shop, in-shop), DeepFashion2, H&M and Fashion200k."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import rich.console

from samething.datasets.boxes import box_columns, without_empty_boxes
from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles, joined
from samething.progress import progress_bar


def read_deep_fashion(source: OfficialFiles) -> pa.Table:
    """``deepfashion_train.json``: group → item → paths relative to ``deepfashion/``."""
    where = "deepfashion/deepfashion_train.json"
    content = source.json(where)
    expected = "{group: {item: [path, …], …}, …}"
    if not isinstance(content, dict):
        raise source.malformed(where, f"is a {type(content).__name__}", expected=expected)
    images: list[str] = []
    labels: list[str] = []
    for group, items in content.items():
        if not isinstance(items, dict):
            raise source.malformed(where, f"group {group!r} is {items!r}", expected=expected)
        for item, paths in items.items():
            if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                raise source.malformed(where, f"item {item!r} of {group!r} is {paths!r}", expected=expected)
            images += [f"deepfashion/{path}" for path in paths]
            labels += [item] * len(paths)
    return source.rows(where, image=pa.array(images, pa.string()), label=pa.array(labels, pa.string()))


def read_hm(source: OfficialFiles) -> pa.Table:
    """``articles.csv`` (article_id, product_code, …); images in folders named by the first three digits."""
    where = "hm_personalized_fashion/articles.csv"
    table = source.csv(where, ("article_id", "product_code"))
    article = table["article_id"]
    wrong = pc.index(pc.match_substring_regex(article, "^[0-9]{10}$"), False).as_py()
    if wrong >= 0:
        raise source.malformed(
            where,
            f"row {wrong} has the article {article[wrong].as_py()!r}",
            expected="article_id of ten digits, the zero in front included",
        )
    folder = joined("hm_personalized_fashion/images/", pc.utf8_slice_codeunits(article, 0, 3))
    return source.rows(where, image=joined(folder, "/", article, ".jpg"), label=table["product_code"])


def read_fashion200k(source: OfficialFiles) -> pa.Table:
    """``train.csv`` (img_path, img_id), or the official label files of the training part."""
    where = "fashion200k/train.csv"
    if source.exists(where):
        table = source.csv(where, ("img_path", "img_id"))
        return source.rows(where, image=table["img_path"], folder="fashion200k/", label=table["img_id"])
    kinds = ("dress", "jacket", "pants", "skirt", "top")
    files = [f"fashion200k/labels/{kind}_train_detect_all.txt" for kind in kinds]
    if not any(source.exists(name) for name in files):
        raise source.missing(where, *files)
    parts = []
    for name in files:
        lines = source.lines(name)
        found = pc.extract_regex(lines, r"^(?P<path>women/[^\t]*/(?P<product>[^/\t]+)/[^/\t]+)\t")
        wrong = pc.index(pc.is_null(found), True).as_py()
        if wrong >= 0:
            raise source.malformed(
                name,
                f"line {wrong + 1} is {lines[wrong].as_py()!r}",
                expected="women/…/PRODUCT/IMAGE, the score and the description, separated by tabs",
            )
        path, product = pc.struct_field(found, "path"), pc.struct_field(found, "product")
        parts.append(source.rows(name, image=path, folder="fashion200k/", label=product))
    return pa.concat_tables(parts)


def read_deep_fashion2(source: OfficialFiles) -> pa.Table:
    """``annos/<id>.json`` for each image of ``image/``; a box for each item whose style is above 0."""
    folder = "deepfashion2/annos"
    names = sorted(path.name for path in source.path(folder).glob("*.json"))
    if not names:
        raise source.missing(f"{folder}/000001.json")
    files: list[str] = []
    labels: list[str] = []
    boxes: list[list[float]] = []
    with progress_bar("images", disable=not rich.console.Console(stderr=True).is_terminal) as progress:
        for name in progress.track(names, description="annotations"):
            for label, box in _items_of(source, f"{folder}/{name}"):
                files.append(f"deepfashion2/image/{name.removesuffix('.json')}.jpg")
                labels.append(label)
                boxes.append(box)
    columns = box_columns(np.asarray(boxes, np.float64).reshape(-1, 4), margin_percent=source.margin)
    rows = source.rows(
        folder, image=pa.array(files, pa.string()), label=pa.array(labels, pa.string()), **columns
    )
    return without_empty_boxes(rows)


def _items_of(source: OfficialFiles, where: str) -> list[tuple[str, list[float]]]:
    content: Any = source.json(where, without=frozenset({"segmentation", "landmarks"}))
    found = []
    try:
        for name, item in content.items():
            if re.fullmatch(r"item\d+", name) and int(item["style"]) > 0:
                left, top, right, bottom = map(float, item["bounding_box"])
                label = f"{int(content['pair_id'])}_{int(item['style'])}"
                found.append((label, [left, top, right, bottom]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise source.malformed(
            where,
            f"cannot be used ({type(error).__name__}: {error})",
            expected="pair_id, and for each item style and bounding_box as [left, top, right, bottom]",
        ) from error
    return found


def read_in_shop(source: OfficialFiles) -> pa.Table:
    """``list_eval_partition.txt`` (a count, a header, then image_name item_id evaluation_status)."""
    where = "in_shop/Eval/list_eval_partition.txt"
    table = source.spaced(where, ("image_name", "item_id", "status"), skip_rows=2)
    said = source.lines(where)[0].as_py().strip()
    if said != str(table.num_rows):
        raise source.malformed(
            where, f"says {said} images and lists {table.num_rows}", expected="as many lines as it says"
        )
    roles = {"train": "train", "query": "query", "gallery": "index"}
    place = pc.index_in(table["status"], value_set=pa.array(list(roles)))
    wrong = pc.index(pc.is_null(place), True).as_py()
    if wrong >= 0:
        raise source.malformed(
            where,
            f"line {wrong + 3} has the status {table['status'][wrong].as_py()!r}",
            expected="train, query or gallery",
        )
    role = pa.array(list(roles.values())).take(place.combine_chunks())
    return source.rows(
        where, image=table["image_name"], folder="in_shop/Img/", label=table["item_id"], role=role
    )


DEEP_FASHION = Dataset(
    key="deep_fashion",
    title="DeepFashion, consumer-to-shop (training part)",
    domain="apparel",
    classes=None,
    images=None,
    licence="research only, not commercial",
    source="https://www.kaggle.com/datasets/sangamman/deepfashion-consumer-to-shop-training",
    get="run: kaggle datasets download sangamman/deepfashion-consumer-to-shop-training, and unpack it into "
    "deepfashion/",
    files=("deepfashion/deepfashion_train.json", "deepfashion/train/"),
    layout="https://github.com/morrisfl/UniFEx, src/datasets",
    reader=read_deep_fashion,
)

HM = Dataset(
    key="hm",
    title="H&M Personalized Fashion",
    domain="apparel",
    classes=47_224,
    images=105_542,
    gigabytes=31.0,
    licence="terms of the competition; research only",
    source="https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations/data",
    get="run: kaggle competitions download -c h-and-m-personalized-fashion-recommendations, and unpack it "
    "into hm_personalized_fashion/",
    files=("hm_personalized_fashion/articles.csv", "hm_personalized_fashion/images/"),
    layout="data page of the competition",
    reader=read_hm,
    published=(Published(classes=47_224, images=105_542),),
    note="some 440 articles have no image; --check-files leaves them out",
)

FASHION200K = Dataset(
    key="fashion200k",
    title="Fashion200k",
    domain="apparel",
    classes=None,
    images=None,
    licence="research only; images belong to the shops",
    source="https://github.com/xthan/fashion-200k",
    get="unpack women.tar.gz and the labels folder into fashion200k/",
    files=("fashion200k/women/",),
    layout="README of the source (labels/*_train_detect_all.txt); or fashion200k/train.csv, img_path,img_id",
    reader=read_fashion200k,
)

DEEP_FASHION2 = Dataset(
    key="deep_fashion2",
    title="DeepFashion2 (training part)",
    domain="apparel",
    classes=None,
    images=None,
    licence="research only, not commercial",
    source="https://github.com/switchablenorms/DeepFashion2",
    get="fill in the form for the password, and unpack train.zip so that deepfashion2/annos/ and "
    "deepfashion2/image/ are there",
    files=("deepfashion2/annos/", "deepfashion2/image/"),
    layout="README of the source, Data Organization",
    reader=read_deep_fashion2,
    margin_percent=2.0,
    note="a row is an item of clothing: a box in one of 191,961 images",
)

IN_SHOP = Dataset(
    key="in_shop",
    title="DeepFashion, In-shop Clothes Retrieval",
    domain="apparel",
    classes=7_982,
    images=52_712,
    licence="research only, not commercial",
    source="https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
    get="unpack img.zip into in_shop/Img/ and put list_eval_partition.txt into in_shop/Eval/",
    files=("in_shop/Eval/list_eval_partition.txt", "in_shop/Img/img/"),
    layout="README of the source; the usual split of metric learning is the official one",
    reader=read_in_shop,
    has_roles=True,
    published=(
        Published(where={"role": "train"}, classes=3_997, images=25_882),
        Published(where={"role": "query"}, classes=3_985, images=14_218),
        Published(where={"role": "index"}, classes=3_985, images=12_612),
    ),
)
