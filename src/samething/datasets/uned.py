"""UnED: eight domains with training, validation, queries and index, listed in JSON files.

Layout, protocols and numbers: https://github.com/nikosips/Universal-Image-Embeddings (README,
``prepare_data.sh``, ``universal_embedding/dataset_infos.py``); Ypsilantis et al., ICCV 2023.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from samething.datasets.dataset import Part, Published
from samething.datasets.official import OfficialFiles
from samething.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnedDomain:
    """One domain: its folders of images, and the published size of each of its JSON files."""

    folders: tuple[str, ...]
    """Folders below ``images/`` that hold its images."""
    sizes: Mapping[str, int]
    """Split → number of images; a split is a file ``info_files/<domain>/<split>.json``."""
    train_classes: int
    one_numbering: bool = False
    """Whether the class numbers of all splits mean the same things, because test images are searched for
    among training images. Elsewhere training and test share no class, or number them on their own."""


DOMAINS: Final[Mapping[str, UnedDomain]] = {
    name: UnedDomain(**{**row, "folders": tuple(row["folders"])})
    for name, row in tomllib.loads(Path(__file__).with_name("uned.toml").read_text(encoding="utf-8")).items()
}
"""The domains of UnED, in the order of its authors."""


def splits(domain: str, part: Part) -> dict[str, str]:
    """Which JSON files of a domain make up a part, and the role of their images.

    ``val`` alone gives the authors' validation protocol, as queries and index; together with the rest
    (``all``) its images have the role ``val``.

    >>> splits("inshop", "test")
    {'test': 'query', 'index': 'index'}
    >>> splits("met", "val")
    {'val': 'query', 'small_index': 'index'}
    >>> splits("cars", "all")
    {'train': 'train', 'val': 'val', 'test': 'query+index'}
    """
    files = DOMAINS[domain].sizes
    test = {"test": "query", "index": "index"} if "index" in files else {"test": "query+index"}
    if part == "train":
        return {"train": "train"}
    if part == "val":
        return {"val": "query", "small_index": "index"} if "small_index" in files else {"val": "query+index"}
    return test if part == "test" else {"train": "train", "val": "val", **test}


def read_uned(source: OfficialFiles) -> pa.Table:
    """``info_files/<domain>/<split>.json``: lists of {path, class_id}, a class_id being a number or several.

    The column ``split`` keeps the authors' name of the file. An image with several classes has the first as
    its label, and all of them in the column ``labels``. The Met's index is its training set: with all parts
    read, those images have two rows.

    Raises:
        ArtefactError: a JSON file or an image folder is missing.
        InputError: an entry is not as promised, or a domain is none of UnED's.
    """
    unknown = sorted({*source.domains} - {*DOMAINS})
    if unknown:
        raise InputError(
            f"UnED has no domain {', '.join(unknown)}",
            expected=f"some of {', '.join(DOMAINS)}, separated by commas",
            next_step="correct --domain, or leave it away for all eight",
        )
    domains = [name for name in DOMAINS if not source.domains or name in source.domains]
    needed = [
        name
        for domain in domains
        for name in (
            *(f"uned/info_files/{domain}/{split}.json" for split in splits(domain, source.part)),
            *(f"uned/images/{folder}" for folder in DOMAINS[domain].folders),
        )
        if not source.exists(name)
    ]
    if needed:
        raise source.missing(*needed)
    return pa.concat_tables(
        _read_split(source, domain, split, role)
        for domain in domains
        for split, role in splits(domain, source.part).items()
    )


def _read_split(source: OfficialFiles, domain: str, split: str, role: str) -> pa.Table:
    where = f"uned/info_files/{domain}/{split}.json"
    group = "" if DOMAINS[domain].one_numbering else f"{'test' if split == 'index' else split}/"
    entries = source.json_rows(where, "path", "class_id", "class")
    paths: list[Any] = [path for path, *_ in entries]
    classes = [other if value is None else value for _, value, other in entries]
    for number, (path, value) in enumerate(zip(paths, classes, strict=True)):
        if not isinstance(path, str) or not path or not _is_class(value):
            raise source.malformed(
                where,
                f"entry {number} is (path, class_id) {path!r}, {value!r}",
                expected="{path, class_id} in every entry, class_id being a number or several",
            )
    if domain == "rp2k" and (first := next((path for path in paths if not path.isascii()), None)):
        there, escaped = (source.exists(f"uned/images/{name}") for name in (first, escaped_name(first)))
        paths = [escaped_name(path) for path in paths] if escaped and not there else paths
    prefix = f"{domain}/{group}"
    several = [[f"{prefix}{one}" for one in value] if isinstance(value, list) else None for value in classes]
    return source.rows(
        where,
        image=paths,
        folder="uned/images/",
        # a distractor bears no class: it is a thing of its own
        label=[
            f"{prefix}{value}" if own is None else own[0] if own else f"{prefix}of no class/{path}"
            for value, own, path in zip(classes, several, paths, strict=True)
        ],
        role=role,
        domain=domain,
        labels=pa.array(
            [[f"uned/{one}" for one in own] if own and len(own) > 1 else None for own in several],
            pa.list_(pa.string()),
        ),
        split=pa.repeat(pa.scalar(split), len(paths)),
    )


def _is_class(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_class(one) and not isinstance(one, list) for one in value)
    return isinstance(value, int | str) and not isinstance(value, bool) and value != ""


def escaped_name(path: str) -> str:
    """A path as some unpacking programs write it: letters beyond ASCII as ``#U`` and four digits.

    >>> escaped_name("rp2k/all/train/可乐/é.jpg")
    'rp2k/all/train/#U53ef#U4e50/#U00e9.jpg'
    """
    return re.sub(r"[^\x00-\x7f]", lambda found: f"#U{ord(found[0]):04x}", path)


PUBLISHED: Final = tuple(
    Published(
        where={"domain": name, "split": split},
        classes=domain.train_classes if split == "train" else None,
        images=number,
    )
    for name, domain in DOMAINS.items()
    for split, number in domain.sizes.items()
    if split != "small_index"
)
"""Sizes of UnED's parts, as published."""
