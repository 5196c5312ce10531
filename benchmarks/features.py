"""From image files to features: the pipeline against the model alone, Pillow, and a plain timm loop.

    python benchmarks/features.py decode
    python benchmarks/features.py pipeline [--backbone vit_base] [--images FOLDER] [--num 1024]
    python benchmarks/features.py sentence-transformers [--images FOLDER] [--num 256]

``decode`` compares decoding and resizing with Pillow's, one thread, processor time, alternating. ``pipeline``
gives the images per second of the whole (files to blocks on disk, one decoding process, one thread for the
model) over the rate of the same model on ready tensors, and over a plain loop of timm's transform, torch's
DataLoader and the model in torch as it comes; wall-clock time, alternating, medians.
``vit_base`` is a ViT-B/16 at 224 with random weights. ``sentence-transformers`` describes the same files with
the same network, CLIP's ViT-B/16 with random weights, by that library's ``encode`` and by the pipeline, with
torch in float32 and with the runtime that the pipeline chooses. Without a folder the images are cut from
scikit-image's photographs, 1,024 pixels wide, in JPEG files of quality 90.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import timm
import timm.data
import torch
from PIL import Image

from samething.backbones import Backbone, load_backbone
from samething.backbones.runtimes import Runtime, choose_runtime
from samething.catalog import Catalog
from samething.features.inference import extract_features
from samething.features.job import Job
from samething.features.worker_pool import ImageReader, ImageStream
from samething.files import file_sha256
from samething.images import Preprocessing, decode, read_pixels
from samething.sessions import parity_cosine

BATCH_SIZE = 64
ROUNDS = 3


def photographs(width: int) -> list[bytes]:
    """scikit-image's photographs as JPEG files of that width, quality 90."""
    folder = Path(skimage.data.__file__).parent
    contents = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".jpg", ".png"):
            continue
        image = decode(path)
        stream = io.BytesIO()
        scaled = image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)
        scaled.save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
    return contents


def bench_decode() -> None:
    torch.set_num_threads(1)
    for width, size in ((512, 224), (1024, 384), (2048, 384)):
        contents = photographs(width)
        exact = Preprocessing(size=size, resize="squash")
        ways = {way: dataclasses.replace(exact, decoding=way) for way in ("exact", "fast", "scaled")}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(5):
            for way, preprocessing in ways.items():
                start = time.process_time()
                for content in contents:
                    read_pixels(content, preprocessing)
                seconds[way].append(time.process_time() - start)
        best = {way: min(values) for way, values in seconds.items()}
        difference = max(
            int(np.abs(read_pixels(c, ways["fast"]).astype(int) - read_pixels(c, exact)).max())
            for c in contents
        )
        print(
            f"{width} px -> {size}: Pillow {len(contents) / best['exact']:.0f} images/s, "
            f"fast {best['exact'] / best['fast']:.2f} x (largest difference {difference} of 255), "
            f"scaled {best['exact'] / best['scaled']:.2f} x"
        )


def vit_base() -> Backbone:
    torch.manual_seed(0)
    network = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
    return Backbone(network, name="vit_base", width=768, preprocessing=Preprocessing(size=224))


class PlainSet(torch.utils.data.Dataset):
    """What people write: open, convert, timm's transform."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[place]).convert("RGB"))


def plain_rate(backbone: Backbone, paths: list[Path]) -> float:
    """Images a second of the plain loop, after its first batch."""
    preprocessing = backbone.preprocessing
    transform = timm.data.create_transform(
        (3, preprocessing.size, preprocessing.size), interpolation="bicubic", mean=preprocessing.mean,
        std=preprocessing.std, crop_pct=preprocessing.crop_fraction,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(PlainSet(paths, transform), BATCH_SIZE, num_workers=1)
    start, num = 0.0, -BATCH_SIZE
    with torch.no_grad():
        for batch in loader:
            backbone.network(batch).numpy()
            start = start or time.perf_counter()
            num += len(batch)
    return num / (time.perf_counter() - start)


def own_rate(runtime: Runtime, ready: torch.Tensor, num: int) -> float:
    """Images a second of the model on pixels that are there."""
    runtime.extract(ready)
    start = time.perf_counter()
    for _ in range(num):
        runtime.extract(ready)
    return num * len(ready) / (time.perf_counter() - start)


def whole_rate(backbone: Backbone, catalog: Catalog, runtime: Runtime) -> float:
    """Images a second from files to blocks on disk, once the pipeline is full."""
    fast = backbone.with_preprocessing(dataclasses.replace(backbone.preprocessing, decoding="fast"))
    with tempfile.TemporaryDirectory() as folder:
        job = Job.of(catalog, folder=Path(folder), batch_size=BATCH_SIZE, previous=None)
        reader = ImageReader(catalog, job.copies, fast.preprocessing)
        stream = ImageStream(reader, job.missing(), num_workers=1)
        start, num = 0.0, 0
        extracted = extract_features(
            stream, fast, runtime=runtime.name, num_images=len(catalog), chosen=lambda name: None,
            made=runtime,
        )  # fmt: skip
        for batch, features in extracted:
            job.keep(batch, features)
            if start:
                num += len(batch.rows)
            start = start or time.perf_counter()
        return num / (time.perf_counter() - start)


def bench_pipeline(images: Path, name: str, num: int) -> None:
    torch.set_num_threads(1)
    backbone = vit_base() if name == "vit_base" else load_backbone(name)
    paths, catalog = chosen_images(images, num)
    pixels = [read_pixels(path.read_bytes(), backbone.preprocessing) for path in paths[:BATCH_SIZE]]
    ready = torch.from_numpy(np.stack(pixels))
    runtime = choose_runtime(backbone, ready)
    rates: dict[str, list[float]] = {"own": [], "whole": [], "plain": []}
    for _ in range(ROUNDS):
        before = own_rate(runtime, ready, max(2, num // BATCH_SIZE // 2))
        rates["whole"].append(whole_rate(backbone, catalog, runtime))
        after = own_rate(runtime, ready, max(2, num // BATCH_SIZE // 2))
        rates["own"].append((before + after) / 2)
        rates["plain"].append(plain_rate(backbone, paths[: max(4 * BATCH_SIZE, num // 4)]))
    own, plain = (
        statistics.median(a / b for a, b in zip(rates["whole"], rates[key], strict=True))
        for key in ("own", "plain")
    )
    print(
        f"{name} with {runtime.name}, {len(paths)} images: whole {statistics.median(rates['whole']):.1f} "
        f"images/s, {own:.3f} of the model's own rate, {plain:.2f} x the plain loop; rounds: "
        + ", ".join(f"{w:.0f}/{o:.0f}" for w, o in zip(rates["whole"], rates["own"], strict=True))
    )


class ImageTower(torch.nn.Module):
    """CLIP's image side: what sentence-transformers calls an image's embedding."""

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels to vectors."""
        vectors: torch.Tensor = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        return vectors


def random_clip(folder: Path) -> torch.nn.Module:
    """CLIP ViT-B/16 with random weights and a tiny text side, saved as sentence-transformers loads it."""
    import transformers

    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "patch_size": 16}
    config = transformers.CLIPConfig(
        text_config=text | tokens, vision_config=vision | {"num_attention_heads": 12}, projection_dim=512
    )
    torch.manual_seed(0)
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(folder)
    transformers.CLIPProcessor(
        image_processor=transformers.CLIPImageProcessor(),
        tokenizer=transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")),
    ).save_pretrained(folder)
    return clip


def bench_sentence_transformers(images: Path, num: int) -> None:
    import sentence_transformers

    torch.set_num_threads(1)
    paths, catalog = chosen_images(images, num)
    with tempfile.TemporaryDirectory() as folder:
        clip = random_clip(Path(folder))
        theirs = sentence_transformers.SentenceTransformer(folder, device="cpu")
    preprocessing = Preprocessing(
        size=224, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    )
    backbone = Backbone(ImageTower(clip), name="clip", width=512, preprocessing=preprocessing)
    pixels = [read_pixels(path.read_bytes(), preprocessing) for path in paths[:BATCH_SIZE]]
    ready = torch.from_numpy(np.stack(pixels))
    runtimes = {
        "torch": choose_runtime(backbone, ready, runtime="torch"),
        "auto": choose_runtime(backbone, ready),
    }
    expected = theirs.encode([Image.open(path) for path in paths[:BATCH_SIZE]], batch_size=BATCH_SIZE)
    for runtime in runtimes.values():
        print(f"{runtime.name}: least cosine to theirs {parity_cosine(runtime.extract(ready), expected):.6f}")
    rates: dict[str, list[float]] = {"theirs": [], **{name: [] for name in runtimes}}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        theirs.encode([Image.open(path) for path in paths], batch_size=BATCH_SIZE)
        rates["theirs"].append(len(paths) / (time.perf_counter() - start))
        for name, runtime in runtimes.items():
            rates[name].append(whole_rate(backbone, catalog, runtime))
    for name, runtime in runtimes.items():
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates["theirs"], strict=True))
        print(
            f"the pipeline with {runtime.name} ({name}): {statistics.median(rates[name]):.1f} images/s, "
            f"{ratio:.2f} x sentence-transformers' encode ({statistics.median(rates['theirs']):.1f})"
        )


def write_images(folder: Path, num: int) -> None:
    """Cuts from photographs, 1,024 by 768, no two alike."""
    images = [decode(path) for path in sorted(Path(skimage.data.__file__).parent.glob("*.jpg"))]
    rng = random.Random(0)
    for number in range(num):
        image = images[number % len(images)].convert("RGB")
        share = rng.uniform(0.6, 1.0)
        width, height = share * image.width, share * image.height
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        image.resize((1024, 768), Image.Resampling.LANCZOS, box).save(
            folder / f"{number:05d}.jpg", quality=90
        )


def chosen_images(images: Path, num: int) -> tuple[list[Path], Catalog]:
    """Some JPEG files of a folder, drawn with a seed, and their catalog."""
    paths = sorted(path for path in images.rglob("*") if path.suffix in (".jpg", ".jpeg"))
    paths = random.Random(0).sample(paths, min(num, len(paths)))
    rows = [{"image": str(path), "label": "x", "sha256": file_sha256(path)} for path in paths]
    return paths, Catalog.from_rows(rows, root=images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["decode", "pipeline", "sentence-transformers"])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--num", type=int, default=1024)
    given = parser.parse_args()
    if given.what == "decode":
        bench_decode()
    else:
        number = min(given.num, 256) if given.what == "sentence-transformers" else given.num
        with tempfile.TemporaryDirectory() as made:
            if given.images is None:
                write_images(Path(made), number)
            folder = given.images or Path(made)
            if given.what == "sentence-transformers":
                bench_sentence_transformers(folder, number)
            else:
                bench_pipeline(folder, given.backbone, number)
