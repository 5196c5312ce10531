"""Optimisers: torch's own, and sharpness-aware minimisation around any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

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


def take_step(
    optimiser: torch.optim.Optimizer, loss_and_gradients: Callable[[], Tensor], config: TrainConfig
) -> Tensor:
    """One step; returns the loss before it.

    With ``sam_rho`` the gradient is taken where the loss is worst within that radius: at
    ``w + rho g / |g|`` (Foret et al. 2021, eq. 2).
    """
    loss = loss_and_gradients()
    parameters = [
        parameter
        for group in optimiser.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if config.sam_rho:
        with torch.no_grad():
            length = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            factor = config.sam_rho / (length + 1e-12)
            before = [parameter.clone() for parameter in parameters]
            for parameter in parameters:
                parameter.add_(parameter.grad * factor)
        loss_and_gradients()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    if config.gradient_clip:
        nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
    optimiser.step()
    return loss
