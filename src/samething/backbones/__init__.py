"""Frozen foundation models: a table of rows, ``load_backbone(name)``, and the fastest runtime for each.

The table and the list of it need no torch; what loads a backbone is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from samething.backbones.backbone_table import BackboneRow

if TYPE_CHECKING:
    from samething.backbones.backbone_table import BACKBONES
    from samething.backbones.loading import load_backbone, load_from_metadata, load_the_same
    from samething.backbones.network import Backbone, weights_fingerprint, write_onnx

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneRow",
    "load_backbone",
    "load_from_metadata",
    "load_the_same",
    "weights_fingerprint",
    "write_onnx",
]

_ROOMS: Final = {
    "BACKBONES": "backbone_table", "Backbone": "network", "load_backbone": "loading",
    "load_from_metadata": "loading", "load_the_same": "loading",
    "weights_fingerprint": "network", "write_onnx": "network",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
