"""What a smaller or faster form of a model costs: mMP@5 per domain with intervals, size, speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.table import Table

from samething.errors import ArtefactError
from samething.evaluation import MEAN
from samething.files import Json

Role: TypeAlias = Literal["test", "val"]


@dataclasses.dataclass(frozen=True)
class Change:
    """mMP@5 before and after, in [0, 1], and the paired difference with its 95 % interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    num_queries: int


@dataclasses.dataclass(frozen=True)
class Parity:
    """A form of a model against the same model in float32 at full length."""

    measured_on: Role
    """``test``: query and index images; ``val``: validation images, where there is no test."""
    changes: Mapping[str, Change]
    """A domain each, and ``mean``: the plain mean over domains. One index over all domains."""
    tolerance: float
    """Largest fall of the mean that is accepted, in [0, 1]."""
    model_bytes: tuple[int, int]
    """Size of the graph with its weights: of the reference, of this form."""
    vector_bytes: tuple[int, int]
    """Size of a stored vector, likewise."""
    images_per_s: tuple[float, float] | None
    """Prepared images per second through the graph on this machine; None where the graph's arithmetic is the
    same."""
    queries_coded: bool = False
    """Whether queries were coded as well as the index, as they must be where an image is both."""

    @property
    def fall(self) -> float:
        """How far the mean fell; negative where it rose."""
        return -self.changes[MEAN].difference

    @property
    def within_tolerance(self) -> bool:
        """Whether the mean fell by no more than the tolerance."""
        return self.fall <= self.tolerance

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values."""
        value: dict[str, Json] = dataclasses.asdict(self)
        for name in ("model_bytes", "vector_bytes", "images_per_s"):
            value[name] = list(value[name]) if value[name] is not None else None
        return {**value, "fall": self.fall, "within_tolerance": self.within_tolerance}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Parity:
        """The inverse of :meth:`to_json`."""
        fields = {field.name: value[field.name] for field in dataclasses.fields(cls)}
        for name in ("model_bytes", "vector_bytes", "images_per_s"):
            fields[name] = tuple(fields[name]) if fields[name] is not None else None
        fields["changes"] = {name: Change(**change) for name, change in fields["changes"].items()}
        return cls(**fields)

    def __rich__(self) -> Table:
        """The change a domain, size and speed."""
        before, after = (size / 1e6 for size in self.model_bytes)
        long, short = self.vector_bytes
        caption = f"graph {before:.1f} → {after:.1f} MB; vector {long} → {short} bytes"
        if self.images_per_s:
            caption += f"; {self.images_per_s[0]:.0f} → {self.images_per_s[1]:.0f} images/s"
        table = Table(title="against float32 at full length, mMP@5 %", caption=caption, box=SIMPLE_HEAD)
        for column in ("domain", "queries", "before", "after", "change (95 %)"):
            table.add_column(column, justify="left" if column == "domain" else "right")
        for domain, change in self.changes.items():
            table.add_row(
                domain,
                f"{change.num_queries:,}",
                f"{100 * change.before:.1f}",
                f"{100 * change.after:.1f}",
                f"{100 * change.difference:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})",
                style="bold" if domain == MEAN else None,
            )
        return table

    def refusal(self, folder: Path) -> ArtefactError:
        """The error of a form that loses more than the tolerance; says where."""
        worst = sorted(
            (change.difference, domain) for domain, change in self.changes.items() if domain != MEAN
        )
        domains = ", ".join(f"{domain} {100 * change:+.1f}" for change, domain in worst)
        return ArtefactError(
            f"{folder}: this form loses {100 * self.fall:.1f} points of mMP@5 on the mean over domains "
            f"({domains})",
            expected=f"a fall of at most {100 * self.tolerance:.1f} points (--tolerance {self.tolerance:g})",
            next_step="run the same command with --allow-quality-loss, which keeps what was computed, "
            "or choose a milder form",
        )
