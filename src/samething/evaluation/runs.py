"""Trained runs beside what the backbone does without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from samething.arrays import Embeddings, FeatureRows
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.analysis import Analysis
from samething.evaluation.comparison import Comparison
from samething.evaluation.gains import GAINS, Gain
from samething.evaluation.no_match import NoMatch, measure_no_match
from samething.evaluation.page import write_report
from samething.evaluation.rules import Protocol, Rules, rules_of
from samething.evaluation.variants import sweep as swept
from samething.evaluation.variants import zero_shot
from samething.features import FeatureSet
from samething.heads import HeadConfig, fitted_head
from samething.retrieval import Precision
from samething.training.run import Run


def compare_runs(
    folders: Sequence[Path],
    *,
    baselines: bool = True,
    shown: Protocol = "merged",
    features: Sequence[Path] = (),
    rules: str | Rules = "default",
    sweep: bool = False,
    gains: Sequence[str] = (),
    no_match: float | None = None,
    precision: Precision = "float64",
) -> Comparison:
    """Evaluate runs on the test images of their common catalog.

    The baselines, for each backbone among the runs: its features at full width, average-pooled to the run's
    dimension (the paper's zero-shot baseline), and their principal components, fitted to the training
    images.

    Args:
        folders: finished runs.
        baselines: whether the baselines are measured too.
        shown: the index that printing shows.
        features: feature folders that were moved since the runs were trained; each run finds its own.
        rules: a protocol's name or its rules.
        sweep: also every run's embeddings in fewer dimensions and narrower types, and further baselines.
        gains: names of ``GAINS``: each is applied to every run and compared with the run.
        no_match: precision of answers for which the threshold of "no match" is chosen on validation.
        precision: of the search.

    Raises:
        ArtefactError: a run's features are nowhere.
        InputError: the catalogs differ, hold no test images (or no validation images where they are
            needed), or a gain is unknown.
    """
    runs, feature_sets, catalog, tested = _opened(folders, features)
    rules = rules_of(rules)
    unknown = [name for name in gains if name not in GAINS]
    if unknown:
        raise InputError(
            f"gain {unknown[0]!r}", expected=f"some of {', '.join(GAINS)}", next_step="choose among them"
        )
    embeddings: dict[str, np.ndarray] = {}
    applied: dict[str, Gain] = {}
    found: dict[str, NoMatch] = {}
    backbones = {str(described.backbone["name"]) for described in feature_sets}
    for run, described in zip(runs, feature_sets, strict=True):
        name, rows = _name(run, runs), np.asarray(described.rows[tested])
        own = run.head.embed(rows)
        trained_on = described.rows[catalog.has_role("train")] if baselines or sweep else None
        prefix = f"{described.backbone['name']} " if len(backbones) > 1 else ""
        if baselines and trained_on is not None:
            for label, baseline in _baselines(described, run.head.embedding_dim, tested).items():
                embeddings.setdefault(prefix + label, baseline)
        if sweep and trained_on is not None:
            dim = run.head.embedding_dim
            for label, pooled in zero_shot(rows, np.asarray(trained_on), dim).items():
                embeddings.setdefault(f"{prefix}zero-shot {label}", pooled)
            embeddings |= swept(name, own, run.head.embed(np.asarray(trained_on)))
        embeddings[name] = own
        for gain in gains:
            embeddings[f"{name} + {gain}"] = own
            applied[f"{name} + {gain}"] = GAINS[gain]
        if no_match is not None:
            asked = catalog.has_role("val", "query", "index", "query+index")
            rows = run.head.embed(np.asarray(described.rows[asked]))
            found[name] = measure_no_match(rows, catalog.take(asked), target_precision=no_match)
    if rules.largest_dim is not None:
        embeddings = _within(embeddings, rules.largest_dim, names=[_name(run, runs) for run in runs])
    comparison = Comparison.of(
        embeddings, catalog.take(tested), rules=rules, gains=applied, shown=shown, precision=precision
    )
    several = len(runs) > 1 or sweep or gains
    return dataclasses.replace(
        comparison, reference=_name(runs[0], runs) if several else None, no_match=found
    )


def run_embeddings(folder: Path, *, moved: Sequence[Path] = ()) -> tuple[Embeddings, Catalog]:
    """Embeddings of the test images of a run's catalog, and these images."""
    runs, feature_sets, catalog, tested = _opened([folder], moved)
    return runs[0].head.embed(np.asarray(feature_sets[0].rows[tested])), catalog.take(tested)


def write_run_page(target: Path, folder: Path, comparison: Comparison, *, moved: Sequence[Path] = ()) -> Path:
    """Write the HTML report of a run that is one of those compared."""
    run = Run.open(folder, moved=moved)
    embeddings, catalog = run_embeddings(folder, moved=moved)
    names = [name for name in (run.folder.name, str(run.folder)) if name in comparison.results]
    analysis = Analysis.of(embeddings, catalog)
    return write_report(
        target,
        title=f"samething: {names[0]}",
        comparison=comparison,
        featured=names[0],
        records=run.records,
        queries=analysis.examples(15),
        facts={
            "test images": f"{len(catalog):,} of {len(np.unique(catalog.class_ids())):,} things",
            "domains": ", ".join(catalog.domains),
            "backbone": f"{run.features().backbone['name']}, frozen",
            "head": f"{run.config.embedding_dim}-d {run.config.head}, {run.config.loss}",
        },
        analysis=analysis,
        embeddings=embeddings,
    )


def _within(
    embeddings: dict[str, np.ndarray], largest_dim: int, *, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Baselines with too many dimensions are left out; a run with too many is refused by the evaluation."""
    return {name: rows for name, rows in embeddings.items() if rows.shape[1] <= largest_dim or name in names}


def _opened(
    folders: Sequence[Path], moved: Sequence[Path]
) -> tuple[list[Run], list[FeatureSet], Catalog, Bool[np.ndarray, " n"]]:
    """Runs, their features, their common catalog and which of its images are for the test."""
    runs = [Run.open(folder, moved=moved) for folder in folders]
    feature_sets = [run.features() for run in runs]
    catalog = feature_sets[0].catalog
    for run, found in zip(runs, feature_sets, strict=True):
        if found.catalog.fingerprint != catalog.fingerprint:
            raise InputError(
                f"{run.folder} and {runs[0].folder} were trained on features of different catalogs",
                expected="runs on one catalog, so that they are asked the same questions",
                next_step="evaluate them one by one",
            )
    tested = catalog.has_role("query", "index", "query+index")
    if not tested.any():
        raise InputError(
            f"the catalog of {runs[0].folder} has no test images",
            expected="images with the roles query and index, or query+index",
            next_step="make the catalog with a share for the test: samething catalog FOLDER --test 0.2",
        )
    return runs, feature_sets, catalog, tested


def _name(run: Run, runs: Sequence[Run]) -> str:
    names = [other.folder.name for other in runs]
    return run.folder.name if names.count(run.folder.name) == 1 else str(run.folder)


def _baselines(features: FeatureSet, dim: int, tested: np.ndarray) -> dict[str, np.ndarray]:
    train: FeatureRows = np.asarray(features.rows[features.catalog.has_role("train")])
    rows = np.asarray(features.rows[tested])
    average = fitted_head(HeadConfig(kind="average", embedding_dim=dim, standardise=False), train)
    pca = fitted_head(HeadConfig(kind="pca", embedding_dim=dim), train)
    return {
        "backbone": rows,
        f"average-pool-{dim}": average.embed(rows),
        f"PCA-{dim}": pca.embed(rows),
    }
