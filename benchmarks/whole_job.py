"""The whole job: features once and ten epochs of the head, against ten passes of the backbone with the head.

    python benchmarks/whole_job.py demo               # a folder that samething demo has made
    python benchmarks/whole_job.py demo --images 2048 --rounds 5

Everything is CPU time of this process on one thread, decoding included, in turns within one run.

Measured in full: ten epochs of the head from the cached features, by ``train`` with the paper's recipe, with
its validations and checkpoints. Measured on a sample, and multiplied by the number of training images: what
an image costs in ``features``, with each runtime, and what it costs in the loop. What a features job costs
before the first image is found from two sizes of the sample, and counted once.

The loop is the plain one: decode and prepare the batch, the frozen backbone in torch without gradients,
channels last, at the paper's batch of 128, then the head, the loss by autograd and Adam; every epoch anew,
because nothing is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import torch
from torch import nn

from samething.backbones import load_backbone
from samething.catalog import Catalog
from samething.errors import InputError
from samething.features import FeatureSet, features
from samething.images import decode, prepare
from samething.losses import MarginHead, build_margin
from samething.training import RECIPES, train

BACKBONE, DIM, BATCH, EPOCHS = "efficientnet_lite0", 64, 128, 10
NUM_SETUP = 64
"""Images of the smaller sample: the first batch, on which features compares another runtime with torch."""
DEMANDS = {"torch": 9.0}
DEMAND_OF_OTHERS = 25.0


def cpu_seconds(job: Callable[[], object]) -> float:
    started = time.process_time()
    job()
    return time.process_time() - started


@dataclasses.dataclass
class Loop:
    """The backbone with the head: what one pass over some images costs."""

    images: Catalog
    num_classes: int

    def __post_init__(self) -> None:
        backbone = load_backbone(BACKBONE)
        self.preprocessing = backbone.preprocessing
        self.backbone = backbone.to(memory_format=torch.channels_last)
        margin = build_margin("arcface", num_classes=self.num_classes, scale=30.0, margin_radians=0.5)
        self.loss = MarginHead(DIM, self.num_classes, margin, num_centers=3)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(backbone.width, DIM))
        parameters = [*self.head.parameters(), *self.loss.parameters()]
        self.optimiser = torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-4)

    def one_pass(self) -> None:
        """Decode, describe, and take a step of the head, batch by batch."""
        paths = self.images.paths
        labels = torch.from_numpy(self.images.class_ids()) % self.num_classes
        for start in range(0, len(paths), BATCH):
            part = slice(start, start + BATCH)
            pixels = np.stack([prepare(decode(path), self.preprocessing) for path in paths[part]])
            with torch.no_grad():
                described = self.backbone(
                    torch.from_numpy(pixels).contiguous(memory_format=torch.channels_last)
                )
            self.optimiser.zero_grad()
            self.loss(self.head(described), labels[part]).backward()
            self.optimiser.step()


def describe(images: Path, runtime: str, folder: Path) -> str:
    """Features of some images, from nothing; returns the runtime that did it."""
    shutil.rmtree(folder, ignore_errors=True)
    found = features(images, backbone=BACKBONE, output=folder, num_workers=0, runtime=runtime)
    return str(found.manifest.content.get("runtime"))


def write_samples(catalog: Catalog, sizes: tuple[int, int], folder: Path) -> list[Path]:
    """Catalogs of so many images, evenly from the whole: domains in their own shares."""
    paths = []
    for size in sizes:
        chosen = np.zeros(len(catalog), bool)
        chosen[np.linspace(0, len(catalog) - 1, size).astype(int)] = True
        paths.append(folder / f"{size}.parquet")
        catalog.take(chosen).write(paths[-1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of samething demo: its features and images")
    parser.add_argument("--images", type=int, default=1024, help="size of the sample")
    parser.add_argument("--rounds", type=int, default=3, help="turns; medians are taken")
    parser.add_argument("--runtimes", nargs="+", default=None, help="of samething features; by default all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    known = [name for name in get_args(get_type_hints(features)["runtime"]) if name != "auto"]
    runtimes = args.runtimes or known
    cached = FeatureSet.open(args.demo / "features")
    images = Catalog.read(args.demo / "images" / "catalog.parquet")
    images = images.take(images.has_role("train"))
    num_images, num_classes = len(images), int(images.class_ids().max()) + 1
    sizes = (NUM_SETUP, args.images)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = write_samples(images, sizes, folder)
        loop = Loop(Catalog.read(large, root=images.root), num_classes)
        config = dataclasses.replace(RECIPES["paper"](), epochs=float(EPOCHS))
        for number in range(args.rounds):
            times = {"loop": cpu_seconds(loop.one_pass) / sizes[1]}
            for runtime in runtimes:
                try:
                    of_small = cpu_seconds(lambda runtime=runtime: describe(small, runtime, folder / "f"))
                except InputError as error:  # its features are not those of torch
                    print(f"{runtime} is left out: {error}")
                    continue
                of_large = cpu_seconds(lambda runtime=runtime: describe(large, runtime, folder / "f"))
                did = str(FeatureSet.open(folder / "f").manifest.content.get("runtime"))
                if did != runtime:
                    print(f"{runtime} is left out: {did} did the work")
                    continue
                times[runtime] = (of_large - of_small) / (sizes[1] - sizes[0])
                times[f"{runtime}, set-up"] = max(0.0, of_small - sizes[0] * times[runtime])
            output = folder / f"run{number}"
            times["head"] = cpu_seconds(
                lambda output=output: train(cached.folder, output=output, config=config)
            )
            for key, value in times.items():
                seconds.setdefault(key, []).append(value)
    print_table(
        {key: statistics.median(values) for key, values in seconds.items()}, runtimes, num_images, sizes
    )


def print_table(
    seconds: dict[str, float], runtimes: list[str], num_images: int, sizes: tuple[int, int]
) -> None:
    whole = EPOCHS * num_images * seconds["loop"]
    print(
        f"\n{num_images:,} training images, {BACKBONE}, {EPOCHS} epochs, CPU seconds on one thread.\n"
        f"Measured: {sizes[1]} images in the loop, {sizes[0]} and {sizes[1]} in features, and the head.\n"
    )
    columns = ("", "ms per image, measured", "set-up", "features", "head, measured", "whole job")
    columns += ("× less", "demanded")
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    print(f"| {EPOCHS} passes of the loop | {1e3 * seconds['loop']:.1f} | | | | {whole:.0f} | 1 | |")
    for runtime in runtimes:
        if runtime not in seconds:
            continue
        setup, once = seconds[f"{runtime}, set-up"], num_images * seconds[runtime]
        total = setup + once + seconds["head"]
        cells = [f"{1e3 * seconds[runtime]:.1f}", f"{setup:.1f}", f"{once:.0f}", f"{seconds['head']:.1f}"]
        cells += [f"{total:.0f}", f"{whole / total:.1f}", f"{DEMANDS.get(runtime, DEMAND_OF_OTHERS):.0f}"]
        print(f"| cached, {runtime} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
