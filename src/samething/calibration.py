"""From a score to a probability, and to the answer "no match".

A score says which entry is nearest, not whether it is the same thing. From validation queries of which it is
known whether their best entry was right, a calibration learns how probable that is at a score, and from which
score on an answer is right as often as is asked for.

The nearest wrong entry of a larger index is nearer. Where the index in use has ``growth`` times as many
entries as the one the scores are from, a wrong entry reaches a score up to ``growth`` times as often (the
chances of ``growth`` indices add up at most), so each wrong answer counts that often.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from samething.arrays import Bool, Float
from samething.errors import ArtefactError, InputError
from samething.files import Json, finite
from samething.statistics import logistic_weights

FORMAT_VERSION: Final = 1
Calibrator: TypeAlias = Literal["labels", "views"]
"""What a calibration was learned from: labelled images, or views of images against other images."""
_LARGEST_SLOPE: Final = 1e4
_MOST_STEPS: Final = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Score -> probability that it is the same thing, and the score below which the answer is "no match"."""

    slope: float
    """Of the log-odds over the score."""
    intercept: float
    """Log-odds at score 0."""
    threshold: float
    """Lowest score that is an answer; infinite where no score is sure enough."""
    target_precision: float
    """Share of the answers that was asked to be right, in (0, 1]."""
    precision: float
    """Share of the answers that were right on the queries it was fitted to, each wrong one counted ``growth``
    times; NaN without an answer."""
    recall: float
    """Share of the fitted queries with a positive that got a right answer."""
    num_queries: int
    """Queries it was fitted to."""
    num_wrong: int
    """Wrong answers among them at or above the threshold: what ``precision`` rests on."""
    growth: float
    """How many times larger than the index of these queries the index is that it holds for."""
    num_with_positive: int
    """Queries that could be answered right."""
    index_size: int | None = None
    """Entries of the index that it holds for, where that is known."""
    sure: bool = False
    """Whether the threshold allows for wrong answers that were not seen by chance."""
    steps: tuple[tuple[float, int, int], ...] = ()
    """Scores from high to low, at most 256, and how many answers at or above each were right and wrong."""

    @classmethod
    def fit(
        cls,
        scores: Float[np.ndarray, " q"],
        is_right: Bool[np.ndarray, " q"],
        *,
        num_with_positive: int | None = None,
        target_precision: float = 0.95,
        growth: float = 1.0,
        sure: bool = False,
        index_size: int | None = None,
    ) -> Calibration:
        """Learn from the best score of each validation query and whether its entry was right.

        Args:
            scores: cosine similarity of each query's nearest entry.
            is_right: whether that entry is the same thing; queries without one in the index are wrong at
                any score, and belong here if they will be asked in use.
            num_with_positive: queries that could be answered right; by default all.
            target_precision: share of the answers that is to be right.
            growth: size of the index in use over that of the index of these scores, at least 1.
            sure: choose the threshold by the 95 % upper bound of the number of wrong answers rather than by
                the number seen: where none was seen, up to 3 are expected.
            index_size: entries of the index that it is fitted for, for :meth:`for_index`.

        Raises:
            InputError: no queries, only right or only wrong ones, a score is not finite, the precision is
                not in (0, 1], or the index shrinks.

        >>> fitted = Calibration.fit(
        ...     np.array([0.9, 0.8, 0.4, 0.3]), np.array([True, True, False, False]), target_precision=1.0
        ... )
        >>> fitted.threshold, fitted.recall
        (0.8, 0.5)
        """
        if not 0 < target_precision <= 1:
            raise InputError(
                f"target_precision={target_precision}",
                expected="a share in (0, 1]",
                next_step="for instance 0.95",
            )
        if not 1 <= growth < math.inf:
            raise InputError(
                f"growth={growth}",
                expected="at least 1",
                next_step="leave it at 1 for an index that is not larger",
            )
        if len(scores) == 0 or is_right.all() or not is_right.any() or not np.isfinite(scores).all():
            raise InputError(
                f"{len(scores)} queries of which {int(is_right.sum())} found the right thing first",
                expected="queries with finite scores, some right and some wrong",
                next_step="calibrate on more validation images",
            )
        order = np.argsort(-scores, kind="stable")
        ranked, hits = scores[order], np.cumsum(is_right[order])
        answered = np.arange(1, len(ranked) + 1)
        # equal scores are answered together
        ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
        steps = np.stack([ranked[ends], hits[ends], answered[ends] - hits[ends]], axis=1)
        slope, intercept = _logistic(scores, is_right)
        threshold, num_right, num_wrong = _lowest_sure(steps, target_precision, growth, sure=sure)
        kept = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_STEPS)).astype(int))]
        num_with_positive = num_with_positive or len(scores)
        return cls(
            slope=slope,
            intercept=intercept - math.log(growth),
            threshold=threshold,
            target_precision=target_precision,
            precision=num_right / (num_right + growth * num_wrong) if num_right else math.nan,
            recall=num_right / num_with_positive,
            num_queries=len(scores),
            num_wrong=num_wrong,
            growth=growth,
            num_with_positive=num_with_positive,
            index_size=index_size,
            sure=sure,
            steps=tuple((float(score), int(right), int(wrong)) for score, right, wrong in kept),
        )

    def for_index(self, num_entries: int) -> Calibration:
        """The same for an index of another size: wrong answers count as much oftener as it is larger.

        A smaller index, and a calibration that does not know its own, change nothing.

        >>> scores, is_right = np.array([0.9, 0.8, 0.7, 0.3]), np.array([True, True, False, False])
        >>> fitted = Calibration.fit(scores, is_right, target_precision=0.6, index_size=100)
        >>> fitted.threshold, fitted.for_index(1000).threshold
        (0.7, 0.8)
        """
        if not self.index_size or num_entries <= self.index_size or not self.steps:
            return self
        more = num_entries / self.index_size
        growth = self.growth * more
        threshold, num_right, num_wrong = _lowest_sure(
            np.array(self.steps), self.target_precision, growth, sure=self.sure
        )
        return dataclasses.replace(
            self,
            intercept=self.intercept - math.log(more),
            threshold=threshold,
            precision=num_right / (num_right + growth * num_wrong) if num_right else math.nan,
            recall=num_right / self.num_with_positive,
            num_wrong=num_wrong,
            growth=growth,
            index_size=num_entries,
        )

    def error(self, scores: Float[np.ndarray, " q"], is_right: Bool[np.ndarray, " q"]) -> float:
        """Expected calibration error, in [0, 1]: how far probabilities are from the shares that are right.

        Guo et al., *On Calibration of Modern Neural Networks* (ICML 2017), in ten bins of equal width.
        """
        chances = self.probability(scores)
        bins = np.minimum((10 * chances).astype(int), 9)
        gaps = np.bincount(bins, weights=chances - is_right, minlength=10)
        return float(np.abs(gaps).sum() / len(scores))

    def probability(self, scores: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
        """Probability in [0, 1] that entries with these scores are the same thing as the query."""
        odds = np.clip(self.slope * np.asarray(scores, dtype=np.float64) + self.intercept, -700, 700)
        return np.asarray(1 / (1 + np.exp(-odds)))

    def is_match(self, scores: Float[np.ndarray, ...]) -> Bool[np.ndarray, ...]:
        """Whether scores are answers rather than "no match"."""
        return np.asarray(np.asarray(scores) >= self.threshold)

    def to_json(self) -> Json:
        """As stored in a model folder."""
        return finite({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, content: Json) -> Calibration:
        """Read back :meth:`to_json`.

        Raises:
            ArtefactError: it is none, or of a newer format.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        version = content.get("format_version") if isinstance(content, dict) else None
        if not isinstance(version, int) or version > FORMAT_VERSION or names - content.keys():
            raise ArtefactError(
                "a calibration that this program does not know",
                expected=f"what Calibration.to_json writes, version {FORMAT_VERSION} or older",
                next_step="export the model again, or pip install --upgrade samething",
            )
        missing = {"threshold": math.inf, "precision": math.nan}
        values: dict[str, Any] = {
            name: missing.get(name) if content[name] is None else content[name] for name in names
        }
        steps = tuple((float(score), int(right), int(wrong)) for score, right, wrong in values.pop("steps"))
        return cls(**values, steps=steps)


def _lowest_sure(
    steps: Float[np.ndarray, "s 3"], target_precision: float, growth: float, *, sure: bool
) -> tuple[float, int, int]:
    """The lowest score from which answers are right often enough, and the right and wrong ones from it on."""
    scores, right, wrong = steps.T
    counted = _upper_bound(wrong) if sure else wrong
    is_enough = right * (1 - target_precision) >= target_precision * growth * counted - 1e-9
    good = np.flatnonzero(is_enough & (right > 0))
    if not len(good):
        return math.inf, 0, 0
    return float(scores[good[-1]]), int(right[good[-1]]), int(wrong[good[-1]])


def _upper_bound(counts: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """95 % upper bound of the expected number where ``counts`` were seen (Poisson, one-sided).

    Wilson and Hilferty's approximation of the chi-squared quantile, right to 1 % (*The Distribution of
    Chi-Square*, PNAS 1931).

    >>> _upper_bound(np.array([0.0, 10.0])).round(1).tolist()
    [3.0, 17.0]
    """
    degrees = 9.0 * (counts + 1)
    return np.asarray((counts + 1) * (1 - 1 / degrees + 1.6449 / np.sqrt(degrees)) ** 3)


def _logistic(scores: Float[np.ndarray, " q"], is_right: Bool[np.ndarray, " q"]) -> tuple[float, float]:
    """Slope and intercept of the log-odds over the score."""
    centre, spread = float(scores.mean()), float(scores.std()) or 1.0
    inputs = np.stack([(scores - centre) / spread, np.ones_like(scores)], axis=1).astype(np.float64)
    weights = logistic_weights(inputs, is_right)
    slope = float(np.clip(weights[0] / spread, -_LARGEST_SLOPE, _LARGEST_SLOPE))
    return slope, float(weights[1] - slope * centre)
