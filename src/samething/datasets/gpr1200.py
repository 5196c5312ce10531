"""GPR1200: 1,200 things of six kinds, ten images each, all of them queries."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles

# A kind is 200 categories, in this order (eval/GPR1200.py of the source).
_KINDS: Final = ("landmarks", "nature", "sketches", "objects", "packaged goods", "faces")
_CATEGORIES_OF_A_KIND: Final = 200


def read_gpr1200(source: OfficialFiles) -> pa.Table:
    """``images/<category>_<name>.jpg``; the kind of a category follows from its number."""
    where = "GPR1200/images"
    names = pa.array(source.images(where), pa.string())
    category = pc.list_element(pc.split_pattern(names, "_", max_splits=1), 0)
    is_known = pc.match_substring_regex(category, "^[0-9]{1,4}$")
    wrong = pc.index(is_known, False).as_py()
    numbers = pc.if_else(is_known, category, "9999").cast(pa.int64()).to_numpy()
    if wrong < 0 and len(numbers) and numbers.max() >= len(_KINDS) * _CATEGORIES_OF_A_KIND:
        wrong = int(numbers.argmax())
    if wrong >= 0:
        raise source.malformed(
            where,
            f"holds {names[wrong].as_py()}",
            expected="images named CATEGORY_NAME.jpg, CATEGORY below 1200",
        )
    domain = pa.array(np.asarray(_KINDS, dtype=object)[numbers // _CATEGORIES_OF_A_KIND], pa.string())
    return source.rows(
        where, image=names, folder=f"{where}/", label=category, domain=domain, role="query+index"
    )


GPR1200 = Dataset(
    key="gpr1200",
    title="GPR1200",
    domain="several",
    classes=1_200,
    images=12_000,
    licence="research and education only; images belong to their owners",
    source="https://github.com/Visual-Computing/GPR1200",
    get="unpack https://visual-computing.com/files/GPR1200/GPR1200.zip into GPR1200/",
    files=("GPR1200/images/",),
    layout="README of the source",
    reader=read_gpr1200,
    has_roles=True,
    published=(Published(classes=1_200, images=12_000),),
)
