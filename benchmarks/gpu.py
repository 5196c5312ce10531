"""What a card takes: backbone, head training, exact search; at most five minutes.

    python benchmarks/gpu.py           # where torch sees a CUDA device
    python benchmarks/gpu.py --tiny    # the same lines on the CPU in small, to see that they run

Everything is computed from random numbers: no weights are fetched, no images read. The rates do not depend on
what the numbers are.

* The card's peak: products of bfloat16 matrices, 8192 each way.
* SoViT-400m at 384 pixels, by the code of ``features``: batches are copied to pinned memory and on to the
  card while the last one is computed. Its share of the peak counts multiplications and additions.
* The paper's head: 328,400 features of 1152, 34,800 classes of three sub-centres, ten epochs at batch 128, by
  the code of ``train``, from the card's memory. Against it ten passes of the backbone, as a loop needs that
  keeps nothing, reckoned from the rate above.
* The five nearest of 1.4 million rows for 242,000 queries, and the ranks of the relevant ones.
* EfficientNet-Lite0 in ONNX Runtime's CUDA provider, where that is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from samething.arrays import unit
from samething.backbones import Backbone, write_onnx
from samething.backbones.runtimes import parity_cosine
from samething.backbones.timm_networks import timm_network
from samething.catalog import Catalog
from samething.features import FeatureSet
from samething.features.inference import Accelerator
from samething.files import Manifest
from samething.images import Preprocessing
from samething.retrieval import RankCounter, Relevant, exact_topk
from samething.training import RECIPES
from samething.training.data import TrainingData
from samething.training.loop import HeadTrainer
from samething.training.on_card import RowsOnDevice


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    device: str = "cuda"
    product: int = 8192
    architecture: str = "vit_so400m_patch14_siglip_384"
    side: int = 384
    batch: int = 256
    num_batches: int = 24
    rows: int = 328_400
    width: int = 1152
    classes: int = 34_800
    epochs: int = 10
    queries: int = 242_000
    gallery: int = 1_400_000


TINY = Sizes(
    device="cpu", product=128, architecture="test_vit", side=160, batch=4, num_batches=3,
    rows=300, width=64, classes=60, epochs=4, queries=300, gallery=2_000,
)  # fmt: skip
DIM, K = 64, 5


def seconds(job: Callable[[], Any], device: str) -> float:
    """Wall time of a job, the card's work included."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - started


def peak_flops(sizes: Sizes) -> float:
    """Operations per second of the best of five rounds of bfloat16 products."""
    left = torch.randn(sizes.product, sizes.product, device=sizes.device).bfloat16()

    def ten() -> None:
        for _ in range(10):
            left @ left

    ten()
    return 10 * 2 * sizes.product**3 / min(seconds(ten, sizes.device) for _ in range(5))


def backbone_rates(sizes: Sizes) -> dict[str, float]:
    """Images per second, eager and compiled, with the copies; and the share of the peak that the best is."""
    peak = peak_flops(sizes)
    print(f"bfloat16 products: {peak / 1e12:.3g} TFLOPS")
    preprocessing = Preprocessing(size=sizes.side)
    network = timm_network(sizes.architecture, size=sizes.side)
    width = int(network.num_features)  # type: ignore[arg-type]
    backbone = Backbone(network, name=sizes.architecture, width=width, preprocessing=preprocessing)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        backbone(torch.zeros(1, 3, *preprocessing.shape, dtype=torch.uint8))
    pixels = np.random.default_rng(0).integers(0, 256, (sizes.batch, 3, sizes.side, sizes.side), np.uint8)
    reference = Accelerator(backbone, batch_size=sizes.batch, device=sizes.device).extract(
        torch.from_numpy(pixels)
    )
    rates = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        accelerator = Accelerator(
            backbone,
            batch_size=sizes.batch,
            device=sizes.device,
            dtype=torch.bfloat16,
            compiled=compiled and sizes.device == "cuda",
        )
        cosine = parity_cosine(accelerator.extract(torch.from_numpy(pixels)), reference)

        def some(accelerator: Accelerator = accelerator) -> None:
            under_way: deque[Callable[[], np.ndarray]] = deque()
            for _ in range(sizes.num_batches):
                under_way.append(accelerator.submit(pixels))
                if len(under_way) > 1:
                    under_way.popleft()()
            under_way.popleft()()

        some()
        rates[name] = sizes.num_batches * sizes.batch / seconds(some, sizes.device)
        share = rates[name] * counter.get_total_flops() / peak
        print(
            f"{sizes.architecture}, {name}, bfloat16: {rates[name]:,.0f} images/s, {share:.2f} of the peak "
            f"(cosine to float32 at least {cosine:.5f})"
        )
    return rates


def head_training(sizes: Sizes, images_per_s: float, folder: Path) -> None:
    """Seconds of the paper's head from the card's memory: recorded, recorded and compiled, and plain."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((sizes.rows, sizes.width), np.float32).astype(np.float16)
    labels = np.arange(sizes.rows) % sizes.classes
    catalog = Catalog.from_rows(
        [
            {"image": f"{row}.jpg", "label": f"c{label}", "domain": "d", "role": "train"}
            for row, label in enumerate(labels.tolist())
        ],
        root=folder,
    )
    manifest = Manifest(kind="features", format_version=1, made_from={})
    features = FeatureSet(folder, manifest, rows, catalog, ())
    data = TrainingData.of(features)
    # one checkpoint, at the end: there is nothing here to validate on
    config = dataclasses.replace(RECIPES["paper"](), validate_every=float(sizes.epochs))
    for name, epochs in (("recorded", sizes.epochs), ("recorded and compiled", sizes.epochs), ("plain", 1)):
        (folder / name).mkdir()
        (folder / name / "checkpoints").mkdir()
        started = time.perf_counter()
        trainer = HeadTrainer(
            features, data, dataclasses.replace(config, epochs=float(epochs)), folder / name
        )
        trainer.on_device = RowsOnDevice(features, data, trainer.device)
        before = time.perf_counter() - started
        if name == "recorded and compiled" and sizes.device == "cuda":
            trainer.margin_head.compile(dynamic=False)
        if name == "plain":
            trainer._full_step = trainer._step
        took = seconds(trainer.run, sizes.device) * sizes.epochs / epochs
        loop = sizes.epochs * sizes.rows / images_per_s + took
        print(
            f"head, {name}: {took:.1f} s for {sizes.epochs} epochs ({before:.1f} s before the first step); "
            f"the loop with the backbone takes {loop:,.0f} s, {loop / took:,.0f} × as long"
            + ("" if epochs == sizes.epochs else f" (measured: {epochs} epoch)")
        )


def search(sizes: Sizes) -> None:
    """Seconds of exact search, and whether the processor finds the same."""
    rng = np.random.default_rng(1)
    gallery = unit(rng.standard_normal((sizes.gallery, DIM), np.float32))
    asked = rng.integers(0, sizes.gallery, sizes.queries)
    noise = rng.standard_normal((sizes.queries, DIM), np.float32)
    queries = unit(gallery[asked] + 0.1 * noise)
    some = slice(0, 50)
    for precision in ("float32", "float64"):
        found: list[Any] = []
        took = seconds(
            lambda precision=precision, found=found: found.append(
                exact_topk(queries, gallery, K, precision=precision, device=sizes.device)
            ),
            sizes.device,
        )
        same = (found[0].indices[some] == exact_topk(queries[some], gallery, K).indices).mean()
        print(
            f"top {K} of {sizes.gallery:,} for {sizes.queries:,} queries, {precision}: {took:.1f} s; "
            f"{same:.1%} of the first {some.stop}'s are the processor's in float64"
        )
    relevant = Relevant(rows=asked, counts=np.ones(sizes.queries, np.int64))
    counter = RankCounter(queries, gallery, relevant, device=sizes.device)
    took = seconds(lambda: counter.count(gallery), sizes.device)
    check = RankCounter(queries[some], gallery, Relevant(rows=asked[some], counts=np.ones(50, np.int64)))
    check.count(gallery)
    same = (counter.ranks()[some] == check.ranks()).mean()
    print(f"ranks of as many, float64: {took:.1f} s; {same:.1%} of the first {some.stop} are the processor's")


def onnx_runtime(sizes: Sizes, folder: Path) -> None:
    """Images per second of a model's graph in the CUDA provider."""
    import onnxruntime

    wanted = "CUDAExecutionProvider" if sizes.device == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        print(f"onnxruntime has no {wanted} here: pip install 'samething[gpu]' for its CUDA build")
        return
    network = timm_network("tf_efficientnet_lite0")
    backbone = Backbone(network, name="lite0", width=1280, preprocessing=Preprocessing(size=224))
    path = write_onnx(backbone, folder / "model.onnx", size=224)
    session = onnxruntime.InferenceSession(path, providers=[wanted])
    pixels = np.random.default_rng(2).integers(0, 256, (sizes.batch, 3, 224, 224), np.uint8)
    with torch.inference_mode():
        expected = backbone(torch.from_numpy(pixels[:4])).numpy()
    cosine = parity_cosine(session.run(None, {"pixels": pixels})[0][:4], expected)
    took = min(seconds(lambda: session.run(None, {"pixels": pixels}), sizes.device) for _ in range(5))
    rate = len(pixels) / took
    provider = session.get_providers()[0]
    print(f"tf_efficientnet_lite0, {provider}: {rate:,.0f} images/s (cosine to torch {cosine:.5f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, in small")
    sizes = TINY if parser.parse_args().tiny else Sizes()
    if sizes.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --tiny runs the same lines on the CPU")
    card = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU, in small: no figures"
    print(f"{card}, torch {torch.__version__}")
    started = time.perf_counter()
    rates = backbone_rates(sizes)
    with tempfile.TemporaryDirectory() as name:
        head_training(sizes, max(rates.values()), Path(name))
        onnx_runtime(sizes, Path(name))
    search(sizes)
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
