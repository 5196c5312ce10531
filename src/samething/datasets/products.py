"""Packaged goods: Products-10K, Shopee, RP2K and Stanford Online Products."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles


def read_products_10k(source: OfficialFiles) -> pa.Table:
    """``train.csv`` (name, class, group), images in ``train/``."""
    where = "products-10k/train.csv"
    table = source.csv(where, ("name", "class"))
    return source.rows(where, image=table["name"], folder="products-10k/train/", label=table["class"])


def read_shopee(source: OfficialFiles) -> pa.Table:
    """``train.csv`` (posting_id, image, image_phash, title, label_group), images in ``train_images/``."""
    where = "shopee/train.csv"
    table = source.csv(where, ("image", "label_group"))
    return source.rows(where, image=table["image"], folder="shopee/train_images/", label=table["label_group"])


def read_rp2k(source: OfficialFiles) -> pa.Table:
    """``train.csv`` (img_path, img_id) with paths below ``train/``."""
    where = "rp2k/train.csv"
    table = source.csv(where, ("img_path", "img_id"))
    return source.rows(where, image=table["img_path"], folder="rp2k/train/", label=table["img_id"])


def read_sop(source: OfficialFiles) -> pa.Table:
    """``Ebay_train.txt`` and ``Ebay_test.txt`` (image_id class_id super_class_id path, with a header)."""
    columns = ("image_id", "class_id", "super_class_id", "path")
    parts = []
    for name, role in (("Ebay_train.txt", "train"), ("Ebay_test.txt", "query+index")):
        where = f"stanford_online_products/{name}"
        table = source.spaced(where, columns, skip_rows=1)
        digits = pc.match_substring_regex(table["class_id"], "^[0-9]+$")
        row = pc.index(digits, False).as_py()
        if row >= 0:
            raise source.malformed(
                where,
                f"line {row + 2} has the class {table['class_id'][row].as_py()!r}",
                expected="image_id class_id super_class_id path, the first three as numbers",
            )
        parts.append(
            source.rows(
                where,
                image=table["path"],
                folder="stanford_online_products/",
                label=table["class_id"],
                role=role,
            )
        )
    return pa.concat_tables(parts)


PRODUCTS_10K = Dataset(
    key="products_10k",
    title="Products-10K",
    domain="packaged goods",
    classes=9_691,
    images=141_931,
    licence="research only, not commercial",
    source="https://products-10k.github.io",
    get="run: kaggle competitions download -c products-10k, and unpack it into products-10k/",
    files=("products-10k/train.csv", "products-10k/train/"),
    layout="https://products-10k.github.io/challenge.html",
    reader=read_products_10k,
    published=(Published(classes=9_691, images=141_931),),
)

SHOPEE = Dataset(
    key="shopee",
    title="Shopee product matching",
    domain="packaged goods",
    classes=11_014,
    images=34_250,
    gigabytes=1.8,
    licence="terms of the competition; research only",
    source="https://www.kaggle.com/competitions/shopee-product-matching/data",
    get="run: kaggle competitions download -c shopee-product-matching, and unpack it into shopee/",
    files=("shopee/train.csv", "shopee/train_images/"),
    layout="data page of the competition",
    reader=read_shopee,
    published=(Published(classes=11_014, images=34_250),),
    note="34,250 offers; several offers use the same image, and an image is one row",
)

RP2K = Dataset(
    key="rp2k",
    title="RP2K (retail products)",
    domain="packaged goods",
    classes=None,
    images=None,
    licence="research only, not commercial",
    source="https://www.pinlandata.com/rp2k_dataset/",
    get="unpack the training folder into rp2k/train/ and list it in rp2k/train.csv with the columns "
    "img_path,img_id (img_path relative to rp2k/train/)",
    files=("rp2k/train.csv", "rp2k/train/"),
    layout="https://github.com/morrisfl/UniFEx, src/datasets",
    reader=read_rp2k,
    note="384,311 images of 2,388 products in all its parts",
)

SOP = Dataset(
    key="sop",
    title="Stanford Online Products",
    domain="packaged goods",
    classes=22_634,
    images=120_053,
    gigabytes=3.1,
    licence="research only; images belong to eBay's sellers",
    source="https://cvgl.stanford.edu/projects/lifted_struct/",
    get="unpack Stanford_Online_Products.zip as stanford_online_products/",
    files=("stanford_online_products/Ebay_train.txt", "stanford_online_products/Ebay_test.txt"),
    layout="Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016",
    reader=read_sop,
    has_roles=True,
    published=(
        Published(where={"role": "train"}, classes=11_318, images=59_551),
        Published(where={"role": "query+index"}, classes=11_316, images=60_502),
    ),
)
