"""One optimisation step of the head's training, in process CPU time, against two rivals and a floor.

    python benchmarks/training.py                 # the table of docs/benchmarks.md, "Training step"
    python benchmarks/training.py --losses        # every loss, against the plain path with autograd

A step is what the paper does 2,566 times an epoch: 128 rows of 1,152 features through dropout and a linear
projection to 64 dimensions, the margin loss over 34,800 classes with k sub-centres, gradients, and Adam (L2
1e-4) on projection and class weights. All variants start from the same weights, run in turns in one process
on one thread, and are compared pair by pair; medians. Peak memory is that of a process of its own each.

Rivals: ``straightforward`` is the paper's head as one would write it down; ``pml`` is
pytorch-metric-learning as it is on PyPI (``pip install --no-deps pytorch-metric-learning``). The floor is the
three matrix products of a step at the best rate that this machine shows for their shapes, and Adam's traffic:
torch's fused Adam over all class weights, which is bound by memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samething.losses import LOSSES, MarginHead, build_margin
from samething.losses.fused_step import FusedMarginStep
from samething.losses.matrix_products import fast_float32_products

NUM_FEATURES, DIM, BATCH, NUM_CLASSES = 1152, 64, 128, 34_800
SCALE, MARGIN_RADIANS = 30.0, 0.5
VARIANTS = ("straightforward", "pml", "autograd", "fused", "fused-bf16")
Step = Callable[[Tensor, Tensor], Tensor]


class StraightforwardHead(nn.Module):
    """Sub-Center ArcFace as the formulas read: angles of the whole matrix, mixed by a one-hot matrix."""

    def __init__(self, num_classes: int, num_centers: int) -> None:
        super().__init__()
        self.num_classes, self.num_centers = num_classes, num_centers
        self.weight = nn.Parameter(torch.empty(num_classes * num_centers, DIM))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy."""
        cosines = F.linear(F.normalize(embeddings), F.normalize(self.weight))
        if self.num_centers > 1:
            cosines = cosines.view(-1, self.num_classes, self.num_centers).max(dim=2).values
        theta = torch.acos(cosines.clamp(-1 + 1e-7, 1 - 1e-7))
        one_hot = torch.zeros_like(cosines).scatter_(1, labels[:, None], 1.0)
        with_margin = torch.cos(theta + MARGIN_RADIANS)
        beyond = cosines - MARGIN_RADIANS * math.sin(MARGIN_RADIANS)
        with_margin = torch.where(theta + MARGIN_RADIANS < math.pi, with_margin, beyond)
        logits = SCALE * (one_hot * with_margin + (1 - one_hot) * cosines)
        return F.cross_entropy(logits, labels)


def margin_head(num_classes: int, num_centers: int, loss: str = "arcface") -> MarginHead:
    options = {"arcface": {"scale": SCALE, "margin_radians": MARGIN_RADIANS}}.get(loss, {})
    counts = [3 + i % 97 for i in range(num_classes)]
    margin = build_margin(loss, num_classes=num_classes, class_counts=counts, **options)
    return MarginHead(DIM, num_classes, margin, num_centers=num_centers)


def pml_head(num_classes: int, num_centers: int) -> nn.Module:
    from pytorch_metric_learning.losses import ArcFaceLoss, SubCenterArcFaceLoss

    options = {
        "num_classes": num_classes,
        "embedding_size": DIM,
        "margin": math.degrees(MARGIN_RADIANS),
        "scale": SCALE,
    }
    if num_centers == 1:
        return ArcFaceLoss(**options)
    return SubCenterArcFaceLoss(sub_centers=num_centers, **options)


def build_step(variant: str, *, num_classes: int, num_centers: int, loss: str = "arcface") -> Step:
    """A variant's whole step: features and labels in, loss out, weights moved."""
    torch.manual_seed(0)
    projection = nn.Sequential(nn.Dropout(0.2), nn.Linear(NUM_FEATURES, DIM))
    if variant == "straightforward":
        head: nn.Module = StraightforwardHead(num_classes, num_centers)
    elif variant == "pml":
        head = pml_head(num_classes, num_centers)
    else:
        head = margin_head(num_classes, num_centers, loss)
    rival = variant in ("straightforward", "pml")
    optimiser = torch.optim.Adam(
        [*projection.parameters(), *head.parameters()],
        lr=2e-2,
        weight_decay=1e-4,
        fused=None if rival else True,
        foreach=False if rival else None,
    )

    def with_autograd(features: Tensor, labels: Tensor) -> Tensor:
        value = head(projection(features), labels)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        return value.detach()

    if not variant.startswith("fused"):
        return with_autograd
    precision = "bfloat16" if variant == "fused-bf16" else "float32"
    fused = FusedMarginStep(head, optimiser, precision=precision)

    def in_chunks(features: Tensor, labels: Tensor) -> Tensor:
        optimiser.zero_grad()
        embeddings = projection(features)
        value, gradient = fused.loss_and_embedding_gradient(embeddings, labels)
        embeddings.backward(gradient)
        optimiser.step()
        return value

    return in_chunks


def make_batch(batch: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, NUM_FEATURES, generator=generator)
    return features, torch.randint(num_classes, (batch,), generator=generator)


def floor_steps(num_classes: int, num_centers: int) -> dict[str, Callable[[], None]]:
    """The unavoidable parts: products of a step in chunks that fit the cache, and Adam over all weights."""
    rows, chunk = num_classes * num_centers, 1024
    parts: dict[str, Callable[[], None]] = {}
    for name, dtype in (("products", torch.float32), ("products-bf16", torch.bfloat16)):
        weight = torch.randn(chunk, DIM).to(dtype)
        columns, embeddings = torch.randn(DIM, BATCH).to(dtype), torch.randn(BATCH, DIM).to(dtype)
        cosines, gradient, of_rows = weight @ columns, torch.empty_like(weight), torch.empty_like(embeddings)

        def products(
            weight: Tensor = weight,
            columns: Tensor = columns,
            embeddings: Tensor = embeddings,
            cosines: Tensor = cosines,
            gradient: Tensor = gradient,
            of_rows: Tensor = of_rows,
        ) -> None:
            with fast_float32_products():
                for _ in range(rows // chunk):
                    torch.mm(weight, columns, out=cosines)
                    torch.mm(cosines.t(), weight, out=of_rows)
                    torch.mm(cosines, embeddings, out=gradient)

        parts[name] = products
    weights = nn.Parameter(torch.randn(rows, DIM))
    weights.grad = torch.randn(rows, DIM)
    parts["adam"] = torch.optim.Adam([weights], lr=1e-3, weight_decay=1e-4, fused=True).step
    return parts


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU of each step, in turns; the first two rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def have_pml() -> bool:
    return importlib.util.find_spec("pytorch_metric_learning") is not None


def compare_times(num_centers: int, rounds: int) -> None:
    variants = [v for v in VARIANTS if v != "pml" or have_pml()]
    steps: dict[str, Callable[[], object]] = {}
    features, labels = make_batch(BATCH, NUM_CLASSES)
    for variant in variants:
        step = build_step(variant, num_classes=NUM_CLASSES, num_centers=num_centers)
        steps[variant] = lambda step=step: step(features, labels)
    steps |= floor_steps(NUM_CLASSES, num_centers)
    times = measure(steps, rounds)
    gflop = 6e-9 * NUM_CLASSES * num_centers * DIM * BATCH
    rate = gflop / statistics.median(times["products"]) * 1e3
    rate_bf16 = gflop / statistics.median(times["products-bf16"]) * 1e3
    print(f"\nk = {num_centers}: products {rate:.0f} GFLOP/s (bf16 {rate_bf16:.0f}), Adam ", end="")
    print(f"{statistics.median(times['adam']):.1f} ms\n")
    print("| variant | ms | × straightforward | × pml | × autograd | share of the floor |")
    print("| --- | --- | --- | --- | --- | --- |")
    for variant in variants:
        products = times["products-bf16" if variant.endswith("bf16") else "products"]
        floor = [a + b for a, b in zip(products, times["adam"], strict=True)]
        mine = times[variant]
        rivals = [
            f"{ratio(times[name], mine):.2f}" if name in times else "–"
            for name in ("straightforward", "pml", "autograd")
        ]
        cells = [variant, f"{statistics.median(mine):.1f}", *rivals, f"{ratio(floor, mine):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def compare_losses(num_centers: int, rounds: int) -> None:
    print(f"\nEvery loss, k = {num_centers}\n")
    print("| loss | autograd, ms | fused, ms | fused-bf16, ms | fused is × autograd |")
    print("| --- | --- | --- | --- | --- |")
    features, labels = make_batch(BATCH, NUM_CLASSES)
    for loss in LOSSES:
        steps: dict[str, Callable[[], object]] = {}
        for variant in ("autograd", "fused", "fused-bf16"):
            step = build_step(variant, num_classes=NUM_CLASSES, num_centers=num_centers, loss=loss)
            steps[variant] = lambda step=step: step(features, labels)
        times = measure(steps, rounds)
        cells = [f"{statistics.median(t):.1f}" for t in times.values()]
        print(
            f"| {loss} | {' | '.join(cells)} | {ratio(times['autograd'], times['fused']):.2f} |", flush=True
        )


def print_peak_memory(variant: str, *, batch: int, num_classes: int, num_centers: int) -> None:
    """In a process of its own: three steps, then the peak of the resident memory, in MB."""
    before = peak_resident_mb()
    step = build_step(variant, num_classes=num_classes, num_centers=num_centers)
    for seed in range(3):
        step(*make_batch(batch, num_classes, seed))
    print(json.dumps({"before": before, "peak": peak_resident_mb()}))


def peak_resident_mb() -> float:
    """Of this process alone: on Linux getrusage would answer with the parent's peak, if that was higher."""
    status = Path("/proc/self/status")
    if status.exists():
        return float(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def compare_memory() -> None:
    print("\nPeak resident memory, MB, beyond what the process held once torch was imported\n")
    print("| batch | classes | k | " + " | ".join(VARIANTS) + " | fused / straightforward |")
    print("| --- | --- | --- |" + " --- |" * (len(VARIANTS) + 1))
    for batch, num_classes, num_centers, variants in (
        (128, NUM_CLASSES, 3, VARIANTS),
        (1024, NUM_CLASSES, 3, VARIANTS),
        (128, 1_000_000, 1, ("fused", "fused-bf16")),
    ):
        found: dict[str, float] = {}
        for variant in variants:
            if variant == "pml" and not have_pml():
                continue
            sizes = [f"--batch={batch}", f"--classes={num_classes}", f"--centers={num_centers}"]
            output = subprocess.run(
                [sys.executable, __file__, f"--memory-of={variant}", *sizes],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            reply = json.loads(output.splitlines()[-1])
            found[variant] = reply["peak"] - reply["before"]
        cells = [f"{found[v]:.0f}" if v in found else "–" for v in VARIANTS]
        share = "–"
        if "straightforward" in found:
            share = f"{found['fused'] / found['straightforward']:.2f}"
        row = [str(batch), f"{num_classes:,}", str(num_centers), *cells, share]
        print(f"| {' | '.join(row)} |", flush=True)


def compare_accuracy() -> None:
    """Loss and gradients of the fused step against float64 autograd, at the paper's size."""
    print("\nError of loss (difference) and gradients (norm of the difference / norm) against float64\n")
    print("| variant | loss | embeddings' gradient | class weights' gradient |")
    print("| --- | --- | --- | --- |")
    torch.manual_seed(0)
    head = margin_head(NUM_CLASSES, 3)
    _, labels = make_batch(BATCH, NUM_CLASSES)
    embeddings = torch.randn(BATCH, DIM)
    embeddings += 4 * F.normalize(head.weight.detach()[3 * labels])
    exact = margin_head(NUM_CLASSES, 3).double()
    exact.load_state_dict(head.state_dict())
    inputs = embeddings.double().requires_grad_()
    value = exact(inputs, labels)
    value.backward()
    for variant, precision in (("fused", "float32"), ("fused-bf16", "bfloat16")):
        head.weight.grad = None
        found, gradient = FusedMarginStep(head, precision=precision).loss_and_embedding_gradient(
            embeddings, labels
        )
        errors = [abs(float(found) - value.item())]
        for ours, true in ((gradient, inputs.grad), (head.weight.grad, exact.weight.grad)):
            errors.append(float((ours.double() - true).norm() / true.norm()))
        print(f"| {variant} | " + " | ".join(f"{error:.1e}" for error in errors) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--losses", action="store_true", help="every loss instead of the rivals")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument(
        "--only-centers", type=int, nargs="+", help="numbers of sub-centres; 3 and 1 if not given"
    )
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, default=NUM_CLASSES, help=argparse.SUPPRESS)
    parser.add_argument("--centers", type=int, default=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print_peak_memory(
            options.memory_of,
            batch=options.batch,
            num_classes=options.classes,
            num_centers=options.centers,
        )
        return
    if options.losses:
        for num_centers in (1, 3):
            compare_losses(num_centers, options.rounds)
        return
    if not have_pml():
        print("pytorch-metric-learning is missing: pip install --no-deps pytorch-metric-learning")
    for num_centers in options.only_centers or (3, 1):
        compare_times(num_centers, options.rounds)
    compare_accuracy()
    if not options.no_memory:
        compare_memory()


if __name__ == "__main__":
    main()
