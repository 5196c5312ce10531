"""What the studies have in common: contenders, compared on validation images, and once on test images.

Each is asked the same queries every time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from samething.arrays import Embeddings, Float, Int, PerQuery
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation import evaluate_embeddings
from samething.evaluation.task import rows_by_role
from samething.features import FeatureSet
from samething.files import Json
from samething.progress import without_progress
from samething.statistics import (
    Estimate,
    PairedDifference,
    domain_mean,
    mean_estimates,
    paired_difference,
)
from samething.study.study_folder import StudyFolder

if TYPE_CHECKING:
    from samething.heads import Head
    from samething.training import TrainConfig

METRIC: Final = "mmp@5"
"""What is maximised: mMP@5 in one index over all domains, the plain mean over domains."""


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """The queries of one part of a catalog, and the images they are searched among."""

    part: Literal["val", "test"]
    chosen: Int[np.ndarray, " p"]
    """Rows of the feature folder, ascending."""
    catalog: Catalog
    """These p images."""
    domains: tuple[str, ...]
    domain_of: Int[np.ndarray, " q"]
    """Domain of each query, as a position in ``domains``."""

    @classmethod
    def of(cls, features: FeatureSet, part: Literal["val", "test"]) -> Questions:
        """The queries of a feature folder.

        Raises:
            InputError: there are none, or instances of the part are trained on as well.
        """
        catalog = features.catalog
        queries, gallery = rows_by_role(catalog, part)
        chosen = np.union1d(queries, gallery)
        ids = catalog.class_ids()
        shared = np.intersect1d(ids[queries], ids[catalog.has_role("train")])
        if len(shared):
            label = catalog.strings("label")[np.flatnonzero(ids == shared[0])[0]]
            raise InputError(
                f"{len(shared)} instances are trained on and asked for ({part}), such as {label}",
                expected="instances that are in one part only",
                next_step="split the catalog by instance: samething catalog does",
            )
        names, domain_of = np.unique(catalog.strings("domain")[queries].astype(str), return_inverse=True)
        return cls(part, chosen, catalog.take(chosen), tuple(map(str, names)), domain_of.astype(np.int64))

    def scores(self, embeddings: Embeddings) -> PerQuery:
        """mMP@5 of every query in one index over all domains; NaN where there is nothing to be found."""
        found = evaluate_embeddings(
            embeddings, self.catalog, precision="float32", num_resamples=1, role=self.part
        )
        return found.values(METRIC, scope="merged")

    def mean(self, values: PerQuery) -> float:
        """Plain mean over domains."""
        return domain_mean(values, self.domain_of)

    def estimate(self, values: PerQuery) -> Estimate:
        """The mean with its 95 % bootstrap interval over queries."""
        return mean_estimates(values[None], self.domain_of)[0]

    def of_domains(self, values: PerQuery) -> dict[str, float]:
        """Mean over the queries of each domain."""
        one = {name: values[self.domain_of == number] for number, name in enumerate(self.domains)}
        return {name: domain_mean(own, np.zeros(len(own), np.int64)) for name, own in one.items()}

    def difference(self, first: PerQuery, second: PerQuery) -> PairedDifference:
        """First minus second, with a 95 % interval of the paired bootstrap."""
        return paired_difference(first, second, self.domain_of)

    def row(
        self, values: Float[np.ndarray, "s q"], against: Float[np.ndarray, "_ q"] | None = None
    ) -> dict[str, Any]:
        """Columns of a result table: mean, ends of its interval, each domain, the spread over several seeds.

        Args:
            values: of the queries, a row per seed.
            against: also the paired difference to these, as ``gain``.
        """
        part, mean = self.part, values.mean(axis=0)
        found = self.estimate(mean)
        row = {part: found.value, f"{part}_low": found.low, f"{part}_high": found.high}
        row |= {f"{part} {name}": value for name, value in self.of_domains(mean).items()}
        if len(values) > 1:
            row[f"{part}_spread"] = float(np.std(np.nanmean(values, axis=1), ddof=1))
        if against is not None:
            gain = self.difference(mean, against.mean(axis=0))
            row |= {"gain": gain.difference, "gain_low": gain.low, "gain_high": gain.high}
        return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to embed images, from one training seed or several."""

    name: str = ""
    """Its own among those that the test images are asked for."""
    tried: Mapping[str, Json]
    """What decides its heads, but the seed: how the study's log knows it."""
    features: FeatureSet
    head: Callable[[int, Path], Head | None]
    """From a seed and a folder for checkpoints to the head; None for the features as they are."""
    seeds: Sequence[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Contest:
    """Validation questions, whose answers the study's log remembers, and test questions, asked once."""

    folder: StudyFolder
    val: Questions
    test: Questions

    @staticmethod
    def _scores(contender: Contender, seed: int, questions: Questions, work: Path) -> PerQuery:
        rows = np.asarray(contender.features.rows[questions.chosen])
        head = contender.head(seed, work)
        return questions.scores(rows if head is None else head.embed(rows))

    def on_validation(
        self, contender: Contender, done: Callable[[], object] = int
    ) -> Float[np.ndarray, "s q"]:
        """Scores of every validation query, a row per seed; ``done`` is called after each."""
        found = []
        for seed in contender.seeds:
            measure = functools.partial(self._scores, contender, seed, self.val)
            found.append(self.folder.scores({"part": "val", **contender.tried, "seed": seed}, measure))
            done()
        return np.stack(found)

    def on_test(
        self, contenders: Sequence[Contender], chosen: Mapping[str, Json]
    ) -> dict[str, Float[np.ndarray, "_ _"]]:
        """The one look at the test images: name -> scores of every query, a row per seed.

        Args:
            contenders: what is compared.
            chosen: what was chosen on validation images, as JSON.

        Raises:
            ArtefactError: the test images have been looked at for another choice.
        """

        def measure() -> dict[str, PerQuery]:
            found = {}
            for number, contender in enumerate(contenders):
                for place, seed in enumerate(contender.seeds):
                    work = self.folder.folder / "runs" / f"test-{number}-{place}"
                    found[f"{contender.name} {place}"] = self._scores(contender, seed, self.test, work)
            return found

        seen = self.folder.tested(chosen, measure)
        return {
            one.name: np.stack([seen[f"{one.name} {place}"] for place in range(len(one.seeds))])
            for one in contenders
        }


def short_training(epochs: float, embedding_dim: int, **options: Any) -> TrainConfig:
    """The demo recipe, without validation on the way: validation is asked afterwards."""
    from samething.training import RECIPES

    return dataclasses.replace(
        RECIPES["demo"](), epochs=epochs, embedding_dim=embedding_dim, validate_every=1e6, keep="last",
        **options,
    )  # fmt: skip


def trained_head(
    features: FeatureSet, rows: Int[np.ndarray, " n"], config: TrainConfig, folder: Path
) -> Head:
    """A head trained on some rows; the same folder goes on where it was killed.

    Args:
        features: all of them.
        rows: those trained on, whatever is left of their classes with two images.
        config: how; the last head counts, since validation images are asked afterwards.
        folder: for checkpoints.
    """
    from samething.training.data import TrainingData
    from samething.training.loop import HeadTrainer

    chosen = np.zeros(len(features.catalog), bool)
    chosen[rows] = True
    subset = features.subset(chosen)
    config = dataclasses.replace(config, keep="last")
    with without_progress():
        trainer = HeadTrainer(subset, TrainingData.of(subset), config, folder)
        trainer.run()
        return trainer.result()


def baseline_head(features: FeatureSet, kind: Literal["average", "pca"], dim: int) -> Head:
    """Average pooling of the feature's numbers, or principal components of the training images."""
    from samething.heads import HeadConfig, fitted_head

    train = np.asarray(features.rows[features.catalog.has_role("train")])
    return fitted_head(HeadConfig(kind=kind, embedding_dim=dim, standardise=kind == "pca"), train)
