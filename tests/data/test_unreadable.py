"""Images that cannot be read, and workers that stop working."""

import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "methods"))
import forks

from vil_lightning.data import Digits, ImageFolder, MultiCrop
from vil_lightning.data.images import BadImageError, EncodedImage
from vil_lightning.data.loading import EpochSampler, ResumableLoader, TransformedDataset, collate, view_generator
from vil_lightning.data.transforms import EvalTransform
from vil_lightning.errors import ConfigError

COUNT = 60
BAD = (3, 4, 5, 40, 59)
REPLACED = {
    3: 17,
    4: 41,
    5: 42,
    40: 17,
    59: 36,
}  # 37 images further, the first twice: from 3 to 40, which is bad, to 17


class Damaged:
    """Image i is grey of value i; some cannot be decoded, others not even be opened."""

    labels = list(range(COUNT))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in BAD[:2]:
            raise BadImageError(f"file{index}.png", "is on strike")
        if index in BAD:
            return EncodedImage(b"rubbish", name=f"file{index}.png"), index
        return torch.full((3, 8, 8), index, dtype=torch.uint8), index


def loader(
    num_workers: int = 0, rank: int = 0, world_size: int = 1, limit: float = 0.1, shuffle: bool = True
) -> ResumableLoader:
    dataset = TransformedDataset(Damaged(), EvalTransform(8), seed=1, max_bad_fraction=limit)
    sampler = EpochSampler(dataset, world_size, rank, shuffle=shuffle, seed=1, drop_last=shuffle)
    return ResumableLoader(dataset, batch_size=6, sampler=sampler, num_workers=num_workers, collate_fn=collate)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable__replaced_counted_and_named_once(num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    images = loader(num_workers)
    with caplog.at_level(logging.WARNING, "vil_lightning"):
        for epoch in range(3):
            images.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            labels = torch.cat([labels for _, labels in images]).tolist()
            assert len(labels) == COUNT
            assert sorted(labels) == sorted([i for i in range(COUNT) if i not in BAD] + [REPLACED[i] for i in BAD])
    assert images.dataset.unreadable == {i: f"file{i}.png" for i in BAD}  # type: ignore[attr-defined]
    assert len(caplog.messages) == len(BAD)
    for i in BAD:
        assert sum(f"file{i}.png: " in message for message in caplog.messages) == 1
    assert "unreadable image 5, skipped" in caplog.messages[-1]
    assert any("file3.png: is on strike" in message for message in caplog.messages)


def test_unreadable__same_batches_whatever_the_number_of_workers_and_processes() -> None:
    one, two = (list(loader(num_workers)) for num_workers in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    halves = [torch.cat([labels for _, labels in loader(0, rank, 2)]) for rank in range(2)]
    whole = torch.cat([labels for _, labels in one])
    assert torch.equal(torch.stack(halves, dim=1).flatten(), whole)


def test_unreadable__replacement_is_no_twin() -> None:
    """Image 42, itself and in place of image 5, gets different views."""

    def transform(picture: Any, generators: Any) -> torch.Tensor:
        if isinstance(picture, EncodedImage):
            picture = picture.decode()
        return torch.tensor(generators(0).random(), dtype=torch.float64)

    dataset = TransformedDataset(Damaged(), transform, seed=1)
    seen = {index: float(dataset[2, index].views) for index in (5, 42)}
    assert seen[5] != seen[42] == float(view_generator(1, 2, 42, 0).random())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable__too_many_stop_with_the_list(num_workers: int) -> None:
    images = loader(num_workers, limit=4 / COUNT)
    with pytest.raises(ConfigError) as info:
        list(images)
    message = str(info.value)
    assert message.startswith("5 of 60 images cannot be read, more than data.max_bad_fraction=0.06")
    assert "or raise data.max_bad_fraction" in message
    assert message.count("\n") == 5
    assert all(f"file{i}.png: " in message for i in BAD)


def test_unreadable__exactly_the_limit_goes_on() -> None:
    assert len(list(loader(limit=5 / COUNT))) == 10


class Gone:
    """The file system has vanished."""

    labels = list(range(COUNT))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return EncodedImage(f"/vanished/{index}.png"), index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable__all_of_them(num_workers: int) -> None:
    dataset = TransformedDataset(Gone(), EvalTransform(8), seed=1, max_bad_fraction=1.0)
    with pytest.raises(ConfigError, match=r"8 images one after the other cannot be read\. Is the file system") as info:
        list(ResumableLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=collate))
    assert "/vanished/3.png: cannot be read (No such file or directory)" in str(info.value)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name, value in (("a", 50), ("b", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (8, 8), (value + i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "val" / "a" / "9.png").write_bytes(b"")
    (tmp_path / "train" / "b" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_real_images__leave_out_what_stands_in_for_others(folder: Path, world_size: int, num_workers: int) -> None:
    counted = 0
    for rank in range(world_size):
        data = ImageFolder(str(folder), 8, 4, num_workers, eval_batch_size=3, max_bad_fraction=0.2)
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, predicting=False)
        data.setup("fit")
        for batch_idx, (images, labels) in enumerate(data.val_dataloader()):
            real = data.real_images(batch_idx, len(labels))
            places = (batch_idx * 3 + torch.arange(len(labels))) * world_size + rank
            assert real.tolist() == [place < 20 and place != 9 for place in places.tolist()]
            counted += int(real.sum())
            assert images.shape[1:] == (3, 8, 8)
    assert counted == 19


def test_data_module__one_log_entry_for_all_loaders(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ImageFolder(str(folder), 8, 4, 0, max_bad_fraction=0.2, train_transform=MultiCrop(8, 4, 1))
    data.setup("fit")
    for _ in range(2):
        for images in (data.train_dataloader(), data.eval_train_dataloader(), data.val_dataloader()):
            list(images)
    data.val_images([8, 9])
    assert set(data.known_bad) == {str(folder / "train/b/0.png"), str(folder / "val/a/9.png")}
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("limit", [-0.1, 1.5])
def test_max_bad_fraction__out_of_range(limit: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.max_bad_fraction={limit} must be in \[0, 1\]"):
        Digits(max_bad_fraction=limit)


@pytest.mark.parametrize("name", ["num_workers", "worker_timeout"])
def test_workers__negative(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name}=-1"):
        Digits(**{name: -1})


# --- workers ----------------------------------------------------------------------------------------------------------


class Deadly(Damaged):
    """Reading image 30 kills the process, or takes forever."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == 30 and self.how == "dies":
            os._exit(1)
        if index == 30:
            time.sleep(90)
        return torch.zeros(3, 8, 8, dtype=torch.uint8), index


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_worker__dead_or_hanging_ends_with_one_error(how: str, tmp_path: Path) -> None:
    """In a process of its own, since torch reports a dead worker to its whole process."""
    script = tmp_path / "main.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_unreadable
from vil_lightning.data import Digits, TrainTransform
from vil_lightning.errors import ConfigError

class Data(Digits):
    def build_sources(self):
        return test_unreadable.Deadly({how!r}), test_unreadable.Deadly({how!r}), ["only"]

data = Data(8, 5, num_workers=2, train_transform=TrainTransform(8), worker_timeout=2.0, seed=0)
data.setup()
try:
    list(data.train_dataloader())
except ConfigError as error:
    print("refused:", error, file=sys.stderr)
""")
    start = time.monotonic()
    ((code, output),) = forks.run(script, [dict(os.environ)], timeout=100)
    assert code == 0, output
    assert "refused: A data worker died or stopped answering (" in output
    assert "data.num_workers" in output
    assert time.monotonic() - start < 60  # long before the image would have been read


def test_worker__errors_of_the_code_stay_what_they_are() -> None:
    class Buggy(Damaged):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            raise RuntimeError("a bug")

    dataset = TransformedDataset(Buggy(), EvalTransform(8), seed=1)
    for num_workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug"):
            list(ResumableLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=collate))
