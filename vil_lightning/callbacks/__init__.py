"""Observers: they look at a run and never change it."""

from vil_lightning.callbacks.classification import ClassificationPictures
from vil_lightning.callbacks.feature_health import FeatureHealth
from vil_lightning.callbacks.last_checkpoint import LastCheckpoint
from vil_lightning.callbacks.online_knn import OnlineKNN
from vil_lightning.callbacks.online_probe import OnlineProbe
from vil_lightning.callbacks.pca_maps import PCAMaps
from vil_lightning.callbacks.predictions import PredictionWriter
from vil_lightning.callbacks.progress import RunProgressBar, Throughput
from vil_lightning.callbacks.projector import EmbeddingProjector
from vil_lightning.callbacks.published_curve import PublishedCurve
from vil_lightning.callbacks.reconstruction import ReconstructionPictures
from vil_lightning.callbacks.run_summary import RunSummary
from vil_lightning.callbacks.scan_pictures import ScanPictures
from vil_lightning.callbacks.views import ViewPictures

__all__ = [
    "ClassificationPictures",
    "EmbeddingProjector",
    "FeatureHealth",
    "LastCheckpoint",
    "OnlineKNN",
    "OnlineProbe",
    "PCAMaps",
    "PredictionWriter",
    "PublishedCurve",
    "ReconstructionPictures",
    "RunProgressBar",
    "RunSummary",
    "ScanPictures",
    "Throughput",
    "ViewPictures",
]
