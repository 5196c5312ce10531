"""With how many labelled instances a head is how good: trained on parts of them, asked on the test images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from samething.arrays import Int
from samething.features import FeatureSet
from samething.study.questions import Questions, trained_head
from samething.training.validation import kept_embeddings

if TYPE_CHECKING:
    from samething.heads import Head
    from samething.training.run import Run

SHARES: Final = (1 / 8, 1 / 4, 1 / 2)
"""Of the labelled instances of each domain, besides all of them."""

Point: TypeAlias = tuple[float, float, float, float]
"""Labelled instances, mMP@5 as the mean over domains, and both ends of its 95 % interval."""


def learning_curve(run: Run, features: FeatureSet) -> list[Point]:
    """The head of a run and heads trained as it on an eighth, a quarter and half of its instances.

    The parts are nested, and drawn within each domain. Parts of fewer than two instances are left out.
    """
    questions = Questions.of(features, "test")
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as work:
        for number, rows in _parts(features):
            head = trained_head(features, rows, run.config, Path(work) / str(number))
            points.append(_point(head, rows, number, run, features, questions))
    everything = np.flatnonzero(features.catalog.has_role("train"))
    number = len(np.unique(_labelled(features)[1]))
    points.append(_point(run.head, everything, number, run, features, questions))
    return points


def _point(
    head: Head, rows: Int[np.ndarray, " n"], number: int, run: Run, features: FeatureSet, questions: Questions
) -> Point:
    """Of a head that was trained on some rows, its embeddings kept in the bytes that the run is kept in."""
    tested = questions.chosen
    values = questions.scores(kept_embeddings(head, features.rows, tested, rows, run.config.codes))
    return (float(number), *questions.estimate(values))


def _labelled(features: FeatureSet) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Training rows of instances with two images, and their classes."""
    rows = np.flatnonzero(features.catalog.has_role("train"))
    classes = features.catalog.class_ids()
    enough = np.bincount(classes[rows], minlength=classes.max() + 1)[classes[rows]] > 1
    return rows[enough], classes[rows[enough]]


def _parts(features: FeatureSet) -> Iterator[tuple[int, Int[np.ndarray, " n"]]]:
    """Number of instances and rows of each part, the smallest first."""
    rows, classes = _labelled(features)
    domains = features.catalog.strings("domain").astype(str)[rows]
    generator = np.random.default_rng(0)
    orders = [generator.permutation(np.unique(classes[domains == name])) for name in np.unique(domains)]
    before = 0
    for share in SHARES:
        chosen = np.concatenate([order[: round(share * len(order))] for order in orders])
        if len(chosen) > max(1, before):
            yield len(chosen), rows[np.isin(classes, chosen)]
            before = len(chosen)
