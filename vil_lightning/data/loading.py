"""Reproducible loading: what a sample looks like depends on (seed, epoch, index) alone.

Not on the number of workers or processes, nor on where a run was interrupted: the sampler hands the epoch to the
data set together with the index, each sample draws its randomness from both, and the loader can start in mid-epoch.
With repeated augmentation, where an image occurs several times in an epoch, "epoch" counts these occurrences, too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Key = tuple[int, int]  # (draw, index); draw = epoch * repeats + number of the repeat, simply the epoch without repeats


class ImageSource(Protocol):
    """Decoded images: what a data module builds its data sets from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A uint8 image (3, H, W) and its class."""
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

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class SubsetSource:
    """Some images of another source."""

    def __init__(self, source: ImageSource, indices: list[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[self.indices[index]]


def share_of_classes(source: ImageSource, fraction: float, seed: int) -> SubsetSource:
    """A random share of the images of every class, at least one.

    Args:
        source: With a list `labels`, so that no image has to be decoded.
        fraction: In (0, 1].
        seed: Draws the images.
    """
    labels = torch.tensor(source.labels)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[: max(1, round(fraction * len(members)))]])
    return SubsetSource(source, torch.cat(chosen).sort().values.tolist())


class NumberedSource:
    """The images of another source with their number in place of the class."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[index][0], index


@contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Run torch's CPU generator from a seed made of the three numbers; restore it afterwards."""
    # Distinct odd multipliers modulo 2**63 keep neighbouring (epoch, index) pairs apart; the Mersenne Twister's
    # own seeding scrambles the rest.
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) % (1 << 63)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(mixed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class TransformedDataset(Dataset[tuple[Any, int]]):
    """An image source behind a random transform, indexed by (draw, index)."""

    def __init__(self, source: ImageSource, transform: Callable[[Tensor], Any], seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        draw, index = key if isinstance(key, tuple) else (0, key)  # trainer.overfit_batches brings a sampler of its own
        image, label = self.source[index]
        with seeded(self.seed, draw, index):
            return self.transform(image), label


class EpochSampler(DistributedSampler[Key]):
    """Deals the images to all processes in turn, as (draw, index) pairs, optionally from the middle of an epoch.

    Being a `DistributedSampler`, it is left alone by Lightning, which calls `set_epoch` on it.

    Args:
        repeats: How often an image is dealt in a row (repeated augmentation). An epoch keeps its length: it takes the first
            1/repeats of the shuffled images. Copies are neighbours, so that they go to different processes.
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
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.repeats = repeats
        self.skip_samples = 0

    def __iter__(self) -> Iterator[Key]:
        skip, self.skip_samples = self.skip_samples, 0
        order = self._order()
        for place in range(skip, self.num_samples):
            position = place * self.num_replicas + self.rank  # among those of all processes
            image, repeat = divmod(position, self.repeats)
            # Without drop_last there may be more positions than images: the first ones come again.
            yield self.epoch * self.repeats + repeat, order[image % len(order)]

    def _order(self) -> list[int]:
        """All images in this epoch's order, the same as in `DistributedSampler`."""
        num_images = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return list(range(num_images))
        return torch.randperm(num_images, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that remembers how many batches it has handed out in this epoch (Lightning saves and restores it)."""

    _batches_to_skip = 0
    _batches_done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._batches_to_skip = self._batches_to_skip, 0
        if isinstance(self.sampler, EpochSampler) and self.batch_size is not None:
            self.sampler.skip_samples = skip * self.batch_size
        self._batches_done = skip
        for batch in super().__iter__():
            self._batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches_done": self._batches_done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._batches_to_skip = state_dict["batches_done"] % max(len(self), 1)
