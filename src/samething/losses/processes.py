"""One run on several processes started by torchrun: each takes its share of every batch.

With a single process every function here does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from samething.arrays import Shaped

Rows = TypeVar("Rows", np.ndarray, Tensor)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes when torchrun started this one (it sets WORLD_SIZE), and leave at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def num_processes() -> int:
    """Processes of this data-parallel job; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return num_processes() == 1 or dist.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if num_processes() > 1:
        dist.barrier()


def own_part(rows: Rows) -> Rows:
    """This process' consecutive part of a batch."""
    if num_processes() == 1:
        return rows
    parts = np.linspace(0, len(rows), num_processes() + 1).astype(int)
    return rows[parts[dist.get_rank()] : parts[dist.get_rank() + 1]]


def sum_gradients(loss: Tensor, optimiser: torch.optim.Optimizer) -> Tensor:
    """Add up loss and gradients over the processes; returns the loss of the whole batch."""
    total = loss.detach().clone()
    if num_processes() > 1:
        dist.all_reduce(total)
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
    return total


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
