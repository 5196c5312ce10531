"""Furniture 180 and Storefronts 146: a folder for each thing."""

from __future__ import annotations

import pyarrow as pa

from samething.datasets.description import Dataset
from samething.datasets.official import OfficialFiles


def read_furniture180(source: OfficialFiles) -> pa.Table:
    """``furniture_180/<class>/<image>``."""
    return _read(source, "furniture_180", "furniture180_train.csv")


def read_storefronts146(source: OfficialFiles) -> pa.Table:
    """``storefronts_146/<class>/<image>``."""
    return _read(source, "storefronts_146", "storefronts146_train.csv")


def _read(source: OfficialFiles, folder: str, listing: str) -> pa.Table:
    """The paper's list of images where it is there, else all images of all sub-folders."""
    if source.exists(f"{folder}/{listing}"):
        table = source.csv(f"{folder}/{listing}", ("img_path", "label"))
        return source.rows(
            f"{folder}/{listing}", image=table["img_path"], folder=f"{folder}/", label=table["label"]
        )
    names = source.sub_folders(folder)
    images = [(name, image) for name in names for image in source.images(f"{folder}/{name}")]
    return source.rows(
        folder,
        image=pa.array([f"{folder}/{name}/{image}" for name, image in images], pa.string()),
        label=pa.array([name for name, _ in images], pa.string()),
    )


FURNITURE180 = Dataset(
    key="furniture180",
    title="Furniture 180 (QuData GEmbed)",
    domain="furniture",
    classes=180,
    images=2_687,
    licence="see the source",
    source="https://www.kaggle.com/datasets/andreybeyn/qudata-gembed-furniture-180",
    get="run: kaggle datasets download andreybeyn/qudata-gembed-furniture-180, and unpack it "
    "into furniture_180/",
    files=("furniture_180/",),
    layout="folders of the archive; https://github.com/morrisfl/UniFEx, data/furniture180_train.csv",
    reader=read_furniture180,
    note="numbers of the paper's list, furniture180_train.csv, which is used where it lies in the folder",
)

STOREFRONTS146 = Dataset(
    key="storefronts146",
    title="Storefronts 146",
    domain="storefronts",
    classes=144,
    images=4_545,
    licence="see the source",
    source="https://www.kaggle.com/datasets/kerrit/storefront-146",
    get="run: kaggle datasets download kerrit/storefront-146, and unpack it into storefronts_146/",
    files=("storefronts_146/",),
    layout="folders of the archive; https://github.com/morrisfl/UniFEx, data/storefronts146_train.csv",
    reader=read_storefronts146,
    note="numbers of the paper's list, storefronts146_train.csv, which is used where it lies in the folder",
)
