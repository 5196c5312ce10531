"""One step of torch's own optimisers on a few rows of a parameter at a time, while those rows are in cache.

The optimiser object stays the owner of its state and its settings: a step in chunks leaves in it exactly
what ``optimiser.step()`` with the whole gradient would have left, so its ``state_dict`` saves and resumes
either way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from samething.arrays import Float


def chunk_update(
    optimiser: Optimizer, parameter: nn.Parameter
) -> Callable[[int, Float[Tensor, "rows d"]], None] | None:
    """Begin a step of an optimiser for one two-dimensional parameter, which is given its rows in pieces.

    Args:
        optimiser: its group's learning rate, betas and weight decay hold from now to the last piece.
        parameter: one of its parameters.

    Returns:
        What updates the rows from a number on with their gradient, which is used up. None where it could not
        stand in for the optimiser's own step: that is another than SGD, Adam or AdamW, or an unusual one.
    """
    if type(optimiser) not in (SGD, Adam, AdamW):
        return None
    holding = (each for each in optimiser.param_groups if any(own is parameter for own in each["params"]))
    group = next(holding, None)
    if group is None:
        raise ValueError("the optimiser does not hold this parameter")
    if group["maximize"] or group.get("amsgrad") or group["differentiable"]:
        return None
    weight = parameter.detach()
    # asking for the state makes it, and SGD without momentum has none
    keeps_state = not isinstance(optimiser, SGD) or group["momentum"]
    state = optimiser.state[parameter] if keeps_state else {}
    is_first_step = not state

    if isinstance(optimiser, SGD):
        if is_first_step and group["momentum"]:
            state["momentum_buffer"] = torch.zeros_like(weight)

        def update_sgd(start: int, gradient: Float[Tensor, "rows d"]) -> None:
            rows = slice(start, start + len(gradient))
            torch._fused_sgd_(
                [weight[rows]],
                [gradient],
                [state["momentum_buffer"][rows]] if group["momentum"] else [],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=float(group["lr"]),
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=is_first_step,
            )

        return update_sgd

    if is_first_step:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    state["step"] += 1
    decoupled = group.get("decoupled_weight_decay", isinstance(optimiser, AdamW))
    adam_kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    beta1, beta2 = group["betas"]

    def update_adam(start: int, gradient: Float[Tensor, "rows d"]) -> None:
        rows = slice(start, start + len(gradient))
        adam_kernel(
            [weight[rows]],
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

    return update_adam
