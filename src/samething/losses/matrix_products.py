"""Matrix products of a CPU: float32 by oneDNN where that is both exact and faster, and what bfloat16 costs.

On AMD processors the matrix products of torch's default library run well below the machine's rate.
``torch.set_float32_matmul_precision("medium")`` hands them to oneDNN, which on machines without fast reduced
precision computes in float32 all the same. On others it may round the factors to bfloat16; so a product is
measured against float64 first.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Final

import torch

from samething.retrieval.scores import float32_products

LARGEST_RELATIVE_ERROR: Final = 1e-6
"""float32 products of 64 to 4,096 terms measure 2e-7 to 4e-7; bfloat16 factors give 2e-3."""


@functools.cache
def medium_precision_is_exact() -> bool:
    """Whether "medium" precision on this processor is still float32, for the shapes of a margin step."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(1024, 64, generator=generator)
    embeddings = torch.randn(64, 128, generator=generator)
    gradients = torch.randn(1024, 128, generator=generator)
    pairs = ((classes, embeddings), (gradients.t(), classes), (gradients, embeddings.t()))
    with float32_products("medium"):
        return all(
            float((left @ right - left.double() @ right.double()).norm() / (left @ right).norm())
            <= LARGEST_RELATIVE_ERROR
            for left, right in pairs
        )


@functools.cache
def bfloat16_slowdown() -> float:
    """Time of a margin step's product in bfloat16 over that in float32 on this processor; below 1: faster.

    Without instructions of its own for bfloat16 a CPU is some ten times as slow with it.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        classes, embeddings = torch.ones(4096, 64, dtype=dtype), torch.ones(64, 128, dtype=dtype)
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(classes, embeddings)
            taken.append(time.perf_counter() - started)
        seconds[dtype] = min(taken)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def fast_float32_products() -> contextlib.AbstractContextManager[None]:
    """Within this context float32 products on the CPU go to oneDNN, if that loses nothing; see the module."""
    return float32_products("medium") if medium_precision_is_exact() else contextlib.nullcontext()
