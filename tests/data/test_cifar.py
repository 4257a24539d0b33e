"""CIFAR-10 and CIFAR-100, from tiny archives of the same format: nothing is downloaded."""

import hashlib
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets

from vil_lightning.data import CIFAR10, CIFAR100, TrainTransform
from vil_lightning.errors import ConfigError

NUM_CLASSES = {CIFAR10: 10, CIFAR100: 100}


def write(folder: Path, name: str, content: dict[str, Any]) -> list[str]:
    """Pickle a part of an archive; returns its entry in torchvision's list of files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = pickle.dumps(content)
    (folder / name).write_bytes(data)
    return [name, hashlib.md5(data).hexdigest()]


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The data module; `tmp_path / "made"` holds files that torchvision accepts: 3 parts of 4 images, 5 test images."""
    module = request.param
    dataset = getattr(torchvision.datasets, module.__name__)
    folder, labels_key = tmp_path / "made" / dataset.base_folder, "labels" if module is CIFAR10 else "fine_labels"

    def part(name: str, count: int, seed: int) -> list[str]:
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        return write(folder, name, {"data": pixels, labels_key: [(seed + i) % 10 for i in range(count)]})

    monkeypatch.setattr(dataset, "train_list", [part(f"part_{seed}", 4, seed) for seed in range(3)])
    monkeypatch.setattr(dataset, "test_list", [part("test", 5, 7)])
    name, digest = write(folder, "meta", {dataset.meta["key"]: [f"kind {i}" for i in range(NUM_CLASSES[module])]})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "filename": name, "md5": digest})
    return module


@pytest.mark.parametrize("download", [True, False])  # with the files in place, nothing is downloaded
def test_cifar__images_labels_and_classes(kind: Any, tmp_path: Path, download: bool) -> None:
    data = kind(str(tmp_path / "made"), download, batch_size=4, num_workers=0, train_transform=TrainTransform(32))
    data.prepare_data()
    data.setup("fit")
    assert (len(data.train_source), len(data.val_source)) == (12, 5)
    assert data.classes == [f"kind {i}" for i in range(NUM_CLASSES[kind])]
    image, label = data.train_source[6]  # the third image of the second part
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)[2]
    assert torch.equal(image, torch.from_numpy(pixels))
    assert label == 3
    assert data.val_source.labels == [7, 8, 9, 0, 1]
    views, labels = next(iter(data.train_dataloader()))
    assert (views.image.shape, labels.shape) == ((4, 3, 32, 32), (4,))


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_cifar__files_are_missing(kind: Any, tmp_path: Path, stage: str) -> None:
    data = kind(str(tmp_path / "elsewhere"), download=False)
    data.prepare_data()  # leaves the network alone
    with pytest.raises(
        ConfigError, match=r"data\.root=.*elsewhere: there is no complete cifar-10.*-py.*data\.download"
    ):
        data.setup(stage)


def test_cifar__a_file_is_damaged(kind: Any, tmp_path: Path) -> None:
    next((tmp_path / "made").rglob("test")).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"there is no complete"):
        kind(str(tmp_path / "made"), download=False).setup()


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("Error downloading")], ids=repr)
def test_cifar__download_fails(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(self: Any) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fails)
    with pytest.raises(ConfigError, match=rf"{kind.__name__} could not be downloaded \(.*(route|Error).*data\.root"):
        kind(str(tmp_path / "elsewhere")).prepare_data()


def test_cifar__downloads_to_root(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: Any) -> None:
        (tmp_path / "made").rename(self.root)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fetch)
    data = kind(str(tmp_path / "fetched"))
    data.prepare_data()
    data.setup()
    assert len(data.train_source) == 12
