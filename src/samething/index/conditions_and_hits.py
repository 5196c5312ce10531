"""What an index can be asked for besides nearness, and what it answers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from samething.arrays import Float, Shaped
from samething.errors import InputError
from samething.images.parts import Place
from samething.index.description import IndexDescription, Table, item_rows


@dataclasses.dataclass(frozen=True)
class Between:
    """A range of a numeric column, both ends included; an end that is None is open."""

    low: float | int | None = None
    high: float | int | None = None

    def __post_init__(self) -> None:
        for end in (self.low, self.high):
            if end is not None and not math.isfinite(end):
                raise InputError(
                    f"a range that ends at {end}",
                    expected="finite numbers",
                    next_step="leave an end out to keep it open",
                )

    def of_whole_numbers(self) -> Between:
        """The same range of 64-bit whole numbers, its ends whole.

        >>> Between(0.5, 1e30).of_whole_numbers()
        Between(low=1, high=9223372036854775807)
        """
        least, most = -(2**63) + 1, 2**63 - 1
        low = None if self.low is None else min(max(math.ceil(self.low), least), most)
        high = None if self.high is None else min(max(math.floor(self.high), least), most)
        return Between(low, high)


Condition: TypeAlias = list[str] | Between
"""What one column of a row must meet: one of these texts, or a number in this range."""

Where: TypeAlias = Mapping[str, str | Sequence[str] | Between]
"""A filter: for each text column the value or the values a row may have there, for each numeric column the
range; all columns must agree. A row without a value is left out."""


def conditions(where: Where, columns: Mapping[str, str]) -> dict[str, Condition]:
    """What a filter asks of columns, checked against their kinds.

    Raises:
        InputError: a column that is not there, or what its kind cannot meet.
    """
    return {name: _condition(name, values, columns) for name, values in where.items()}


def _condition(name: str, values: str | Sequence[str] | Between, columns: Mapping[str, str]) -> Condition:
    kinds = {name: kind for name, kind in columns.items() if kind != "bytes"}
    if name not in kinds:
        raise InputError(
            f"a filter on the column {name!r}",
            expected=f"one of the columns {', '.join(kinds)}",
            next_step="correct the name",
        )
    is_numeric = kinds[name] in ("integer", "number")
    if isinstance(values, Between):
        if not is_numeric:
            raise InputError(
                f"a range for the column {name!r}", expected="texts", next_step="give the values as text"
            )
        return values.of_whole_numbers() if kinds[name] == "integer" else values
    if is_numeric:
        raise InputError(
            f"a filter on {name!r} with the value {values!r}",
            expected="a range, since the column holds numbers",
            next_step="give Between(low, high)",
        )
    texts = [values] if isinstance(values, str) else list(values)
    for value in texts:
        if not isinstance(value, str):
            raise InputError(
                f"a filter on {name!r} with the value {value!r}",
                expected="texts",
                next_step="give the value as text",
            )
    return texts


class Hits:
    """The nearest rows of each query, best first; rows of equal score in the order of their ids.

    Args:
        ids: Python strings. ``k`` is smaller than asked for where fewer rows match the filter.
        scores: cosine similarities, float64, rounded to 10 decimals; rows that agree in those are tied.
        rows: metadata of the hits: all hits of the first query, then all of the second, and so on.
        columns: of the metadata.
        description: of the index.
        places: in the order of the rows, the region that is more like the query than the whole image, or
            None; without meaning in an index without regions.
    """

    def __init__(
        self,
        ids: Shaped[np.ndarray, "q k"],
        scores: Float[np.ndarray, "q k"],
        rows: list[dict[str, Any]],
        columns: list[str],
        description: IndexDescription,
        places: Sequence[Place | None],
    ) -> None:
        self.ids, self.scores = ids, scores
        self._rows, self._columns, self._description = rows, columns, description
        self.places = None if description.regions is None else places

    @functools.cached_property
    def items(self) -> Table:
        """Metadata of all hits as a table."""
        return item_rows(self._rows, self._columns, self._description)

    def __len__(self) -> int:
        """Number of queries."""
        return int(self.ids.shape[0])

    def of(self, query: int) -> list[dict[str, Any]]:
        """The hits of one query: mappings of the columns, ``score`` and, with regions, ``place``."""
        num_hits = self.ids.shape[1]
        first = query * num_hits
        rows = self._rows[first : first + num_hits]
        found = [{**row, "score": float(score)} for row, score in zip(rows, self.scores[query], strict=True)]
        if self.places is not None:
            for place, hit in enumerate(found, start=first):
                hit["place"] = self.places[place]
        return found


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a complete check of an index found."""

    num_rows: int
    """Rows that could be read."""
    problems: tuple[str, ...]
    """One sentence each, with the file's name where one is to blame. Empty: all is as it was written."""
