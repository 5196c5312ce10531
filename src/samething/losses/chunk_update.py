"""One step of torch's own optimisers on a few rows of a parameter at a time, while those rows are in cache.

The optimiser object stays the owner of its state and its settings: a step in chunks leaves in it exactly
what ``optimiser.step()`` with the whole gradient would have left, so its ``state_dict`` saves and resumes
either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from samething.arrays import Float


class ChunkUpdate:
    """A step of an optimiser for one two-dimensional parameter, begun once and given its rows in pieces.

    Args:
        optimiser: SGD, Adam or AdamW, see :func:`updates_in_chunks`; its group's learning rate, betas and
            weight decay hold at the time of construction.
        parameter: one of its parameters.
    """

    def __init__(self, optimiser: Optimizer, parameter: nn.Parameter) -> None:
        self.group = _group_of(optimiser, parameter)
        self.parameter = parameter.detach()
        # asking for the state makes it, and SGD without momentum has none
        keeps_state = not isinstance(optimiser, SGD) or self.group["momentum"]
        self.state = optimiser.state[parameter] if keeps_state else {}
        self.is_first_step = not self.state
        if isinstance(optimiser, SGD):
            if self.is_first_step and self.group["momentum"]:
                self.state["momentum_buffer"] = torch.zeros_like(self.parameter)
        else:
            if self.is_first_step:
                self.state["step"] = torch.tensor(0.0)
                self.state["exp_avg"] = torch.zeros_like(self.parameter)
                self.state["exp_avg_sq"] = torch.zeros_like(self.parameter)
            self.state["step"] += 1
        self._is_sgd = isinstance(optimiser, SGD)
        decoupled = self.group.get("decoupled_weight_decay", isinstance(optimiser, AdamW))
        self._adam_kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def __call__(self, start: int, gradient: Float[Tensor, "rows d"]) -> None:
        """Update the rows from ``start`` on with their gradient, which is used up."""
        rows = slice(start, start + len(gradient))
        parameter, group, state = [self.parameter[rows]], self.group, self.state
        if self._is_sgd:
            torch._fused_sgd_(
                parameter,
                [gradient],
                [state["momentum_buffer"][rows]] if group["momentum"] else [],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=float(group["lr"]),
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=self.is_first_step,
            )
            return
        beta1, beta2 = group["betas"]
        self._adam_kernel(
            parameter,
            [gradient],
            [state["exp_avg"][rows]],
            [state["exp_avg_sq"][rows]],
            [],
            [state["step"]],
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def updates_in_chunks(optimiser: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether :class:`ChunkUpdate` can stand in for this optimiser's step on this parameter."""
    if type(optimiser) not in (SGD, Adam, AdamW):
        return False
    group = _group_of(optimiser, parameter)
    return not (group["maximize"] or group.get("amsgrad") or group["differentiable"])


def _group_of(optimiser: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    for group in optimiser.param_groups:
        if any(each is parameter for each in group["params"]):
            return group
    raise ValueError("the optimiser does not hold this parameter")
