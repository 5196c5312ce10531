"""The table of backbones: every family of the paper, and what is best today. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from samething.backbones.contrastive import CONTRASTIVE
from samething.backbones.rows import BackboneRow
from samething.backbones.self_supervised import SELF_SUPERVISED

BACKBONES: Final[Mapping[str, BackboneRow]] = {row.name: row for row in (*SELF_SUPERVISED, *CONTRASTIVE)}
"""Rows by name. Any other model works as ``timm:NAME``, ``open_clip:NAME/WEIGHTS`` or ``hf:NAME``."""
