"""Things that are parts of images: boxes in the catalog, cut when an image is read, never own files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa

from samething.arrays import Float, Int
from samething.catalog import BOX_COLUMNS, Catalog
from samething.datasets.dataset import Dataset, Reader
from samething.datasets.listing import Listing
from samething.datasets.official import OfficialFiles
from samething.progress import progress_bar

# Polygons, run lengths and key points make up nearly all of a COCO file and are not read here.
_NOT_READ: Final = frozenset({"segmentation", "keypoints", "landmarks", "counts"})

_Thing: TypeAlias = tuple[str, str, list[float], list[float]]
"""File, label, corners of the box, and width and height of the image, NaN where they are not known."""


def box_columns(
    boxes: Float[np.ndarray, "n 4"],
    *,
    margin_percent: float = 0.0,
    size: Float[np.ndarray, "n 2"] | None = None,
) -> dict[str, pa.Array]:
    """Box columns of a catalog, from corners and a margin.

    Args:
        boxes: left, top, right, bottom of each thing in pixels.
        margin_percent: added at each side, in percent of the box's own width or height, at least 0.
        size: width and height of each image in pixels, NaN where they are not known; a box ends there.
            Where they are not known it ends at the image's edge when it is cut.

    Returns:
        The four box columns of a catalog, int32, rounded to the nearest pixel.

    >>> columns = box_columns(np.array([[10.0, 20.0, 110.0, 70.0]]), margin_percent=2.0)
    >>> [columns[name][0].as_py() for name in BOX_COLUMNS]
    [8, 19, 112, 71]
    """
    extent = boxes[:, 2:] - boxes[:, :2]
    grown = np.concatenate([boxes[:, :2], boxes[:, 2:]], axis=1)
    grown[:, :2] = np.maximum(grown[:, :2] - extent * (margin_percent / 100), 0)
    grown[:, 2:] = grown[:, 2:] + extent * (margin_percent / 100)
    if size is not None:
        grown[:, 2:] = np.fmin(grown[:, 2:], size)
    pixels: Int[np.ndarray, "n 4"] = np.round(grown).astype(np.int32)
    return {name: pa.array(pixels[:, place]) for place, name in enumerate(BOX_COLUMNS)}


def coco(annotations: str, folder: str = "", *, names: bool = False) -> Reader:
    """A reader of a COCO annotation file: a row for each box that has an extent.

    Args:
        annotations: the annotation file: ``images`` (id, file_name, width, height), ``annotations``
            (image_id, category_id, bbox as left, top, width, height) and ``categories`` (id, name).
        folder: folder that the file names start from, with a slash at its end, or empty.
        names: take the category's name as the label, and not its number.
    """

    def read(source: OfficialFiles) -> pa.Table:
        content = source.json(annotations, without=_NOT_READ)
        content = content if isinstance(content, dict) else {}
        lacking = [name for name in ("images", "annotations") if not isinstance(content.get(name), list)]
        if lacking:
            raise source.malformed(
                annotations, f"has no list {' and no list '.join(lacking)}", expected="a COCO annotation file"
            )
        images = _by_id(source, annotations, "images", content["images"], "file_name")
        categories = (
            _by_id(source, annotations, "categories", content.get("categories") or [], "name")
            if names
            else {}
        )
        things: list[_Thing] = []
        for number, entry in enumerate(content["annotations"]):
            try:
                listed = images[entry["image_id"]]
                left, top, width, height = map(float, entry["bbox"])
                label = categories[entry["category_id"]]["name"] if names else entry["category_id"]
                size = [float(listed.get(side) or np.nan) for side in ("width", "height")]
            except (KeyError, TypeError, ValueError) as error:
                raise source.malformed(
                    annotations,
                    f"annotation {number} cannot be used ({type(error).__name__}: {error})",
                    expected="the image_id of a listed image, the category_id of a listed category, "
                    "and bbox as [left, top, width, height]",
                ) from error
            box = [left, top, left + width, top + height]
            things.append((str(listed["file_name"]), str(label), box, size))
        return _boxed_rows(source, annotations, folder, things)

    return read


def list_coco(
    source: Path, *, domain: str | None = None, root: Path | None = None, margin: float | None = None
) -> Listing:
    """A row for each box of a COCO annotation file, labelled by its category's name.

    Args:
        source: a ``.json`` file with images, annotations (bbox) and categories.
        domain: domain of all boxes.
        root: folder that the file names start from; by default ``images`` beside the file, or else the file's
            own folder.
        margin: added to each side of a box, in percent of the box; by default none.

    Raises:
        ArtefactError: the file is missing.
        InputError: it is not a COCO annotation file; says which entry is amiss.
    """
    source = Path(source)
    dataset = Dataset(
        key=source.stem,
        title="COCO annotations",
        domain=domain or "default",
        licence="one's own",
        source="one's own files",
        get="write the file again with images (id, file_name), annotations (image_id, category_id, bbox) and "
        "categories (id, name)",
        files=(source.name,),
        layout="https://cocodataset.org/#format-data",
        reader=coco(source.name, names=True),
        margin_percent=margin or 0.0,
    )
    reading = OfficialFiles(dataset=dataset, data_root=source.parent, label_prefix="")
    beside = source.parent / "images"
    own = beside if beside.is_dir() else source.parent
    catalog = Catalog.from_table(
        dataset.reader(reading), root=own if root is None else root, where=str(source), dataset=source.stem
    )
    return Listing(catalog=catalog, has_roles=False)


def read_deep_fashion2(source: OfficialFiles) -> pa.Table:
    """``annos/<id>.json`` for each image of ``image/``; a box for each item whose style is above 0."""
    where = "deepfashion2/annos"
    names = sorted(path.name for path in source.path(where).glob("*.json"))
    if not names:
        raise source.missing(f"{where}/000001.json")
    things: list[_Thing] = []
    with progress_bar("images", only_on_terminal=True) as progress:
        for name in progress.track(names, description="annotations"):
            content: Any = source.json(f"{where}/{name}", without=_NOT_READ)
            try:
                for kind, item in content.items():
                    if re.fullmatch(r"item\d+", kind) and int(item["style"]) > 0:
                        left, top, right, bottom = map(float, item["bounding_box"])
                        label = f"{int(content['pair_id'])}_{int(item['style'])}"
                        box, image = [left, top, right, bottom], f"{name.removesuffix('.json')}.jpg"
                        things.append((image, label, box, [np.nan, np.nan]))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise source.malformed(
                    f"{where}/{name}",
                    f"cannot be used ({type(error).__name__}: {error})",
                    expected="pair_id, and for each item style and bounding_box as "
                    "[left, top, right, bottom]",
                ) from error
    return _boxed_rows(source, where, "deepfashion2/image/", things)


def _boxed_rows(source: OfficialFiles, where: str, folder: str, things: Sequence[_Thing]) -> pa.Table:
    """The rows whose box has an extent of at least a pixel; in the others nothing is to be seen."""
    columns = box_columns(
        np.asarray([box for _, _, box, _ in things], np.float64).reshape(-1, 4),
        margin_percent=source.dataset.margin_percent or 0.0,
        size=np.asarray([size for *_, size in things], np.float64).reshape(-1, 2),
    )
    files, labels = [file for file, *_ in things], [label for _, label, _, _ in things]
    table = source.rows(where, image=files, folder=folder, label=labels, **columns)
    left, top, right, bottom = (table[name].to_numpy() for name in BOX_COLUMNS)
    return table.filter(pa.array((right > left) & (bottom > top)))


def _by_id(
    source: OfficialFiles, annotations: str, name: str, entries: list[Any], needed: str
) -> dict[object, dict[str, Any]]:
    found: dict[object, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "id" not in entry or needed not in entry:
            raise source.malformed(
                annotations, f"entry {number} of {name} is {entry!r}", expected=f"an id and a {needed}"
            )
        found[entry["id"]] = entry
    return found
