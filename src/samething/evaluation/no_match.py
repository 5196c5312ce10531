"""How well a threshold fitted to validation images tells "no match" on test images."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from samething.arrays import Bool, Embeddings, Float
from samething.calibration import Calibration
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.task import RetrievalTask, Role, rows_by_role
from samething.files import Json, finite
from samething.statistics import bootstrap_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoMatch:
    """A calibration and what it does on the test images.

    Every test query with a positive is asked twice: against the whole index, where there is a right answer,
    and against the index without its own thing, where "no match" is the right answer.
    """

    calibration: Calibration
    """For an index of the size of the test's."""
    fitted: Calibration
    """As fitted to the validation images, for an index of their size."""
    precision: float
    """Of the answers given to both questions, the share that is right."""
    precision_interval: tuple[float, float]
    """95 % bootstrap interval over queries."""
    recall: float
    """Share of the queries that got the right answer where there is one."""
    recall_interval: tuple[float, float]
    """95 % bootstrap interval over queries."""
    false_alarms: float
    """Share of the queries that got an answer where there is none."""
    num_queries: int
    """Test queries with a positive."""
    calibration_error: float
    """Expected calibration error of the probabilities, over both questions of each query, in [0, 1]."""

    def to_json(self) -> Json:
        """Numbers and the calibration; what is not finite is null."""
        content = dataclasses.asdict(self)
        del content["calibration"], content["fitted"]
        return finite({"calibration": self.calibration.to_json(), **content})

    def __rich__(self) -> str:
        """One line for a person."""
        c = self.calibration
        if math.isinf(c.threshold):
            return (
                f"no match: from no score on are answers right in {c.target_precision:.0%} for certain, by "
                f"{c.num_queries:,} validation questions and for an index {c.growth:.1f} times as large"
            )
        low, high = (100 * end for end in self.precision_interval)
        below, above = (100 * end for end in self.recall_interval)
        return (
            f"no match below a score of {c.threshold:.3f} (precision {c.target_precision:.0%} asked on "
            f"{c.num_queries:,} validation questions, {c.num_wrong} wrong answers above it, for an index "
            f"{c.growth:.1f} times as large): on {self.num_queries:,} test queries precision "
            f"{100 * self.precision:.1f} % ({low:.1f}–{high:.1f}), recall {100 * self.recall:.1f} % "
            f"({below:.1f}–{above:.1f}), false alarms where there is no match "
            f"{100 * self.false_alarms:.1f} %, error of the probabilities {self.calibration_error:.3f}"
        )


def best_answers(
    embeddings: Embeddings, catalog: Catalog, *, role: Role, asked: Embeddings | None = None
) -> tuple[Float[np.ndarray, " q"], Bool[np.ndarray, " q"], Float[np.ndarray, " q"]]:
    """The best score of each query that has a positive, whether it is right, and the best wrong score.

    The best wrong score is what the query finds in an index without its own thing; -1 where there is nothing
    else.
    """
    task = RetrievalTask.of(catalog, role)
    found, is_right = task.answers(embeddings, asked=asked)
    has_answer = task.relevant.counts > 0
    wrong = ~is_right & (found.indices >= 0)
    places = np.arange(len(wrong))
    best_wrong = np.where(wrong.any(axis=1), found.scores[places, wrong.argmax(axis=1)], -1.0)
    return found.scores[has_answer, 0], is_right[has_answer, 0], best_wrong[has_answer]


def fit_calibration(
    embeddings: Embeddings,
    catalog: Catalog,
    *,
    asked: Embeddings | None = None,
    target_precision: float = 0.95,
    sure: bool = True,
) -> Calibration:
    """A calibration from the validation images, each asked with and without its own thing in the index.

    It holds for an index as large as theirs; :meth:`Calibration.for_index` makes it one for a larger index.

    Args:
        embeddings: one row a catalog row.
        catalog: with validation images, which are queries and index.
        asked: the embeddings as queries are compared, where an index keeps them otherwise.
        target_precision: share of the answers that is to be right.
        sure: as in :meth:`Calibration.fit`.

    Raises:
        InputError: there are no validation images, or all answers are right or all wrong.
    """
    best, right, wrong = best_answers(embeddings, catalog, role="val", asked=asked)
    return Calibration.fit(
        np.concatenate([best, wrong]),
        np.concatenate([right, np.zeros(len(wrong), dtype=bool)]),
        num_with_positive=max(1, len(best)),
        target_precision=target_precision,
        sure=sure,
        index_size=len(rows_by_role(catalog, "val")[1]),
    )


def measure_no_match(
    embeddings: Embeddings,
    catalog: Catalog,
    *,
    asked: Embeddings | None = None,
    target_precision: float = 0.95,
) -> NoMatch:
    """Fit on the validation images for an index of the test's size, measure on the test images.

    Arguments are those of :func:`fit_calibration`.

    Raises:
        InputError: as :func:`fit_calibration`; or no test query has a positive.
    """
    fitted = fit_calibration(embeddings, catalog, asked=asked, target_precision=target_precision)
    calibration = fitted.for_index(len(rows_by_role(catalog, "test")[1]))
    best, right, wrong = best_answers(embeddings, catalog, role="test", asked=asked)
    if not len(best):
        raise InputError(
            "no test query has a positive",
            expected="queries whose thing is in the index",
            next_step="check the roles",
        )
    answered, alarmed = calibration.is_match(best), calibration.is_match(wrong)
    hits = (answered & right).astype(float)
    given = answered.astype(float) + alarmed
    return NoMatch(
        calibration=calibration,
        fitted=fitted,
        precision=float(hits.sum() / given.sum()) if given.any() else math.nan,
        precision_interval=_ratio_interval(hits, given),
        recall=float(hits.mean()),
        recall_interval=bootstrap_interval(hits),
        false_alarms=float(alarmed.mean()),
        num_queries=len(best),
        calibration_error=calibration.error(
            np.concatenate([best, wrong]), np.concatenate([right, np.zeros(len(wrong), dtype=bool)])
        ),
    )


def _ratio_interval(parts: Float[np.ndarray, " q"], wholes: Float[np.ndarray, " q"]) -> tuple[float, float]:
    """Percentile bootstrap interval of a ratio of sums over queries."""
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(2000):
        drawn = generator.integers(len(parts), size=len(parts))
        if wholes[drawn].sum():
            ratios.append(parts[drawn].sum() / wholes[drawn].sum())
    if not ratios:
        return math.nan, math.nan
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
