"""Scores of a frozen network: `python main.py evaluate`. Features are computed once and kept; every protocol is named."""

from vil_lightning.evaluation.anytime import Anytime
from vil_lightning.evaluation.finetune import FineTune
from vil_lightning.evaluation.robustness import Robustness
from vil_lightning.evaluation.tasks import KNN, FewLabels, LinearProbe, LogisticRegression, Task
from vil_lightning.evaluation.vtab import VTAB1k

__all__ = [
    "KNN",
    "Anytime",
    "FewLabels",
    "FineTune",
    "LinearProbe",
    "LogisticRegression",
    "Robustness",
    "Task",
    "VTAB1k",
]
