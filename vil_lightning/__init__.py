"""Vision-LSTM in PyTorch Lightning. Importing this package registers the `vil*` models with timm."""

from vil_lightning.backbones import LoadReport, VisionLSTM, load_weights

__version__ = "0.1.0"
__all__ = ["LoadReport", "VisionLSTM", "__version__", "load_weights"]
