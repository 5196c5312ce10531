"""Which parameters of a backbone learn, and how fast each layer does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from samething.errors import InputError, needed
from samething.training.config import FinetuneConfig


def layers_of(network: nn.Module) -> dict[str, int]:
    """Layer of each parameter, by name, counted from the input; timm knows the layers of its models.

    Raises:
        InputError: a network that does not say which layers it has.
    """
    from timm.models import group_parameters

    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise InputError(
            f"--unfreeze of a {type(network).__name__}",
            expected="a backbone of timm, whose layers are known",
            next_step="choose another backbone, or train the head alone",
        )
    layers: dict[str, int] = group_parameters(network, matcher(coarse=False), reverse=True)
    return layers


def chosen_layers(network: nn.Module, num_layers: int | None) -> dict[str, int]:
    """The parameters of the last layers, with how many layers lie behind each (0: it is in the last)."""
    layers = layers_of(network)
    # the last group of most architectures is the classifier, which was removed: count those that exist
    present = sorted(set(layers.values()))
    behind = {layer: len(present) - 1 - place for place, layer in enumerate(present)}
    limit = len(present) if num_layers is None else num_layers
    return {name: behind[layer] for name, layer in layers.items() if behind[layer] < limit}


@dataclasses.dataclass
class Unfrozen:
    """A backbone's network with the parameters that learn."""

    network: nn.Module
    """The network to call; with LoRA it wraps the backbone's own."""
    groups: list[tuple[float, list[nn.Parameter]]]
    """Parameters with their share of the backbone's learning rate."""
    uses_lora: bool

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of what learns, by name."""
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def load_state_dict(self, learned: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`state_dict` gave."""
        parameters = dict(self.network.named_parameters())
        for name, value in learned.items():
            parameters[name].copy_(value)

    def merged(self) -> nn.Module:
        """The network as it was built, with what was learned; LoRA updates become part of the weights."""
        if not self.uses_lora:
            return self.network
        wrapped: Any = self.network
        network: nn.Module = wrapped.merge_and_unload()
        return network.requires_grad_(False)


def unfreeze(network: nn.Module, tune: FinetuneConfig, *, seed: int) -> Unfrozen:
    """Let the chosen part of a frozen network learn.

    Batch normalisation keeps its statistics: the network stays in evaluation mode.

    Raises:
        InputError: its layers are not known, or LoRA finds nothing to adapt.
        MissingExtraError: LoRA without peft.
    """
    chosen = chosen_layers(network, tune.num_layers)
    if tune.gradient_checkpointing:
        setter = getattr(network, "set_grad_checkpointing", None)
        if setter is None:
            raise InputError(
                f"--gradient-checkpointing of a {type(network).__name__}",
                expected="a backbone of timm that can compute activations again",
                next_step="leave it out",
            )
        setter(True)
    if tune.lora_rank:
        return _with_lora(network, chosen, tune, seed=seed)
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if name in chosen:
            parameter.requires_grad_(True)
            groups.setdefault(chosen[name], []).append(parameter)
    return Unfrozen(
        network, [(tune.layer_decay**behind, each) for behind, each in sorted(groups.items())], False
    )


def _with_lora(network: nn.Module, chosen: Mapping[str, int], tune: FinetuneConfig, *, seed: int) -> Unfrozen:
    """Low-rank updates of the linear maps and 1 × 1 convolutions (Hu et al., ICLR 2022)."""
    peft = needed("peft", extra="finetune")
    targets = {
        name: chosen[f"{name}.weight"]
        for name, module in network.named_modules()
        if f"{name}.weight" in chosen
        and (
            isinstance(module, nn.Linear)
            or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
        )
    }
    if not targets:
        raise InputError(
            f"--lora-rank {tune.lora_rank} with --unfreeze {tune.unfreeze}",
            expected="linear maps or 1 × 1 convolutions among the layers that learn",
            next_step="unfreeze more layers, or set --lora-rank 0",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped: Any = peft.get_peft_model(
            network,
            peft.LoraConfig(
                r=tune.lora_rank,
                lora_alpha=tune.lora_alpha,
                target_modules=list(targets),
                lora_dropout=0.0,
            ),
        )
    wrapped.eval()
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").split(".lora_")[0]
            groups.setdefault(targets[own], []).append(parameter)
    return Unfrozen(
        wrapped, [(tune.layer_decay**behind, each) for behind, each in sorted(groups.items())], True
    )
