"""Queries × index to numbers: a domain and merged, with confidence intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts

from samething.errors import InputError
from samething.evaluation.result import (
    MEAN,
    METRICS,
    PROTOCOLS,
    Comparison,
    EvaluationResult,
    Metric,
    Protocol,
    evaluate_embeddings,
    evaluate_files,
)
from samething.files import write_json

__all__ = [
    "MEAN",
    "METRICS",
    "PROTOCOLS",
    "Comparison",
    "EvaluationResult",
    "Metric",
    "Protocol",
    "evaluate",
    "evaluate_embeddings",
    "evaluate_files",
]


def evaluate(
    *runs: Path,
    embeddings: Path | None = None,
    catalog: Path | None = None,
    json: Path | None = None,
    merged: Annotated[bool, cyclopts.Parameter(negative="--per-domain")] = True,
    baselines: bool = True,
    features: list[Path] | None = None,
) -> Comparison | EvaluationResult:
    """Measure retrieval on the test pictures: runs side by side, or any model's embeddings.

    Every query is searched for in one index over all domains (--merged) or in the index of its own domain
    (--per-domain); a hit has the query's label and domain. Printed are mMP@5, R@1 and mAP with 95 % bootstrap
    intervals over queries; queries without a positive are left out and counted.

    Args:
        runs: finished run folders whose features are of the same catalog.
        embeddings: a .npy of floats (n, d) in catalog order, instead of runs; any model's.
        catalog: with embeddings: the table img_path,label,domain,role; the pictures need not exist.
        json: write all numbers of both protocols here.
        merged: print the protocol with one index over all domains, or the one with an index a domain.
        baselines: with runs: also the backbone at full width, average-pooled and PCA.
        features: with runs: where a feature folder is now, if it was moved since; may be repeated.

    Raises:
        InputError: neither runs nor embeddings, or they do not belong together.
    """
    if embeddings is not None and not runs:
        if catalog is None:
            raise InputError(
                "--embeddings without --catalog",
                expected="the table that says what each row shows",
                next_step="add --catalog FILE with the columns img_path,label,domain,role",
            )
        return evaluate_files(embeddings=embeddings, catalog=catalog, json=json, merged=merged)
    if not runs or embeddings is not None or catalog is not None:
        raise InputError(
            "runs together with --embeddings or --catalog" if runs else "nothing to evaluate",
            expected="run folders, or --embeddings E.npy with --catalog C.csv",
            next_step="for instance: samething evaluate runs/first",
        )
    from samething.evaluation.runs import compare_runs

    comparison = compare_runs(
        runs,
        baselines=baselines,
        shown="merged" if merged else "per_domain",
        features=features or (),
    )
    if json is not None:
        write_json(json, comparison.to_json())
    return comparison
