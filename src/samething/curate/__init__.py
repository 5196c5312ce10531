"""Curation: which images to train on, chosen by rules, without copies, leaks and doubtful labels.

Nothing here needs torch.
"""

from __future__ import annotations

from samething.curate.config import RECIPES, CurateConfig
from samething.curate.process import curate
from samething.curate.result import Curation

__all__ = ["RECIPES", "CurateConfig", "Curation", "curate"]
