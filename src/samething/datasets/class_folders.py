"""Public data sets whose folders or file names are the labels."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.dataset import Reader
from samething.datasets.lists import listed
from samething.datasets.official import OfficialFiles


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
