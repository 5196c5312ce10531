"""Images whose label is doubtful, by what a frozen backbone sees in them.

Two ways, both on the features of one domain at a time:

``agreement``
    How much nearer an image is to the other images of its class than to the nearest other class, and how
    much less near than they are to each other. No training.
``sub_centres``
    Sub-Center ArcFace's own way of cleaning (Deng et al., *Sub-center ArcFace: Boosting Face Recognition by
    Large-Scale Noisy Web Faces*, ECCV 2020, section 3.4): a head is trained with three centres per class; the
    centre nearest to most images is the dominant one; an image whose angle to it is large is dropped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Float32, Int

from samething.arrays import Embeddings, FeatureRows, unit
from samething.catalog import Catalog
from samething.features import FeatureSet

Noise: TypeAlias = Literal["none", "agreement", "sub_centres"]

LEAST_AGREEMENT: Final = -0.6
"""Chosen on the demo's emoji and objects with planted noise, see docs/curation.md."""

LARGEST_ANGLE: Final = 75.0
"""Degrees, as in the paper of Sub-Center ArcFace."""

NUM_CENTRES: Final = 3

_ROWS_AT_A_TIME: Final = 1024


def agreement(
    features: FeatureRows, classes: Int[np.ndarray, " n"], domains: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """How well each image agrees with its class; the lower, the more doubtful its label.

    With features of unit length, from which the mean of their domain is taken before:
    (cosine with the sum of its class's other images - largest cosine with the sum of another class of the
    domain) + (mean cosine with its class's other images - the median of that over the class). Between -4
    and 4, for unrelated images around -0.5. An image alone in its class gets 0: nothing speaks against it.

    Args:
        features: of n images.
        classes: their classes 0….
        domains: their domains 0….

    >>> features = np.array([[9, 0, 1], [9, 1, 0], [0, 9, 0], [9, 0, 0], [0, 9, 1], [1, 9, 0]], np.float32)
    >>> doubtful = agreement(features, np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, int))
    >>> np.argsort(doubtful)[:2].tolist()
    [3, 2]
    """
    scores = np.zeros(len(classes), np.float32)
    for domain in np.unique(domains):
        own = np.flatnonzero(domains == domain)
        scores[own] = _agreement_in_domain(np.asarray(features[own]), classes[own])
    return scores


def _agreement_in_domain(features: FeatureRows, classes: Int[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    _, classes = np.unique(classes, return_inverse=True)
    sizes = np.bincount(classes)
    rows = unit(features, np.float32)
    rows = unit(rows - rows.mean(axis=0))
    order = np.argsort(classes, kind="stable")
    sums = np.add.reduceat(rows[order].astype(np.float64), np.cumsum(sizes) - sizes, axis=0).astype(
        np.float32
    )
    directions = unit(sums)
    others = sums[classes] - rows
    products = np.einsum("nd,nd->n", rows, others)
    own = products / np.maximum(np.linalg.norm(others, axis=1), 1e-6)
    mean = products / np.maximum(sizes[classes] - 1, 1)
    rival = np.full(len(classes), -1.0, np.float32)
    for start in range(0, len(classes), _ROWS_AT_A_TIME):
        block = slice(start, start + _ROWS_AT_A_TIME)
        cosines = rows[block] @ directions.T
        cosines[:, sizes < 2] = -1  # a class of one image says little about a class
        cosines[np.arange(len(cosines)), classes[block]] = -1
        rival[block] = cosines.max(axis=1)
    scores = own - rival + mean - _class_medians(mean, classes)[classes]
    scores[sizes[classes] < 2] = 0
    found: np.ndarray = scores.astype(np.float32)
    return found


def _class_medians(
    values: Float[np.ndarray, " n"], classes: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " c"]:
    """Median of each class 0…, which all occur."""
    order = np.lexsort((values, classes))
    sizes = np.bincount(classes)
    starts = np.cumsum(sizes) - sizes
    low, high = order[starts + (sizes - 1) // 2], order[starts + sizes // 2]
    found: np.ndarray = (values[low] + values[high]) / 2
    return found


def sub_centre_angles(
    embeddings: Embeddings, classes: Int[np.ndarray, " n"], centres: Float[np.ndarray, "c k d"]
) -> Float32[np.ndarray, " n"]:
    """Angle in degrees of each image to the dominant centre of its class.

    Dominant is the centre that is the nearest one of its class for most of the class's images, of equal
    ones the first.

    Args:
        embeddings: of n images.
        classes: their classes, 0 to c - 1.
        centres: the k centres of each class.
    """
    directions = unit(centres.reshape(-1, centres.shape[2]), np.float32).reshape(centres.shape)
    cosines = np.einsum("nd,nkd->nk", unit(embeddings, np.float32), directions[classes])
    votes = np.zeros(centres.shape[:2], np.int64)
    np.add.at(votes, (classes, cosines.argmax(axis=1)), 1)
    dominant = votes.argmax(axis=1)[classes]
    chosen = cosines[np.arange(len(cosines)), dominant]
    angles: np.ndarray = np.degrees(np.arccos(np.clip(chosen, -1, 1))).astype(np.float32)
    return angles


def trained_angles(
    features: FeatureSet, catalog: Catalog, folder: Path, *, seed: int
) -> Float32[np.ndarray, " n"]:
    """Train a head with three centres per class for :func:`sub_centre_angles`; 0 for a class of one image.

    Args:
        features: a row for each image of the catalog, in its order.
        catalog: the images, all of training, with the labels in doubt.
        folder: run folder of that head; a killed run goes on there.
        seed: of the training.
    """
    import torch

    from samething.heads import head_from_state
    from samething.training.config import RECIPES
    from samething.training.data import TrainingData
    from samething.training.loop import run_training

    made_from = {**features.manifest.made_from, "catalog": catalog.fingerprint}
    manifest = dataclasses.replace(features.manifest, made_from=made_from)
    training = dataclasses.replace(features, manifest=manifest, catalog=catalog, unreadable=())
    config = dataclasses.replace(
        RECIPES["demo"](),
        num_centers=NUM_CENTRES,
        epochs=10.0,
        keep="last",
        seed=seed,
        embedding_dim=min(64, features.rows.shape[1]),
    )
    run = run_training(training, config, folder, resume=True)
    state = torch.load(folder / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)
    head = head_from_state(run.manifest.content["head"], run.manifest.content["width"], state["head"])
    data = TrainingData.of(training)
    weight = state["margin_head"]["weight"].numpy()
    centres = weight.reshape(-1, NUM_CENTRES, weight.shape[1])
    angles = np.zeros(len(catalog), np.float32)
    angles[data.rows] = sub_centre_angles(head.eval().embed(features.rows[data.rows]), data.classes, centres)
    return angles
