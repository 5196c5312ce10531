"""Whether a row's weights are already on this disk, found without a network and without torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from samething.backbones.backbone_table import BackboneRow

_WEIGHT_FILES: Final = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Names that the hub's repositories give their weights; the last two list the pieces of large ones."""


def hub_cache() -> Path | None:
    """The hub client's cache folder; None if the client is not installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def weights_on_disk(row: BackboneRow) -> Path | None:
    """Where a row's weights lie on this disk; None if they have to be fetched first."""
    if not row.hub:
        found = importlib.util.find_spec(row.identifier.replace("-", "_"))
        return Path(found.origin).parent if found and found.origin else None
    cache = hub_cache()
    if cache is None:
        return None
    for snapshot in sorted((cache / f"models--{row.hub.replace('/', '--')}" / "snapshots").glob("*")):
        for name in _WEIGHT_FILES:
            if (snapshot / name).exists():  # a link whose file is gone does not exist
                return snapshot / name
    return None
