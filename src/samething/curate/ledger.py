"""What was dropped and why: a row each, kept as a few numbers per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa

from samething.arrays import Bool, Int
from samething.catalog import Catalog

Rule: TypeAlias = Literal[
    "unreadable",
    "leak",
    "conflict",
    "duplicate",
    "noise",
    "too few images",
    "too many classes",
    "too many images",
    "budget",
]
RULES: Final[Sequence[Rule]] = get_args(Rule)
"""Why an image is dropped, in the order in which it is looked at."""

MEANINGS: Final[Mapping[Rule, str]] = {
    "unreadable": "the file cannot be read",
    "leak": "the same image is in an evaluation set",
    "conflict": "the same image has another label in the same data set",
    "duplicate": "the same image is kept once already",
    "noise": "its label is doubtful",
    "too few images": "its class has too few images",
    "too many classes": "its class was not among those drawn of its data set",
    "too many images": "it was not among those drawn of its class",
    "budget": "it was not among those drawn within the budget",
}

COLUMNS: Final = ["image", "label", "domain", "dataset", "role"]


class Ledger:
    """Rows of a catalog, each kept or dropped once, with the reason."""

    def __init__(self, num_rows: int) -> None:
        self._rule = np.full(num_rows, -1, np.int8)
        self._reason = np.full(num_rows, -1, np.int32)
        self._partner = np.full(num_rows, -1, np.int64)
        self._reasons: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rule)

    @property
    def is_kept(self) -> Bool[np.ndarray, " n"]:
        """Rows that are not dropped."""
        return self._rule < 0

    def drop(
        self,
        rows: Int[np.ndarray, " r"],
        rule: Rule,
        reasons: str | Sequence[str],
        *,
        partners: Int[np.ndarray, " r"] | None = None,
    ) -> None:
        """Drop rows; those that are dropped already keep their first reason.

        Args:
            rows: distinct rows.
            rule: what drops them.
            reasons: one for all, or one per row.
            partners: the image that makes each one superfluous, as a row of the catalog or, from its end,
                of the evaluation sets; -1 for none.
        """
        new = np.flatnonzero(self._rule[rows] < 0)
        texts = (
            [reasons] * len(new) if isinstance(reasons, str) else [reasons[place] for place in new.tolist()]
        )
        self._rule[rows[new]] = RULES.index(rule)
        self._reason[rows[new]] = [self._reasons.setdefault(text, len(self._reasons)) for text in texts]
        if partners is not None:
            self._partner[rows[new]] = partners[new]

    def counts(self) -> dict[Rule, int]:
        """Dropped images by rule; rules that dropped none are left out."""
        numbers = np.bincount(self._rule[self._rule >= 0], minlength=len(RULES))
        return {rule: int(number) for rule, number in zip(RULES, numbers, strict=True) if number}

    def dropped_rows(self, *rules: Rule) -> Int[np.ndarray, " d"]:
        """Rows that these rules dropped, ascending; without rules, all dropped rows."""
        wanted = [RULES.index(rule) for rule in rules or RULES]
        return np.flatnonzero(np.isin(self._rule, wanted))

    def reason_of(self, row: int) -> str:
        """Why a row was dropped."""
        return list(self._reasons)[int(self._reason[row])]

    def table(self, catalog: Catalog, partner_images: pa.ChunkedArray) -> pa.Table:
        """A row for each dropped image: its columns, the rule, the reason and what stays instead.

        Args:
            catalog: the images.
            partner_images: path of each row that a partner can be.
        """
        rows = self.dropped_rows()
        table = catalog.table.select(COLUMNS).take(pa.array(rows))
        partners = pa.array(self._partner[rows], mask=self._partner[rows] < 0)
        for name, texts, numbers in (("rule", RULES, self._rule), ("reason", self._reasons, self._reason)):
            column = pa.array(list(texts), pa.string()).take(pa.array(numbers[rows]))
            table = table.append_column(name, column)
        return table.append_column("instead", partner_images.take(partners).fill_null(""))
