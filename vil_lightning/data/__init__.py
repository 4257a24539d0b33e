"""LightningDataModules, transforms and loaders. Knows no method."""

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.digits import Digits
from vil_lightning.data.image_folder import ImageFolder
from vil_lightning.data.transforms import MultiCrop

__all__ = ["Digits", "ImageDataModule", "ImageFolder", "MultiCrop"]
