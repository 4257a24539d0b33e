"""What all image data modules share: loaders over a train and a val source."""

import inspect
import itertools
import os
import shlex
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vil_lightning.checks import check_image_sizes
from vil_lightning.data.loading import (
    EpochSampler,
    ImageSource,
    NumberedSource,
    ResumableLoader,
    SubsetSource,
    TransformedDataset,
    collate,
    share_of_classes,
)
from vil_lightning.data.photometry import Plan, apply, plan
from vil_lightning.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    TrainingTransform,
    Transform,
    View,
)
from vil_lightning.errors import ConfigError

_MOST_WORKERS = 512


class PlannedViews(NamedTuple):
    """Views of one size on their way to the device."""

    images: list[Tensor]  # uint8 (B, 3, S, S) each
    plan: Plan  # for all of them, one below the other


class ImageDataModule(L.LightningDataModule):
    """Serves a labelled train and val set, under a training or the evaluation transform.

    A subclass says where images come from (`build_sources`); everything else is the same for all of them. Batches are
    `(images, labels)`, under `MultiCrop` `([views, …], labels)`, in prediction `(images, numbers)`, where a number is an
    index into `predict_names`. The val set also serves for testing and prediction. Images leave the loader cropped, as uint8;
    brightness, colours, blur, flips and normalisation follow on the device.

    Args:
        img_size: Side in px of images under the evaluation transform.
        batch_size: Images per device and step.
        num_workers: Worker processes per loader.
        train_transform: Random views (`MultiCrop`) or view (`TrainTransform`) for training; None trains on the evaluation
            transform.
        eval_batch_size: Images per device and step without gradients; `batch_size` if None.
        mean: Per-channel mean, for pixel values in [0, 1].
        std: Per-channel standard deviation.
        seed: Of order and augmentation; the run's `seed_everything` if None.
        crop_pct: Evaluation resizes the short side to `img_size / crop_pct` and crops the centre.
        repeats: How often a training image occurs in a row, differently augmented each time (repeated augmentation). An
            epoch keeps its length, and so sees 1/repeats of the images.
        train_fraction: Use this share of the training images of every class, at least one (drawn by `seed`): few labels.
        classes: Use these classes only, by number or name: "0-99", "3,5,8-9", "cat,dog". They are numbered anew, in the
            order of the data set. All if None.
        max_bad_fraction: Images that cannot be read are replaced by others in training and left out of scores; each is named in
            the log. A larger share than this of a set stops the run.
        worker_timeout: Seconds to wait for a batch before a worker process counts as dead; 0 waits forever.
    """

    def __init__(
        self,
        img_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 4,
        train_transform: TrainingTransform | None = None,
        eval_batch_size: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        seed: int | None = None,
        crop_pct: float = 1.0,
        repeats: int = 1,
        train_fraction: float = 1.0,
        classes: str | None = None,
        max_bad_fraction: float = 0.01,
        worker_timeout: float = 600.0,
    ) -> None:
        super().__init__()
        positive = {
            "batch_size": batch_size,
            "img_size": img_size,
            "eval_batch_size": eval_batch_size,
            "repeats": repeats,
        }
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value} must be at least 1.")
        if not 0 < train_fraction <= 1:
            raise ConfigError(f"data.train_fraction={train_fraction} must be in (0, 1].")
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction={max_bad_fraction} must be in [0, 1].")
        if worker_timeout < 0 or num_workers < 0:
            raise ConfigError(
                f"data.worker_timeout={worker_timeout} and data.num_workers={num_workers} must not be negative."
            )
        check_image_sizes("data", img_size=img_size)
        if num_workers > _MOST_WORKERS:
            raise ConfigError(f"data.num_workers={num_workers} must be at most {_MOST_WORKERS} processes.")
        if min(std) <= 0:
            raise ConfigError(f"data.std={tuple(std)} must be positive.")
        self.img_size = img_size
        self.batch_size = batch_size
        self.global_batch_size: int | None = (
            None  # of all devices and micro batches; if set, an epoch is made of whole steps
        )
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.train_transform = train_transform
        self.eval_transform = EvalTransform(img_size, crop_pct)
        self.repeats = repeats
        self.train_fraction = train_fraction
        self.class_subset = classes
        self.max_bad_fraction = max_bad_fraction
        self.worker_timeout = worker_timeout
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.train_source: ImageSource
        self.val_source: ImageSource
        self.classes: list[str] = []
        self.source_arguments: dict[str, Any] = {}  # what a subclass was told about where its images are
        self._served: dict[str, DataLoader[Any]] = {}
        self._train_loader: ResumableLoader | None = None
        self._resume_from: dict[str, int] | None = None
        self.known_bad: dict[str, str] = {}  # images that could not be read: name -> reason
        self._eval_datasets: dict[str, TransformedDataset] = {}

    @abstractmethod
    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        """Train source, val source, and the names of the classes."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def labelled(self) -> bool:
        """Whether there are classes; without, only self-supervision is possible."""
        return bool(self.classes)

    def setup(self, stage: str | None = None) -> None:
        if not hasattr(self, "val_source"):
            train, val, classes = self.build_sources()
            train, self.classes = self.choose_classes(train, classes)
            self.train_source = self.take_fraction(train)
            self.val_source, _ = self.choose_classes(val, classes)

    def take_fraction(self, source: ImageSource) -> ImageSource:
        """`train_fraction` of the images."""
        return source if self.train_fraction == 1 else share_of_classes(source, self.train_fraction, self.seed)

    def choose_classes(self, source: ImageSource, classes: list[str]) -> tuple[ImageSource, list[str]]:
        """The images of the classes that are wanted, and the names of these."""
        if self.class_subset is None:
            return source, classes
        numbers = class_numbers(self.class_subset, classes)
        renamed = {number: i for i, number in enumerate(numbers)}
        indices = [i for i, label in enumerate(source.labels) if label in renamed]
        return SubsetSource(source, indices, renamed), [classes[number] for number in numbers]

    def source_options(self) -> str:
        """What names these images on the command line, `--data ImageFolder --data.root DIR`; empty for built-in ones."""
        defaults = inspect.signature(type(self)).parameters
        given = self.source_arguments | {"classes": self.class_subset}
        options = [
            f"--data.{name} {shlex.quote(str(value))}"
            for name, value in given.items()
            if value != (defaults[name].default if name in defaults else None)
        ]
        return " ".join([f"--data {type(self).__name__}", *options]) if self.source_arguments or options else ""

    @property
    def predict_source(self) -> ImageSource:
        """The images to predict."""
        return self.val_source

    @property
    def predict_names(self) -> list[str]:
        """What to call the images to predict, in their order."""
        return [f"val/{i}" for i in range(len(self.predict_source))]

    # --- loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, under the training transform; the last, smaller batch of an epoch is dropped."""
        if "train" in self._served:
            return self._served["train"]
        world_size, _ = self._processes()
        num_images, per_step = len(self.train_source), self.batch_size * world_size
        if num_images < per_step:
            raise ConfigError(
                f"data.batch_size={self.batch_size} on {world_size} process(es) needs {per_step} images for one step, but "
                f"the training set has {num_images}. Use a smaller data.batch_size."
            )
        whole = self.global_batch_size
        if whole is not None and num_images < whole:
            raise ConfigError(
                f"global_batch_size={whole}, but the training set has {num_images} images. Use a smaller global_batch_size."
            )
        dataset = self._dataset(self.train_source, self.train_transform or self.eval_transform)
        # What is left at the end of an epoch would be a smaller step of its own, for some numbers of devices.
        dealt = None if whole is None else num_images // whole * whole
        self._train_loader = self._loader(dataset, self.batch_size, shuffle=True, repeats=self.repeats, dealt=dealt)
        if self._resume_from is not None:
            self._train_loader.load_state_dict(self._resume_from)
            self._resume_from = None
        return self._train_loader

    # Lightning restores a loader's own state only if the loader is not yet built when a checkpoint is read; but
    # `estimated_stepping_batches`, which schedules need, builds it before. A data module's state comes in time.

    def state_dict(self) -> dict[str, Any]:
        if self._train_loader is None:
            return {}
        # An epoch may end before its loader does (trainer.limit_train_batches): the next one starts at the first batch.
        if self.trainer is not None and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return {"train_loader": {"batches_done": 0}}
        return {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_from = state_dict.get("train_loader")

    def val_dataloader(self) -> DataLoader[Any]:
        if "val" in self._served:
            return self._served["val"]
        return self._eval_loader(self.val_source, "val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of images and their numbers, in fixed order, under the evaluation transform."""
        return self._eval_loader(NumberedSource(self.predict_source), "predict")

    def eval_train_dataloader(self, max_images: int | None = None) -> DataLoader[Any]:
        """The training images in fixed order, under the evaluation transform: a bank for kNN and probes.

        Args:
            max_images: Take a random subset of this size, the same at every call. (Folders are sorted by class, so the
                first images would be those of a few classes.)
        """
        source = self.train_source
        if max_images is not None and max_images < len(source):
            order = torch.randperm(len(source), generator=torch.Generator().manual_seed(self.seed))
            source = SubsetSource(source, order[:max_images].tolist())
        return self._eval_loader(source)

    def val_images(self, indices: list[int]) -> tuple[Tensor, list[int]]:
        """Images of the val set, uint8 (n, 3, H, W) under the evaluation transform, and their classes."""
        dataset = self._dataset(self.val_source, self.eval_transform)
        samples = [dataset[0, index] for index in indices]
        dataset.note([entry for sample in samples for entry in sample.bad])
        return torch.stack([sample.views for sample in samples]), [sample.label for sample in samples]

    def real_images(self, batch_idx: int, num_images: int) -> Tensor:
        """Which images of one of this process's val, test or prediction batches are to be counted.

        All processes must make equally many steps, so where the images do not suffice for the last of them, the first
        images are dealt once more. Images that stand in for unreadable ones do not count, either.

        Args:
            batch_idx: Number of the batch on this process.
            num_images: Its length.

        Returns:
            Mask (num_images,) on the CPU: False for an image that was dealt before or stands in for another one.
        """
        world_size, rank = self._processes()
        source = self.predict_source if self._predicting() else self.val_source
        places = (batch_idx * self.eval_batch_size + torch.arange(num_images)) * world_size + rank
        real = places < len(source)
        dataset = self._eval_datasets.get("predict" if self._predicting() else "val")
        if dataset is not None and dataset.unreadable:
            real &= ~torch.isin(places, torch.tensor(list(dataset.unreadable)))
        return real

    def serve(self, train: DataLoader[Any], val: DataLoader[Any]) -> None:
        """Hand out these loaders instead of images from now on, e.g. features that were extracted once."""
        self._served = {"train": train, "val": val}

    def _processes(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank

    def _predicting(self) -> bool:
        return self.trainer is not None and self.trainer.predicting

    def _eval_loader(self, source: ImageSource, split: str | None = None) -> ResumableLoader:
        """In fixed order, under the evaluation transform. What is unreadable in a split is remembered, for `real_images`."""
        dataset = self._dataset(source, self.eval_transform)
        if split is not None:
            dataset = self._eval_datasets.setdefault(split, dataset)
        return self._loader(dataset, self.eval_batch_size, shuffle=False)

    def _dataset(self, source: ImageSource, transform: Transform) -> TransformedDataset:
        return TransformedDataset(source, transform, self.seed, self.max_bad_fraction, self.known_bad)

    def _loader(
        self,
        dataset: TransformedDataset,
        batch_size: int,
        shuffle: bool,
        repeats: int = 1,
        dealt: int | None = None,
    ) -> ResumableLoader:
        world_size, rank = self._processes()
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=EpochSampler(
                dataset,
                world_size,
                rank,
                shuffle,
                self.seed,
                drop_last=shuffle,
                repeats=repeats,
                dealt=dealt,
                shuffled=getattr(dataset.source, "shuffled", None),
            ),
            collate_fn=collate,
            timeout=self.worker_timeout if self.num_workers else 0,
            num_workers=self.num_workers,
            drop_last=shuffle,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0 and shuffle,
        )

    # --- on the device ------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Plan the photometry while its parameters are on the CPU, so that nothing has to wait for the device later."""
        if self._served and not self._predicting():  # no images
            return batch
        images, labels = batch
        if isinstance(images, View):
            return planned([images])[0], labels
        return planned(images) if isinstance(images, list) else images, labels

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self._served and not self._predicting():
            return batch
        images, labels = batch
        if isinstance(images, list):
            return [view for group in images for view in self._finished(group)], labels
        return self._finished(images)[0] if isinstance(images, PlannedViews) else self.normalize(images), labels

    def _finished(self, group: PlannedViews) -> Sequence[Tensor]:
        """The views as the network is fed them."""
        assert self.train_transform is not None  # only it makes planned views
        images = apply(torch.cat(group.images), group.plan, self.train_transform.stages)
        return self._standardize(images).chunk(len(group.images))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> floats with the data set's mean and deviation removed; floats pass unchanged.

        float32, or what `trainer.precision` wants as input (e.g. bfloat16 for `bf16-true`).
        """
        return self._standardize(images.float() / 255) if images.dtype == torch.uint8 else images

    def _standardize(self, images: Tensor) -> Tensor:
        """The same for floats in [0, 1]."""
        mean, std = self._statistics(images.device)
        images = (images - mean) / std
        # Lightning has converted the batch already; but then it was uint8.
        return images if self.trainer is None else self.trainer.precision_plugin.convert_input(images)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation (3, 1, 1). Copied without waiting for the device, which `torch.tensor(..., device=)` would."""
        values = self.mean, self.std
        mean, std = (torch.tensor(value).view(3, 1, 1).to(device, non_blocking=True) for value in values)
        return mean, std

    def denormalize(self, images: Tensor) -> Tensor:
        """Back to [0, 1], for pictures."""
        mean, std = self._statistics(images.device)
        return (images.float() * std + mean).clamp(0, 1)


def planned(views: list[View]) -> list[PlannedViews]:
    """Neighbouring views of the same size together, for fewer and larger operations."""
    groups = [list(group) for _, group in itertools.groupby(views, key=lambda view: view.image.shape)]
    return [
        PlannedViews([view.image for view in group], plan(torch.cat([view.parameters for view in group])))
        for group in groups
    ]


def class_numbers(spec: str, classes: list[str]) -> list[int]:
    """Numbers of the classes in "0-99", "3,5,8-9" or "cat,dog", ascending.

    Raises:
        ConfigError: If there is no such class.
    """
    chosen: set[int] = set()
    for part in (part.strip() for part in spec.split(",")):
        first, dash, last = part.partition("-")
        if part in classes:
            chosen.add(classes.index(part))
        elif first.isdecimal() and (last.isdecimal() if dash else True):
            chosen |= set(range(int(first), int(last or first) + 1)) or {len(classes)}
        else:
            chosen.add(len(classes))
    if max(chosen) >= len(classes):
        raise ConfigError(
            f"data.classes={spec!r}: there are {len(classes)} classes, numbered from 0 ({', '.join(classes[:5])}, ...). "
            'Allowed are numbers, ranges and names, separated by commas, such as "0-99" or "cat,dog".'
        )
    return sorted(chosen)
