"""Landmarks: Google Landmarks v2, the cleaned training set of the recognition challenge of 2021."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles, joined


def read_gldv2(source: OfficialFiles) -> pa.Table:
    """``train.csv`` (id, landmark_id); an image is three folders deep, by the first digits of its id."""
    where = "google_landmark_recognition_2021/train.csv"
    table = source.csv(where, ("id", "landmark_id"))
    ids = table["id"]
    short = pc.index(pc.less(pc.utf8_length(ids), 3), True).as_py()
    if short >= 0:
        raise source.malformed(
            where, f"row {short} has the id {ids[short].as_py()!r}", expected="ids of 16 hexadecimal digits"
        )
    first, second, third = (pc.utf8_slice_codeunits(ids, place, place + 1) for place in range(3))
    folders = pc.binary_join_element_wise(first, second, third, ids, "/")
    image = joined("google_landmark_recognition_2021/train/", folders, ".jpg")
    return source.rows(where, image=image, label=table["landmark_id"])


GLDV2 = Dataset(
    key="gldv2",
    title="Google Landmarks v2 (cleaned training set)",
    domain="landmarks",
    classes=81_313,
    images=1_580_470,
    gigabytes=105.0,
    licence="annotations CC BY 4.0; images CC or public domain, each its own",
    source="https://www.kaggle.com/c/landmark-recognition-2021/data",
    get="run: kaggle competitions download -c landmark-recognition-2021, and unpack it into "
    "google_landmark_recognition_2021/",
    files=("google_landmark_recognition_2021/train.csv", "google_landmark_recognition_2021/train/"),
    layout="data page of the challenge; https://github.com/cvdfoundation/google-landmark",
    reader=read_gldv2,
    published=(Published(classes=81_313, images=1_580_470),),
)
