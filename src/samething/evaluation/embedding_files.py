"""Embeddings of any model, in files: ``.npy``, or UnED's descriptors.

UnED's are a JSON object: data set -> split -> rows. Its authors' programs write each split as a list of one
list of rows (``{"cars": {"test": [[[0.1, …], …]]}}``, universal_embedding/knn_utils.py of
github.com/nikosips/Universal-Image-Embeddings), their README describes a plain list of rows; both are read,
the first is written, because their program takes the first element. Queries are the split ``test``. The index
is ``index`` where queries and index differ, else ``test`` again.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from samething.arrays import Embeddings
from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.files import atomic_path, read_json


def read_embeddings(embeddings: Path, catalog: Path) -> tuple[Embeddings, Catalog]:
    """Any model's embeddings and the catalog of what they show; the images themselves need not exist.

    Args:
        embeddings: a ``.npy`` file of floats, one row per image in catalog order, or UnED's descriptors in a
            ``.json`` file.
        catalog: a table with ``img_path,label,domain,role`` (``.csv``) or a catalog (``.parquet``).

    Raises:
        ArtefactError: a file is missing or unreadable.
        InputError: they do not fit; both files are named.
    """
    images = Catalog.read(Path(catalog))
    if Path(embeddings).suffix.lower() == ".json":
        return read_descriptors(Path(embeddings), images), images
    rows = open_embeddings(Path(embeddings))
    if len(rows) != len(images):
        raise InputError(
            f"{embeddings} has {len(rows)} rows and {catalog} has {len(images)}",
            expected="one embedding per row of the catalog, in its order",
            next_step="embed the images of this catalog again, or give the catalog they were embedded from",
        )
    return rows, images


def open_embeddings(source: Path) -> np.ndarray:
    """A ``.npy`` file of floats (n, d), memory-mapped.

    Raises:
        ArtefactError: it is missing or damaged.
        InputError: it holds something else.
    """
    expected = "a .npy file of float16, float32 or float64, one row per image"
    if not source.is_file():
        raise ArtefactError(f"{source} is not a file", expected=expected, next_step="check the path")
    try:
        rows = np.load(source, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtefactError(
            f"{source} cannot be read ({error})",
            expected=expected,
            next_step="write it with numpy.save, and check that the file is whole",
        ) from error
    if not isinstance(rows, np.ndarray):  # an .npz archive, whatever it is called
        raise InputError(
            f"{source} holds several arrays", expected=expected, next_step="save one: numpy.save"
        )
    if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"{source} holds {rows.dtype} of shape {rows.shape}",
            expected=expected,
            next_step="convert it with numpy: numpy.save(path, rows.astype(numpy.float32))",
        )
    return rows


# ---- UnED's descriptors

TYPE_HINT = "an object data set -> split -> rows of numbers, as UnED's programs write it"


def read_descriptors(source: Path, catalog: Catalog) -> Embeddings:
    """Descriptors in catalog order; rows that are neither query nor index are zero, and are not looked at.

    Args:
        source: UnED's descriptors.
        catalog: its domains are the data sets; a split's rows are in catalog order.

    Raises:
        ArtefactError: the file is missing or not JSON.
        InputError: it is laid out in another way, or a split is missing or has another number of rows than
            the catalog.
    """
    content = read_json(source)
    if not isinstance(content, dict) or not all(isinstance(splits, dict) for splits in content.values()):
        raise InputError(
            f"{source} holds no object of objects", expected=TYPE_HINT, next_step="check the file"
        )
    found: dict[tuple[str, str], np.ndarray] = {}
    for domain, splits in content.items():
        for split, rows in splits.items():
            try:
                array = np.asarray(rows, dtype=np.float32)
                if array.ndim == 3 and len(array) == 1:
                    array = array[0]
                if array.ndim != 2:
                    raise ValueError(f"the shape {array.shape}")
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{source}: {domain}/{split} holds rows of different lengths or no numbers ({error})",
                    expected=TYPE_HINT,
                    next_step="write the descriptors again",
                ) from error
            found[domain, split] = array
    widths = {rows.shape[1] for rows in found.values()}
    if len(widths) != 1:
        raise InputError(
            f"descriptors of {sorted(widths)} dimensions",
            expected="one dimension throughout",
            next_step="write the descriptors again, with one model",
        )
    result = np.zeros((len(catalog), widths.pop()), dtype=np.float32)
    for (domain, split), rows in _rows_by_split(catalog).items():
        given = found.get((domain, split), np.empty((0, 1)))
        if len(given) != len(rows):
            raise InputError(
                f"{len(given)} descriptors of {domain}/{split}",
                expected=f"{len(rows)}, one for each of the catalog's images, in its order",
                next_step="give the catalog of the info files that the descriptors were made from",
            )
        result[rows] = given
    return result


def write_descriptors(target: Path, embeddings: Embeddings, catalog: Catalog) -> Path:
    """Write the embeddings of a catalog's test images as UnED's evaluation program reads them."""
    content: dict[str, dict[str, list[list[list[float]]]]] = {}
    for (domain, split), rows in _rows_by_split(catalog).items():
        own = np.asarray(embeddings[rows], dtype=np.float32).astype(float).tolist()
        content.setdefault(domain, {})[split] = [own]
    with atomic_path(Path(target)) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
    return Path(target)


def _rows_by_split(catalog: Catalog) -> dict[tuple[str, str], np.ndarray]:
    """Domain and ``test`` or ``index`` -> catalog rows, where there are any."""
    domains = catalog.strings("domain")
    queries, index = catalog.has_role("query", "query+index"), catalog.has_role("index")
    found = {
        (domain, split): np.flatnonzero(chosen & (domains == domain))
        for domain in catalog.domains
        for split, chosen in (("test", queries), ("index", index))
    }
    return {key: rows for key, rows in found.items() if len(rows)}
