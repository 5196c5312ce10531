"""Greedy forward selection and a backward check over any score: pure, so that it can be checked by force."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Literal, TypeAlias, TypeVar

from samething.statistics import Estimate

Part = TypeVar("Part", bound=Hashable)


Compare: TypeAlias = Callable[[tuple[Part, ...], tuple[Part, ...] | None], Estimate]
"""Score of the first mix minus that of the second; the second is None for the first choice of all."""


@dataclasses.dataclass(frozen=True)
class Step(Generic[Part]):
    """One decision."""

    kind: Literal["add", "drop", "stop"]
    part: Part
    """What was added or dropped; for ``stop`` the best of those that were not added."""
    gain: Estimate
    """Over the mix before."""
    mix: tuple[Part, ...]
    """The mix after it."""


def select(
    candidates: Sequence[Part],
    compare: Compare[Part],
    *,
    group_of: Callable[[Part], Hashable] = lambda part: part,
    min_gain: float = 0.0,
    announce: Callable[[str], None] = lambda text: None,
) -> tuple[tuple[Part, ...], list[Step[Part]]]:
    """Add the best candidate while that helps for certain, then drop what does not help.

    A candidate is added if it gains at least ``min_gain`` and the interval of its gain lies above 0; the
    first is the best alone. Afterwards, from the one that is missed least, parts are dropped without which
    the mix is at least as good. Equal gains go to the earlier candidate.

    Args:
        candidates: what may be added, such as a data set with a cap.
        compare: the gain of one mix over another; asked again, it should answer the same.
        group_of: candidates of one group exclude each other, such as one data set with several caps.
        min_gain: least gain for an addition.
        announce: is told what is being looked at.

    Returns:
        The mix in the order of its additions, and the decisions.

    >>> value = {"a": 3.0, "b": 2.0, "c": -1.0}
    >>> def compare(first, second):
    ...     gain = sum(value[part] for part in first) - sum(value[part] for part in second or ())
    ...     return Estimate(gain, gain, gain)
    >>> select(["c", "b", "a"], compare)[0]
    ('a', 'b')
    """
    mix: tuple[Part, ...] = ()
    steps: list[Step[Part]] = []
    while True:
        taken = {group_of(part) for part in mix}
        left = [part for part in candidates if group_of(part) not in taken]
        if not left:
            break
        announce(f"adding to {len(mix)}")
        gains = [compare((*mix, part), mix or None) for part in left]
        best = max(range(len(left)), key=lambda number: (gains[number].value, -number))
        gain = gains[best]
        if mix and (gain.value < min_gain or gain.low <= 0):
            steps.append(Step("stop", left[best], gain, mix))
            break
        mix = (*mix, left[best])
        steps.append(Step("add", left[best], gain, mix))
    while len(mix) > 1:
        announce(f"dropping from {len(mix)}")
        without = [tuple(part for part in mix if part != dropped) for dropped in mix]
        gains = [compare(smaller, mix) for smaller in without]
        best = max(range(len(mix)), key=lambda number: (gains[number].value, -number))
        if gains[best].value < 0:
            break
        steps.append(Step("drop", mix[best], gains[best], without[best]))
        mix = without[best]
    return mix, steps
