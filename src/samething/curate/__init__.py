"""Curation: which images to train on, chosen by rules, without copies, leaks and doubtful labels.

Nothing here needs torch.
"""

from __future__ import annotations

from samething.curate.curate_config import CurateConfig
from samething.curate.curation_report import Curation
from samething.curate.process import curate
from samething.curate.recipes import RECIPES

__all__ = ["RECIPES", "CurateConfig", "Curation", "curate"]
