"""From the tokens of a network to one feature: class token, mean, GeM, attention (MAP), or class and mean."""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from samething.arrays import Float
from samething.errors import InputError

Pooling: TypeAlias = Literal["own", "class", "mean", "gem", "map", "class+mean"]

GEM_EXPONENT: Final = 3.0
"""Exponent of the generalised mean (Radenović et al. 2019, section 3.2: the value training converges to)."""

Tokens: TypeAlias = tuple[Tensor | None, Tensor]
"""Class token (b, w), where there is one, and the patches' tokens (b, n, w), both after the last norm."""


def generalised_mean(
    patches: Float[Tensor, "b n w"], *, exponent: float = GEM_EXPONENT, least: float = 1e-6
) -> Float[Tensor, "b w"]:
    """GeM: ``(mean(max(x, least) ** exponent)) ** (1 / exponent)`` over the patches.

    Exponent 1 is the mean of what is positive, a large one the maximum (Radenović et al. 2019, eq. 3).

    >>> generalised_mean(torch.tensor([[[1.0, 2.0], [1.0, 0.0]]]))
    tensor([[1.0000, 1.5874]])
    """
    return patches.clamp(min=least).pow(exponent).mean(1).pow(1 / exponent)


class PooledNetwork(nn.Module):
    """A network whose tokens are pooled otherwise than it does itself.

    Raises:
        InputError: the architecture does not allow this pooling.
    """

    def __init__(self, network: nn.Module, pooling: Pooling, *, name: str) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        possible = possible_poolings(network)
        if pooling not in possible:
            raise InputError(
                f"pooling={pooling!r} with {name}",
                expected=f"one of {', '.join(possible)}, which its architecture allows",
                next_step="choose one of these, or leave it out",
            )

    def forward(self, inputs: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b w"]:
        """Pooled features of normalised pixels."""
        network: Any = self.network
        norm = getattr(network, "fc_norm", None) or nn.Identity()
        if self.pooling == "map":
            attended: Tensor = norm(network.attn_pool(network.forward_features(inputs)))
            return attended
        class_token, patches = tokens(network, inputs)
        parts = []
        if self.pooling in ("class", "class+mean"):
            assert class_token is not None
            parts.append(norm(class_token))
        if self.pooling in ("mean", "class+mean"):
            parts.append(norm(patches.mean(1)))
        if self.pooling == "gem":
            parts.append(norm(generalised_mean(patches)))
        return torch.cat(parts, 1)


def possible_poolings(network: nn.Module) -> tuple[Pooling, ...]:
    """What the architecture allows, its own pooling first."""
    poolings: list[Pooling] = ["own"]
    if not _gives_tokens(network):
        return tuple(poolings)
    if _has_class_token(network):
        poolings += ["class", "class+mean"]
    poolings += ["mean", "gem"]
    if getattr(network, "attn_pool", None) is not None and hasattr(network, "forward_features"):
        poolings.append("map")
    return tuple(poolings)


def tokens(network: Any, inputs: Float[Tensor, "b 3 height width"]) -> Tokens:
    """Class token and patches of timm's, open_clip's or transformers' networks."""
    if hasattr(network, "tokens"):  # transformers
        found: Tokens = network.tokens(inputs)
        return found
    if hasattr(network, "output_tokens"):  # open_clip's own transformer
        # the steps of its own forward pass, without the projection, and the norm on all tokens
        hidden = network.ln_post(network.transformer(network._embeds(inputs)))
        return hidden[:, 0], hidden[:, 1:]
    if hasattr(network, "trunk"):  # a timm network in open_clip
        return tokens(network.trunk, inputs)
    features: Tensor = network.forward_features(inputs)
    if features.ndim == 4:
        channels_last = features.shape[1] != network.num_features
        patches = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        return None, patches
    num_prefix = int(getattr(network, "num_prefix_tokens", 0) or 0)
    class_token = features[:, 0] if _has_class_token(network) else None
    return class_token, features[:, num_prefix:]


def _gives_tokens(network: Any) -> bool:
    if hasattr(network, "tokens"):
        return True
    if hasattr(network, "output_tokens"):
        return getattr(network, "attn_pool", None) is None and network.pool_type == "tok"
    if hasattr(network, "trunk"):
        return _gives_tokens(network.trunk)
    return hasattr(network, "forward_features") and hasattr(network, "num_features")


def _has_class_token(network: Any) -> bool:
    if hasattr(network, "trunk"):
        return _has_class_token(network.trunk)
    if hasattr(network, "output_tokens"):
        return True
    return getattr(network, "cls_token", None) is not None
