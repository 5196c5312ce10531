"""What the training of a head starts from: random weights, or shrunk discriminants in closed form."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from samething.arrays import Int, unit
from samething.features import FeatureSet
from samething.files import Json
from samething.heads import Head, HeadConfig, Scatter, build_head, fitted_head, lda_head, powered
from samething.losses import MarginHead
from samething.training.config import TrainConfig
from samething.training.data import TrainingData
from samething.training.validation import kept_embeddings, validation_scores

SHRINKAGES: Final = (0.25, 0.5, 1.0, 4.0, 1e6)
"""What is chosen from; the last one leaves principal components."""
USUAL_SHRINKAGE: Final = 0.5
"""Where there is too little to choose on."""
_ROWS_ASKED: Final = 1_000
"""Images of a part left out that are searched for among each other."""


def starting_head(
    features: FeatureSet, data: TrainingData, config: TrainConfig
) -> tuple[Head, dict[str, Json]]:
    """The head before the first step, and what was found out for it."""
    width = features.rows.shape[1]
    asked = HeadConfig(
        kind=config.head,
        embedding_dim=config.embedding_dim if config.start == "random" else min(config.embedding_dim, width),
        bias=config.bias,
        standardise=config.standardise,
        power=config.power,
        hidden_dim=config.hidden_dim,
    )
    if config.start == "random":
        head = build_head(asked, width, seed=config.seed)
        head.fit(features.rows, data.rows)
        return head, {}
    parts = parts_to_leave_out(data)
    scatters = {  # of each domain in each part
        (part, domain): Scatter.of(features.rows, data.rows[own], data.classes[own], power=config.power)
        for part, domain in np.unique(np.stack([parts, data.domains], axis=1), axis=0).tolist()
        for own in [(parts == part) & (data.domains == domain)]
    }
    shrinkage = config.shrinkage or USUAL_SHRINKAGE
    if not config.shrinkage and parts.any():
        scores = np.zeros(len(SHRINKAGES))
        for left_out in range(parts.max() + 1):
            rest = Scatter.pooled([each for (part, _), each in scatters.items() if part != left_out])
            scores += _scores(features, data, np.flatnonzero(parts == left_out), rest, config.power)
        shrinkage = SHRINKAGES[int(scores.argmax())]
    return lda_head(asked, Scatter.pooled(list(scatters.values())), shrinkage), {"shrinkage": shrinkage}


@torch.no_grad()
def start_classes(margin_head: MarginHead, head: Head, features: FeatureSet, data: TrainingData) -> None:
    """Put every class where its images are: a tenth of what it was stays, so that sub-centres differ."""
    embeddings = torch.from_numpy(head.embed(features.rows[data.rows]))
    sums: Tensor = torch.zeros(len(data.class_counts), embeddings.shape[1])
    sums.index_add_(0, torch.from_numpy(data.classes), embeddings)
    weight = margin_head.weight
    centres = nn.functional.normalize(sums).repeat_interleave(margin_head.num_centers, dim=0)
    weight.lerp_(centres * weight.norm(dim=1, keepdim=True), 0.9)


def reduction_score(features: FeatureSet, data: TrainingData, config: TrainConfig, dim: int) -> float:
    """mMP@5 on validation of the backbone's own principal components in as many bytes."""
    reduction = fitted_head(HeadConfig(kind="pca", embedding_dim=dim), features.rows, data.rows)
    kept = kept_embeddings(reduction, features.rows, data.val_rows, data.rows, config.codes)
    return validation_scores(kept, data.val_catalog)[0]


def parts_to_leave_out(data: TrainingData) -> Int[np.ndarray, " n"]:
    """The part of each training row: its domain, or one of three sets of classes if domains are few.

    With fewer than twelve classes there is one part, and nothing to choose on.
    """
    classes_of = [len(np.unique(data.classes[data.domains == domain])) for domain in np.unique(data.domains)]
    if len(classes_of) >= 3 and min(classes_of) >= 4:
        return data.domains
    num_classes = len(data.class_counts)
    order = np.random.default_rng(0).permutation(num_classes)
    groups: np.ndarray = order[data.classes] % (3 if num_classes >= 12 else 1)
    return groups


def _scores(
    features: FeatureSet, data: TrainingData, own: Int[np.ndarray, " p"], rest: Scatter, power: float
) -> np.ndarray:
    """mMP@5 of a part that is left out, under each shrinkage and with all numbers that the whitening gives.

    Args:
        features: all of them.
        data: the training rows.
        own: which of them are the part.
        rest: of the other parts.
        power: signed power of the features' numbers.
    """
    if len(own) > _ROWS_ASKED:  # whole classes of it, drawn
        place = np.random.default_rng(0).permutation(len(data.class_counts))[data.classes[own]]
        own = np.sort(own[np.argsort(place, kind="stable")[:_ROWS_ASKED]])
    rows = data.rows[own]
    inputs = powered(np.asarray(features.rows[rows], np.float32), power) - rest.mean
    catalog = features.catalog.take(rows)
    scores = [
        validation_scores(unit((inputs @ rest.whitening(shrinkage).T).astype(np.float32)), catalog)[0]
        for shrinkage in SHRINKAGES
    ]
    return np.nan_to_num(scores)
