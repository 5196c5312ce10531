"""Queries × gallery to numbers: per domain and merged, with confidence intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts

from samething.calibration import Calibration
from samething.errors import InputError
from samething.evaluation.embedding_files import read_embeddings, write_descriptors
from samething.evaluation.measuring import compare_embeddings, evaluate_embeddings
from samething.evaluation.protocols import MEAN, PROTOCOLS, ProtocolName, Scope, protocol_of
from samething.evaluation.result import Comparison, EvaluationResult
from samething.files import write_json
from samething.retrieval import Precision

__all__ = [
    "MEAN",
    "PROTOCOLS",
    "Calibration",
    "Comparison",
    "EvaluationResult",
    "compare_embeddings",
    "evaluate",
    "evaluate_embeddings",
]

GainName = Literal["query-expansion", "database-augmentation", "both-expansions", "re-ranking"]


def evaluate(
    *runs: Path,
    embeddings: Path | None = None,
    catalog: Path | None = None,
    protocol: ProtocolName = "default",
    metrics: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True)] = (),
    distractors: Annotated[tuple[Path, ...], cyclopts.Parameter(consume_multiple=True)] = (),
    json: Path | None = None,
    html: Path | None = None,
    descriptors: Path | None = None,
    merged: Annotated[bool, cyclopts.Parameter(negative="--per-domain")] = True,
    baselines: bool = True,
    features: list[Path] | None = None,
    gains: Annotated[tuple[GainName, ...], cyclopts.Parameter(consume_multiple=True)] = (),
    rerank: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True)] = (),
    no_match: float | None = None,
    precision: Precision = "float64",
) -> Comparison | EvaluationResult:
    """Measure retrieval on the test images: runs side by side, or any model's embeddings.

    Every query is searched for in one index over all domains (--merged) or in the index of its own domain
    (--per-domain); a hit has the query's label and domain. Printed are the protocol's metrics (mMP@5, R@1 and
    mAP) with 95 % bootstrap intervals over queries; queries without a positive are left out and counted.

    Args:
        runs: finished run folders whose features are of the same catalog.
        embeddings: a .npy of floats (n, d) in catalog order, instead of runs; any model's. Or UnED's
            descriptors (.json).
        catalog: with embeddings: the table img_path,label,domain,role; the images need not exist.
        protocol: guiec, uned, ilias, metric-learning, board, revisited, or custom with --metrics: see
            docs/evaluation.md.
        metrics: with the custom protocol: mmp@K, r@K, p@K, mrr@K, map@K, map, map@r, map-trapezoid,
            r-precision.
        distractors: with embeddings: .npy files of further index rows, which match nothing; read in blocks.
        json: write all numbers here.
        html: with runs: write a report with images and plots here, about the first run.
        descriptors: write the first run's embeddings as UnED's evaluation program reads them.
        merged: print the numbers of one index over all domains, or those of an index per domain.
        baselines: with runs: also the backbone at full width, average-pooled and PCA.
        features: with runs: where a feature folder is now, if it was moved since; may be repeated.
        gains: with runs: measure these after-retrieval gains.
        rerank: with runs: measure a second look, taught on the validation images: geometry, regions, … .
        no_match: with runs: choose on validation the score below which the answer is "no match" so that this
            share of the answers is right, and measure it on the test.
        precision: float64 is exact and repeatable, float32 faster.

    Raises:
        InputError: neither runs nor embeddings, or they do not belong together.
        ArtefactError: a file is missing or unreadable, or a run's features are nowhere.
    """
    chosen = protocol_of(protocol, metrics=metrics)
    _require_one_source(runs, embeddings, catalog, distractors)
    shown: Scope = "merged" if merged else "per_domain"
    result: Comparison | EvaluationResult
    if embeddings is not None and catalog is not None:
        rows, tested = read_embeddings(embeddings, catalog)
        options: dict[str, Any] = {"distractors": distractors, "precision": precision, "shown": shown}
        result = evaluate_embeddings(rows, tested, protocol=chosen, show_progress=True, **options)
    else:
        from samething.evaluation.runs import OpenedRuns

        opened = OpenedRuns.open(runs, moved=features or ())
        rows, tested = opened.embeddings[0], opened.tested
        options = {"baselines": baselines, "gains": gains, "rerank": rerank, "no_match": no_match}
        result = opened.compare(chosen, shown=shown, precision=precision, **options)
        if html is not None:
            opened.write_report(html, result)
    if json is not None:
        write_json(json, result.to_json())
    if descriptors is not None:
        write_descriptors(descriptors, rows, tested)
    return result


def _require_one_source(
    runs: tuple[Path, ...], embeddings: Path | None, catalog: Path | None, distractors: tuple[Path, ...]
) -> None:
    """Refuse anything but runs alone, or embeddings with a catalog."""
    if embeddings is not None and not runs:
        if catalog is None:
            raise InputError(
                "--embeddings without --catalog",
                expected="the table that says what each row shows",
                next_step="add --catalog FILE with the columns img_path,label,domain,role",
            )
    elif not runs or embeddings is not None or catalog is not None or distractors:
        raise InputError(
            "runs together with --embeddings, --catalog or --distractors" if runs else "nothing to evaluate",
            expected="run folders, or --embeddings E.npy with --catalog C.csv",
            next_step="for instance: samething evaluate runs/first",
        )
