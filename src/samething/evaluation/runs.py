"""Trained runs beside what the backbone does without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samething.arrays import FeatureRows
from samething.errors import InputError
from samething.evaluation.result import Comparison, Protocol
from samething.features import FeatureSet
from samething.heads import HeadConfig, fitted_head
from samething.training.run import Run


def compare_runs(
    folders: Sequence[Path],
    *,
    baselines: bool = True,
    shown: Protocol = "merged",
    features: Sequence[Path] = (),
) -> Comparison:
    """Evaluate runs on the test pictures of their common catalog.

    The baselines, for each backbone among the runs: its features at full width, average-pooled to the run's
    dimension (the paper's zero-shot baseline), and their principal components, fitted to the training
    pictures.

    Args:
        folders: finished run folders.
        baselines: whether to measure them.
        shown: the protocol that is printed.
        features: feature folders that were moved since the runs were trained; each run finds its own.

    Raises:
        ArtefactError: a run's features are nowhere.
        InputError: the catalogs differ, or hold no test pictures.
    """
    runs = [Run.open(folder) for folder in folders]
    feature_sets = [run.features(*features) for run in runs]
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
            f"the catalog of {runs[0].folder} has no test pictures",
            expected="pictures with the roles query and index, or query+index",
            next_step="make the catalog with a share for the test: samething catalog FOLDER --test 0.2",
        )
    embeddings: dict[str, np.ndarray] = {}
    backbones = {str(found.backbone["name"]) for found in feature_sets}
    for run, found in zip(runs, feature_sets, strict=True):
        if baselines:
            prefix = f"{found.backbone['name']} " if len(backbones) > 1 else ""
            for name, rows in _baselines(found, run.head.embedding_dim, tested).items():
                embeddings.setdefault(prefix + name, rows)
        embeddings[_name(run, runs)] = run.head.embed(np.asarray(found.rows[tested]))
    return dataclasses.replace(Comparison.of(embeddings, catalog.take(tested)), shown=shown)


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
