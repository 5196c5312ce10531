"""What a written model is worth: metrics on the test images, "no match", and what its form costs."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import rich.table

from samething.arrays import Embeddings, PixelBatch
from samething.catalog import Catalog
from samething.embedder import Embedder
from samething.errors import ArtefactError, ImageError, InputError
from samething.evaluation import MEAN, Comparison, EvaluationResult, evaluate_embeddings
from samething.evaluation.no_match import NoMatch, measure_no_match
from samething.evaluation.task import Role, rows_by_role
from samething.export.embedding_model import Source
from samething.export.form import Form
from samething.files import Json
from samething.heads import Head
from samething.images import Preprocessing, decode, prepare
from samething.pages import Cells, Table
from samething.progress import progress_bar
from samething.retrieval.codes import Coder
from samething.statistics import percent

LEAST_QUESTIONS: Final = 100
"""Validation queries that scores are calibrated on at least."""
NO_MATCH_PRECISION: Final = 0.5
"""A search says "no match" where its best answer is rather wrong than right."""
_SPEED_BATCH: Final = 16
_SPEED_ROUNDS: Final = 5


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
        return {**dataclasses.asdict(self), "fall": self.fall, "within_tolerance": self.within_tolerance}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Parity:
        """The inverse of :meth:`to_json`."""
        fields = {field.name: value[field.name] for field in dataclasses.fields(cls)}
        for name in ("model_bytes", "vector_bytes", "images_per_s"):
            fields[name] = tuple(fields[name]) if fields[name] is not None else None
        fields["changes"] = {name: Change(**change) for name, change in fields["changes"].items()}
        return cls(**fields)

    def __rich__(self) -> rich.table.Table:
        """The change a domain, size and speed."""
        before, after = (size / 1e6 for size in self.model_bytes)
        long, short = self.vector_bytes
        caption = f"graph {before:.1f} → {after:.1f} MB; vector {long} → {short} bytes"
        if self.images_per_s:
            caption += f"; {self.images_per_s[0]:.0f} → {self.images_per_s[1]:.0f} images/s"
        rows: list[Cells] = []
        for domain, change in self.changes.items():
            difference = percent(change.difference, change.low, change.high, sign=True)
            before_and_after = percent(change.before), percent(change.after)
            rows.append([domain, f"{change.num_queries:,}", *before_and_after, difference])
        columns = ["domain", "queries", "before", "after", "change (95 %)"]
        title, place = "against float32 at full length, mMP@5 %", list(self.changes).index(MEAN)
        return Table(title, columns, rows, caption, featured=place).printed()

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


def measured(
    source: Source,
    head: Head,
    embedder: Embedder | None,
    reference: Embedder | None,
    form: Form,
    tolerance: float,
) -> tuple[EvaluationResult | None, Parity | None]:
    """Metrics of the model as it is written, and what its form costs.

    Args:
        source: what it is made of.
        head: its head, which may be a prefix of the source's.
        embedder: the model in its form; None for one that only torch runs.
        reference: the model in float32 at full length; None where the form costs nothing.
        form: how it is written.
        tolerance: largest accepted fall of mMP@5.

    Returns:
        Metrics of the test images, None without any; and the parity, None without a reference.

    Raises:
        InputError: a reference, and neither test nor validation images.
        ArtefactError: the images have moved, or none of them can be read.
    """
    catalog = source.features.catalog
    is_tested, is_val = catalog.has_role("query", "index", "query+index"), catalog.has_role("val")
    is_both = catalog.has_role("query+index").any()
    is_asked, is_found = catalog.has_role("query").any(), catalog.has_role("index").any()
    role: Role = "test" if is_both or (is_asked and is_found) else "val"
    rows = is_tested if role == "test" else is_val
    by_features = source.described and not form.changes_arithmetic
    if reference is None and (role == "val" or (embedder is None and not by_features)):
        return None, None
    if not rows.any():
        raise InputError(
            "a catalog without test and validation images",
            expected="images to measure on what this form of the model costs",
            next_step="make the catalog with --test or --val, or export in float32 at full length",
        )
    tested, readable = catalog.take(rows), np.ones(int(rows.sum()), dtype=bool)

    def vectors_of(network: Head, by: Embedder | None) -> Embeddings:
        if by is None:
            return network.embed(np.asarray(source.features.rows[rows]))
        found, can_be_read = _embedded(by, tested)
        readable[:] &= can_be_read
        return found

    before = None if reference is None else vectors_of(source.head, None if source.described else reference)
    after = vectors_of(head, None if by_features else embedder)[readable]
    tested = tested.take(readable)
    coder = None if embedder is None else embedder.coder
    result = evaluate_embeddings(_as_found(after, tested, coder), tested, role=role)
    if embedder is None or reference is None or before is None:
        return result, None
    parity = Parity(
        measured_on=role,
        changes=changes_of(evaluate_embeddings(before[readable], tested, role=role), result),
        tolerance=tolerance,
        model_bytes=(_graph_bytes(reference.folder), _graph_bytes(embedder.folder)),
        vector_bytes=(4 * source.head.embedding_dim, coder.num_bytes if coder else 4 * head.embedding_dim),
        images_per_s=_speeds(reference, embedder, tested, form),
        queries_coded=coder is not None and not _is_asked_alone(tested),
    )
    return (result if role == "test" else None), parity


def _is_asked_alone(tested: Catalog) -> bool:
    """Whether images are either queries or index, so that queries can stay whole."""
    return bool(tested.has_role("query").any() and not tested.has_role("query+index").any())


def _as_found(vectors: Embeddings, tested: Catalog, coder: Coder | None) -> Embeddings:
    """Vectors as a search compares them: those of the index as they come back from their codes."""
    if coder is None:
        return vectors
    kept = coder.decode(coder.encode(vectors))
    if _is_asked_alone(tested):
        kept[tested.has_role("query")] = vectors[tested.has_role("query")]
    return kept


def no_match(source: Source, head: Head, form: Form, coder: Coder | None) -> NoMatch | None:
    """What scores mean, by the validation images, and how true that is of the test images.

    None where they are too few or too hard for any answer to be sure enough, and where scores are other ones
    than the head's own.
    """
    if not source.described or form.precision == "int8":
        return None
    catalog = source.features.catalog
    try:
        used = [rows_by_role(catalog, role) for role in ("val", "test")]
        rows = np.unique(np.concatenate([part for pair in used for part in pair]))
        embeddings = head.embed(np.asarray(source.features.rows[rows]))
        kept = embeddings if coder is None else coder.decode(coder.encode(embeddings))
        found = measure_no_match(
            kept, catalog.take(rows), asked=embeddings, target_precision=NO_MATCH_PRECISION
        )
    except InputError:  # no images of a role, or all answers right: nothing to learn from
        return None
    fitted = found.fitted
    enough = fitted.num_with_positive >= LEAST_QUESTIONS and math.isfinite(fitted.threshold)
    return found if enough else None


def changes_of(before: EvaluationResult, after: EvaluationResult) -> dict[str, Change]:
    """Change per domain and on the mean, from two results over the same queries."""
    both = Comparison(results={"before": before, "after": after}, dimensions={})
    return {
        domain: Change(
            before=before.value("mmp@5", domain=domain),
            after=after.value("mmp@5", domain=domain),
            difference=found.difference,
            low=found.low,
            high=found.high,
            num_queries=before.num_queries(domain),
        )
        for domain, found in both.differences("before")["after"].items()
    }


def prepared_images(catalog: Catalog, preprocessing: Preprocessing, count: int) -> PixelBatch:
    """Evenly chosen images of a catalog as pixels; those that cannot be read are passed over."""
    found: list[np.ndarray] = []
    for row in range(0, len(catalog), max(1, len(catalog) // count)):
        if len(found) == count:
            break
        try:
            found.append(prepare(decode(catalog.source(row)), preprocessing))
        except ImageError:
            continue
    return np.stack(found) if found else np.empty((0, 3, *preprocessing.shape), np.uint8)


def _embedded(embedder: Embedder, catalog: Catalog) -> tuple[Embeddings, np.ndarray]:
    """Vectors of a catalog's images and which rows could be read.

    Raises:
        ArtefactError: the images have moved, or none of them can be read.
    """
    catalog.require_files()
    vectors = np.zeros((len(catalog), embedder.dim), np.float32)
    readable = np.zeros(len(catalog), dtype=bool)
    with progress_bar("images") as progress:
        task = progress.add_task("parity", total=len(catalog))
        for batch in embedder.embed_stream(catalog.sources):
            vectors[batch.positions] = batch.vectors
            readable[batch.positions] = True
            progress.advance(task, len(batch.positions) + len(batch.unreadable))
    if not readable.any():
        raise ArtefactError(
            "none of the images can be read",
            expected="the images that the run was evaluated on",
            next_step="put them back where the catalog says they are",
        )
    return vectors, readable


def _graph_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def _speeds(
    reference: Embedder, embedder: Embedder, tested: Catalog, form: Form
) -> tuple[float, float] | None:
    """Images per second of both graphs, medians of turns; None where their arithmetic is the same."""
    if form.precision == "float32" or form.input == "images":
        return None
    pixels = prepared_images(tested, reference.preprocessing, _SPEED_BATCH)
    if len(pixels) == 0:
        return None
    times: tuple[list[float], list[float]] = [], []
    for _ in range(_SPEED_ROUNDS + 1):
        for each, own_times in zip((reference, embedder), times, strict=True):
            started = time.perf_counter()
            each.embed_pixels(pixels)
            own_times.append((time.perf_counter() - started) / len(pixels))
    before, after = (1 / statistics.median(each[1:]) for each in times)  # the first turn warms up
    return before, after
