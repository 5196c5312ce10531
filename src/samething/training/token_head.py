"""The trained part of a re-ranker of tokens: what of a patch tells instances apart, and which patches count.

Tokens come down to 128 numbers by principal components; the trained part is one linear map of these and one
weight per token, 16,514 parameters, learned from the tokens of training images. Without training the map is
the identity, and a token counts by its distance from the mean token.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from samething.arrays import Float, Int, UInt8
from samething.backbones import Backbone
from samething.backbones.pooling import possible_poolings
from samething.backbones.pooling import tokens as tokens_of
from samething.errors import InputError
from samething.progress import progress_bar
from samething.rerank.tokens import NUM_DIMS, SINKHORN_STEPS, Likeness

_SCALE: Final = 20.0
"""Of likeness in the softmax over a batch."""
_CLASSES: Final = 16
"""In a batch, two images of each."""
_LEARNING_RATE: Final = 1e-2


class Components(nn.Module):
    """Principal components of tokens: (…, width) to (…, 128), with zeros where there are fewer."""

    mean: Tensor
    directions: Tensor

    def __init__(self, mean: Float[Tensor, " w"], directions: Float[Tensor, "w 128"]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions)

    @classmethod
    def of(cls, rows: Float[Tensor, "n w"]) -> Components:
        """The components of some tokens, the largest first."""
        mean = rows.double().mean(dim=0)
        centred = rows.double() - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        directions = torch.zeros(rows.shape[1], NUM_DIMS, dtype=torch.float64)
        count = min(NUM_DIMS, rows.shape[1])
        directions[:, :count] = vectors.flip(1)[:, :count]
        return cls(mean.float(), directions.float())

    def forward(self, rows: Float[Tensor, "*n w"]) -> Float[Tensor, "*n 128"]:
        """The components of tokens."""
        return (rows - self.mean) @ self.directions


class TokenHead(nn.Module):
    """From components to a direction times its weight: (b, n, 128) to (b, n, 128) of length at most 1."""

    def __init__(self) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(NUM_DIMS, NUM_DIMS))
        """Of the identity."""
        self.weigh = nn.Linear(NUM_DIMS, 1)
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        self.nowhere = nn.Parameter(torch.tensor(0.3))
        """Cosine of what belongs nowhere."""

    def forward(self, components: Float[Tensor, "b n 128"]) -> Float[Tensor, "b n 128"]:
        """Weighted directions; the most distinct token of an image has the weight 1 before training."""
        lengths = components.norm(dim=2, keepdim=True)
        distinct = lengths / lengths.amax(dim=1, keepdim=True).clamp(min=1e-6)
        weights = distinct * 2 * torch.sigmoid(self.weigh(components / lengths.clamp(min=1e-6)))
        directions = nn.functional.normalize(components + components @ self.change, dim=2)
        weighted: Tensor = directions * weights.clamp(max=1)
        return weighted


class TokenNetwork(nn.Module):
    """Pixels to weighted tokens, as the graph of a re-ranker gives them: (b, 3, h, w) to (b, n, 128).

    Raises:
        InputError: the backbone has no tokens.
    """

    def __init__(self, backbone: Backbone, components: nn.Module, head: nn.Module) -> None:
        super().__init__()
        if len(possible_poolings(inner(backbone))) < 2:
            raise InputError(
                f"tokens of {backbone.name}",
                expected="a network of timm, open_clip or transformers that gives its patches, in one view",
                next_step="choose another backbone, without views",
            )
        self.backbone, self.components, self.head = backbone, components, head

    def forward(self, pixels: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b n d"]:
        """Weighted tokens."""
        own = self.backbone
        patches = tokens_of(inner(own), (pixels.float() / 255 - own.mean) / own.std)[1]
        found: Tensor = self.head(self.components(patches.float()))
        return found


def inner(backbone: Backbone) -> nn.Module:
    """The network below another pooling."""
    network = backbone.network
    return getattr(network, "network", network) if hasattr(network, "pooling") else network


def chamfer(queries: Float[Tensor, "b n d"], others: Float[Tensor, "c m d"]) -> Float[Tensor, "b c"]:
    """Likeness of each query with each other image; as :func:`samething.rerank.tokens.likeness` has it."""
    lengths, directions = _split(queries)
    cosines = torch.einsum("bnd,cmd->bcnm", directions, _split(others)[1])
    best = cosines.amax(dim=3)
    return torch.einsum("bcn,bn->bc", best, lengths) / lengths.sum(dim=1, keepdim=True).clamp(min=1e-6)


def sinkhorn(
    queries: Float[Tensor, "b n d"],
    others: Float[Tensor, "c m d"],
    nowhere: Float[Tensor, ""],
    temperature: float,
) -> Float[Tensor, "b c"]:
    """The same by optimal transport, in logarithms."""
    (left, one), (right, other) = _split(queries), _split(others)
    cosines = torch.einsum("bnd,cmd->bcnm", one, other)
    b, c, n, m = cosines.shape
    padded = nowhere.expand(b, c, n + 1, m + 1).clone()
    padded[:, :, :-1, :-1] = cosines
    kernel = padded / temperature
    totals = left.sum(dim=1), right.sum(dim=1)
    rows = torch.cat([left[:, None].expand(b, c, n), totals[1].view(1, c, 1).expand(b, c, 1)], dim=2)
    columns = torch.cat([right[None].expand(b, c, m), totals[0].view(b, 1, 1).expand(b, c, 1)], dim=2)
    rows, columns = (side.clamp(min=1e-12).log() for side in (rows, columns))
    of_column = torch.zeros_like(columns)
    for _ in range(SINKHORN_STEPS):
        of_row = rows - torch.logsumexp(kernel + of_column[:, :, None], dim=3)
        of_column = columns - torch.logsumexp(kernel + of_row[..., None], dim=2)
    moved = (kernel + of_row[..., None] + of_column[:, :, None]).exp()[:, :, :-1, :-1]
    lighter = torch.minimum(totals[0][:, None], totals[1][None]).clamp(min=1e-6)
    return (moved * cosines).sum(dim=(2, 3)) / lighter


def _split(tokens: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n d"]]:
    """Weights and directions."""
    lengths = tokens.norm(dim=2)
    return lengths, tokens / lengths.clamp(min=1e-12)[..., None]


def compared(
    head: TokenHead,
    queries: Float[Tensor, "b n 128"],
    others: Float[Tensor, "c m 128"],
    likeness: Likeness,
    temperature: float,
) -> Float[Tensor, "b c"]:
    """Likeness of weighted tokens by the name of the way."""
    if likeness == "chamfer":
        return chamfer(queries, others)
    return sinkhorn(queries, others, head.nowhere, temperature)


def train_token_head(
    components: Float[Tensor, "i n 128"],
    classes: Int[np.ndarray, " i"],
    *,
    likeness: Likeness,
    temperature: float,
    steps: int,
    seed: int = 0,
) -> TokenHead:
    """Learn from images of several instances: each of a batch is to be most like its other image.

    Args:
        components: of the images' tokens.
        classes: which images show one instance; those of a single image are left out.
        likeness: how images are compared.
        temperature: of optimal transport.
        steps: batches of 16 instances, two images of each; 0 leaves the head as it begins.
        seed: of the batches.

    Raises:
        InputError: fewer than two instances have two images.
    """
    head = TokenHead()
    if steps == 0:
        return head
    rng = np.random.default_rng(seed)
    members = [
        rows for rows in (np.flatnonzero(classes == one) for one in np.unique(classes)) if len(rows) > 1
    ]
    if len(members) < 2:
        raise InputError(
            f"{len(members)} instances with two images",
            expected="at least two to learn from",
            next_step="leave training out (--steps 0), or give a catalog with labels of instances",
        )
    optimiser = torch.optim.AdamW(head.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    with progress_bar("steps") as progress:
        for _ in progress.track(range(steps), description="tokens"):
            chosen = rng.permutation(len(members))[:_CLASSES]
            pairs = np.array([rng.choice(members[one], 2, replace=False) for one in chosen])
            one, other = (head(components[torch.from_numpy(side)].float()) for side in pairs.T)
            logits = _SCALE * compared(head, one, other, likeness, temperature)
            wanted = torch.arange(len(pairs))
            loss = nn.functional.cross_entropy(logits, wanted) + nn.functional.cross_entropy(logits.T, wanted)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return head.eval()
