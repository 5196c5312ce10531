"""Cars: Stanford Cars as a training set, refined by colour, and Cars196 in the split of metric learning."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles
from samething.errors import MissingExtraError

_IMAGES: Final = "stanford_cars/cars_train/cars_train/"


def read_stanford_cars(source: OfficialFiles) -> pa.Table:
    """``sc_train.csv`` (image, and Label or Class)."""
    return _from_csv(source, "stanford_cars/sc_train.csv")


def read_stanford_cars_refined(source: OfficialFiles) -> pa.Table:
    """``refined_train.csv`` (image, and Class as model_colour)."""
    return _from_csv(source, "stanford_cars/refined_train.csv")


def _from_csv(source: OfficialFiles, where: str) -> pa.Table:
    label = "Class" if "Class" in source.header(where) else "Label"
    table = source.csv(where, ("image", label))
    return source.rows(where, image=table["image"], folder=_IMAGES, label=table[label])


def read_cars196(source: OfficialFiles) -> pa.Table:
    """``cars_annos.mat``: the first 98 models for training, the others searched for among each other."""
    try:
        import scipy.io
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise MissingExtraError("scipy", extra="train") from error
    where = "cars196/cars_annos.mat"
    if not source.exists(where):
        raise source.missing(where)
    try:
        annotations = np.atleast_1d(scipy.io.loadmat(source.path(where), squeeze_me=True)["annotations"])
        paths = [str(path) for path in annotations["relative_im_path"]]
        classes = np.asarray([int(number) for number in annotations["class"]])
    except (MatReadError, KeyError, ValueError, TypeError, IndexError, NotImplementedError, OSError) as error:
        raise source.malformed(
            where,
            f"cannot be read ({type(error).__name__}: {error})",
            expected="a MATLAB file with annotations.relative_im_path and annotations.class",
        ) from error
    role = pa.array(np.where(classes <= 98, "train", "query+index").tolist())
    label = pa.array(classes.astype(str).tolist(), pa.string())
    return source.rows(where, image=pa.array(paths, pa.string()), folder="cars196/", label=label, role=role)


STANFORD_CARS = Dataset(
    key="stanford_cars",
    title="Stanford Cars (training part)",
    domain="cars",
    classes=196,
    images=8_144,
    gigabytes=1.0,
    licence="research only, not commercial",
    source="https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset",
    get="run: kaggle datasets download jessicali9530/stanford-cars-dataset, unpack it into stanford_cars/, "
    "and save cardatasettrain.csv of https://github.com/BotechEngineering/StanfordCarsDatasetCSV as "
    "stanford_cars/sc_train.csv",
    files=("stanford_cars/sc_train.csv", _IMAGES),
    layout="https://github.com/BotechEngineering/StanfordCarsDatasetCSV",
    reader=read_stanford_cars,
    published=(Published(classes=196, images=8_144),),
    note="holds test classes of Cars196 and of UnED's cars: never train on it and measure there",
)

STANFORD_CARS_REFINED = Dataset(
    key="stanford_cars_refined",
    title="Stanford Cars, model × colour",
    domain="cars",
    classes=1_288,
    images=8_126,
    gigabytes=1.0,
    licence="research only, not commercial",
    source="https://github.com/morrisfl/stanford_cars_refined",
    get="save data/refined_train.csv of the source as stanford_cars/refined_train.csv; the images are "
    "those of stanford_cars",
    files=("stanford_cars/refined_train.csv", _IMAGES),
    layout="README of the source",
    reader=read_stanford_cars_refined,
    published=(Published(classes=1_288, images=8_126),),
    note="of these classes 901 have three images or more (7,568 images); M4D-35k's part is published as "
    "1.0k classes, 7.3k images",
)

CARS196 = Dataset(
    key="cars196",
    title="Cars196, split of metric learning",
    domain="cars",
    classes=196,
    images=16_185,
    gigabytes=2.0,
    licence="research only, not commercial",
    source="http://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    get="unpack car_ims.tgz into cars196/ and put cars_annos.mat there",
    files=("cars196/cars_annos.mat", "cars196/car_ims/"),
    layout="the devkit's README; split by Song et al., CVPR 2016: classes 1 to 98 train",
    reader=read_cars196,
    has_roles=True,
    published=(
        Published(where={"role": "train"}, classes=98, images=8_054),
        Published(where={"role": "query+index"}, classes=98, images=8_131),
    ),
)
