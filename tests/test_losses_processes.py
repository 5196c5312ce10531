"""Two processes that share a batch do what one process does with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import samething
from samething.losses import LOSSES, MarginHead, build_margin

CASES = [(name, {}, {}) for name in LOSSES] + [
    ("adacos", {"dynamic": True}, {}),
    ("arcface", {}, {"class_fraction": 0.5, "prefixes": (4, 8)}),
]


def run_steps(case: int, rows: slice) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps of gradient descent; with several processes the gradients are averaged, as DDP does."""
    torch.set_num_threads(1)
    name, margin_options, head_options = CASES[case]
    torch.manual_seed(0)
    margin = build_margin(name, num_classes=10, class_counts=list(range(3, 13)), **margin_options)
    head = MarginHead(8, 10, margin, num_centers=2, **head_options).double()
    losses = []
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 8, generator=g, dtype=torch.float64) * 5
        y = torch.randint(10, (16,), generator=g)
        head.zero_grad()
        loss = head(x[rows], y[rows])
        loss.backward()
        total = loss.detach().clone()
        if dist.is_initialized():
            for tensor in (head.weight.grad, total):
                dist.all_reduce(tensor)
                tensor /= dist.get_world_size()
        with torch.no_grad():
            head.weight -= head.weight.grad
        losses.append(float(total))
    return losses, head.state_dict()


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = [run_steps(case, slice(8 * rank, 8 * rank + 8)) for case in range(len(CASES))]
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    source = str(Path(samething.__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for case, (name, *_) in enumerate(CASES):
        losses, state = run_steps(case, slice(None))
        for rank_losses, rank_state in (ranks[0][case], ranks[1][case]):
            assert rank_losses == pytest.approx(losses, abs=1e-12), name
            for key, value in state.items():
                assert torch.allclose(rank_state[key], value, rtol=1e-10, atol=1e-12), (name, key)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
