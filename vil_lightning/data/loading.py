"""Reproducible loading: what a view looks like depends on (seed, epoch, index of the image, number of the view) alone.

Not on the number of workers or processes, nor on where a run was interrupted: the sampler hands the epoch to the data set
together with the index, each view draws its randomness from a generator made of the four numbers, and the loader can start
in mid-epoch. With repeated augmentation, where an image occurs several times in an epoch, "epoch" counts these occurrences,
too.

An image that cannot be read is replaced by another one, the same every time, and named in the log; too many of them stop the
run.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from vil_lightning.data.images import BadImageError, Picture
from vil_lightning.data.transforms import Transform
from vil_lightning.errors import ConfigError

Key = tuple[int, int]  # (draw, index); draw = epoch * repeats + number of the repeat, simply the epoch without repeats
log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Images and their classes: what a data module builds its data sets from."""

    @property
    def labels(self) -> list[int]:
        """Of all images, known without reading one."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        """A uint8 image (3, H, W) or an `EncodedImage`, and its class."""
        ...


class TensorSource:
    """Images held in memory.

    Args:
        images: uint8 (N, 3, H, W).
        labels: (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return self.images[index], self.labels[index]


class SubsetSource:
    """Some images of another source.

    Args:
        renamed: New numbers of the classes, where they change.
    """

    def __init__(self, source: ImageSource, indices: list[int], renamed: dict[int, int] | None = None) -> None:
        self.source = source
        self.indices = indices
        self.renamed = renamed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        picture, label = self.source[self.indices[index]]
        return picture, label if self.renamed is None else self.renamed[label]

    @property
    def labels(self) -> list[int]:
        labels = self.source.labels
        chosen = [labels[i] for i in self.indices]
        return chosen if self.renamed is None else [self.renamed[label] for label in chosen]


class NumberedSource:
    """The images of another source with their number in place of the class."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return self.source[index][0], index

    @property
    def labels(self) -> list[int]:
        return list(range(len(self.source)))


def share_of_classes(source: ImageSource, fraction: float, seed: int) -> SubsetSource:
    """A random share of the images of every class, at least one.

    Args:
        source: Of all images.
        fraction: In (0, 1].
        seed: Draws the images.
    """
    labels = torch.tensor(source.labels)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[: max(1, round(fraction * len(members)))]])
    return SubsetSource(source, torch.cat(chosen).sort().values.tolist())


# --- samples ----------------------------------------------------------------------------------------------------------


def view_generator(seed: int, epoch: int, index: int, view: int) -> np.random.Generator:
    """The generator of one view of one image in one epoch: a stream of random numbers of its own.

    Philox is a function of a key and a counter; the seed is the key, the other numbers are the counter's upper words, so no
    two streams ever meet (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    return np.random.Generator(np.random.Philox(key=seed % (1 << 64), counter=[0, view, index, epoch]))


class Sample(NamedTuple):
    """An item on its way through the loader."""

    views: Any
    label: int
    bad: list[tuple[str, str, int]]  # name, reason and index of images that could not be read and were replaced


class TransformedDataset(Dataset[Sample]):
    """An image source behind a random transform, indexed by (draw, index).

    Args:
        max_bad_fraction: Share of the images that may be unreadable.
        known_bad: Unreadable images that were named in the log already, shared by the data sets of a run: name -> reason.
    """

    attempts = 8  # so many unreadable images one after the other are taken for a broken file system

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        seed: int,
        max_bad_fraction: float = 0.01,
        known_bad: dict[str, str] | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.known_bad = {} if known_bad is None else known_bad
        self.unreadable: dict[int, str] = {}  # index -> name; known in the main process only

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        draw, index = key if isinstance(key, tuple) else (0, key)  # trainer.overfit_batches brings a sampler of its own
        bad: list[tuple[str, str, int]] = []
        # The randomness stays that of `index`: otherwise a replacement would be the twin of its original.
        generators = ViewGenerators(self.seed, draw, index)
        for attempt in range(min(self.attempts, len(self))):
            # Far away: the neighbours of an unreadable file may have met the same fate. The golden section spreads best.
            place = (index + round(0.618 * len(self)) * attempt) % len(self)
            try:
                picture, label = self.source[place]
                return Sample(self.transform(picture, generators), label, bad)
            except BadImageError as error:
                bad.append((error.name, error.reason, place))
        return Sample(None, -1, bad)

    def note(self, bad: list[tuple[str, str, int]]) -> None:
        """Log images that could not be read, in the main process.

        Raises:
            ConfigError: If there are too many of them by now.
        """
        for name, reason, index in bad:
            self.unreadable[index] = name
            if name not in self.known_bad:
                self.known_bad[name] = reason
                log.warning("unreadable image %d, skipped: %s: %s", len(self.known_bad), name, reason)
        if len(self.unreadable) > self.max_bad_fraction * len(self):
            raise ConfigError(
                f"{len(self.unreadable)} of {len(self)} images cannot be read, more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows. Repair or remove them, or raise data.max_bad_fraction:\n  "
                + "\n  ".join(f"{name}: {self.known_bad[name]}" for name in sorted(set(self.unreadable.values())))
            )


class ViewGenerators:
    """The generators of an image's views: `generators(view)`."""

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        self.numbers = (seed, epoch, index)

    def __call__(self, view: int) -> np.random.Generator:
        return view_generator(*self.numbers, view)


class Batch(NamedTuple):
    """A collated batch, with the images that could not be read for it."""

    content: Any
    bad: list[tuple[str, str, int]]
    failed: bool


def collate(samples: list[Sample]) -> Batch:
    """Stack samples; `content` is (views, labels)."""
    bad = [entry for sample in samples for entry in sample.bad]
    if any(sample.views is None for sample in samples):
        return Batch(None, bad, True)
    return Batch(default_collate([(sample.views, sample.label) for sample in samples]), bad, False)


# --- order ------------------------------------------------------------------------------------------------------------


class EpochSampler(DistributedSampler[Key]):
    """Deals the images to all processes in turn, as (draw, index) pairs, optionally from the middle of an epoch.

    Being a `DistributedSampler`, it is left alone by Lightning, which calls `set_epoch` on it.

    Args:
        repeats: How often an image is dealt in a row (repeated augmentation). An epoch keeps its length: it takes the first
            1/repeats of the shuffled images. Copies are neighbours, so that they go to different processes.
        dealt: How many images an epoch deals to all processes together, a multiple of their number; all if None.
        shuffled: The order of all images as a function of a generator; any order is equally likely if None.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int,
        rank: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        repeats: int = 1,
        dealt: int | None = None,
        shuffled: Callable[[torch.Generator], list[int]] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        if dealt is not None:
            self.num_samples, self.total_size = dealt // num_replicas, dealt
        self.repeats = repeats
        self.shuffled = shuffled
        self.skip_samples = 0

    def __iter__(self) -> Iterator[Key]:
        skip, self.skip_samples = self.skip_samples, 0
        return self.keys_from(skip)

    def keys_from(self, place: int) -> Iterator[Key]:
        """What this process gets in this epoch, from its `place`-th image on."""
        order = self._order()
        for own in range(place, self.num_samples):
            position = own * self.num_replicas + self.rank  # among those of all processes
            image, repeat = divmod(position, self.repeats)
            # Without drop_last there may be more positions than images: the first ones come again.
            yield self.epoch * self.repeats + repeat, order[image % len(order)]

    def _order(self) -> list[int]:
        """All images in this epoch's order, the same as in `DistributedSampler` unless the source has one of its own."""
        num_images = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return list(range(num_images))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return (
            torch.randperm(num_images, generator=generator).tolist()
            if self.shuffled is None
            else self.shuffled(generator)
        )


def dead_worker(reason: str) -> ConfigError:
    """The error to raise when a worker has died or stopped answering."""
    return ConfigError(
        f"A data worker died or stopped answering ({reason}). It may have run out of memory (use fewer data.num_workers), out "
        "of shared memory, or the file system that holds the images may have gone (a worker has data.worker_timeout seconds)."
    )


def death_of_worker(error: BaseException) -> str | None:
    """What torch says about a worker that was killed. It does so in a signal handler: the error comes out of whatever the
    main process was doing then, not only out of the loader.
    """
    text = str(error).partition("\n")[0].strip()
    return text if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid") else None


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that remembers how many batches it has handed out in this epoch (Lightning saves and restores it).

    With `collate`, it hands out the content of batches and reports unreadable images to the data set.
    """

    _batches_to_skip = 0
    _batches_done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._batches_to_skip = self._batches_to_skip, 0
        if isinstance(self.sampler, EpochSampler) and self.batch_size is not None:
            self.sampler.skip_samples = skip * self.batch_size
        self._batches_done = skip
        for batch in self._batches():
            self._batches_done += 1
            yield batch

    def _batches(self) -> Iterator[Any]:
        try:
            for batch in super().__iter__():
                yield self._content(batch) if isinstance(batch, Batch) else batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            # A death or a timeout (errors of the data set say "Caught ..."). Tensors of a dead worker cannot be fetched.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader "):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            if not isinstance(error, RuntimeError):
                # The signal of its death may still be on its way. It raises wherever the program then is: let it be here.
                with contextlib.suppress(RuntimeError):
                    time.sleep(0.5)
            raise dead_worker(reason) from error

    def _content(self, batch: Batch) -> Any:
        dataset: Any = self.dataset
        dataset.note(batch.bad)
        if batch.failed:
            names = "\n  ".join(f"{name}: {reason}" for name, reason, _ in batch.bad[-dataset.attempts :])
            raise ConfigError(
                f"{dataset.attempts} images one after the other cannot be read. Is the file system that holds them still there?"
                f"\n  {names}"
            )
        return batch.content

    @property
    def images_per_batch(self) -> int:
        """Images of one batch of all processes."""
        replicas = self.sampler.num_replicas if isinstance(self.sampler, EpochSampler) else 1
        return (self.batch_size or 1) * replicas

    def state_dict(self) -> dict[str, int]:
        return {"batches_done": self._batches_done, "images_per_batch": self.images_per_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind the images that were dealt, also if there were other processes or batches.

        Raises:
            ConfigError: If that is in the middle of a batch.
        """
        images = state_dict["batches_done"] * state_dict.get("images_per_batch", self.images_per_batch)
        batches, rest = divmod(images, self.images_per_batch)
        if rest:
            raise ConfigError(
                f"ckpt_path: the checkpoint was written {images} images into an epoch, but batches are of "
                f"{self.images_per_batch} images now (data.batch_size={self.batch_size} x processes). Resume with a "
                f"data.batch_size or a number of devices whose product divides {images}, or from a checkpoint at the end of an "
                "epoch."
            )
        self._batches_to_skip = batches % max(len(self), 1)
