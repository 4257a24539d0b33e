"""Observers: they look at a run and never change it."""

from vil_lightning.callbacks.classification import ClassificationPictures
from vil_lightning.callbacks.last_checkpoint import LastCheckpoint
from vil_lightning.callbacks.online_knn import OnlineKNN
from vil_lightning.callbacks.predictions import PredictionWriter
from vil_lightning.callbacks.progress import RunProgressBar, Throughput
from vil_lightning.callbacks.published_curve import PublishedCurve
from vil_lightning.callbacks.reconstruction import ReconstructionPictures
from vil_lightning.callbacks.run_summary import RunSummary
from vil_lightning.callbacks.views import ViewPictures

__all__ = [
    "ClassificationPictures",
    "LastCheckpoint",
    "OnlineKNN",
    "PredictionWriter",
    "PublishedCurve",
    "ReconstructionPictures",
    "RunProgressBar",
    "RunSummary",
    "Throughput",
    "ViewPictures",
]
