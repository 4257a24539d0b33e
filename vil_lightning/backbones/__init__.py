"""Backbones for timm: Vision-LSTM, Vision Mamba, isotropic ConvNeXt. Needs torch and timm; neither lightning nor lightly."""

from vil_lightning.backbones.convnext_isotropic import ConvNeXtIsotropic
from vil_lightning.backbones.vision_lstm import VisionLSTM
from vil_lightning.backbones.vision_mamba import VisionMamba
from vil_lightning.backbones.weights import LoadReport, load_weights

__all__ = ["ConvNeXtIsotropic", "LoadReport", "VisionLSTM", "VisionMamba", "load_weights"]
