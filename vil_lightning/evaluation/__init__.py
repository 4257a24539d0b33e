"""Scores of a frozen network: `python main.py evaluate`. Features are computed once and kept; every protocol is named."""

from vil_lightning.evaluation.tasks import KNN, FewLabels, LinearProbe, LogisticRegression, Task

__all__ = ["KNN", "FewLabels", "LinearProbe", "LogisticRegression", "Task"]
