"""A backbone of one's own that is exported in moments: the colours of 8 × 8 places, mixed."""

from __future__ import annotations

import torch
from torch import nn

from samething.backbones import Backbone
from samething.images import Preprocessing

NAME = "python:small_backbone:colours"


def colours() -> Backbone:
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 96))
    half = (0.5, 0.5, 0.5)
    return Backbone(
        network,
        name="colours",
        width=96,
        licence="own",
        preprocessing=Preprocessing(size=64, mean=half, std=half),
    )
