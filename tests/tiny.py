"""A run over a tiny vision transformer with random weights: everything that real ones have, in seconds."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import timm
import torch

from samething.checksums import require_whole
from samething.datasets import catalog
from samething.embedder import FORMAT_VERSION, KIND
from samething.features import features
from samething.files import read_manifest
from samething.training import train
from scenes import write_things

BACKBONES = {"vit": "test_vit", "conv": "test_efficientnet"}


def write_tiny(folder: Path, kind: str, *, num_things: int = 16) -> None:
    """Random weights ``w.safetensors`` of a tiny network, images ``p`` and their catalog ``c.parquet``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(BACKBONES[kind], num_classes=0)
    safetensors.torch.save_file(network.state_dict(), folder / "w.safetensors")
    write_things(folder / "p", num_things=num_things)
    catalog(folder / "p", domain="things", output=folder / "c.parquet")


def make_tiny(folder: Path, kind: str = "vit", **options: object) -> Path:
    """A folder with images ``p``, catalog ``c.parquet``, features ``f``, ``w.safetensors`` and ``run``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny(folder, kind)
    features(
        folder / "c.parquet",
        backbone=f"timm:{BACKBONES[kind]}",
        weights=folder / "w.safetensors",
        output=folder / "f",
        runtime="torch",
        num_workers=0,
    )
    train(
        folder / "f",
        output=folder / "run",
        **{"recipe": "demo", "epochs": 6.0, "embedding_dim": 16, **options},
    )
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder, checked: ``head.*`` and ``backbone.*``."""
    require_whole(
        folder, read_manifest(folder, kind=KIND, format_version=FORMAT_VERSION), ["model.safetensors"]
    )
    return safetensors.torch.load_file(folder / "model.safetensors")
