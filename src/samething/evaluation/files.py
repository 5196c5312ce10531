"""Embeddings of any model, from files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from samething.arrays import Embeddings
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.measuring import evaluate_embeddings, open_embeddings
from samething.evaluation.result import EvaluationResult
from samething.evaluation.rules import Rules
from samething.evaluation.uned import embeddings_of, read_descriptors
from samething.retrieval import Precision


def evaluate_files(
    *,
    embeddings: Path,
    catalog: Path,
    json: Path | None = None,
    merged: bool = True,
    precision: Precision = "float64",
    rules: str | Rules = "default",
    distractors: Sequence[Path] = (),
    show_progress: bool = False,
) -> EvaluationResult:
    """Evaluate any model's embeddings from two files; the images themselves need not exist.

    Args:
        embeddings: a ``.npy`` file of floats, one row per image in catalog order, or UnED's descriptors in a
            ``.json`` file.
        catalog: a table with ``img_path,label,domain,role`` (``.csv``) or a catalog (``.parquet``); roles are
            ``query``, ``index`` and ``query+index``.
        json: where the numbers of both protocols are written.
        merged: print the protocol with one index over all domains rather than the one with an index a domain.
        precision: ``float64`` is exact and repeatable, ``float32`` faster.
        rules: a protocol's name or its rules.
        distractors: as in :func:`evaluate_embeddings`.
        show_progress: show a bar.

    Raises:
        ArtefactError: a file is missing or unreadable.
        InputError: as in :func:`evaluate_embeddings`, naming both files where they do not fit.
    """
    rows, images = read_embeddings(embeddings, catalog)
    result = evaluate_embeddings(
        rows,
        images,
        precision=precision,
        rules=rules,
        distractors=distractors,
        show_progress=show_progress,
    )
    if json is not None:
        result.write_json(json)
    return dataclasses.replace(result, shown="merged" if merged else "per_domain")


def read_embeddings(embeddings: Path, catalog: Path) -> tuple[Embeddings, Catalog]:
    """Embeddings and the catalog of what they show; arguments and errors as in :func:`evaluate_files`."""
    images = Catalog.read(Path(catalog))
    if Path(embeddings).suffix.lower() == ".json":
        return embeddings_of(read_descriptors(Path(embeddings)), images), images
    rows = open_embeddings(Path(embeddings))
    if len(rows) != len(images):
        raise InputError(
            f"{embeddings} has {len(rows)} rows and {catalog} has {len(images)}",
            expected="one embedding per row of the catalog, in its order",
            next_step="embed the images of this catalog again, or give the catalog they were embedded from",
        )
    return rows, images
