"""How well embeddings find the same thing: queries × index → an :class:`EvaluationResult`.

Two protocols over the same queries, with the same definition of a hit (same label and same domain):

``merged``
    One index over all domains, as a universal embedding is used.
``per_domain``
    One index a domain, so that no other domain can distract.

Three metrics: ``mmp@5``, ``r@1`` and ``map`` over the whole ranking. All numbers are shares in [0, 1]; tables
show percent.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from samething.arrays import Embeddings
from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.evaluation.comparison import Comparison, ComparisonRow, compare_embeddings
from samething.evaluation.protocols import evaluate_embeddings
from samething.evaluation.results import (
    MEAN,
    METRICS,
    PROTOCOLS,
    Estimate,
    EvaluationResult,
    Protocol,
    ResultRow,
)
from samething.retrieval import Precision

__all__ = [
    "MEAN",
    "METRICS",
    "PROTOCOLS",
    "Comparison",
    "ComparisonRow",
    "Estimate",
    "EvaluationResult",
    "Protocol",
    "ResultRow",
    "compare_embeddings",
    "evaluate_embeddings",
    "evaluate_files",
    "read_embeddings",
]


def evaluate_files(
    *,
    embeddings: Path,
    catalog: Path,
    json: Path | None = None,
    merged: bool = True,
    precision: Precision = "float64",
) -> EvaluationResult:
    """Evaluate embeddings of any model: mMP@5, R@1 and mAP, a domain and their mean, with intervals.

    The pictures themselves need not exist. Queries without a relevant picture in the index are counted and
    left out of the means.

    Args:
        embeddings: .npy file of float16, float32 or float64, one row a picture in catalog order.
        catalog: .csv (img_path,label,domain,role) or .parquet; roles query, index and query+index are used.
        json: write the numbers of both protocols to this file.
        merged: show one index over all domains; otherwise one index a domain.
        precision: float64 does not depend on the machine; float32 is for big jobs.

    Raises:
        ArtefactError: a file is missing or unreadable.
        InputError: the two files do not belong together, or cannot be evaluated; see
            :func:`evaluate_embeddings`.
    """
    pictures = Catalog.read(catalog)
    rows = read_embeddings(embeddings)
    if len(rows) != len(pictures):
        raise InputError(
            f"{embeddings} has {len(rows)} rows and {catalog} has {len(pictures)} pictures",
            expected="one row a picture, in the order of the catalog",
            next_step="give the catalog that the embeddings were made from",
        )
    result = evaluate_embeddings(rows, pictures, precision=precision)
    result = dataclasses.replace(result, shown="merged" if merged else "per_domain")
    if json is not None:
        result.write_json(json)
    return result


def read_embeddings(source: Path) -> Embeddings:
    """Open a .npy file of embeddings, shape (n, d), mapped into memory rather than read.

    Raises:
        ArtefactError: missing, or not a whole .npy file.
        InputError: not two-dimensional, or not float16, float32 or float64.
    """
    try:
        rows = np.lib.format.open_memmap(source, mode="r")
    except (OSError, ValueError, EOFError) as error:
        problem = "does not exist" if not Path(source).exists() else f"cannot be read ({error})"
        raise ArtefactError(
            f"{source} {problem}",
            expected="a .npy file of embeddings",
            next_step="write one with numpy.save(path, embeddings)",
        ) from error
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"{source} holds {rows.dtype} of shape {rows.shape}",
            expected="float16, float32 or float64 of shape (pictures, dimensions)",
            next_step="save the embeddings as one row a picture",
        )
    return rows
