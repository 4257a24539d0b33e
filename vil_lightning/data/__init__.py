"""LightningDataModules, transforms and loaders. Knows no method."""

from vil_lightning.data.cifar import CIFAR10, CIFAR100
from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.digits import Digits
from vil_lightning.data.huggingface import HuggingFaceData
from vil_lightning.data.image_folder import ImageFolder
from vil_lightning.data.imagenet import ImageNet
from vil_lightning.data.masks import SegmentationTransform
from vil_lightning.data.segmentation import SegmentationFolder, ShapesSegmentation
from vil_lightning.data.streaming import StreamingData
from vil_lightning.data.torchvision_data import TorchvisionData
from vil_lightning.data.transforms import MultiCrop, TrainTransform

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "HuggingFaceData",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "MultiCrop",
    "SegmentationFolder",
    "SegmentationTransform",
    "ShapesSegmentation",
    "StreamingData",
    "TorchvisionData",
    "TrainTransform",
]
