"""Observers: they look at a run and never change it."""

from vil_lightning.callbacks.online_knn import OnlineKNN
from vil_lightning.callbacks.progress import RunProgressBar, Throughput
from vil_lightning.callbacks.run_summary import RunSummary
from vil_lightning.callbacks.views import ViewPictures

__all__ = ["OnlineKNN", "RunProgressBar", "RunSummary", "Throughput", "ViewPictures"]
