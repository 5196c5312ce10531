"""What a smaller or faster form of a model costs: mMP@5 a domain with intervals, size, speed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.table import Table

from samething.arrays import Embeddings, PixelBatch
from samething.catalog import Catalog
from samething.embedder import Embedder
from samething.embedder.codes import Coder
from samething.errors import ArtefactError, InputError
from samething.evaluation import MEAN, EvaluationResult, evaluate_embeddings
from samething.files import Json
from samething.images import Preprocessing
from samething.metrics import paired_difference

Role = Literal["test", "val"]
SPEED_BATCH = 16
SPEED_ROUNDS = 5


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

    def require_within_tolerance(self, folder: Path) -> None:
        """Refuse a form that loses too much.

        Raises:
            ArtefactError: the mean fell by more than the tolerance; says where.
        """
        if self.within_tolerance:
            return
        worst = sorted(
            (change.difference, domain) for domain, change in self.changes.items() if domain != MEAN
        )
        domains = ", ".join(f"{domain} {100 * change:+.1f}" for change, domain in worst)
        raise ArtefactError(
            f"{folder}: this form loses {100 * self.fall:.1f} points of mMP@5 on the mean over domains "
            f"({domains})",
            expected=f"a fall of at most {100 * self.tolerance:.1f} points (--tolerance {self.tolerance:g})",
            next_step="run the same command with --allow-quality-loss, which keeps what was computed, "
            "or choose a milder form",
        )


def changes_of(before: EvaluationResult, after: EvaluationResult) -> dict[str, Change]:
    """Change a domain and on the mean, from two results over the same queries."""
    changes = {}
    for domain in (*before.domains, MEAN):
        chosen = (
            np.ones(len(before.query_rows), dtype=bool)
            if domain == MEAN
            else before.query_domains == before.domains.index(domain)
        )
        pair = paired_difference(
            after.values("mmp@5")[chosen], before.values("mmp@5")[chosen], before.query_domains[chosen]
        )
        changes[domain] = Change(
            before=before.value("mmp@5", domain=domain),
            after=after.value("mmp@5", domain=domain),
            difference=pair.difference,
            low=pair.low,
            high=pair.high,
            num_queries=before.num_queries(domain),
        )
    return changes


def measured_role(catalog: Catalog) -> Role:
    """The images that a form is measured on: test, or validation where there is no test.

    Raises:
        InputError: neither.
    """
    if catalog.has_role("query", "query+index").any() and catalog.has_role("index", "query+index").any():
        return "test"
    if catalog.has_role("val").any():
        return "val"
    raise InputError(
        "a catalog without test and validation images",
        expected="images to measure on what this form of the model costs",
        next_step="make the catalog with --test or --val, or export in float32 at full length",
    )


def rows_of(catalog: Catalog, role: Role) -> np.ndarray:
    """Catalog rows of a role's images, as a mask."""
    if role == "val":
        return catalog.has_role("val")
    return catalog.has_role("query", "index", "query+index")


def embed_images(embedder: Embedder, catalog: Catalog) -> tuple[Embeddings, np.ndarray]:
    """Vectors of a catalog's images and which rows could be read.

    Raises:
        ArtefactError: the images have moved, or none of them can be read.
    """
    from samething.progress import progress_bar

    catalog.require_files()
    vectors = np.zeros((len(catalog), embedder.dim), np.float32)
    readable = np.zeros(len(catalog), dtype=bool)
    with progress_bar("images") as progress:
        task = progress.add_task("parity", total=len(catalog))
        for batch in embedder.embed_stream(catalog.sources):
            rows = batch.positions
            vectors[rows] = batch.vectors
            readable[rows] = True
            progress.advance(task, len(batch.positions) + len(batch.unreadable))
    if not readable.any():
        raise ArtefactError(
            "none of the images can be read",
            expected="the images that the run was evaluated on",
            next_step="put them back where the catalog says they are",
        )
    return vectors, readable


def decoded(coder: Coder, vectors: Embeddings, catalog: Catalog, role: Role) -> tuple[Embeddings, bool]:
    """Vectors as they come back from their bytes; queries stay whole where no image is query and index."""
    coded = coder.decode(coder.encode(vectors))
    if role == "val" or catalog.has_role("query+index").any():
        return coded, True
    coded[catalog.has_role("query")] = vectors[catalog.has_role("query")]
    return coded, False


def evaluate_both(
    before: Float[np.ndarray, "n full"], after: Float[np.ndarray, "n short"], catalog: Catalog, role: Role
) -> tuple[EvaluationResult, EvaluationResult]:
    """Both embeddings of the same images on the same queries."""
    results = (evaluate_embeddings(vectors, catalog, role=role) for vectors in (before, after))
    first, second = results
    return first, second


def images_per_second(
    embedders: Mapping[str, Embedder], pixels: Mapping[str, PixelBatch]
) -> dict[str, float]:
    """Images a second through each graph: medians of turns, in batches of 16.

    Args:
        embedders: the graphs, by name.
        pixels: what each one is fed, by the same names; up to 16 images of one size.
    """
    times: dict[str, list[float]] = {name: [] for name in embedders}
    for _ in range(SPEED_ROUNDS + 1):
        for name, embedder in embedders.items():
            started = time.perf_counter()
            embedder.embed_pixels(pixels[name])
            times[name].append((time.perf_counter() - started) / len(pixels[name]))
    return {name: 1 / statistics.median(each[1:]) for name, each in times.items()}


def prepared_images(catalog: Catalog, preprocessing: Preprocessing, count: int) -> PixelBatch:
    """Evenly chosen images of a catalog as pixels; those that cannot be read are passed over."""
    from samething.errors import ImageError
    from samething.images import decode, prepare

    found: list[Any] = []
    for row in range(0, len(catalog), max(1, len(catalog) // count)):
        if len(found) == count:
            break
        try:
            found.append(prepare(decode(catalog.source(row)), preprocessing))
        except ImageError:
            continue
    return np.stack(found) if found else np.empty((0, 3, *preprocessing.shape), np.uint8)
