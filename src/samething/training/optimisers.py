"""Optimisers, which are torch's own, and learning rates as a pure function of the step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from samething.training.config import TrainConfig


def build_optimiser(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a configuration, over the parameters that are trained.

    ``sgd`` and ``adam`` add ``weight_decay × weight`` to the gradient (L2); ``adamw`` shrinks the weights by
    ``learning_rate × weight_decay`` beside the step (Loshchilov & Hutter 2019).
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    on_card, decay = trained[0].is_cuda, config.weight_decay
    # a number would be part of a recorded step for ever
    rate = torch.tensor(config.learning_rate, device=trained[0].device) if on_card else config.learning_rate
    if config.optimiser == "sgd":
        return torch.optim.SGD(
            trained, lr=rate, weight_decay=decay, momentum=config.momentum, fused=on_card or None
        )
    kind = torch.optim.Adam if config.optimiser == "adam" else torch.optim.AdamW
    return kind(trained, lr=rate, weight_decay=decay, fused=True, capturable=on_card)


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
