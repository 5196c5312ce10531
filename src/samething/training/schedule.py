"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math
from typing import Final

from samething.training.config import TrainConfig

_EXPONENTIAL_START: Final = 1e-3
"""An exponential warm-up begins at this share of the highest learning rate."""


def learning_rate(config: TrainConfig, step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Learning rate of a step.

    Linear warm-up: ``lr (step + 1) / warmup_steps``; exponential: from ``0.001 lr`` to ``lr`` by a constant
    factor. Then ``final + (lr - final) (1 + cos(pi t)) / 2``, where t runs from 0 to 1 over the rest (SGDR,
    Loshchilov & Hutter 2017, eq. 5, one cycle), or the constant lr.

    Args:
        config: the run's configuration.
        step: number of the step, from 0.
        num_steps: steps of the whole run.
        warmup_steps: steps of the warm-up.
    """
    highest, final = config.learning_rate, config.final_learning_rate
    if step < warmup_steps:
        share = (step + 1) / warmup_steps
        if config.warmup_shape == "linear":
            return highest * share
        return highest * math.pow(_EXPONENTIAL_START, 1 - share)
    if config.schedule == "constant":
        return highest
    share = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return final + (highest - final) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def warmup_steps(config: TrainConfig, *, steps_per_epoch: int) -> int:
    """Length of the warm-up in steps."""
    return _steps(config.warmup, config.warmup_unit, config, steps_per_epoch)


def checkpoint_steps(config: TrainConfig, *, steps_per_epoch: int) -> int | None:
    """Steps between the checkpoints beside those of the validations; None: there are none."""
    if not config.checkpoint_every:
        return None
    return max(1, _steps(config.checkpoint_every, config.checkpoint_unit, config, steps_per_epoch))


def _steps(length: float, unit: str, config: TrainConfig, steps_per_epoch: int) -> int:
    if unit == "steps":
        return round(length)
    if unit == "images":
        return round(length / config.batch_size)
    return round(length * steps_per_epoch)
