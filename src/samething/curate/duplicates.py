"""What becomes of pairs that show one image: leaks, contradictions and copies.

Tiers say what an image is for: training below validation below evaluation. Of a pair in two tiers the lower
one is a *leak*: a model would be tested, or chosen, on what it has seen. Two images of evaluation are only
reported, because a benchmark is not ours to change. Within a tier, the same image

- under one label, or in two data sets, is a *duplicate*: one stays (see :func:`pairs.row_ranks`);
- under two labels of one data set is a *conflict*: one of them is wrong, and nothing says which. If the files
  are equal, both are dropped. If the images only look the same, both stay and are reported: products
  that differ in a detail are photographed alike; ``conflicts`` changes that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa

from samething.arrays import Int
from samething.curate.curate_config import Conflicts, Leaks
from samething.curate.ledger import Ledger
from samething.curate.pairs import METHODS, Pairs

Relation: TypeAlias = Literal["leak", "within evaluation", "conflict", "duplicate", "across data sets"]
RELATIONS: Final[Sequence[Relation]] = get_args(Relation)

TRAINING, VALIDATION, EVALUATION = 0, 1, 2
"""Tiers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What is known of all rows: the catalog's, and behind them those of the evaluation sets."""

    tiers: Int[np.ndarray, " n"]
    classes: Int[np.ndarray, " n"]
    datasets: Int[np.ndarray, " n"]
    """Numbered by first appearance."""
    ranks: Int[np.ndarray, " n"]
    """Place of each row when one of several copies stays."""


def resolve(
    pairs: Pairs, rows: Rows, ledger: Ledger, *, leaks: Leaks, conflicts: Conflicts
) -> Int[np.ndarray, " p"]:
    """Drop what must not stay twice.

    A row is dropped for the sake of one that stays, never for one that is dropped itself as a copy, so that
    images that are alike only through a chain of others stay.

    Args:
        pairs: of all rows; the second ones of a kept pair may be dropped.
        rows: what is known of them.
        ledger: of the catalog's rows, the first ones of all.
        leaks: ``remove`` or only ``report`` them.
        conflicts: ``exact`` drops both where the files are equal, ``all`` also where the images look the
            same, ``report`` none.

    Returns:
        Relation of each pair, as an index into :data:`RELATIONS`.
    """
    first, second = pairs.first, pairs.second
    tier = rows.tiers[first]
    relation = np.select(
        [
            tier != rows.tiers[second],
            tier == EVALUATION,
            rows.datasets[first] != rows.datasets[second],
            rows.classes[first] != rows.classes[second],
        ],
        [RELATIONS.index(name) for name in ("leak", "within evaluation", "across data sets", "conflict")],
        RELATIONS.index("duplicate"),
    )
    # the better one first: what stays is decided before what goes for its sake
    swap = rows.ranks[first] > rows.ranks[second]
    better, worse = np.where(swap, second, first), np.where(swap, first, second)
    order = np.lexsort((rows.ranks[better], rows.ranks[worse]))
    if leaks == "remove":
        own = order[relation[order] == RELATIONS.index("leak")]
        _, firsts = np.unique(worse[own], return_index=True)
        own = own[firsts]
        # from below, because an evaluation set of its own stands behind the catalog
        names = np.asarray(["training", "validation", "evaluation"], dtype=object)[rows.tiers[better[own]]]
        reasons = [
            f"the image is in the {name} set ({pairs.found_by(n)})"
            for name, n in zip(names, own.tolist(), strict=True)
        ]
        ledger.drop(worse[own], "leak", reasons, partners=better[own])
    if conflicts != "report":
        drops = relation == RELATIONS.index("conflict")
        if conflicts == "exact":
            drops &= pairs.method == METHODS.index("exact")
        both = np.concatenate([worse[drops], better[drops]])
        others = np.concatenate([better[drops], worse[drops]])
        found = np.concatenate([np.flatnonzero(drops)] * 2)
        both, firsts = np.unique(both, return_index=True)
        reasons = [f"the image has another label, too ({pairs.found_by(n)})" for n in found[firsts].tolist()]
        ledger.drop(both, "conflict", reasons, partners=others[firsts])
    copies = np.isin(relation, [RELATIONS.index("duplicate"), RELATIONS.index("across data sets")])
    stays = np.ones(len(rows.tiers), bool)
    stays[: len(ledger)] = ledger.is_kept
    gone: list[int] = []
    instead: list[int] = []
    reasons = []
    for number in order[copies[order]].tolist():
        kept, copy = int(better[number]), int(worse[number])
        if stays[kept] and stays[copy]:
            stays[copy] = False
            gone.append(copy)
            instead.append(kept)
            reasons.append(f"{RELATIONS[relation[number]]} ({pairs.found_by(number)})")
    ledger.drop(np.asarray(gone, np.int64), "duplicate", reasons, partners=np.asarray(instead, np.int64))
    return relation


def pair_table(
    pairs: Pairs, relation: Int[np.ndarray, " p"], rows: Rows, listed: pa.Table, ledger: Ledger
) -> pa.Table:
    """A row per pair: both images, what they are to each other, what found them, and what became of them.

    Args:
        pairs: of all rows.
        relation: of each pair.
        rows: what is known of all rows.
        listed: columns image, label, dataset and role of all rows.
        ledger: of the catalog's rows.
    """
    stays = np.ones(len(rows.tiers), bool)
    stays[: len(ledger)] = ledger.is_kept
    columns: dict[str, object] = {}
    for side, numbers in (("first", pairs.first), ("second", pairs.second)):
        taken = listed.take(pa.array(numbers))
        columns |= {f"{side}_{name}": taken[name] for name in ("image", "label", "dataset", "role")}
    left, right = stays[pairs.first], stays[pairs.second]
    became = np.select(
        [left & right, left, right], ["both stay", "first stays", "second stays"], "both dropped"
    )
    columns |= {
        "relation": np.asarray(RELATIONS, dtype=object)[relation],
        "method": np.asarray(METHODS, dtype=object)[pairs.method],
        "score": np.round(pairs.score.astype(np.float64), 4),
        "closeness": pa.array(
            np.round(pairs.closeness.astype(np.float64), 4), mask=np.isnan(pairs.closeness)
        ),
        "became": became.astype(object),
    }
    return pa.table(columns)
