"""What the evidence of a second look is worth, in units of the first search's cosine.

One logistic regression over pairs of a query and a candidate weighs evidence and cosine together. Dividing by
the cosine's own weight says what a unit of evidence is worth in cosine; that is added to the score, and the
calibration of scores turns the sum into a probability as it does a score alone. No weight is below 0, so
evidence never lowers a score, and where it says nothing the score stays as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

import numpy as np

from samething.arrays import Bool, Float, Int
from samething.errors import ArtefactError
from samething.files import Json
from samething.statistics import logistic_weights

Taught: TypeAlias = Literal["labels", "views", "nothing"]
"""What weights were learned from: labelled images, views of images, or nothing: the re-ranker's own."""
_EVERYWHERE: Final = ""
_LEAST_PAIRS: Final = 50
"""Right pairs, and wrong ones, that a domain needs for weights of its own."""
_LARGEST: Final = 2.0
"""Of a weight: more than all that cosines can differ by changes no order."""


@dataclasses.dataclass(frozen=True)
class Trust:
    """Weights of a re-ranker's numbers by the candidate's domain."""

    weights: Mapping[str, tuple[float, ...]]
    """Domain -> what each number is worth in cosine; under an empty name, that of all other domains."""
    taught_by: Taught = "nothing"
    num_pairs: int = 0
    """Pairs that they were learned from."""

    @classmethod
    def untaught(cls, weights: tuple[float, ...]) -> Trust:
        """A re-ranker's own weights, the same in all domains."""
        return cls({_EVERYWHERE: weights})

    @classmethod
    def fit(
        cls,
        scores: Float[np.ndarray, " p"],
        numbers: Float[np.ndarray, "p f"],
        is_right: Bool[np.ndarray, " p"],
        queries: Int[np.ndarray, " p"],
        domains: Sequence[str],
        *,
        otherwise: tuple[float, ...],
        taught_by: Taught = "labels",
    ) -> Trust:
        """Learn from pairs of a query and a candidate.

        Args:
            scores: cosines of the first search.
            numbers: the evidence of the second look.
            is_right: whether the pair shows the same thing.
            queries: which query each pair is of.
            domains: of each pair's candidate.
            otherwise: weights of all domains where there are too few pairs in all.
            taught_by: what the pairs come from.

        Returns:
            Weights for every domain with enough pairs, and for all others. They are 0 where with them as
            many first answers of the queries became wrong as right.
        """
        names = np.array(domains, dtype=object)
        weights = {}
        for domain in (_EVERYWHERE, *sorted(set(domains))):
            own = np.ones(len(names), bool) if domain == _EVERYWHERE else names == domain
            num_right = int(is_right[own].sum())
            if min(num_right, int(own.sum()) - num_right) >= _LEAST_PAIRS:
                found = _fitted(scores[own], numbers[own], is_right[own])
                better, worse = _changed(
                    scores[own] + numbers[own] @ found, scores[own], is_right[own], queries[own]
                )
                weights[domain] = tuple(found.tolist()) if better > worse else (0.0,) * numbers.shape[1]
        weights.setdefault(_EVERYWHERE, otherwise)
        return cls(weights, taught_by, len(scores))

    def added(self, numbers: Float[np.ndarray, "p f"], domains: Sequence[str]) -> Float[np.ndarray, " p"]:
        """What is added to the cosine of candidates of some domains.

        >>> Trust({"": (0.1, 0.0), "logo": (0.0, 0.0)}).added(np.ones((2, 2)), ["logo", "art"]).tolist()
        [0.0, 0.1]
        """
        rows = [self.weights.get(domain, self.weights[_EVERYWHERE]) for domain in domains]
        return np.asarray((numbers * np.array(rows, float).reshape(numbers.shape)).sum(axis=1))

    def to_json(self) -> Json:
        """Plain values."""
        return {
            **dataclasses.asdict(self),
            "weights": {name: list(own) for name, own in self.weights.items()},
        }

    @classmethod
    def from_json(cls, content: Json) -> Trust:
        """The inverse of :meth:`to_json`.

        Raises:
            ArtefactError: it is none.
        """
        try:
            weights = {name: tuple(map(float, own)) for name, own in content["weights"].items()}
            return cls(
                {_EVERYWHERE: weights[_EVERYWHERE], **weights}, content["taught_by"], content["num_pairs"]
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtefactError(
                f"weights of a second look that this program does not know ({error!r})",
                expected="what Trust.to_json writes",
                next_step="learn them again: samething index prepare",
            ) from error


def _fitted(
    scores: Float[np.ndarray, " p"], numbers: Float[np.ndarray, "p f"], is_right: Bool[np.ndarray, " p"]
) -> Float[np.ndarray, " f"]:
    """Weights of the numbers over that of the score; one below 0 is left out, the most negative first."""
    spread = np.maximum(np.concatenate([[scores.std()], numbers.std(axis=0)]), 1e-9)
    inputs = np.concatenate([scores[:, None], numbers], axis=1) / spread
    kept = [place for place in range(1, inputs.shape[1]) if numbers[:, place - 1].any()]
    found = np.zeros(inputs.shape[1])
    while kept:
        chosen = np.concatenate([inputs[:, [0, *kept]], np.ones((len(scores), 1))], axis=1)
        fitted = logistic_weights(chosen, is_right)[:-1]
        if fitted[1:].min() >= 0:
            found[[0, *kept]] = fitted
            break
        kept.pop(int(fitted[1:].argmin()))
    found /= spread
    if found[0] <= 0:  # where the cosine says nothing, any evidence outweighs it
        return np.asarray(np.where(found[1:] > 0, _LARGEST, 0.0))
    return np.asarray(np.minimum(found[1:] / found[0], _LARGEST))


def _changed(
    after: Float[np.ndarray, " p"],
    before: Float[np.ndarray, " p"],
    is_right: Bool[np.ndarray, " p"],
    queries: Int[np.ndarray, " p"],
) -> tuple[int, int]:
    """How many queries' first answers became right, and how many wrong."""
    first = []
    for scores in (before, after):
        order = np.lexsort((-scores, queries))
        first.append(is_right[order[np.unique(queries[order], return_index=True)[1]]])
    return int((first[1] & ~first[0]).sum()), int((first[0] & ~first[1]).sum())
