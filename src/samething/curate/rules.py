"""Which images stay: numbers of images per class, of classes per data set, and a budget over domains.

Each rule takes rows and returns those that stay, ascending, whatever their role. A class is a domain and a
label; it belongs to the data set of its first row. What is drawn depends on the names of images and classes
and on the seed alone (:mod:`samething.curate.draws`).

>>> from pathlib import Path
>>> rows = [{"image": f"{label}{number}", "label": label} for label in "ab" for number in range(3)]
>>> images = Catalog.from_rows(rows[:5], root=Path())
>>> population = Population.of(images)
>>> population.with_enough_images(population.rows, Limit(3))
array([0, 1, 2])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import pyarrow.compute as pc

from samething.arrays import Int, UInt64, counted
from samething.catalog import Catalog
from samething.curate.draws import draws_of
from samething.errors import InputError

Share: TypeAlias = Literal["proportional", "equal", "temperature"]
Thin: TypeAlias = Literal["classes", "images"]

Rows: TypeAlias = Int[np.ndarray, " r"]
Kept: TypeAlias = Int[np.ndarray, " k"]
"""Those of some rows that stay, ascending."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """A number that holds for all data sets, and others for some of them."""

    default: int | None = None
    """None for no limit."""
    of_dataset: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def of(self, dataset: str, *, otherwise: int) -> int:
        """The number for a data set, where there is no limit another one.

        >>> Limit(None, {"gldv2": 10}).of("gldv2", otherwise=0), Limit(100).of("cars", otherwise=0)
        (10, 100)
        """
        return self.of_dataset.get(dataset, otherwise if self.default is None else self.default)

    def __str__(self) -> str:
        own = [f"{number} for {name}" for name, number in self.of_dataset.items()]
        return ", ".join([*([] if self.default is None else [str(self.default)]), *own])

    @classmethod
    def parsed(cls, texts: Sequence[str], *, name: str) -> Limit:
        """From ``N`` for all data sets and ``DATASET=N`` for one.

        Args:
            texts: as typed.
            name: the option's, for messages.

        Raises:
            InputError: not such a text, a number below 1, or a data set named twice.

        >>> Limit.parsed(["100", "gldv2=10"], name="--max-images")
        Limit(default=100, of_dataset={'gldv2': 10})
        """
        numbers: dict[str, int] = {}
        for text in texts:
            dataset, _, number = text.rpartition("=")
            if not number.isascii() or not number.isdigit() or int(number) < 1 or dataset in numbers:
                raise InputError(
                    f"{name} {text}",
                    expected="a whole number from 1, or DATASET=NUMBER, once for each data set",
                    next_step=f"write for instance: {name} 100 {name} gldv2=10",
                )
            numbers[dataset] = int(number)
        return cls(numbers.pop("", None), numbers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is kept in all, and how it is shared over the domains.

    Raises:
        InputError: images and classes are both given, or a number is out of its range.
    """

    images: int | None = None
    """Images in all; None for no limit."""
    classes: int | None = None
    """Classes in all, instead; None for no limit."""
    share: Share = "proportional"
    """``proportional`` to what each domain has; ``equal``; ``temperature``: proportional to what it has to
    the power of 1 / temperature, between the two. What a domain cannot fill goes to the others."""
    temperature: float = 2.0
    """For ``temperature``; 1 is proportional, large is equal."""
    thin: Thin = "classes"
    """How a domain is brought to its images: fewer ``classes``, each whole; or fewer ``images`` a class,
    all classes kept as far as their smallest number allows."""
    least: int = 1
    """Images that a class must keep to be worth keeping."""

    def __post_init__(self) -> None:
        numbers = [number for number in (self.images, self.classes) if number is not None]
        if len(numbers) == 2 or min(numbers, default=1) < 1 or self.least < 1 or not self.temperature > 0:
            raise InputError(
                f"a budget of images={self.images}, classes={self.classes}, "
                f"temperature={self.temperature}, least={self.least}",
                expected="images or classes, not both, from 1; a temperature above 0; least from 1",
                next_step="give one of budget_images and budget_classes",
            )

    def __str__(self) -> str:
        what = f"{self.images} images" if self.classes is None else f"{self.classes} classes"
        return f"{what} in all, shared {self.share}"


def domain_quotas(
    available: Int[np.ndarray, " d"], budget: int, *, share: Share = "proportional", temperature: float = 2.0
) -> Int[np.ndarray, " d"]:
    """How much of a budget each domain gets.

    The quotas are whole, at most what is available, and sum to the budget, or to all there is if that is
    less. Remainders go to the largest fractions, of equal ones to the first.

    >>> domain_quotas(np.array([900, 90, 10]), 100).tolist()
    [90, 9, 1]
    >>> domain_quotas(np.array([900, 90, 10]), 100, share="equal").tolist()
    [45, 45, 10]
    """
    exponent = {"proportional": 1.0, "equal": 0.0, "temperature": 1.0 / temperature}[share]
    budget = min(budget, int(available.sum()))
    weights = np.where(available > 0, np.maximum(available, 1).astype(float) ** exponent, 0.0)
    quotas = np.zeros(len(available))
    open_domains, left = available > 0, float(budget)
    while open_domains.any():
        offers = left * weights / weights[open_domains].sum()
        full = open_domains & (offers >= available)
        if not full.any():
            quotas[open_domains] = offers[open_domains]
            break
        quotas[full] = available[full]
        left -= float(available[full].sum())
        open_domains &= ~full
    whole = np.minimum(np.floor(quotas + 1e-9).astype(np.int64), available)
    order = np.argsort(-np.where(whole < available, quotas - whole, -1.0), kind="stable")
    whole[order[: budget - int(whole.sum())]] += 1
    return np.asarray(whole)


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """A catalog as numbers: what the rules look at, some 40 bytes per image."""

    classes: Int[np.ndarray, " n"]
    """Classes 0…, numbered by (domain, label)."""
    class_dataset: Int[np.ndarray, " c"]
    """Data set of each class's first row, as an index into ``dataset_names``."""
    class_domain: Int[np.ndarray, " c"]
    """Domain of each class, as an index into ``domain_names``."""
    image_draws: UInt64[np.ndarray, " n"]
    class_draws: UInt64[np.ndarray, " c"]
    dataset_names: Sequence[str]
    domain_names: Sequence[str]

    @classmethod
    def of(cls, catalog: Catalog, *, seed: int = 0) -> Population:
        """The numbers of a catalog."""
        classes = catalog.class_ids()
        firsts = np.empty(int(classes.max(initial=-1)) + 1, np.int64)
        firsts[classes[::-1]] = np.arange(len(classes))[::-1]
        one_per_class = catalog.take(firsts)
        table = one_per_class.table
        names = pc.binary_join_element_wise(table["domain"], table["label"], "\x1f")
        dataset_names, datasets = np.unique(one_per_class.strings("dataset"), return_inverse=True)
        domain_names, domains = np.unique(one_per_class.strings("domain"), return_inverse=True)
        return cls(
            classes=classes,
            class_dataset=datasets,
            class_domain=domains,
            image_draws=draws_of(catalog.table["image"], seed=seed),
            class_draws=draws_of(names, seed=seed),
            dataset_names=dataset_names.tolist(),
            domain_names=domain_names.tolist(),
        )

    @property
    def rows(self) -> Rows:
        """All rows."""
        return np.arange(len(self.classes))

    def sizes(self, rows: Rows) -> Int[np.ndarray, " c"]:
        """Images of each class among some rows."""
        return np.bincount(self.classes[rows], minlength=len(self.class_draws))

    def with_enough_images(self, rows: Rows, least: Limit) -> Kept:
        """Rows of the classes that have at least so many images."""
        enough = self.sizes(rows) >= self._of_datasets(least, otherwise=0)[self.class_dataset]
        return np.asarray(rows[enough[self.classes[rows]]])

    def with_capped_images(self, rows: Rows, most: Limit) -> Kept:
        """Rows of all classes, of each at most so many images, drawn at random."""
        return self._drawn_images(rows, self._of_datasets(most)[self.class_dataset])

    def with_capped_classes(self, rows: Rows, most: Limit) -> Kept:
        """Rows of at most so many classes per data set, drawn at random."""
        present = np.flatnonzero(self.sizes(rows))
        chosen = self._drawn_classes(present, self.class_dataset, self._of_datasets(most))
        return np.asarray(rows[chosen[self.classes[rows]]])

    def within_budget(self, rows: Rows, budget: Budget) -> Kept:
        """Rows that a total budget of images or classes leaves, shared over the domains."""
        most_in_all = budget.images if budget.classes is None else budget.classes
        if most_in_all is None:
            return rows
        sizes, num_domains = self.sizes(rows), len(self.domain_names)
        present = np.flatnonzero(sizes)
        counted_classes = self.classes[rows] if budget.classes is None else present
        available = np.bincount(self.class_domain[counted_classes], minlength=num_domains)
        quotas = domain_quotas(available, most_in_all, share=budget.share, temperature=budget.temperature)
        if budget.classes is not None:
            chosen = self._drawn_classes(present, self.class_domain, quotas)
            return np.asarray(rows[chosen[self.classes[rows]]])
        most = np.zeros(len(sizes), np.int64)
        for domain in range(num_domains):
            own = present[self.class_domain[present] == domain]
            own = own[np.argsort(self.class_draws[own], kind="stable")]
            if budget.thin == "images":
                most[own] = _fewer_images(sizes[own], int(quotas[domain]), budget.least)
                continue
            # the first classes whole, the next one in part where that is enough
            before = np.cumsum(sizes[own]) - sizes[own]
            whole = np.clip(quotas[domain] - before, 0, sizes[own])
            most[own] = np.where(whole >= np.minimum(sizes[own], budget.least), whole, 0)
        return self._drawn_images(rows, most)

    def _of_datasets(self, limit: Limit, *, otherwise: int = np.iinfo(np.int64).max) -> Int[np.ndarray, " s"]:
        """The limit of each data set; without one, by default a number that none reaches."""
        return np.asarray([limit.of(name, otherwise=otherwise) for name in self.dataset_names], np.int64)

    def _drawn_images(self, rows: Rows, most: Int[np.ndarray, " c"]) -> Kept:
        """Of each class the images with the lowest draws, as many as it may have."""
        classes = self.classes[rows]
        sizes = self.sizes(rows)
        too_many = (sizes > most)[classes]
        if not too_many.any():
            return rows
        kept = ~too_many
        own = np.flatnonzero(too_many)
        order = own[np.lexsort((self.image_draws[rows[own]], classes[own]))]
        kept[order[_places(classes[order]) < most[classes[order]]]] = True
        return np.asarray(rows[kept])

    def _drawn_classes(
        self, present: Int[np.ndarray, " p"], groups: Int[np.ndarray, " c"], quotas: Int[np.ndarray, " g"]
    ) -> np.ndarray:
        """Whether each class is among the lowest draws of its group, as many as the group may have."""
        order = present[np.lexsort((self.class_draws[present], groups[present]))]
        chosen = np.zeros(len(self.class_draws), bool)
        chosen[order[_places(groups[order]) < quotas[groups[order]]]] = True
        return chosen


def _places(groups: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Place of each entry in its run of equal values, from 0."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return counted(np.diff(starts, append=len(groups)))


def _fewer_images(sizes: Int[np.ndarray, " c"], quota: int, least: int) -> Int[np.ndarray, " c"]:
    """Images of each class: the same cap for all, one more for the first ones while the quota lasts."""
    floors = np.minimum(sizes, least)
    fitting = np.cumsum(floors) <= quota
    if not fitting.all():
        return np.where(fitting, floors, 0)
    low, high = least, int(sizes.max(initial=least))
    while low < high:  # the largest cap that fits
        middle = (low + high + 1) // 2
        if int(np.minimum(sizes, middle).sum()) <= quota:
            low = middle
        else:
            high = middle - 1
    most = np.minimum(sizes, low)
    more = np.flatnonzero(sizes > low)[: quota - int(most.sum())]
    most[more] += 1
    return np.asarray(most)
