"""Which data sets to train on: a mix of groups with caps, trained under a budget, asked on validation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from samething.arrays import Bool, Float, Int
from samething.catalog import Catalog
from samething.curate.rules import Budget, Limit, Population, Share
from samething.errors import InputError
from samething.features import FeatureSet
from samething.statistics import Estimate
from samething.study.contest import Contender, Contest, baseline_head, trained_head

if TYPE_CHECKING:
    from samething.heads import Head
    from samething.training import TrainConfig

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

    by: Literal["domain", "dataset"] = "domain"
    """The column that names a group."""
    budget: int
    """Training images, at most, of every mix."""
    caps: tuple[int, ...] = (0,)
    """Caps that are tried for each group; 0 for none."""
    share: Share = "proportional"
    """How the budget is shared over the domains (:class:`samething.curate.rules.Budget`)."""
    num_seeds: int = 1
    leave_one_domain_out: bool = False
    """Whether the queries of each domain are answered by a head that was trained without it."""
    seed: int = 0
    """Of the draws; trainings use the numbers from it on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer:
    """Trains mixes for as many steps as a full budget takes, and asks them on validation images."""

    contest: Contest
    features: FeatureSet
    config: TrainConfig
    terms: Terms
    groups: tuple[str, ...]

    @classmethod
    def of(cls, contest: Contest, features: FeatureSet, config: TrainConfig, terms: Terms) -> Mixer:
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
        if not 4 <= terms.budget <= len(train) or terms.num_seeds < 1 or min(terms.caps, default=-1) < 0:
            raise InputError(
                f"--budget {terms.budget} --seeds {terms.num_seeds} --cap {' '.join(map(str, terms.caps))}",
                expected=f"a budget from 4 to the {len(train):,} training images there are, a seed or "
                "more, and caps from 0 (none)",
                next_step="change --budget, --seeds or --cap",
            )
        return cls(contest=contest, features=features, config=config, terms=terms, groups=groups)

    @property
    def everything(self) -> tuple[Part, ...]:
        """All groups, without caps."""
        return tuple((group, 0) for group in self.groups)

    def contender(
        self, mix: Mix, name: str = "", *, budget: int | None = None, without: str = ""
    ) -> Contender:
        """Heads trained on a mix, a seed each.

        A mix from which nothing can be learned (fewer than two classes) is answered by the average pool.

        Args:
            mix: the groups, each with its cap.
            name: the contender's.
            budget: images, instead of that of the terms.
            without: a domain of which nothing is taken.
        """
        terms = self.terms if budget is None else dataclasses.replace(self.terms, budget=budget)
        catalog = self.features.catalog

        def head(seed: int, work: Path) -> Head:
            rows = mixed_rows(catalog, mix, terms, without=without)
            if len(np.unique(catalog.class_ids()[rows])) < 2:
                return baseline_head(self.features, "average", self.config.embedding_dim)
            steps = max(1, math.ceil(self.config.epochs * terms.budget / self.config.batch_size))
            config = dataclasses.replace(
                self.config, seed=seed, iterations=steps, warmup=float(steps // 20), warmup_unit="steps"
            )
            return trained_head(self.features, rows, config, work)

        return Contender(
            name=name,
            tried={
                "mix": sorted([group, cap] for group, cap in mix),
                "budget": terms.budget,
                "without": without,
            },
            features=self.features,
            head=head,
            seeds=range(terms.seed, terms.seed + terms.num_seeds),
        )

    def scores(self, mix: Mix, *, budget: int | None = None) -> Float[np.ndarray, "s q"]:
        """Validation scores of a mix, a row per seed."""
        if not self.terms.leave_one_domain_out:
            return self.contest.on_validation(self.contender(mix, budget=budget))
        val = self.contest.val
        values = np.empty((self.terms.num_seeds, len(val.domain_of)))
        for number, domain in enumerate(val.domains):
            own = val.domain_of == number
            found = self.contest.on_validation(self.contender(mix, budget=budget, without=domain))
            values[:, own] = found[:, own]
        return values

    def compare(self, first: Mix, second: Mix | None) -> Estimate:
        """Gain of a mix over another on validation, by the paired bootstrap; of the first, its score."""
        val, values = self.contest.val, self.scores(first).mean(axis=0)
        if second is None:
            return val.estimate(values)
        return val.difference(values, self.scores(second).mean(axis=0)).estimate


def mixed_rows(catalog: Catalog, mix: Mix, terms: Terms, *, without: str = "") -> Int[np.ndarray, " n"]:
    """Rows of a catalog that a mix trains on, ascending.

    Classes of one image are left out, then each group is capped, then the whole is brought to its budget,
    shared over the domains, by leaving out whole classes.

    Args:
        catalog: its rows with the role train are looked at.
        mix: the groups, each with its cap.
        terms: what is the same for every mix.
        without: a domain of which nothing is taken.
    """
    group_of = catalog.strings(terms.by).astype(str)
    usable: Bool[np.ndarray, " n"] = catalog.has_role("train") & (
        catalog.strings("domain").astype(str) != without
    )
    population = Population.of(catalog, seed=terms.seed)
    kept = [np.empty(0, np.int64)]
    for group, cap in mix:
        rows = population.with_enough_images(np.flatnonzero(usable & (group_of == group)), Limit(2))
        kept.append(population.with_capped_images(rows, Limit(cap or None)))
    together = np.sort(np.concatenate(kept))
    if len(together) > terms.budget:
        budget = Budget(images=terms.budget, share=terms.share, least=2)
        together = population.within_budget(together, budget)
    return together
