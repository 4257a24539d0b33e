"""Reproducible loading: what a sample looks like depends on (seed, epoch, index) alone.

Not on the number of workers or processes, nor on where a run was interrupted: the sampler hands the epoch to the
data set together with the index, each sample draws its randomness from both, and the loader can start in mid-epoch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Key = tuple[int, int]  # (epoch, index)


class ImageSource(Protocol):
    """Decoded images: what a data module builds its data sets from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A uint8 image (3, H, W) and its class."""
        ...


class SubsetSource:
    """Some images of another source."""

    def __init__(self, source: ImageSource, indices: list[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[self.indices[index]]


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
    """An image source behind a random transform, indexed by (epoch, index)."""

    def __init__(self, source: ImageSource, transform: Callable[[Tensor], Any], seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        epoch, index = key
        image, label = self.source[index]
        with seeded(self.seed, epoch, index):
            return self.transform(image), label


class EpochSampler(DistributedSampler[Key]):
    """Shuffles (or not) over all processes and yields (epoch, index) pairs, optionally from the middle of an epoch.

    Being a `DistributedSampler`, it is left alone by Lightning, which calls `set_epoch` on it.
    """

    def __init__(
        self, dataset: Dataset[Any], num_replicas: int, rank: int, shuffle: bool, seed: int, drop_last: bool
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.skip_samples = 0

    def __iter__(self) -> Iterator[Key]:
        skip, self.skip_samples = self.skip_samples, 0
        for position, index in enumerate(super().__iter__()):
            if position >= skip:
                yield self.epoch, index  # type: ignore[misc]


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
