"""What a view looks like depends on (seed, epoch, index, view) alone; images that cannot be read; dead workers."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from vil_lightning.data import Digits, MultiCrop
from vil_lightning.data.loading import EpochSampler, ResumableLoader, TransformedDataset, collate, view_generator

COUNT, BATCH = 22, 4


class Numbered:
    """Image i is grey of value i, plus a gradient to crop from."""

    labels = list(range(COUNT))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        gradient = torch.arange(16 * 16, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
        return (gradient + index).to(torch.uint8), index


def loader(
    rank: int = 0, world_size: int = 1, batch_size: int = BATCH, num_workers: int = 0, repeats: int = 1
) -> ResumableLoader:
    transform = MultiCrop(global_size=8, local_size=4, num_local_views=1)
    dataset = TransformedDataset(Numbered(), transform, seed=5)
    sampler = EpochSampler(dataset, world_size, rank, shuffle=True, seed=5, drop_last=True, repeats=repeats)
    return ResumableLoader(
        dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True, collate_fn=collate
    )


def epoch_of(loader: ResumableLoader, epoch: int = 0) -> list[Any]:
    loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return list(loader)


def same(a: Any, b: Any) -> bool:
    """Whether two batches have the same views and labels, bit for bit."""
    pairs = [pair for views in zip(a[0], b[0], strict=True) for pair in zip(*views, strict=True)]
    return torch.equal(a[1], b[1]) and all(torch.equal(x, y) for x, y in pairs)


def by_label(batches: list[Any]) -> dict[int, list[Tensor]]:
    """Images and parameters of every view of every image."""
    return {
        int(label): [tensor[i] for view in views for tensor in view]
        for views, labels in batches
        for i, label in enumerate(labels)
    }


def test_batches__independent_of_the_number_of_workers() -> None:
    alone, helped = epoch_of(loader(), 3), epoch_of(loader(num_workers=2), 3)
    assert len(alone) == len(helped) == COUNT // BATCH
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_samples__independent_of_the_number_of_processes() -> None:
    one = by_label(epoch_of(loader(batch_size=2), 1))
    ranks = [by_label(epoch_of(loader(rank, 2, batch_size=1), 1)) for rank in range(2)]
    assert not set(ranks[0]) & set(ranks[1])
    two = ranks[0] | ranks[1]
    assert set(one) == set(two) == set(range(COUNT))
    assert all(torch.equal(x, y) for label in one for x, y in zip(one[label], two[label], strict=True))


def test_global_batches__the_same_images_on_one_process_and_two() -> None:
    one = epoch_of(loader(batch_size=4))
    two = [epoch_of(loader(rank, 2, batch_size=2)) for rank in range(2)]
    for whole, first, second in zip(one, *two, strict=True):
        assert set(whole[1].tolist()) == set(first[1].tolist()) | set(second[1].tolist())


def test_epochs__differ_in_order_and_augmentation() -> None:
    first, second = epoch_of(loader(), 0), epoch_of(loader(), 1)
    assert [b[1].tolist() for b in first] != [b[1].tolist() for b in second]
    a, b = by_label(first), by_label(second)
    common = set(a) & set(b)
    assert len(common) > 10
    changed = [label for label in common if not torch.equal(a[label][0], b[label][0])]
    assert len(changed) > 0.8 * len(common)


def test_epochs__are_repeatable() -> None:
    assert all(same(a, b) for a, b in zip(epoch_of(loader(), 2), epoch_of(loader(), 2), strict=True))


def test_views__of_one_image_differ() -> None:
    views, _ = epoch_of(loader())[0]
    assert not torch.equal(views[0].image, views[1].image)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [1, 3])
def test_resumable_loader__continues_with_the_next_batch(done: int, num_workers: int) -> None:
    whole = epoch_of(loader(), 1)
    interrupted = loader()
    interrupted.sampler.set_epoch(1)  # type: ignore[union-attr]
    iterator = iter(interrupted)
    for _ in range(done):
        next(iterator)
    state = interrupted.state_dict()
    resumed = loader(num_workers=num_workers)
    resumed.load_state_dict(state)
    rest = epoch_of(resumed, 1)
    assert len(rest) == len(whole) - done
    assert all(same(a, b) for a, b in zip(rest, whole[done:], strict=True))
    # The next epoch starts at its beginning again.
    assert all(same(a, b) for a, b in zip(epoch_of(resumed, 2), epoch_of(loader(), 2), strict=True))


def test_resumable_loader__state_counts_on_after_resuming() -> None:
    resumed = loader()
    resumed.load_state_dict({"batches_done": 2})
    iterator = iter(resumed)
    next(iterator)
    assert resumed.state_dict() == {"batches_done": 3, "images_per_batch": resumed.images_per_batch}


def test_resumable_loader__finished_epoch_starts_the_next_one_from_its_beginning() -> None:
    finished = loader()
    epoch_of(finished, 0)
    resumed = loader()
    resumed.load_state_dict(finished.state_dict())
    assert all(same(a, b) for a, b in zip(epoch_of(resumed, 1), epoch_of(loader(), 1), strict=True))


def test_view_generator__each_number_counts() -> None:
    keys = list(itertools.product((0, 1, 2, 2**40), repeat=4))
    assert len({view_generator(*key).random() for key in keys}) == len(keys)
    assert view_generator(1, 2, 3, 4).random(3).tolist() == view_generator(1, 2, 3, 4).random(3).tolist()


def test_view_generator__neighbours_are_independent() -> None:
    """Means and correlations of the first two numbers of 40,000 neighbouring streams."""
    drawn = np.array(
        [view_generator(0, epoch, i, view).random(2) for epoch in (0, 1) for view in (0, 1) for i in range(10_000)]
    )
    streams = drawn.reshape(4, 10_000, 2)
    error = 4 / math.sqrt(10_000)
    assert np.abs(streams.mean(1) - 0.5).max() < error / math.sqrt(12)
    columns = np.concatenate([streams[..., 0], streams[..., 1]])
    correlations = np.corrcoef(columns) - np.eye(8)
    assert np.abs(correlations).max() < error
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < error


def test_data_module__seed_decides_the_batches() -> None:
    def first_batch(seed: int) -> Any:
        data = Digits(8, 8, train_transform=MultiCrop(8, 4, 1, hflip_prob=0.0), seed=seed)
        data.setup()
        return next(iter(data.train_dataloader()))

    assert same(first_batch(1), first_batch(1))
    assert not torch.equal(first_batch(1)[0][0].image, first_batch(2)[0][0].image)


# --- the order in which images are dealt, and repeated augmentation ---------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 3, 4, 50])
def test_epoch_sampler__order_of_the_distributed_sampler(world_size: int, shuffle: bool) -> None:
    for rank in range(world_size):
        settings = {"num_replicas": world_size, "rank": rank, "shuffle": shuffle, "seed": 5, "drop_last": shuffle}
        reference = DistributedSampler(Numbered(), **settings)
        sampler = EpochSampler(Numbered(), **settings)
        for epoch in (0, 3):
            reference.set_epoch(epoch)
            sampler.set_epoch(epoch)
            assert list(sampler) == [(epoch, index) for index in reference]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("repeats", [2, 3])
def test_repeats__copies_are_neighbours_and_the_epoch_keeps_its_length(world_size: int, repeats: int) -> None:
    def dealt(repeats: int, epoch: int) -> list[tuple[int, int]]:
        """What all processes get, in the order it is dealt in."""
        samplers = [EpochSampler(Numbered(), world_size, rank, True, 5, True, repeats) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [key for keys in zip(*samplers, strict=True) for key in keys]

    order = [index for _, index in dealt(1, 4)]
    assert len(order) == COUNT - COUNT % world_size
    expected = [(4 * repeats + repeat, index) for index in order for repeat in range(repeats)]
    assert dealt(repeats, 4) == expected[: len(order)]
    keys = [key for epoch in range(6) for key in dealt(repeats, epoch)]
    assert len(set(keys)) == len(keys)  # no image is ever augmented the same way twice


def test_repeats__copies_go_to_different_processes() -> None:
    ranks = [list(EpochSampler(Numbered(), 2, rank, True, 5, True, 2)) for rank in range(2)]
    assert [index for _, index in ranks[0]] == [index for _, index in ranks[1]]
    assert {draw for draw, _ in ranks[0]} == {0}
    assert {draw for draw, _ in ranks[1]} == {1}


def test_repeats__copies_are_augmented_differently() -> None:
    batches = epoch_of(loader(repeats=2))
    assert len(batches) == COUNT // BATCH
    different = 0
    for views, labels in batches:
        assert labels[0::2].tolist() == labels[1::2].tolist()
        images = views[0].image
        different += sum(not torch.equal(a, b) for a, b in zip(images[0::2], images[1::2], strict=True))
    assert different > 0.8 * len(batches) * BATCH / 2


def test_repeats__samples_independent_of_the_number_of_processes() -> None:
    whole = epoch_of(loader(batch_size=6, repeats=3), 1)
    parts = [epoch_of(loader(rank, 3, batch_size=2, repeats=3), 1) for rank in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for rank, share in enumerate(shares):
            views = [[tensor[rank::3] for tensor in view] for view in batch[0]]
            assert same(share, (views, batch[1][rank::3]))


@pytest.mark.parametrize("done", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_repeats__resumes_in_mid_epoch(world_size: int, done: int) -> None:
    def last() -> ResumableLoader:
        return loader(world_size - 1, world_size, batch_size=3, repeats=2)  # 3: in the middle of two copies

    whole = epoch_of(last(), 1)
    assert len(whole) == COUNT // world_size // 3
    resumed = last()
    resumed.load_state_dict({"batches_done": done % len(whole)})
    rest = epoch_of(resumed, 1)
    assert all(same(a, b) for a, b in zip(rest, whole[done % len(whole) :], strict=True))


def test_repeats__data_module_repeats_training_images_only() -> None:
    data = Digits(8, 60, train_transform=MultiCrop(8, 4, 0, hflip_prob=0.0), seed=1, repeats=3)
    data.setup()
    train = data.train_dataloader()
    assert len(train) == 1438 // 60
    _, labels = next(iter(train))
    assert labels[0::3].tolist() == labels[1::3].tolist() == labels[2::3].tolist()
    assert len(set(labels[0::3].tolist())) > 5
    for evaluation, count in ((data.val_dataloader(), 359), (data.eval_train_dataloader(), 1438)):
        keys = list(evaluation.sampler)
        assert keys == [(0, index) for index in range(count)]
