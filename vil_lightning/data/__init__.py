"""LightningDataModules, transforms and loaders. Knows no method."""

from vil_lightning.data.cifar import CIFAR10, CIFAR100
from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.digits import Digits
from vil_lightning.data.image_folder import ImageFolder
from vil_lightning.data.transforms import MultiCrop, TrainTransform

__all__ = ["CIFAR10", "CIFAR100", "Digits", "ImageDataModule", "ImageFolder", "MultiCrop", "TrainTransform"]
