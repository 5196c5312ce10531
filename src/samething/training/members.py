"""Several heads from several seeds, joined to one of the same size.

Each member is a run of its own, in a folder below the run's, and resumes by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from samething.features import FeatureSet
from samething.heads import Head, reduced_head
from samething.training.config import TrainConfig
from samething.training.data import TrainingData
from samething.training.run import Run
from samething.training.validation import validation_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What comes out of training."""

    head: Head
    records: list[dict[str, Any]]
    num_steps: int
    num_class_parameters: int
    best_score: float | None


def member_configs(config: TrainConfig) -> list[TrainConfig]:
    """A configuration for each member: as wide as it is trained, and with a seed of its own."""
    dim = config.train_dim or config.embedding_dim
    return [
        dataclasses.replace(
            config, members=1, train_dim=0, embedding_dim=dim, whiten=0.0, seed=config.seed + i
        )
        for i in range(config.members)
    ]


def joined(runs: Sequence[Run], config: TrainConfig, features: FeatureSet, data: TrainingData) -> Trained:
    """The members' heads as one, and how good that is.

    The records are the means of those of the members, and the validation of the joined head at the end.
    """
    heads = [run.head for run in runs]
    head = reduced_head(heads, features.rows, config.embedding_dim, rows=data.rows, whiten=config.whiten)
    records, score = _mean_records(runs), None
    if len(data.val_rows):
        embeddings = head.embed(features.rows[data.val_rows])
        value, recall = validation_scores(embeddings, data.val_catalog)
        if not np.isnan(value):
            score = value
            records.append({"step": records[-1]["step"], "val/mmp@5": value, "val/r@1": recall})
    contents = [run.manifest.content for run in runs]
    return Trained(
        head=head,
        records=records,
        num_steps=sum(content["num_steps"] for content in contents),
        num_class_parameters=sum(content["num_class_parameters"] for content in contents),
        best_score=score,
    )


def _mean_records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Mean of what the members recorded at the same step, of those that had not stopped early by then."""
    gathered: dict[tuple[int, bool], dict[str, list[float]]] = {}
    for run in runs:
        for record in run.records:
            names = gathered.setdefault((record["step"], "val/mmp@5" in record), {})
            for name in record.keys() - {"step"}:
                names.setdefault(name, []).append(record[name])
    return [
        {"step": step, **{name: float(np.mean(values)) for name, values in sorted(names.items())}}
        for (step, _), names in sorted(gathered.items())
    ]
