"""What computes a backbone on a CPU: every runtime over timm's network in torch as it comes, and its parity.

    python benchmarks/runtimes.py [--rounds 7] [--batch 32] [--only vit_base]

One thread, processor time, the candidates in turns; a ratio is the median over the rounds of two times of one
round. Cosines are the least over scikit-image's photographs to torch in float32. The peak is that of a large
matrix product in float32; a runtime's share of it is the network's own operations per second over it.
``efficientnet_lite0`` has its real weights, ``vit_base`` is timm's ViT-B/16 of SigLIP at 224 with random
ones; ``eager`` is the network on normalised float32 pixels at the best of three batch sizes; all else
starts from uint8.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from samething.backbones import Backbone, load_backbone
from samething.backbones.runtimes import Extract, with_graph, with_torch
from samething.images import Preprocessing, decode, prepare
from samething.sessions import PARITY_COSINE, parity_cosine


def vit_base() -> Backbone:
    torch.manual_seed(0)
    network = timm.create_model("vit_base_patch16_siglip_224", num_classes=0)
    return Backbone(
        network, name="vit_base", width=768, preprocessing=Preprocessing(size=224, resize="squash")
    )


def photographs(backbone: Backbone) -> torch.Tensor:
    folder = Path(skimage.data.__file__).parent
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    return torch.from_numpy(np.stack([prepare(decode(path), backbone.preprocessing) for path in paths]))


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def in_chunks(extract: Extract, images: torch.Tensor) -> np.ndarray:
    return np.concatenate([extract(chunk) for chunk in images.split(8)])


def best_eager(backbone: Backbone, pixels: torch.Tensor) -> tuple[Callable[[], object], int]:
    """The network alone, at the batch size that takes the least time per image."""
    found = []
    for batch in (size for size in (1, 8, 32) if size <= len(pixels)):
        inputs = (pixels[:batch].float() / 255 - backbone.mean) / backbone.std

        def call(inputs: torch.Tensor = inputs) -> object:
            with torch.inference_mode():
                return backbone.network(inputs)

        call()
        found.append((min(seconds(call) for _ in range(2)) / batch, batch, call))
    _, batch, call = min(found, key=lambda one: one[0])
    return call, batch


def float32_peak() -> float:
    """Operations a second of a matrix product in float32."""
    one, other = torch.randn(2048, 2048), torch.randn(2048, 2048)
    torch.mm(one, other)
    return 2 * 2048**3 / min(seconds(lambda: torch.mm(one, other)) for _ in range(5))


def operations(backbone: Backbone, pixels: torch.Tensor) -> float:
    """Of one image, two for a multiplication with an addition."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        backbone(pixels[:1])
    return float(counter.get_total_flops())


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "efficientnet_lite0": lambda: load_backbone("efficientnet_lite0"),
    "vit_base": vit_base,
}


def bench(backbone: Backbone, rounds: int, batch: int) -> None:
    images = photographs(backbone)
    pixels = torch.cat([images] * (1 + batch // len(images)))[:batch].contiguous()
    eager, eager_batch = best_eager(backbone, pixels)
    makers: dict[str, Callable[[], Extract]] = {
        "torch, channels last": lambda: with_torch(backbone, "cpu"),
        "torch bfloat16": lambda: with_torch(backbone, "cpu", torch.bfloat16),
        "ONNX Runtime": lambda: with_graph(backbone, "cpu"),
        "OpenVINO": lambda: with_graph(backbone, "openvino"),
        "OpenVINO bfloat16": lambda: with_graph(backbone, "openvino-bfloat16"),
    }
    candidates = {name: make() for name, make in makers.items()}
    expected = in_chunks(candidates["torch, channels last"], images)
    cosines = {name: parity_cosine(in_chunks(call, images), expected) for name, call in candidates.items()}
    for call in candidates.values():
        call(pixels)
    times: dict[str, list[float]] = {name: [] for name in ("eager", *candidates)}
    for _ in range(rounds):
        times["eager"].append(seconds(eager) / eager_batch)
        for name, call in candidates.items():
            times[name].append(seconds(lambda call=call: call(pixels)) / len(pixels))
    print(f"\n{backbone.name}: {len(images)} photographs, batch {batch}; eager best at batch {eager_batch}")
    peak, needed = float32_peak(), operations(backbone, pixels)
    print(f"{needed / 1e9:.2f} billion operations per image, peak {peak / 1e9:.0f} billion a second")
    print(
        f"{'':24} {'images/s':>10} {'× eager':>8} {'of peak':>8} {'least cosine':>13}  gate {PARITY_COSINE}"
    )
    for name, spent in times.items():
        ratio = statistics.median(one / other for one, other in zip(times["eager"], spent, strict=True))
        cosine = cosines.get(name, 1.0)
        gate = "passes" if cosine >= PARITY_COSINE else "FAILS"
        rate = 1 / statistics.median(spent)
        print(f"{name:24} {rate:10.1f} {ratio:8.2f} {rate * needed / peak:8.2f} {cosine:13.6f}  {gate}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", choices=tuple(BACKBONES), default=None)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in [chosen.only] if chosen.only else BACKBONES:
        bench(BACKBONES[name](), chosen.rounds, chosen.batch)
