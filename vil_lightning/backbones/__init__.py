"""Backbones: Vision-LSTM, registered with timm on import. Needs torch and timm; neither lightning nor lightly."""

from vil_lightning.backbones.vision_lstm import VisionLSTM
from vil_lightning.backbones.weights import LoadReport, load_weights

__all__ = ["LoadReport", "VisionLSTM", "load_weights"]
