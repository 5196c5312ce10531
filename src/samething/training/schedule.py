"""Learning rates as a pure function of the step."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then half a cosine or a constant rate."""

    highest: float
    """Learning rate at the end of the warm-up."""
    final: float
    """Learning rate of the last step of a cosine."""
    course: Literal["cosine", "constant"]
    num_steps: int
    """Steps of the whole run."""
    warmup_steps: int
    """Steps of the warm-up."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0.

        ``highest (step + 1) / warmup_steps``, then ``final + (highest - final) (1 + cos(pi t)) / 2``, where t
        runs from 0 to 1 over the rest (SGDR, Loshchilov & Hutter 2017, eq. 5, one cycle).
        """
        if step < self.warmup_steps:
            return self.highest * ((step + 1) / self.warmup_steps)
        if self.course == "constant":
            return self.highest
        share = (step - self.warmup_steps) / max(1, self.num_steps - 1 - self.warmup_steps)
        return self.final + (self.highest - self.final) * (1 + math.cos(math.pi * min(1.0, share))) / 2
