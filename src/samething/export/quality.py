"""What a written model is worth: metrics on the test images, "no match", and what its form costs."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Final

import numpy as np

from samething.arrays import Embeddings, PixelBatch
from samething.catalog import Catalog
from samething.embedder import Embedder
from samething.errors import ArtefactError, ImageError, InputError
from samething.evaluation import MEAN, EvaluationResult, evaluate_embeddings
from samething.evaluation.no_match import NoMatch, measure_no_match
from samething.evaluation.task import rows_by_role
from samething.export.embedding_model import Source
from samething.export.form import Form
from samething.export.parity import Change, Parity, Role
from samething.heads import Head
from samething.images import Preprocessing, decode, prepare
from samething.progress import progress_bar
from samething.retrieval.codes import Coder
from samething.statistics import paired_difference

LEAST_QUESTIONS: Final = 100
"""Validation queries that scores are calibrated on at least."""
NO_MATCH_PRECISION: Final = 0.5
"""A search says "no match" where its best answer is rather wrong than right."""
_SPEED_BATCH: Final = 16
_SPEED_ROUNDS: Final = 5


def measured(
    source: Source, head: Head, embedder: Embedder, reference: Embedder | None, form: Form, tolerance: float
) -> tuple[EvaluationResult | None, Parity | None]:
    """Metrics of the model as it is written, and what its form costs.

    Args:
        source: what it is made of.
        head: its head, which may be a prefix of the source's.
        embedder: the model in its form.
        reference: the model in float32 at full length; None where the form costs nothing.
        form: how it is written.
        tolerance: largest accepted fall of mMP@5.

    Returns:
        Metrics of the test images, None without any; and the parity, None without a reference.
    """
    catalog = source.features.catalog
    if reference is None:
        if source.described or not _has_test(catalog):
            return metrics_on_test(source, head, embedder.coder), None
        tested = catalog.take(_rows_of(catalog, "test"))
        vectors, readable = _embedded(embedder, tested)
        tested = tested.take(readable)
        kept = _as_found(vectors[readable], tested, embedder.coder)
        return evaluate_embeddings(kept, tested), None
    role = _measured_role(catalog)
    rows = _rows_of(catalog, role)
    tested = catalog.take(rows)
    readable = np.ones(len(tested), dtype=bool)
    if source.described:
        before = source.head.embed(np.asarray(source.features.rows[rows]))
    else:
        before, readable = _embedded(reference, tested)
    if form.changes_arithmetic or not source.described:
        after, read = _embedded(embedder, tested)
        readable &= read
    else:
        after = head.embed(np.asarray(source.features.rows[rows]))
    before, after, tested = before[readable], after[readable], tested.take(readable)
    after = _as_found(after, tested, embedder.coder)
    first, second = (evaluate_embeddings(vectors, tested, role=role) for vectors in (before, after))
    parity = Parity(
        measured_on=role,
        changes=changes_of(first, second),
        tolerance=tolerance,
        model_bytes=(_graph_bytes(reference.folder), _graph_bytes(embedder.folder)),
        vector_bytes=(
            4 * source.head.embedding_dim,
            embedder.coder.num_bytes if embedder.coder else 4 * head.embedding_dim,
        ),
        images_per_s=_speeds(reference, embedder, tested, form),
        queries_coded=embedder.coder is not None and not _is_asked_alone(tested),
    )
    return (second if role == "test" else None), parity


def metrics_on_test(source: Source, head: Head, coder: Coder | None) -> EvaluationResult | None:
    """Metrics of the test images from the cached features; None where there are none."""
    catalog = source.features.catalog
    if not source.described or not _has_test(catalog):
        return None
    rows = _rows_of(catalog, "test")
    vectors, tested = head.embed(np.asarray(source.features.rows[rows])), catalog.take(rows)
    return evaluate_embeddings(_as_found(vectors, tested, coder), tested)


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


def _has_test(catalog: Catalog) -> bool:
    return bool(
        catalog.has_role("query", "query+index").any() and catalog.has_role("index", "query+index").any()
    )


def _measured_role(catalog: Catalog) -> Role:
    """The images that a form is measured on: test, or validation where there is no test.

    Raises:
        InputError: neither.
    """
    if _has_test(catalog):
        return "test"
    if catalog.has_role("val").any():
        return "val"
    raise InputError(
        "a catalog without test and validation images",
        expected="images to measure on what this form of the model costs",
        next_step="make the catalog with --test or --val, or export in float32 at full length",
    )


def _rows_of(catalog: Catalog, role: Role) -> np.ndarray:
    """Catalog rows of a role's images, as a mask."""
    return catalog.has_role("val") if role == "val" else catalog.has_role("query", "index", "query+index")


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
