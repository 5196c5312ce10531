"""Frozen foundation models: a table of rows, ``load_backbone(name)``, and the fastest runtime for each."""

from __future__ import annotations

from samething.backbones.network import (
    BACKBONES,
    Backbone,
    BackboneRow,
    efficientnet_lite_state,
    load_backbone,
    weights_fingerprint,
    write_onnx,
)

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneRow",
    "efficientnet_lite_state",
    "load_backbone",
    "weights_fingerprint",
    "write_onnx",
]
