"""What a page needs to begin: the domains and labels of an index with their counts, and a few images."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from typing import Final

from samething.files import Json
from samething.index import AbstractIndex

_MAX_LABELS: Final = 500
_MAX_SAMPLES: Final = 12


def overview_of(index: AbstractIndex) -> dict[str, Json]:
    """Counts, columns, model and samples of an index."""
    domains: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    samples: dict[str, list[str]] = {}
    for batch in index.items(columns=["label", "domain"]):
        domains.update(name or "" for name in batch.column("domain").to_pylist())
        labels.update(name or "" for name in batch.column("label").to_pylist())
        for name, row_id in zip(*(batch.column(c).to_pylist() for c in ("domain", "id")), strict=True):
            kept = samples.setdefault(name or "", [])
            if len(kept) < _MAX_SAMPLES or row_id < kept[-1]:
                bisect.insort(kept, row_id)
                del kept[_MAX_SAMPLES:]
    del labels[""]
    return {
        "num_images": domains.total(),
        "model": index.description.model_name,
        "dim": index.description.dim,
        "domains": dict(sorted(domains.items())),
        "num_labels": len(labels),
        "samples": _spread(list(samples.values()), _MAX_SAMPLES),
        "labels": sorted(name for name, _ in labels.most_common(_MAX_LABELS)),
        "columns": {name: kind for name, kind in index.description.columns.items() if kind != "bytes"},
    }


def first_thumbnails(index: AbstractIndex, most: int) -> list[bytes]:
    """Thumbnails of the first so many images, of those that have one."""
    first = next(iter(index.items(["thumbnail"])), None)
    rows = [] if first is None else first.slice(0, most).to_pylist()
    return [row["thumbnail"] for row in rows if row["thumbnail"]]


def _spread(groups: list[list[str]], count: int) -> list[str]:
    """So many of all groups, as evenly as they have them.

    >>> _spread([["a", "b", "c"], ["x"]], 3)
    ['a', 'x', 'b']
    """
    turns = itertools.zip_longest(*groups)
    return [name for turn in turns for name in turn if name is not None][:count]
