"""Optimisers: torch's own."""

from __future__ import annotations

from collections.abc import Iterable

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
