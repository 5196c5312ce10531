"""The paper's questions, asked automatically: which data, which loss, which backbone.

Every study chooses on validation instances and looks at the test instances once, at its end. What was tried
is kept a line each, so that a killed study goes on and ends with the same result.
"""

from __future__ import annotations

from samething.study.backbone_comparison import backbones
from samething.study.data_study import datasets
from samething.study.greedy import Step, select
from samething.study.loss_search import losses
from samething.study.study_folder import StudyFolder
from samething.study.study_report import StudyResult

__all__ = ["Step", "StudyFolder", "StudyResult", "backbones", "datasets", "losses", "select"]
