"""The HTML report of a run: what ``samething evaluate --html`` and the demo write."""

from samething.evaluation.analysis import Analysis, ShownHit, ShownQuery
from samething.evaluation.page import write_report

__all__ = ["Analysis", "ShownHit", "ShownQuery", "write_report"]
