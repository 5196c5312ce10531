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
import torch.distributed
from torch import Tensor

from samething.losses.processes import num_processes

Rows = TypeVar("Rows", np.ndarray, Tensor)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other processes when torchrun started this one (it sets WORLD_SIZE), and leave at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return num_processes() == 1 or torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if num_processes() > 1:
        torch.distributed.barrier()


def share(rows: Rows) -> Rows:
    """This process' consecutive part of a batch."""
    if num_processes() == 1:
        return rows
    parts = np.linspace(0, len(rows), num_processes() + 1).astype(int)
    rank = torch.distributed.get_rank()
    return rows[parts[rank] : parts[rank + 1]]


def sum_gradients(loss: Tensor, optimiser: torch.optim.Optimizer) -> Tensor:
    """Add up loss and gradients over the processes; returns the loss of the whole batch."""
    total = loss.detach().clone()
    if num_processes() > 1:
        torch.distributed.all_reduce(total)
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
    return total
