"""Batch statistics over all processes of a data-parallel job."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from samething.arrays import Shaped


def num_processes() -> int:
    """Processes of this data-parallel job; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Shaped[Tensor, " b"]) -> Shaped[Tensor, " all"]:
    """One number per row, of all processes, in rank order; ``rows`` itself when there is one process.

    Batches may differ in length between processes. Nothing is differentiated through.
    """
    rows = rows.detach()
    if num_processes() == 1:
        return rows
    length = torch.tensor([len(rows)], device=rows.device)
    lengths = [torch.zeros_like(length) for _ in range(num_processes())]
    dist.all_gather(lengths, length)
    num_rows = [int(n) for n in torch.cat(lengths).tolist()]
    padded = rows.new_zeros(max(num_rows))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in num_rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, num_rows, strict=True)])
