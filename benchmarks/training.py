"""One optimisation step of a head and its class weights: ours against two others and against the floor.

The shapes are the paper's: features of 1,152 numbers, dropout, a linear map to 64, 34,800 classes, k = 3 and
k = 1 sub-centres, batch 128, Adam. Each writing has a process of its own, on one thread; they take turns, and
a ratio is the median over the rounds of two times measured one after the other. Time is CPU time of the
process.

    python benchmarks/training.py              # times, digits and memory
    python benchmarks/training.py --rounds 25  # quieter medians
    python benchmarks/training.py --losses     # every loss: plain, fused

(a) ``as the paper``: acos over the whole matrix, one-hot mixing, Adam as torch chooses it by itself.
(b) pytorch-metric-learning's SubCenterArcFaceLoss / ArcFaceLoss (pip install --no-deps
    pytorch-metric-learning), with the same Adam.
(c) the floor: the three matrix products of a step at the best rate this machine shows for their shapes, and
    Adam's pass over the class weights, with nothing in between.

``fused`` is FusedMarginStep.
Memory is the peak of each process, less that of a process that trains a head of a few classes with torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from samething.losses import LOSSES, MarginHead, build_margin
from samething.losses.fused_step import FusedMarginStep
from samething.losses.matrix_products import fast_float32_products, medium_precision_is_exact

WIDTH, DIM, SCALE, MARGIN = 1152, 64, 30.0, 0.5
ADAM = {"lr": 1e-3, "weight_decay": 1e-4}
Step = Callable[[], float]


def projection() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(WIDTH, DIM))


def batch_of(batch: int, classes: int, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, WIDTH, generator=generator)
    return features, torch.randint(classes, (batch,), generator=generator)


class PaperHead(nn.Module):
    """The paper's loss written down plainly, as its equations read."""

    def __init__(self, classes: int, k: int) -> None:
        super().__init__()
        self.classes, self.k = classes, k
        self.weight = nn.Parameter(torch.empty(classes * k, DIM))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        cosines = F.normalize(embeddings) @ F.normalize(self.weight).t()
        if self.k > 1:
            cosines = cosines.view(-1, self.classes, self.k).amax(dim=2)
        theta = torch.acos(cosines.clamp(-1, 1))
        with_margin = torch.cos(theta + MARGIN)
        beyond = cosines - math.sin(MARGIN) * MARGIN
        with_margin = torch.where(cosines > math.cos(math.pi - MARGIN), with_margin, beyond)
        target = F.one_hot(labels, self.classes).to(cosines.dtype)
        return F.cross_entropy(SCALE * (target * with_margin + (1 - target) * cosines), labels)


def paper_step(classes: int, k: int, batch: int) -> Step:
    return autograd_step(PaperHead(classes, k), classes, batch)


def pml_step(classes: int, k: int, batch: int) -> Step:
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from pytorch_metric_learning import losses

    options = {"num_classes": classes, "embedding_size": DIM, "margin": math.degrees(MARGIN), "scale": SCALE}
    if k > 1:
        return autograd_step(losses.SubCenterArcFaceLoss(sub_centers=k, **options), classes, batch)
    return autograd_step(losses.ArcFaceLoss(**options), classes, batch)


def plain_step(classes: int, k: int, batch: int, *, loss: str = "arcface", **options: Any) -> Step:
    """Our own loss by autograd, with torch's fused Adam."""
    return autograd_step(our_head(classes, k, loss, **options), classes, batch, fused=True)


def autograd_step(
    loss_of: Callable[..., torch.Tensor], classes: int, batch: int, *, fused: bool = False
) -> Step:
    linear = projection()
    parameters = [*linear.parameters(), *loss_of.parameters()]
    optimiser = torch.optim.Adam(parameters, **ADAM, **({"fused": True} if fused else {}))
    features, labels = batch_of(batch, classes)

    def step() -> float:
        optimiser.zero_grad()
        loss = loss_of(linear(features), labels)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def our_head(classes: int, k: int, loss: str = "arcface", **head_options: Any) -> MarginHead:
    options = {"scale": SCALE, "margin_radians": MARGIN} if loss == "arcface" else {}
    counts = [3 + i % 97 for i in range(classes)]
    margin = build_margin(loss, num_classes=classes, class_counts=counts, **options)
    return MarginHead(DIM, classes, margin, num_centers=k, **head_options)


def fused_step(
    classes: int,
    k: int,
    batch: int,
    *,
    precision: str = "float32",
    loss: str = "arcface",
    **options: Any,
) -> Step:
    linear, head = projection(), our_head(classes, k, loss, **options)
    optimiser = torch.optim.Adam([*linear.parameters(), head.weight], **ADAM, fused=True)
    fused = FusedMarginStep(head, optimiser, precision=precision)
    features, labels = batch_of(batch, classes)

    def step() -> float:
        optimiser.zero_grad()
        embeddings = linear(features)
        loss, gradient = fused.loss_and_embedding_gradient(embeddings, labels)
        embeddings.backward(gradient)
        optimiser.step()
        return loss.item()

    return step


def floor_step(classes: int, k: int, batch: int, *, bfloat16: bool = False) -> Step:
    """Three products over every centre, in pieces that stay in cache, and Adam over the class weights."""
    rows, piece = classes * k, 3072
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    centers, by_row = torch.randn(piece, DIM).to(dtype), torch.randn(piece, batch).to(dtype)
    embeddings, columns = torch.randn(batch, DIM).to(dtype), torch.randn(DIM, batch).to(dtype)
    outputs = [torch.empty(shape, dtype=dtype) for shape in ((piece, batch), (batch, DIM), (piece, DIM))]
    weight = nn.Parameter(torch.randn(rows, DIM))
    weight.grad = torch.randn(rows, DIM)
    adam = torch.optim.Adam([weight], **ADAM, fused=True)

    def step() -> float:
        with fast_float32_products():
            for _ in range(round(rows / piece)):
                torch.mm(centers, columns, out=outputs[0])
                torch.mm(by_row.t(), centers, out=outputs[1])
                torch.mm(by_row, embeddings, out=outputs[2])
        adam.step()
        return 0.0

    return step


PAPER, PML, FLOOR = "(a) as the paper", "(b) pytorch-metric-learning", "(c) floor, float32"
FLOOR_BFLOAT16 = "(c) floor, bfloat16"
MAKERS: dict[str, Callable[[int, int, int], Step]] = {
    PAPER: paper_step,
    PML: pml_step,
    "ours, plain autograd": plain_step,
    "ours, fused, float32": fused_step,
    "ours, fused, bfloat16": partial(fused_step, precision="bfloat16"),
    FLOOR: floor_step,
    FLOOR_BFLOAT16: partial(floor_step, bfloat16=True),
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{loss: {"loss": loss} for loss in LOSSES},
    "arcface, prefixes 16 32 64": {"prefixes": (16, 32, 64)},
    "arcface, 0.3 of the classes": {"class_fraction": 0.3},
}
"""Every loss, and ArcFace with the options that look at parts."""
WRITINGS: dict[str, Callable[..., Step]] = {
    "plain": plain_step,
    "fused": fused_step,
    "fused, bfloat16": partial(fused_step, precision="bfloat16"),
}
for (_writing, _maker), (_variant, _options) in itertools.product(WRITINGS.items(), VARIANTS.items()):
    MAKERS[f"{_writing}:{_variant}"] = partial(_maker, **_options)
IN_THE_TABLE = [name for name in MAKERS if ":" not in name]


# ---------------------------------------------------------------- processes


def be_a_worker(name: str, classes: int, k: int, batch: int) -> None:
    """Take a step for every line read, and answer with its milliseconds and the peak memory in bytes."""
    step = MAKERS[name](classes, k, batch)
    for _ in range(3):
        step()
    for _ in sys.stdin:
        start = time.process_time()
        step()
        print(1e3 * (time.process_time() - start), peak_bytes(), flush=True)


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss would count the memory of the process that started this one
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1])


def processor() -> str:
    """The processor's name, and whether it multiplies matrices of bfloat16 by itself."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.machine()
    lines = dict(line.split(":", 1) for line in information.read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    name, flags = fields.get("model name", platform.machine()), fields.get("flags", "").split()
    return f"{name}{' with AMX' if 'amx_bf16' in flags else ''}"


class Worker:
    """A process that takes steps of one writing."""

    def __init__(self, name: str, classes: int, k: int, batch: int) -> None:
        sizes = [str(size) for size in (classes, k, batch)]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "--worker", name, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def step(self) -> tuple[float, float]:
        """Milliseconds of CPU, and peak memory so far in MB."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        milliseconds, peak = self.process.stdout.readline().split()
        return float(milliseconds), int(peak) / 1e6

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def available(names: list[str]) -> list[str]:
    has_pml = importlib.util.find_spec("pytorch_metric_learning") is not None
    return [name for name in names if name != PML or has_pml]


def times_of(names: list[str], sizes: tuple[int, int, int], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU; in every round each takes one step."""
    times: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, *sizes)) for name in names}
        for worker in workers.values():
            worker.step()
        for _ in range(rounds):
            for name, worker in workers.items():
                times[name].append(worker.step()[0])
    return times


def print_times(classes: int, k: int, batch: int, rounds: int) -> None:
    times = times_of(available(IN_THE_TABLE), (classes, k, batch), rounds)
    print(f"\nk = {k}, batch {batch}, {classes:,} classes: ms of CPU a step, one thread\n")
    print("| | median | least | × (a) | × (b) | share of floor |\n| --- | --- | --- | --- | --- | --- |")
    for name, each in times.items():
        floor = FLOOR_BFLOAT16 if "bfloat16" in name else FLOOR
        ratios = [ratio(times, rival, name) for rival in (PAPER, PML, floor)]
        print(f"| {name} | {statistics.median(each):.1f} | {min(each):.1f} | " + " | ".join(ratios) + " |")


def print_losses(classes: int, k: int, batch: int, rounds: int) -> None:
    print(f"\nk = {k}, batch {batch}, {classes:,} classes: ms of CPU a step, one thread\n")
    print("| | " + " | ".join(WRITINGS) + " | fused is × plain |\n" + "| --- " * (len(WRITINGS) + 2) + "|")
    for variant in VARIANTS:
        names = [f"{writing}:{variant}" for writing in WRITINGS]
        times = times_of(names, (classes, k, batch), rounds)
        medians = [f"{statistics.median(each):.1f}" for each in times.values()]
        print(
            f"| {variant} | " + " | ".join(medians) + f" | {ratio(times, names[0], names[1])} |", flush=True
        )


def ratio(times: dict[str, list[float]], rival: str, ours: str) -> str:
    if rival not in times:
        return ""
    return f"{statistics.median(r / o for r, o in zip(times[rival], times[ours], strict=True)):.2f}"


def peak_megabytes(name: str, classes: int, k: int, batch: int) -> float:
    with Worker(name, classes, k, batch) as worker:
        return worker.step()[1]


def print_memory(classes: int, k: int) -> None:
    base = peak_megabytes("ours, plain autograd", 8, 1, 8)
    print(f"\nPeak memory in MB beyond torch's own {base:.0f} MB, k = {k}, {classes:,} classes\n")
    print("| | batch 128 | of (a) | batch 1,024 | of (a) |\n| --- | --- | --- | --- | --- |")
    rivals: list[float] = []
    for name in available([name for name in IN_THE_TABLE if "floor" not in name]):
        peaks = [peak_megabytes(name, classes, k, batch) - base for batch in (128, 1024)]
        rivals = rivals or peaks
        cells = [f"{peak:.0f} | {peak / rival:.2f}" for peak, rival in zip(peaks, rivals, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    million = peak_megabytes("ours, fused, float32", 1_000_000, 1, 128) - base
    state = 3 * 1_000_000 * DIM * 4 / 1e6
    print(
        f"\n1,000,000 classes, k = 1, batch 128: {million:.0f} MB, of which weights and Adam are {state:.0f}."
    )


# ---------------------------------------------------------------- digits


def print_errors(classes: int, k: int, batch: int) -> None:
    """Against autograd in float64, at weights that have been trained for some steps."""
    head, linear = our_head(classes, k), projection()
    features, labels = batch_of(batch, classes)
    optimiser = torch.optim.Adam([head.weight, *linear.parameters()], lr=2e-2, fused=True)
    warm_up = FusedMarginStep(head, optimiser)
    for step in range(5):
        others, other_labels = batch_of(batch, classes, seed=2 + step)
        warm_up.loss_and_embedding_gradient(linear(others), other_labels)
    x = linear(features).detach()
    exact = our_head(classes, k).double()
    exact.load_state_dict(head.state_dict())
    exact_x = x.double().requires_grad_()
    exact_loss = exact(exact_x, labels)
    exact_loss.backward()
    print(f"\nk = {k}: relative error against float64\n")
    print("| | loss | gradient by embeddings | by class weights |\n| --- | --- | --- | --- |")
    for precision in ("float32", "bfloat16"):
        head.weight.grad = None
        fused = FusedMarginStep(head, precision=precision)
        loss, gradient = fused.loss_and_embedding_gradient(x, labels)
        errors = [
            float((ours.double() - value).norm() / value.norm())
            for ours, value in (
                (loss, exact_loss.detach()),
                (gradient, exact_x.grad),
                (head.weight.grad, exact.weight.grad),
            )
        ]
        print(f"| fused, {precision} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each writing")
    parser.add_argument("--classes", type=int, default=34_800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--centers", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--only-times", action="store_true", help="neither digits nor memory")
    parser.add_argument("--losses", action="store_true", help="every loss instead")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.worker:
        name, *sizes = args.worker
        be_a_worker(name, *map(int, sizes))
        return
    if args.losses:
        for k in args.centers:
            print_losses(args.classes, k, args.batch, args.rounds)
        return
    if not importlib.util.find_spec("pytorch_metric_learning"):
        print("(b) is left out: pip install --no-deps pytorch-metric-learning")
    print(
        f"{processor()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"float32 products by {'oneDNN' if medium_precision_is_exact() else 'the default library'}"
    )
    for k in args.centers:
        print_times(args.classes, k, args.batch, args.rounds)
        if not args.only_times:
            print_errors(args.classes, k, args.batch)
    if not args.only_times:
        print_memory(args.classes, args.centers[0])


if __name__ == "__main__":
    main()
