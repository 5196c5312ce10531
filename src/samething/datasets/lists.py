"""Public data sets that list their images in a file (CSV, text, JSON or MATLAB), or whose folders are labels.

:func:`listed`, :func:`grouped` and :func:`class_folders` make a reader out of names. The other readers are
for layouts that one data set has alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.dataset import Reader
from samething.datasets.official import OfficialFiles, joined


def listed(where: str, folder: str, image: str, *label: str) -> Reader:
    """A reader of a CSV file with a header.

    Args:
        where: the file.
        folder: where the paths of images start, with a slash at its end.
        image: column of the paths.
        label: column of the labels; of several the first that the file has.
    """

    def read(source: OfficialFiles) -> pa.Table:
        header = source.header(where)
        chosen = next((name for name in label if name in header), label[-1])
        table = source.csv(where, (image, chosen))
        return source.rows(where, image=table[image], folder=folder, label=table[chosen])

    return read


def grouped(where: str, folder: str, suffix: str = "", *, levels: int = 1) -> Reader:
    """A reader of a JSON file that maps classes to lists of images.

    Args:
        where: the file.
        folder: where the paths of images start, with a slash at its end.
        suffix: what every path lacks.
        levels: 1 for ``{class: [path, …]}``, 2 for ``{group: {class: [path, …]}}``.
    """
    kinds = ("class", "") if levels == 1 else ("item", "group")
    expected = "{class: [path, …], …}" if levels == 1 else "{group: {item: [path, …], …}, …}"

    def read(source: OfficialFiles) -> pa.Table:
        content = source.json(where)
        if not isinstance(content, dict):
            raise source.malformed(where, f"is a {type(content).__name__}", expected=expected)
        images: list[str] = []
        labels: list[str] = []
        for group, classes in content.items() if levels == 2 else (("", content),):
            if not isinstance(classes, dict):
                raise source.malformed(where, f"{kinds[1]} {group!r} is {classes!r}", expected=expected)
            for name, paths in classes.items():
                if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                    among = f" of {group!r}" if levels == 2 else ""
                    raise source.malformed(
                        where, f"{kinds[0]} {name!r}{among} is {paths!r}", expected=expected
                    )
                images += [path + suffix for path in paths]
                labels += [name] * len(paths)
        return source.rows(where, image=images, folder=folder, label=labels)

    return read


def class_folders(folder: str, listing: str) -> Reader:
    """A reader of ``<folder>/<class>/<image>``, or of the paper's list of images where it lies there."""

    def read(source: OfficialFiles) -> pa.Table:
        if source.exists(f"{folder}/{listing}"):
            return listed(f"{folder}/{listing}", f"{folder}/", "img_path", "label")(source)
        names = source.sub_folders(folder)
        images = [(name, image) for name in names for image in source.images(f"{folder}/{name}")]
        return source.rows(
            folder,
            image=[f"{folder}/{name}/{image}" for name, image in images],
            label=[name for name, _ in images],
        )

    return read


def read_gldv2(source: OfficialFiles) -> pa.Table:
    """``train.csv`` (id, landmark_id); an image is three folders deep, by the first digits of its id."""
    where = "google_landmark_recognition_2021/train.csv"
    table = source.csv(where, ("id", "landmark_id"))
    ids = table["id"]
    is_long = pc.greater_equal(pc.utf8_length(ids), 3)
    source.require(where, is_long, "row {} has the id {!r}", ids, expected="ids of 16 hexadecimal digits")
    first, second, third = (pc.utf8_slice_codeunits(ids, place, place + 1) for place in range(3))
    folders = pc.binary_join_element_wise(first, second, third, ids, "/")
    image = joined("google_landmark_recognition_2021/train/", folders, ".jpg")
    return source.rows(where, image=image, label=table["landmark_id"])


def read_hm(source: OfficialFiles) -> pa.Table:
    """``articles.csv`` (article_id, product_code, …); images in folders named by the first three digits."""
    where = "hm_personalized_fashion/articles.csv"
    table = source.csv(where, ("article_id", "product_code"))
    article = table["article_id"]
    source.require(
        where,
        pc.match_substring_regex(article, "^[0-9]{10}$"),
        "row {} has the article {!r}",
        article,
        expected="article_id of ten digits, the zero in front included",
    )
    folder = joined("hm_personalized_fashion/images/", pc.utf8_slice_codeunits(article, 0, 3))
    return source.rows(where, image=joined(folder, "/", article, ".jpg"), label=table["product_code"])


# First folder of a path → data set and domain.
_PARTS_OF_M4D: Final = {
    "products-10k": ("products_10k", "packaged goods"),
    "google_landmark_recognition_2021": ("gldv2", "landmarks"),
    "deepfashion": ("deep_fashion", "apparel"),
    "stanford_cars": ("stanford_cars", "cars"),
}


def read_m4d_35k(source: OfficialFiles) -> pa.Table:
    """``m4d-35k_train.csv`` (img_path, label); the data set of a row is the first folder of its path."""
    where = "m4d-35k_train.csv"
    table = source.csv(where, ("img_path", "label"))
    path = table["img_path"]
    folder = pc.list_element(pc.split_pattern(path, "/", max_splits=1), 0)
    dataset, domain = (
        _translated(folder, {name: part[side] for name, part in _PARTS_OF_M4D.items()}) for side in (0, 1)
    )
    source.require(
        where,
        pc.is_valid(dataset),
        "row {} has the path {!r}",
        path,
        expected=f"paths that begin with {', '.join(_PARTS_OF_M4D)}",
    )
    return source.rows(where, image=path, label=table["label"], domain=domain, dataset=dataset)


def read_met(source: OfficialFiles) -> pa.Table:
    """``MET_database.json``: a list of {id, path}, with paths in ``MET/`` (and in some copies with it)."""
    where = "met_dataset/ground_truth/MET_database.json"
    rows = source.json_rows(where, "id", "path")
    for number, (label, path) in enumerate(rows):
        if not isinstance(path, str) or label is None:
            raise source.malformed(
                where,
                f"entry {number} is (id, path) {label!r}, {path!r}",
                expected="{id, path} in every entry",
            )
    path = pc.replace_substring_regex(pa.array([path for _, path in rows], pa.string()), "^MET/", "")
    return source.rows(where, image=path, folder="met_dataset/MET/", label=[str(label) for label, _ in rows])


def read_sop(source: OfficialFiles) -> pa.Table:
    """``Ebay_train.txt`` and ``Ebay_test.txt`` (image_id class_id super_class_id path, with a header)."""
    parts = []
    for name, role in (("Ebay_train.txt", "train"), ("Ebay_test.txt", "query+index")):
        where = f"stanford_online_products/{name}"
        columns = ("image_id", "class_id", "super_class_id", "path")
        table = source.spaced(where, columns, skip_rows=1)
        label = table["class_id"]
        source.require(
            where,
            pc.match_substring_regex(label, "^[0-9]+$"),
            "line {} has the class {!r}",
            label,
            expected=f"{' '.join(columns)}, the first three as numbers",
            first=2,
        )
        rows = source.rows(
            where, image=table["path"], folder="stanford_online_products/", label=label, role=role
        )
        parts.append(rows)
    return pa.concat_tables(parts)


def read_fashion200k(source: OfficialFiles) -> pa.Table:
    """``train.csv`` (img_path, img_id), or the official label files of the training part."""
    where = "fashion200k/train.csv"
    if source.exists(where):
        return listed(where, "fashion200k/", "img_path", "img_id")(source)
    kinds = ("dress", "jacket", "pants", "skirt", "top")
    files = [f"fashion200k/labels/{kind}_train_detect_all.txt" for kind in kinds]
    if not any(source.exists(name) for name in files):
        raise source.missing(where, *files)
    parts = []
    for name in files:
        lines = source.lines(name)
        found = pc.extract_regex(lines, r"^(?P<path>women/[^\t]*/(?P<product>[^/\t]+)/[^/\t]+)\t")
        source.require(
            name,
            pc.is_valid(found),
            "line {} is {!r}",
            lines,
            first=1,
            expected="women/…/PRODUCT/IMAGE, the score and the description, separated by tabs",
        )
        path, product = pc.struct_field(found, "path"), pc.struct_field(found, "product")
        parts.append(source.rows(name, image=path, folder="fashion200k/", label=product))
    return pa.concat_tables(parts)


def read_in_shop(source: OfficialFiles) -> pa.Table:
    """``list_eval_partition.txt`` (a count, a header, then image_name item_id evaluation_status)."""
    where = "in_shop/Eval/list_eval_partition.txt"
    table = source.spaced(where, ("image_name", "item_id", "status"), skip_rows=2)
    said = source.lines(where)[0].as_py().strip()
    if said != str(table.num_rows):
        raise source.malformed(
            where, f"says {said} images and lists {table.num_rows}", expected="as many lines as it says"
        )
    role = _translated(table["status"], {"train": "train", "query": "query", "gallery": "index"})
    source.require(
        where,
        pc.is_valid(role),
        "line {} has the status {!r}",
        table["status"],
        first=3,
        expected="train, query or gallery",
    )
    return source.rows(
        where, image=table["image_name"], folder="in_shop/Img/", label=table["item_id"], role=role
    )


def read_cub_200(source: OfficialFiles) -> pa.Table:
    """``images.txt`` and ``image_class_labels.txt``: the first 100 species train, the others are searched."""
    where, classes_file = "CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt"
    images = source.spaced(where, ("id", "path"))
    classes = source.spaced(classes_file, ("id", "class"))
    place = pc.index_in(images["id"], value_set=classes["id"].combine_chunks())
    source.require(
        classes_file,
        pc.is_valid(place),
        "has no class for the image {1} of images.txt",
        images["id"],
        expected="a line for each image",
    )
    label = classes["class"].take(place)
    source.require(
        classes_file,
        pc.match_substring_regex(label, "^[0-9]+$"),
        "row {} has the class {!r}",
        label,
        expected="numbers from 1 to 200",
    )
    role = np.where(label.cast(pa.int64()).to_numpy() <= 100, "train", "query+index").tolist()
    return source.rows(where, image=images["path"], folder="CUB_200_2011/images/", label=label, role=role)


def read_cars196(source: OfficialFiles) -> pa.Table:
    """``cars_annos.mat``: the first 98 models for training, the others searched for among each other."""
    where = "cars196/cars_annos.mat"
    expected = "annotations.relative_im_path and annotations.class"
    with source.matlab(where, expected=expected) as content:
        annotations = np.atleast_1d(content["annotations"])
        paths = [str(path) for path in annotations["relative_im_path"]]
        classes = np.asarray([int(number) for number in annotations["class"]])
    role = np.where(classes <= 98, "train", "query+index").tolist()
    return source.rows(where, image=paths, folder="cars196/", label=classes.astype(str).tolist(), role=role)


# A kind of GPR1200 is 200 categories, in this order (eval/GPR1200.py of the source).
_KINDS: Final = ("landmarks", "nature", "sketches", "objects", "packaged goods", "faces")
_CATEGORIES_PER_KIND: Final = 200


def read_gpr1200(source: OfficialFiles) -> pa.Table:
    """``images/<category>_<name>.jpg``: 1,200 things of six kinds, ten images each, all of them queries."""
    where = "GPR1200/images"
    names = pa.array(source.images(where), pa.string())
    category = pc.list_element(pc.split_pattern(names, "_", max_splits=1), 0)
    is_number = pc.match_substring_regex(category, "^[0-9]{1,4}$")
    numbers = pc.if_else(is_number, category, "9999").cast(pa.int64())
    source.require(
        where,
        pc.less(numbers, len(_KINDS) * _CATEGORIES_PER_KIND),
        "holds {1}",
        names,
        expected="images named CATEGORY_NAME.jpg, CATEGORY below 1200",
    )
    kind = np.asarray(_KINDS, dtype=object)[numbers.to_numpy() // _CATEGORIES_PER_KIND].tolist()
    return source.rows(
        where, image=names, folder=f"{where}/", label=category, domain=kind, role="query+index"
    )


def read_guiec(source: OfficialFiles) -> pa.Table:
    """``query/[DOMAIN/]THING/image`` and ``index/[DOMAIN/]THING/image``.

    One's own benchmark in the form of the Google Universal Image Embedding Challenge, whose own images (5,000
    queries, 200,000 in the index) were never published. An image directly in ``index/`` or ``index/DOMAIN/``
    (beside folders of things) is a distractor: a thing of its own.
    """
    rows: list[tuple[str, str, str, str]] = []
    for role in ("query", "index"):
        folder = f"guiec/{role}"
        # domain, thing and path
        found: list[tuple[str | None, str | None, str]] = [
            (None, None, f"{folder}/{name}") for name in source.images(folder)
        ]
        for name in source.sub_folders(folder):
            below = f"{folder}/{name}"
            things = source.sub_folders(below)
            own = (name, None) if things else (None, name)
            found += [(*own, f"{below}/{image}") for image in source.images(below)]
            for below_thing, one in ((f"{below}/{one}", one) for one in things):
                found += [(name, one, f"{below_thing}/{image}") for image in source.images(below_thing)]
        for domain, thing, path in found:
            if thing is None and role == "query":
                raise source.malformed(
                    f"guiec/{role}",
                    f"holds {path}, which lies in no folder of a thing",
                    expected="query/THING/IMAGE or query/DOMAIN/THING/IMAGE",
                )
            label = f"distractor/{path}" if thing is None else f"{domain}/{thing}" if domain else thing
            rows.append((path, label, domain or source.dataset.key, role))
    if not any(role == "query" for *_, role in rows):
        raise source.malformed("guiec/query", "holds no images", expected="query/THING/IMAGE")
    images, labels, domains, roles = map(list, zip(*rows, strict=True))
    return source.rows("guiec", image=images, label=labels, domain=domains, role=roles)


def _translated(column: pa.ChunkedArray, words: Mapping[str, str]) -> pa.Array:
    """Each text replaced by what it stands for; null where it stands for nothing."""
    place = pc.index_in(column, value_set=pa.array(list(words))).combine_chunks()
    return pa.array(list(words.values())).take(place)
