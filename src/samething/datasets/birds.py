"""Birds: CUB-200-2011 in the split of metric learning."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles


def read_cub_200(source: OfficialFiles) -> pa.Table:
    """``images.txt`` and ``image_class_labels.txt``: the first 100 species train, the others are searched."""
    where, classes_file = "CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt"
    images = source.spaced(where, ("id", "path"))
    classes = source.spaced(classes_file, ("id", "class"))
    place = pc.index_in(images["id"], value_set=classes["id"].combine_chunks())
    without = pc.index(pc.is_null(place), True).as_py()
    if without >= 0:
        raise source.malformed(
            classes_file,
            f"has no class for the image {images['id'][without].as_py()} of images.txt",
            expected="a line for each image",
        )
    label = classes["class"].take(place)
    wrong = pc.index(pc.match_substring_regex(label, "^[0-9]+$"), False).as_py()
    if wrong >= 0:
        raise source.malformed(
            classes_file,
            f"image {images['id'][wrong].as_py()} has the class {label[wrong].as_py()!r}",
            expected="numbers from 1 to 200",
        )
    role = pa.array(np.where(label.cast(pa.int64()).to_numpy() <= 100, "train", "query+index").tolist())
    return source.rows(where, image=images["path"], folder="CUB_200_2011/images/", label=label, role=role)


CUB_200 = Dataset(
    key="cub_200",
    title="CUB-200-2011, split of metric learning",
    domain="birds",
    classes=200,
    images=11_788,
    gigabytes=1.2,
    licence="research only, not commercial; images belong to Flickr's users",
    source="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    get="unpack CUB_200_2011.tgz, whose folder is CUB_200_2011/",
    files=("CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt", "CUB_200_2011/images/"),
    layout="README of the archive; split by Song et al., CVPR 2016: classes 1 to 100 train",
    reader=read_cub_200,
    has_roles=True,
    published=(
        Published(where={"role": "train"}, classes=100, images=5_864),
        Published(where={"role": "query+index"}, classes=100, images=5_924),
    ),
)
