"""Images with masks: ADE20K's folders, and a synthetic set that anyone can run."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from vil_lightning.data.datamodule import ImageDataModule, PlannedViews, planned
from vil_lightning.data.files import image_paths
from vil_lightning.data.images import BadImageError, EncodedImage
from vil_lightning.data.loading import (
    ImageSource,
    Key,
    Sample,
    TransformedDataset,
    view_generator,
)
from vil_lightning.data.masks import (
    LabelRule,
    Masked,
    MaskedView,
    SegmentationTransform,
    WholeImage,
    read_mask,
)
from vil_lightning.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Transform
from vil_lightning.errors import ConfigError

_CHECKED_MASKS = 16  # of each part, before the first step
_MAX_CLASSES = 2**15 - 1  # masks travel as int16
_CLASS_NAMES = "objectInfo150.txt"  # a table in ADE20K's folder


class PaddedView(NamedTuple):
    """A training view on its way to the device."""

    view: Any  # View, later PlannedViews
    size: Tensor  # int64 (B, 2), height and width of what is image


class MaskedDataset(TransformedDataset):
    """A `TransformedDataset` whose labels are masks: of the view in training, of the whole image in evaluation."""

    def __getitem__(self, key: Key) -> Sample:
        sample = super().__getitem__(key)
        if isinstance(sample.views, MaskedView):
            view, mask, size = sample.views
            return Sample(PaddedView(view, size), mask, sample.bad)  # type: ignore[arg-type]
        return sample


class SegmentationData(ImageDataModule):
    """What data modules with masks share. Batches are (images (B, 3, H, W), masks int16 (B, H, W)).

    Masks hold classes from 0, and -1 where a pixel is not to count. Training batches are views of one size, evaluation batches
    whole images with whole masks. `classes` are those of the masks; the images themselves have none (`labelled` is False), so
    methods that classify images refuse these data.
    """

    has_masks = True
    train_transform: SegmentationTransform
    eval_transform: WholeImage

    def __init__(self, train_transform: SegmentationTransform, **kwargs: Any) -> None:
        if not isinstance(train_transform, SegmentationTransform):
            raise ConfigError(
                f"data.train_transform={type(train_transform).__name__} does not cut out masks. Use SegmentationTransform."
            )
        super().__init__(train_transform.img_size, train_transform=train_transform, **kwargs)
        self.eval_transform = WholeImage(self.img_size)

    @property
    def labelled(self) -> bool:
        return False

    def val_images(self, indices: list[int]) -> tuple[Tensor, list[int]]:
        """Centres of val images for pictures, uint8 (n, 3, S, S), and in place of classes, which they lack, zeros."""
        pictures = [self.val_source[index][0] for index in indices]
        return torch.stack([self.eval_transform.square(picture) for picture in pictures]), [0] * len(pictures)

    def first_val_size(self) -> tuple[int, int] | None:
        """Height and width in px of the first val image; None if it cannot be read."""
        try:
            return tuple(self.val_source[0][0].mask.shape)  # type: ignore[union-attr]
        except BadImageError:
            return None

    def _dataset(self, source: ImageSource, transform: Transform) -> MaskedDataset:
        return MaskedDataset(source, transform, self.seed, self.max_bad_fraction, self.known_bad)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, masks = batch
        if isinstance(images, PaddedView):
            images = PaddedView(planned([images.view])[0], images.size)
        return images, masks

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, masks = batch
        if not isinstance(images, PaddedView):
            return self.normalize(images), masks
        views: PlannedViews = images.view
        finished = self._finished(views)[0]
        rows, columns = (torch.arange(side, device=masks.device) for side in finished.shape[-2:])
        height, width = images.size.T[:, :, None]  # (B, 1) each
        inside = (rows < height)[:, :, None] & (columns < width)[:, None, :]  # (B, H, W)
        return finished * inside[:, None], masks


# --- folders ----------------------------------------------------------------------------------------------------------


class MaskSource:
    """Image files with a mask file each.

    Args:
        pairs: Paths of the image and of the mask.
        rule: What the numbers in masks mean.
    """

    def __init__(self, pairs: list[tuple[str, str]], rule: LabelRule) -> None:
        self.pairs = pairs
        self.rule = rule

    @property
    def labels(self) -> list[int]:
        return [0] * len(self.pairs)  # all are of one class, of which a share may be taken

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """`Masked`, and its mask (H, W)."""
        path, mask_path = self.pairs[index]
        image = EncodedImage(path)
        mask = read_mask(mask_path, self.rule, image.size())
        return Masked(image, mask), mask


class SegmentationFolder(SegmentationData):
    """Images and masks in ADE20K's folders.

    `root/images/training/x.jpg` with `root/annotations/training/x.png`, and the same below `validation`; deeper folders are
    allowed, and any image format. The release "ADEChallengeData2016" is unpacked so. Evaluation serves whole images, one at a
    time, for they are of different sizes.

    Args:
        root: The directory.
        batch_size: Training crops per device and step.
        num_workers: Worker processes per loader.
        train_transform: Random crops; the recipe of ViL, of 512 px, if None.
        num_classes: Number of classes.
        reduce_zero_label: In the files 0 is ignored, and the classes count from 1, as in ADE20K.
        ignore_label: Another number in the files that is ignored; None for none. Other arguments as in `ImageDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 16,
        num_workers: int = 4,
        train_transform: SegmentationTransform | None = None,
        num_classes: int = 150,
        reduce_zero_label: bool = True,
        ignore_label: int | None = 255,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        seed: int | None = None,
        repeats: int = 1,
        train_fraction: float = 1.0,
        max_bad_fraction: float = 0.01,
        worker_timeout: float = 600.0,
    ) -> None:
        super().__init__(
            SegmentationTransform() if train_transform is None else train_transform,
            batch_size=batch_size,
            num_workers=num_workers,
            eval_batch_size=1,
            mean=mean,
            std=std,
            seed=seed,
            repeats=repeats,
            train_fraction=train_fraction,
            max_bad_fraction=max_bad_fraction,
            worker_timeout=worker_timeout,
        )
        if root is None or not Path(root).is_dir():
            raise ConfigError(
                f"data.root={root} is not a directory. Set --data.root to the one that holds images/ and annotations/."
            )
        if not 2 <= num_classes <= _MAX_CLASSES:
            raise ConfigError(f"data.num_classes={num_classes} must be between 2 and {_MAX_CLASSES}.")
        self.rule = LabelRule(num_classes, reduce_zero_label, ignore_label)
        first = int(reduce_zero_label)
        if ignore_label is not None and first <= ignore_label < first + num_classes:
            raise ConfigError(
                f"data.ignore_label={ignore_label} is one of the classes {first} to {first + num_classes - 1}. Set it to "
                "another number, or to null."
            )
        self.source_arguments = {"root": root, "num_classes": num_classes, "reduce_zero_label": reduce_zero_label}
        self.root = Path(root)
        self.classes = _class_names(self.root / _CLASS_NAMES, num_classes)

    def setup(self, stage: str | None = None) -> None:
        """List and check what a stage needs: every image has a mask, and a sample of the masks are what they should be."""
        if stage in ("fit", None) and not hasattr(self, "train_source"):
            self.train_source = self.take_fraction(self._source("training"))
        if not hasattr(self, "val_source"):
            self.val_source = self._source("validation")

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        self.setup("fit")
        return self.train_source, self.val_source, self.classes

    @property
    def predict_names(self) -> list[str]:
        """Paths of the images."""
        assert isinstance(self.val_source, MaskSource)
        return [path for path, _ in self.val_source.pairs]

    def _source(self, part: str) -> MaskSource:
        images, masks = self.root / "images" / part, self.root / "annotations" / part
        for folder in (images, masks):
            if not folder.is_dir():
                raise ConfigError(
                    f"data.root: there is no directory {folder}. Expected {self.root}/images/{part}/x.jpg and "
                    f"{self.root}/annotations/{part}/x.png."
                )
        paths = image_paths(images)
        if not paths:
            raise ConfigError(f"data.root: {images} holds no images ({', '.join(IMG_EXTENSIONS)}).")
        pairs = [(path, str(masks / Path(path).relative_to(images).with_suffix(".png"))) for path in paths]
        existing = set(image_paths(masks))
        missing = [(path, mask) for path, mask in pairs if mask not in existing]
        if missing:
            raise ConfigError(
                f"data.root: {len(missing)} of {len(pairs)} images in {images} have no mask. {missing[0][0]} needs "
                f"{missing[0][1]}. Add the masks, or remove the images."
            )
        source = MaskSource(pairs, self.rule)
        for index in range(0, len(source), math.ceil(len(source) / _CHECKED_MASKS)):
            try:
                source[index]
            except BadImageError:
                continue  # data.max_bad_fraction says what happens to these
        return source


def _class_names(table: Path, num_classes: int) -> list[str]:
    """Names of the classes: the first name in the last column of ADE20K's table, if it has so many rows, or numbers."""
    rows = table.read_text(encoding="utf-8").splitlines()[1:] if table.is_file() else []
    names = [row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip()]
    return names if len(names) == num_classes else [str(number) for number in range(num_classes)]


# --- synthetic --------------------------------------------------------------------------------------------------------

_COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (50, 60, 220), "yellow": (210, 200, 40)}
_NUM_SHAPES = 3
_CELL = 8  # side in px of the squares that shapes are made of: no patch of 2, 4 or 8 px shows two classes
# Cells (row, column) of the shapes: square, bars, angle, cross.
_SHAPES = (
    ((0, 0), (0, 1), (1, 0), (1, 1)),
    ((0, 0), (0, 1), (0, 2)),
    ((0, 0), (1, 0), (2, 0)),
    ((0, 0), (1, 0), (1, 1)),
    ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1)),
)


class ShapesSegmentation(SegmentationData):
    """Coloured shapes on grey, textured ground, made up; the colour is the class, so a linear map of the pixels solves it.

    A check of everything around a network, on any machine: a probe of almost any backbone comes close to 100 % mIoU, and with
    `shuffle_masks` it can only learn how frequent the classes are. The images are the same in every run.

    Args:
        img_size: Side of the images in px, a multiple of 8, at least 32.
        batch_size: Training images per device and step.
        num_train: Number of training images.
        num_val: Number of val images.
        shuffle_masks: Give every training image the mask of another one: there is nothing left to learn.
        train_transform: Random crops; if None, whole images, mirrored half of the time. Other arguments as in
            `ImageDataModule`.
    """

    def __init__(
        self,
        img_size: int = 64,
        batch_size: int = 32,
        num_workers: int = 0,
        num_train: int = 256,
        num_val: int = 64,
        shuffle_masks: bool = False,
        train_transform: SegmentationTransform | None = None,
        eval_batch_size: int | None = 32,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.25, 0.25, 0.25),
        seed: int | None = None,
    ) -> None:
        if img_size < 4 * _CELL or img_size % _CELL:
            raise ConfigError(f"data.img_size={img_size} must be a multiple of {_CELL}, at least {4 * _CELL}.")
        for name, count, least in (("num_train", num_train, 2), ("num_val", num_val, 1)):
            if count < least:
                raise ConfigError(f"data.{name}={count} must be at least {least}.")
        whole = SegmentationTransform(img_size, (img_size, img_size), (1.0, 1.0), 1.0, color_jitter=(0, 0, 0, 0))
        super().__init__(
            whole if train_transform is None else train_transform,
            batch_size=batch_size,
            num_workers=num_workers,
            eval_batch_size=eval_batch_size,
            mean=mean,
            std=std,
            seed=seed,
        )
        self.image_side = img_size
        self.num_train = num_train
        self.num_val = num_val
        self.shuffle_masks = shuffle_masks

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        drawn = [draw_shapes(self.image_side, index) for index in range(self.num_train + self.num_val)]
        train, val = drawn[: self.num_train], drawn[self.num_train :]
        if self.shuffle_masks:
            train = [Masked(train[i].image, train[i - 1].mask) for i in range(len(train))]
        return ShapeSource(train), ShapeSource(val), ["ground", *_COLOURS]


class ShapeSource:
    """Images with masks, held in memory."""

    def __init__(self, pairs: list[Masked]) -> None:
        self.pairs = pairs

    @property
    def labels(self) -> list[int]:
        return [0] * len(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.pairs[index], self.pairs[index].mask


def draw_shapes(side: int, index: int) -> Masked:
    """The image with this number: uint8 (3, side, side), and its mask, in which 0 is the ground."""
    rng = view_generator(0, 0, index, 0)
    cells = side // _CELL
    classes = np.zeros((cells, cells), dtype=np.int16)
    for number in 1 + rng.permutation(len(_COLOURS))[:_NUM_SHAPES]:
        shape = np.array(_SHAPES[rng.integers(len(_SHAPES))])
        rows, columns = (shape + rng.integers(cells - shape.max(0), size=2)).T
        classes[rows, columns] = number  # over what was there
    mask = np.kron(classes, np.ones((_CELL, _CELL), dtype=np.int16))
    palette = np.array([(0, 0, 0), *_COLOURS.values()])[mask]  # (H, W, 3)
    ground = rng.uniform(60, 190) + 20 * rng.standard_normal((side, side, 1))
    image = np.where(mask[..., None] == 0, ground, palette) + 10 * rng.standard_normal((side, side, 3))
    pixels = torch.from_numpy(image.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
    return Masked(pixels, torch.from_numpy(mask))
