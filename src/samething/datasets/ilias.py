"""ILIAS: 1,000 things, their queries and positives, among distractors in tar shards.

Layout and numbers: https://github.com/ilias-vrg/ilias (``download/``, ``evaluation/``,
``feature_extraction/``); Kordopatis-Zilos et al., CVPR 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.official import OfficialFiles, joined
from samething.errors import ArtefactError
from samething.images import IMAGE_SUFFIXES
from samething.images.shards import tar_members
from samething.progress import progress_bar

_SHARDS: Final = "ilias/yfcc100m"
_MINI: Final = "ilias/image_ids/mini_ilias_yfcc100m_ids.txt"


def read_ilias_core(source: OfficialFiles) -> pa.Table:
    """Queries and positives, by ``image_ids/image_query_ids.txt`` and ``positive_ids.txt``."""
    return pa.concat_tables(_core(source))


def read_ilias(source: OfficialFiles) -> pa.Table:
    """Queries, positives, and the images of all shards in ``yfcc100m/``."""
    return pa.concat_tables([*_core(source), *_distractors(source, None)])


def read_mini_ilias(source: OfficialFiles) -> pa.Table:
    """Queries, positives, and those images of the shards that ``mini_ilias_yfcc100m_ids.txt`` names."""
    wanted = pc.utf8_trim_whitespace(source.lines(_MINI))
    return pa.concat_tables([*_core(source), *_distractors(source, wanted)])


def _core(source: OfficialFiles) -> Iterator[pa.Table]:
    """An identifier is ``<thing>/query/Qxxx_yy.jpg`` or ``<thing>/pos/Pxxx_zz.jpg``; other cells are left."""
    for name, role, folder in (
        ("image_query_ids.txt", "query", "query"),
        ("positive_ids.txt", "index", "pos"),
    ):
        where = f"ilias/image_ids/{name}"
        lines = source.lines(where)
        identifier = pc.utf8_trim_whitespace(pc.list_element(pc.split_pattern(lines, ","), 0))
        found = pc.extract_regex(identifier, rf"^(?P<thing>[^/]+)/{folder}/[^/]+$")
        source.require(
            where,
            pc.is_valid(found),
            "line {} is {!r}",
            lines,
            expected=f"THING/{folder}/IMAGE.jpg[,…]",
            first=1,
        )
        thing = pc.struct_field(found, "thing")
        yield source.rows(where, image=identifier, folder="ilias/ilias_core/", label=thing, role=role)


def _distractors(source: OfficialFiles, wanted: pa.Array | None) -> Iterator[pa.Table]:
    """A table for each shard; a shard is a tar file, or the folder that it was unpacked to."""
    folder = source.path(_SHARDS)
    shards = sorted(path for path in folder.glob("*") if path.suffix == ".tar" or path.is_dir())
    if not shards:
        raise source.missing(f"{_SHARDS}/*.tar")
    count = 0
    with progress_bar("shards", only_on_terminal=True) as progress:
        for path in progress.track(shards, description="distractors"):
            where = f"{_SHARDS}/{path.name}"
            if path.is_dir():
                members = source.images(where)
            else:
                try:  # only the headers are read
                    members = [
                        name
                        for name in tar_members(str(path))
                        if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
                    ]
                except ArtefactError as error:
                    raise source.malformed(
                        where, "is no whole, uncompressed tar file", expected=error.expected
                    ) from error
            names = pa.array(members, pa.string())
            if wanted is not None:
                keys = pc.replace_substring_regex(names, r"\.[^/]*$", "")  # as WebDataset does
                names = names.filter(pc.is_in(keys, value_set=wanted))
            if len(names):
                count += len(names)
                # each is a thing of its own, which no query shows
                label = joined(f"distractor/{path.stem}/", names)
                # members are read where they lie
                image = joined(f"{where}/", names) if path.is_dir() else joined("tar://", names, f"::{where}")
                yield source.rows(where, image=image, label=label, role="index")
    if not count:
        found = "hold no images" if wanted is None else f"hold none of the images that {_MINI} names"
        raise source.malformed(_SHARDS, f"its {len(shards)} shards {found}", expected="the official shards")
