"""Random subsets of classes and of embedding dimensions for one training step, the same in every process.

Both are drawn from a generator seeded by (seed, step): the state of the draw is two integers, and a resumed
run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def generator_for_step(seed: int, step: int) -> torch.Generator:
    """A CPU generator that depends on both numbers; ≥ 0 each."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, dtype=np.uint32)[0]
    return torch.Generator().manual_seed(int(mixed))


def sample_classes(
    present: Int[Tensor, " some"], *, num_classes: int, fraction: float, generator: torch.Generator
) -> Int[Tensor, " sampled"]:
    """Partial FC (An et al., arXiv 2203.15565): the classes present, and random others up to ``fraction``.

    Args:
        present: class numbers of the (global) batch; repeats are welcome.
        num_classes: C.
        fraction: r in (0, 1]; ⌈r·C⌉ classes are returned, or more when more are present.
        generator: a CPU generator.

    Returns:
        Class numbers, ascending, without repeats.

    >>> g = generator_for_step(0, 0)
    >>> sampled = sample_classes(torch.tensor([7, 7, 2]), num_classes=10, fraction=0.5, generator=g)
    >>> len(sampled), 2 in sampled, 7 in sampled
    (5, True, True)
    """
    present = torch.unique(present).cpu()
    keys = torch.rand(num_classes, generator=generator)
    keys[present] = 2.0  # above every draw from [0, 1)
    num_sampled = max(math.ceil(fraction * num_classes), len(present))
    return keys.topk(num_sampled).indices.sort().values


def sample_dimensions(dim: int, *, fraction: float, generator: torch.Generator) -> Int[Tensor, " sampled"]:
    """Random feature selection (UNICOM, An et al., arXiv 2304.05884): some dimensions of an embedding.

    Args:
        dim: dimensions there are.
        fraction: part of them in (0, 1]; at least one is returned.
        generator: a CPU generator.

    Returns:
        Dimension numbers, ascending.

    >>> len(sample_dimensions(64, fraction=0.25, generator=generator_for_step(0, 0)))
    16
    """
    num_sampled = max(1, round(fraction * dim))
    return torch.randperm(dim, generator=generator)[:num_sampled].sort().values
