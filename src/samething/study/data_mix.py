"""Which data sets to train on: a mix of groups with caps, trained under a budget, asked on validation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from samething.arrays import Bool, Int, PerQuery
from samething.catalog import Catalog
from samething.curate.rules import Budget, Limit, Population, Share
from samething.errors import InputError
from samething.features import FeatureSet
from samething.files import Json
from samething.study.greedy import Gain
from samething.study.questions import Questions, baseline_head, means_of_seeds, trained_head
from samething.study.study_folder import StudyFolder

if TYPE_CHECKING:
    from samething.heads import Head
    from samething.training import TrainConfig

By: TypeAlias = Literal["domain", "dataset"]
Part: TypeAlias = tuple[str, int]
"""A group, and the most images of a class that are taken of it; 0 for all."""
Mix: TypeAlias = Sequence[Part]


def named(part: Part) -> str:
    """A part in words.

    >>> named(("cars", 0)), named(("cars", 10))
    ('cars', 'cars, at most 10 per class')
    """
    return part[0] if not part[1] else f"{part[0]}, at most {part[1]} per class"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What is the same for every mix."""

    by: By
    budget: int
    """Training images, at most, of every mix."""
    caps: tuple[int, ...]
    """Caps that are tried for each group; 0 for none."""
    share: Share
    num_seeds: int
    leave_one_domain_out: bool
    seed: int

    def check(self, num_images: int) -> None:
        """Refuse what cannot be asked.

        Raises:
            InputError: a number out of its range.
        """
        if not 4 <= self.budget <= num_images or self.num_seeds < 1 or min(self.caps, default=-1) < 0:
            raise InputError(
                f"--budget {self.budget} --seeds {self.num_seeds} --cap {' '.join(map(str, self.caps))}",
                expected=f"a budget from 4 to the {num_images:,} training images there are, a seed or "
                "more, and caps from 0 (none)",
                next_step="change --budget, --seeds or --cap",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer:
    """Trains and asks mixes; every answer is kept in the study's log."""

    features: FeatureSet
    folder: StudyFolder
    config: TrainConfig
    terms: Terms
    val: Questions
    groups: tuple[str, ...]

    @classmethod
    def of(cls, features: FeatureSet, folder: StudyFolder, config: TrainConfig, terms: Terms) -> Mixer:
        """Find the groups of a feature folder.

        Raises:
            InputError: fewer than two groups, or the terms are out of range.
        """
        train = features.catalog.take(features.catalog.has_role("train"))
        groups = tuple(sorted(set(map(str, train.strings(terms.by)))))
        if len(groups) < 2:
            raise InputError(
                f"{len(groups)} {terms.by} with training images in {features.folder}",
                expected="at least two to choose from",
                next_step="choose the other with --by domain or --by dataset, or join catalogs",
            )
        terms.check(len(train))
        val = Questions.of(features, "val")
        return cls(features=features, folder=folder, config=config, terms=terms, val=val, groups=groups)

    @property
    def everything(self) -> tuple[Part, ...]:
        """All groups, without caps."""
        return tuple((group, 0) for group in self.groups)

    def rows(self, mix: Mix, *, budget: int | None = None, without: str = "") -> Int[np.ndarray, " n"]:
        """Rows of the feature folder that a mix trains on, ascending.

        Args:
            mix: the groups, each with its cap.
            budget: images, instead of that of the terms.
            without: a domain of which nothing is taken.
        """
        return mixed_rows(
            self.features.catalog,
            mix,
            by=self.terms.by,
            budget=self.terms.budget if budget is None else budget,
            share=self.terms.share,
            seed=self.terms.seed,
            without=without,
        )

    def trained(self, rows: Int[np.ndarray, " n"], seed: int, work: Path, *, budget: int) -> Head:
        """A head trained for as many steps as a full budget takes, however many images there are.

        A mix from which nothing can be learned (fewer than two classes) is answered by the average pool.
        """
        ids = self.features.catalog.class_ids()[rows]
        if len(np.unique(ids)) < 2:
            return baseline_head(self.features, "average", self.config.embedding_dim)
        steps = max(1, math.ceil(self.config.epochs * budget / self.config.batch_size))
        config = dataclasses.replace(
            self.config, seed=seed, iterations=steps, warmup=float(steps // 20), warmup_unit="steps"
        )
        return trained_head(self.features, rows, config, work)

    def scores_of_seed(self, mix: Mix, seed: int, *, budget: int | None = None) -> PerQuery:
        """Validation scores of a mix from one training seed.

        With one domain left out, the queries of each domain are answered by a head that was trained without
        that domain.
        """
        budget = self.terms.budget if budget is None else budget

        def measure(work: Path, without: str = "") -> PerQuery:
            rows = self.rows(mix, budget=budget, without=without)
            return self.val.scores(self.trained(rows, seed, work, budget=budget).embed(self.val.rows))

        def tried(without: str) -> dict[str, Json]:
            parts = sorted([group, cap] for group, cap in mix)
            return {"part": "val", "mix": parts, "budget": budget, "seed": seed, "without": without}

        if not self.terms.leave_one_domain_out:
            return self.folder.scores(tried(""), measure)
        values = np.empty(len(self.val.domain_of))
        for number, domain in enumerate(self.val.domains):
            found = self.folder.scores(tried(domain), functools.partial(measure, without=domain))
            values[self.val.domain_of == number] = found[self.val.domain_of == number]
        return values

    def scores(self, mix: Mix, *, budget: int | None = None) -> PerQuery:
        """Validation scores of a mix, means over the seeds."""
        seeds = range(self.terms.num_seeds)
        return means_of_seeds(
            {seed: self.scores_of_seed(mix, self.terms.seed + seed, budget=budget) for seed in seeds}
        )[0]

    def compare(self, first: Mix, second: Mix | None) -> Gain:
        """Gain of a mix over another on validation, by the paired bootstrap; of the first, its score."""
        values = self.scores(first)
        if second is None:
            return Gain(self.val.mean(values), *self.val.interval(values))
        found = self.val.difference(values, self.scores(second))
        return Gain(found.difference, found.low, found.high)

    def tested(self, mixes: Mapping[str, Mix], questions: Questions) -> dict[str, PerQuery]:
        """Test scores of some mixes, a value per query and seed; not kept here."""
        found = {}
        for name, mix in mixes.items():
            for seed in range(self.terms.num_seeds):
                work = self.folder.folder / "runs" / f"test-{name}-{seed}"
                rows = self.rows(mix)
                head = self.trained(rows, self.terms.seed + seed, work, budget=self.terms.budget)
                found[f"{name} {seed}"] = questions.scores(head.embed(questions.rows))
        return found


def mixed_rows(
    catalog: Catalog, mix: Mix, *, by: By, budget: int, share: Share, seed: int = 0, without: str = ""
) -> Int[np.ndarray, " n"]:
    """Rows of a catalog that a mix trains on, ascending.

    Classes of one image are left out, then each group is capped, then the whole is brought to its budget,
    shared over the domains, by leaving out whole classes.

    Args:
        catalog: its rows with the role train are looked at.
        mix: the groups, each with its cap.
        by: the column that names the group.
        budget: images, at most.
        share: how the budget is shared over the domains (:class:`samething.curate.rules.Budget`).
        seed: of the draws.
        without: a domain of which nothing is taken.
    """
    group_of = catalog.strings(by).astype(str)
    usable: Bool[np.ndarray, " n"] = catalog.has_role("train") & (
        catalog.strings("domain").astype(str) != without
    )
    population = Population.of(catalog, seed=seed)
    kept = [np.empty(0, np.int64)]
    for group, cap in mix:
        rows = population.with_enough_images(np.flatnonzero(usable & (group_of == group)), Limit(2))
        kept.append(population.with_capped_images(rows, Limit(cap or None)))
    together = np.sort(np.concatenate(kept))
    if len(together) > budget:
        together = population.within_budget(together, Budget(images=budget, share=share, least=2))
    return together
