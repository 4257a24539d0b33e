"""A pretraining and a supervised recipe run from every kind of source; two processes see every image once.

All sources hold the same pictures, made of the built-in digits.
"""

import hashlib
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from shrunk import CONFIGS, PRETRAIN, Command
from sklearn.datasets import load_digits
from torch import Tensor

from vil_lightning.data import MultiCrop, convert

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from tiny import run_in_two_processes, trainer

NUM_TRAIN, NUM_VAL = 70, 20


def pictures() -> list[tuple[Image.Image, int]]:
    """Ninety digits, no two the same."""
    digits = load_digits()
    images = (digits.images[: NUM_TRAIN + NUM_VAL] * (255 / 16)).round().astype("uint8")
    return [(Image.fromarray(image), int(label)) for image, label in zip(images, digits.target, strict=False)]


# --- the same pictures in every form: a folder -> the arguments of the command line -----------------------------------


def folders(root: Path, name: str = "ImageFolder", prefix: str = "") -> list[str]:
    for i, (image, label) in enumerate(pictures()):
        folder = root / ("train" if i < NUM_TRAIN else "val") / f"{prefix}{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i:03d}.png")
    return ["--data", name, "--data.root", str(root)]


def imagenet(root: Path) -> list[str]:
    return folders(root, "ImageNet", "n0000000")


def torchvision(root: Path) -> list[str]:
    """FashionMNIST's files (they are MNIST's)."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, part in (("train", pictures()[:NUM_TRAIN]), ("t10k", pictures()[NUM_TRAIN:])):
        pixels = b"".join(image.resize((28, 28)).tobytes() for image, _ in part)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, len(part), 28, 28) + pixels)
        labels = bytes(label for _, label in part)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(part)) + labels)
    return ["--data", "TorchvisionData", "--data.name", "FashionMNIST", "--data.root", str(root)]


def hugging_face(root: Path) -> list[str]:
    names = datasets.ClassLabel(names=[str(i) for i in range(10)])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    for split, part in (("train", pictures()[:NUM_TRAIN]), ("validation", pictures()[NUM_TRAIN:])):
        columns = {"image": [image for image, _ in part], "label": [label for _, label in part]}
        table = datasets.Dataset.from_dict(columns, features=features)
        root.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(root / f"{split}.parquet"))
    return ["--data", "HuggingFaceData", "--data.path", str(root)]


def shards(root: Path) -> list[str]:
    source = folders(root / "files")
    small = ["--images_per_shard", "16", "--workers", "1"]
    convert.main([*source, "--data.num_workers", "0", "--out", str(root / "shards"), *small])
    return ["--data", "StreamingData", "--data.root", str(root / "shards"), "--data.shuffle_window", "2"]


SOURCES: dict[str, Callable[[Path], list[str]]] = {
    "ImageFolder": folders,
    "ImageNet": imagenet,
    "TorchvisionData": torchvision,
    "HuggingFaceData": hugging_face,
    "StreamingData": shards,
}


@pytest.fixture(scope="module")
def source_args(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arguments that name each source, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        return {name: make(tmp_path_factory.mktemp(name)) for name, make in SOURCES.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- recipes ----------------------------------------------------------------------------------------------------------

IN_THIS_PROCESS = ["--data.num_workers", "0", "--data.img_size", "16"]
SUPERVISED = [
    *("fit", "--config", str(CONFIGS / "train_supervised.yaml"), "--trainer.max_epochs", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--data.batch_size", "16"),
    *("--model.backbone.kwargs", "{img_size: 16, patch_size: 8, embed_dim: 32, depth: 2}"),
]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("recipe", [PRETRAIN, SUPERVISED], ids=["dino", "supervised"])
def test_recipes__run_from_every_source(
    command: Command, tmp_path: Path, source_args: dict[str, list[str]], recipe: list[str], name: str
) -> None:
    result = command(*recipe, *source_args[name], *IN_THIS_PROCESS)
    assert result.code == 0, result.err
    assert f"{name}: {NUM_TRAIN} training and {NUM_VAL} val images, 10 classes" in result.out
    assert list(tmp_path.glob("checkpoints/*/last.ckpt"))


# --- every image once, on any number of processes ---------------------------------------------------------------------


class Witness(L.LightningModule):
    """Records a fingerprint of every image's views, as they come from the loader, and its label."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[tuple[str, int]]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, labels = batch
        for i, label in enumerate(labels.tolist()):
            content = b"".join((255 * view[i]).round().short().numpy().tobytes() for view in views)
            self.seen[-1].append((hashlib.sha256(content).hexdigest(), label))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data_of(args: list[str], batch_size: int, num_workers: int) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    own = ["--data.img_size", "16", "--data.batch_size", str(batch_size), "--data.num_workers", str(num_workers)]
    data = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parser.parse_args([*args, *own])).data
    data.train_transform, data.seed = MultiCrop(16, 8, 1), 3
    return data


def witness(world_size: int, out: Path) -> None:
    """Two epochs from every source; saves what was seen."""
    torch.set_num_threads(1)
    seen = {}
    for name, args in torch.load(out / "args.pt", weights_only=True).items():
        module = Witness()
        parallel = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
        fit = trainer(out, max_epochs=2, **parallel)
        fit.fit(module, datamodule=data_of(args, 10 // world_size, num_workers=0))
        seen[name] = module.seen
        rank = fit.global_rank
    torch.save(seen, out / f"world{world_size}_rank{rank}.pt")


@pytest.mark.timeout(300)
def test_two_processes__see_every_image_once_and_the_same_views(
    tmp_path: Path, source_args: dict[str, list[str]]
) -> None:
    torch.save(source_args, tmp_path / "args.pt")
    witness(1, tmp_path)
    results = run_in_two_processes(__file__, "witness", tmp_path, timeout=250)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    one = torch.load(tmp_path / "world1_rank0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / f"world2_rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name in SOURCES:
        for epoch in range(2):
            alone = one[name][epoch]
            both = [entry for rank in ranks for entry in rank[name][epoch]]
            assert len(alone) == len(both) == len(set(alone)) == NUM_TRAIN, name
            assert set(alone) == set(both), name
        assert not set(one[name][0]) & set(one[name][1]), name  # another epoch, other views


@pytest.mark.parametrize("name", ["ImageFolder", "StreamingData", "HuggingFaceData"])
def test_workers__make_the_same_batches(source_args: dict[str, list[str]], name: str) -> None:
    batches = []
    for num_workers in (0, 1, 2):
        data = data_of(source_args[name], 10, num_workers)
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
    for alone, *helped in zip(*batches, strict=True):
        for other in helped:
            assert torch.equal(alone[1], other[1])
            pairs = [pair for views in zip(alone[0], other[0], strict=True) for pair in zip(*views, strict=True)]
            assert all(torch.equal(a, b) for a, b in pairs)


def test_shards__hold_the_pictures_of_the_folder(source_args: dict[str, list[str]]) -> None:
    files, packed = (data_of(source_args[name], 10, 0) for name in ("ImageFolder", "StreamingData"))
    for data in (files, packed):
        data.setup("fit")

    def content(source: Any) -> list[tuple[bytes, int]]:
        return sorted((source[i][0].encoded(), source[i][1]) for i in range(len(source)))

    assert content(files.train_source) == content(packed.train_source)
    assert content(files.val_source) == content(packed.val_source)
