"""What the studies have in common: contenders, compared on validation images, and once on test images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samething.arrays import Float, PerQuery
from samething.features import FeatureSet
from samething.files import Json
from samething.study.questions import Questions
from samething.study.study_folder import StudyFolder

if TYPE_CHECKING:
    from samething.heads import Head


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
