"""Learning rates as a pure function of the step."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Half a cosine or a constant rate, under a linear warm-up."""

    highest: float
    """Highest rate of the course."""
    final: float
    """Learning rate that a cosine ends at, after the last step."""
    course: Literal["cosine", "constant"]
    num_steps: int
    """Steps of the whole run."""
    warmup_steps: int
    """Steps of the warm-up."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0.

        The course times ``min(1, (step + 1) / warmup_steps)``, as the paper's authors have it. The cosine is
        ``final + (highest - final) (1 + cos(pi step / num_steps)) / 2`` over all steps (SGDR, Loshchilov &
        Hutter 2017, eq. 5, one cycle).
        """
        warmth = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.course == "constant":
            return self.highest * warmth
        cosine = (1 + math.cos(math.pi * min(1.0, step / self.num_steps))) / 2
        return warmth * (self.final + (self.highest - self.final) * cosine)
