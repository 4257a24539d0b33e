"""Data sets of torchvision, from tiny ones of the same format: nothing is downloaded."""

import bz2
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from vil_lightning.data import TorchvisionData, TrainTransform
from vil_lightning.data.images import EncodedImage
from vil_lightning.data.torchvision_data import DATASETS
from vil_lightning.errors import ConfigError

Patch = pytest.MonkeyPatch
TV: Any = torchvision.datasets


class Maker:
    """Writes tiny data sets; every picture is another shade."""

    def __init__(self, root: Path, patch: Patch) -> None:
        self.root = root
        self.patch = patch
        self.shade = 0

    def image(self, path: str, mode: str = "RGB") -> None:
        self.shade += 1
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (self.shade, 10, 2 * self.shade)).convert(mode).save(file)

    def text(self, path: str, *lines: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")

    def data(self, path: str, content: bytes) -> str:
        """Write a file; returns its digest."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return hashlib.md5(content).hexdigest()

    def pixels(self, *shape: int) -> np.ndarray:
        self.shade += 1
        return np.random.default_rng(self.shade).integers(0, 256, shape, dtype=np.uint8)

    def mat(self, path: str, **content: Any) -> str:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(file, content)
        return hashlib.md5(file.read_bytes()).hexdigest()


def cifar(make: Maker, name: str) -> None:
    kind, key = getattr(TV, name), "labels" if name == "CIFAR10" else "fine_labels"

    def part(file: str, count: int) -> list[str]:
        content = {"data": make.pixels(count, 3072), key: [i % 3 for i in range(count)]}
        return [file, make.data(f"{kind.base_folder}/{file}", pickle.dumps(content))]

    make.patch.setattr(kind, "train_list", [part("one", 4), part("two", 3)])
    make.patch.setattr(kind, "test_list", [part("test", 3)])
    digest = make.data(f"{kind.base_folder}/meta", pickle.dumps({kind.meta["key"]: ["a", "b", "c"]}))
    make.patch.setattr(kind, "meta", {**kind.meta, "filename": "meta", "md5": digest})


def mnist(make: Maker, name: str) -> None:
    for part, count in (("train", 6), ("t10k", 4)):
        header = b"".join(int(n).to_bytes(4, "big") for n in (0x803, count, 28, 28))
        make.data(f"{name}/raw/{part}-images-idx3-ubyte", header + make.pixels(count, 28, 28).tobytes())
        header = b"".join(int(n).to_bytes(4, "big") for n in (0x801, count))
        make.data(f"{name}/raw/{part}-labels-idx1-ubyte", header + bytes(i % 3 for i in range(count)))


def usps(make: Maker, name: str) -> None:
    for file, count in (("usps.bz2", 5), ("usps.t.bz2", 3)):
        lines = []
        for i in range(count):
            values = " ".join(f"{j + 1}:{v / 127.5 - 1:.4f}" for j, v in enumerate(make.pixels(256)))
            lines.append(f"{i % 2 + 1} {values}")
        make.data(file, bz2.compress("\n".join(lines).encode()))


def stl10(make: Maker, name: str) -> None:
    files = {"train_X": 4, "train_y": 4, "unlabeled_X": 6, "test_X": 3, "test_y": 3}
    digests = {}
    for file, count in files.items():
        content = make.pixels(count, 3, 96, 96).tobytes() if "X" in file else bytes(i % 2 + 1 for i in range(count))
        digests[file] = [f"{file}.bin", make.data(f"stl10_binary/{file}.bin", content)]
    make.patch.setattr(TV.STL10, "train_list", [digests[key] for key in ("train_X", "train_y", "unlabeled_X")])
    make.patch.setattr(TV.STL10, "test_list", [digests[key] for key in ("test_X", "test_y")])
    make.text("stl10_binary/class_names.txt", "airplane", "bird")


def svhn(make: Maker, name: str) -> None:
    entries = {}
    for split, count in (("train", 4), ("test", 3), ("extra", 5)):
        labels = np.array(
            [[10 if i % 3 == 0 else i % 3] for i in range(count)], dtype=np.uint8
        )  # 10 stands for the digit 0
        digest = make.mat(f"{split}_32x32.mat", X=make.pixels(32, 32, 3, count), y=labels)
        entries[split] = ["", f"{split}_32x32.mat", digest]
    make.patch.setattr(TV.SVHN, "split_list", entries)


def dtd(make: Maker, name: str) -> None:
    for i, split in enumerate(("train", "val", "test")):
        files = [f"{kind}/{kind}_{i}{j}.jpg" for kind in ("dotted", "banded") for j in range(2)]
        make.text(f"dtd/dtd/labels/{split}1.txt", *files)
        for file in files:
            make.image(f"dtd/dtd/images/{file}")


def aircraft(make: Maker, name: str) -> None:
    make.text("fgvc-aircraft-2013b/data/variants.txt", "A320 b", "747")
    for i, split in enumerate(("train", "val", "test")):
        make.text(f"fgvc-aircraft-2013b/data/images_variant_{split}.txt", f"9{i} 747", f"1{i} A320 b")
        for number in (f"9{i}", f"1{i}"):
            make.image(f"fgvc-aircraft-2013b/data/images/{number}.jpg")


def flowers(make: Maker, name: str) -> None:
    for i in range(1, 7):
        make.image(f"flowers-102/jpg/image_{i:05d}.jpg")
    files = {
        "label": make.mat("flowers-102/imagelabels.mat", labels=np.array([[2, 1, 2, 1, 2, 1]])),
        "setid": make.mat("flowers-102/setid.mat", trnid=[[5, 2]], valid=[[1, 6]], tstid=[[3, 4]]),
    }
    names = {"label": "imagelabels.mat", "setid": "setid.mat"}
    make.patch.setattr(TV.Flowers102, "_file_dict", {key: (names[key], digest) for key, digest in files.items()})


def food(make: Maker, name: str) -> None:
    for i, split in enumerate(("train", "test")):
        content = {kind: [f"{kind}/{i}{j}" for j in range(2)] for kind in ("pizza", "apple_pie")}
        make.text(f"food-101/meta/{split}.json", json.dumps(content))
        for files in content.values():
            for file in files:
                make.image(f"food-101/images/{file}.jpg")


def pets(make: Maker, name: str) -> None:
    for i, split in enumerate(("trainval", "test")):
        ids = [(f"{kind}_{i}{j}", label) for label, kind in ((1, "Abyssinian"), (2, "great_dane")) for j in range(2)]
        make.text(f"oxford-iiit-pet/annotations/{split}.txt", *(f"{name} {label} 1 1" for name, label in ids))
        for name, _ in ids:
            make.image(f"oxford-iiit-pet/images/{name}.jpg")


def cars(make: Maker, name: str) -> None:
    kind = np.dtype([("fname", object), ("class", object)])
    for folder, file in (("cars_train", "devkit/cars_train_annos"), ("cars_test", "cars_test_annos_withlabels")):
        annotations = np.array([("2.jpg", 1), ("1.jpg", 2), ("3.jpg", 1)], dtype=kind)
        make.mat(f"stanford_cars/{file}.mat", annotations=annotations)
        for i in (1, 2, 3):
            make.image(f"stanford_cars/{folder}/{i}.jpg")
    make.mat("stanford_cars/devkit/cars_meta.mat", class_names=np.array(["Audi", "BMW"], dtype=object))


def folders(*parts: str, classes: tuple[str, ...] = ("a", "b"), suffix: str = "jpg") -> Callable[[Maker, str], None]:
    """Class folders of five images; in each of the parts."""

    def write(make: Maker, name: str) -> None:
        for part in parts:
            for kind in classes:
                for i in range(5):
                    make.image(f"{part}/{kind}/{i}.{suffix}")

    return write


def gtsrb(make: Maker, name: str) -> None:
    folders("gtsrb/GTSRB/Training", classes=("00000", "00001"), suffix="ppm")(make, name)
    make.text("gtsrb/GT-final_test.csv", "Filename;ClassId", "01.ppm;1", "00.ppm;0")
    for i in range(2):
        make.image(f"gtsrb/GTSRB/Final_Test/Images/0{i}.ppm")


def caltech101(make: Maker, name: str) -> None:
    for kind in ("Faces", "BACKGROUND_Google", "ant"):
        for i in range(1, 6):
            make.image(f"caltech101/101_ObjectCategories/{kind}/image_{i:04d}.jpg", "L" if i == 2 else "RGB")


def caltech256(make: Maker, name: str) -> None:
    for number, kind in ((1, "ak47"), (2, "bear")):
        for i in range(1, 6):
            make.image(f"caltech256/256_ObjectCategories/{number:03d}.{kind}/{number:03d}_{i:04d}.jpg")


def sun(make: Maker, name: str) -> None:
    make.text("SUN397/ClassName.txt", "/b/beach", "/a/abbey/outdoor")
    for i in (3, 1, 2, 5, 4):
        make.image(f"SUN397/b/beach/sun_{i}.jpg")
        make.image(f"SUN397/a/abbey/outdoor/sun_x{i}.jpg")


MAKERS: dict[str, Callable[[Maker, str], None]] = {
    "CIFAR10": cifar,
    "CIFAR100": cifar,
    "Caltech101": caltech101,
    "Caltech256": caltech256,
    "Country211": folders("country211/train", "country211/valid", "country211/test"),
    "DTD": dtd,
    "EuroSAT": folders("eurosat/2750"),
    "FGVCAircraft": aircraft,
    "FashionMNIST": mnist,
    "Flowers102": flowers,
    "Food101": food,
    "GTSRB": gtsrb,
    "Imagenette": folders(
        "imagenette2/train", "imagenette2/val", classes=("n01440764", "n03394916"), suffix="JPEG"
    ),
    "KMNIST": mnist,
    "MNIST": mnist,
    "OxfordIIITPet": pets,
    "RenderedSST2": folders(
        *(f"rendered-sst2/{split}" for split in ("train", "valid", "test")), classes=("negative", "positive"), suffix="png"
    ),
    "STL10": stl10,
    "SUN397": sun,
    "SVHN": svhn,
    "StanfordCars": cars,
    "USPS": usps,
}  # fmt: skip
CLASSES = {
    "CIFAR10": ["a", "b", "c"],
    "Caltech101": ["Faces", "ant"],
    "Caltech256": ["001.ak47", "002.bear"],
    "EuroSAT": ["a", "b"],
    "FGVCAircraft": ["A320 b", "747"],
    "Food101": ["apple_pie", "pizza"],
    "GTSRB": ["0", "1"],
    "Imagenette": ["tench, Tinca tinca", "French horn, horn"],
    "OxfordIIITPet": ["Abyssinian", "Great Dane"],
    "STL10": ["airplane", "bird"],
    "SUN397": ["beach", "abbey/outdoor"],
    "SVHN": ["0", "1", "2"],
    "StanfordCars": ["Audi", "BMW"],
}
# Written out once more: which of torchvision's data sets are to train on, and which to validate on.
OFFICIAL: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    **dict.fromkeys(
        ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"), ([{"train": True}], [{"train": False}])
    ),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "SVHN", "StanfordCars"), ([{"split": "train"}], [{"split": "test"}])),
    **dict.fromkeys(
        ("DTD", "FGVCAircraft", "Flowers102", "RenderedSST2"),
        ([{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    ),
    "Country211": ([{"split": "train"}, {"split": "valid"}], [{"split": "test"}]),
    "Imagenette": ([{"split": "train"}], [{"split": "val"}]),
    "OxfordIIITPet": ([{"split": "trainval"}], [{"split": "test"}]),
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: Patch) -> Maker:
    return Maker(tmp_path / "made", monkeypatch)


def built(make: Maker, name: str, **kwargs: Any) -> TorchvisionData:
    data = TorchvisionData(name, str(make.root), img_size=8, batch_size=2, num_workers=0, **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def ours(source: Any) -> list[tuple[bytes, int]]:
    pictures = [source[i] for i in range(len(source))]
    assert source.labels == [label for _, label in pictures]
    decoded = [(p.decode() if isinstance(p, EncodedImage) else p, label) for p, label in pictures]
    assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image, _ in decoded)
    return sorted((image.contiguous().numpy().tobytes(), label) for image, label in decoded)


def theirs(make: Maker, name: str, *arguments: dict[str, Any]) -> list[tuple[bytes, int]]:
    """What torchvision's own data sets give."""
    parts = [getattr(TV, name)(make.root, **kwargs) for kwargs in arguments]
    return sorted(
        (pil_to_tensor(image.convert("RGB")).numpy().tobytes(), int(label))
        for part in parts
        for image, label in (part[i] for i in range(len(part)))
    )


def test_torchvision_data__every_data_set_is_tried() -> None:
    assert set(MAKERS) == set(DATASETS)
    assert {name for name, entry in DATASETS.items() if entry.val is not None} == set(OFFICIAL)


@pytest.mark.parametrize("name", MAKERS)
def test_torchvision_data__gives_what_torchvision_gives(make: Maker, name: str) -> None:
    MAKERS[name](make, name)
    data = built(make, name)
    train, val = ours(data.train_source), ours(data.val_source)
    assert data.classes == CLASSES.get(name, data.classes)
    assert len({label for _, label in train}) <= data.num_classes
    if name in OFFICIAL:
        of_train, of_val = OFFICIAL[name]
        assert train == theirs(make, name, *of_train)
        assert val == theirs(make, name, *of_val)
    else:
        assert sorted(train + val) == theirs(make, name, {})
        assert [len(train), len(val)] == [8, 2]
        assert {label for _, label in val} == {0, 1}
    assert len(next(iter(data.val_dataloader()))[1]) == 2


@pytest.mark.parametrize("name", MAKERS)
def test_torchvision_data__nothing_there(make: Maker, name: str, monkeypatch: Patch) -> None:
    expected = DATASETS[name].folder.format(split="train")
    pattern = rf"data\.root=.*made: there is no complete {expected}.*data\.name={name}.*data\.download \(now False\)"
    with pytest.raises(ConfigError, match=pattern):
        built(make, name)


def test_torchvision_data__order_is_that_of_the_names(make: Maker) -> None:
    sun(make, "SUN397")
    paths = [
        p for source in (built(make, "SUN397").train_source,) for p in [source[i][0].name for i in range(len(source))]
    ]
    assert paths == sorted(paths)
    MAKERS["EuroSAT"](make, "EuroSAT")
    first, second = built(make, "EuroSAT", seed=1), built(make, "EuroSAT", seed=2)
    other = built(make, "EuroSAT", split_seed=1)
    assert ours(first.val_source) == ours(second.val_source) != ours(other.val_source)


def test_torchvision_data__other_splits(make: Maker) -> None:
    dtd(make, "DTD")
    data = built(make, "DTD", train_split="test+train", val_split="val")
    assert ours(data.train_source) == theirs(make, "DTD", {"split": "train"}, {"split": "test"})
    assert ours(data.val_source) == theirs(make, "DTD", {"split": "val"})
    held = built(make, "DTD", val_fraction=0.5)  # of train and val; test is left alone
    parts = [{"split": "train"}, {"split": "val"}]
    assert sorted(ours(held.train_source) + ours(held.val_source)) == theirs(make, "DTD", *parts)
    assert (len(held.train_source), len(held.val_source)) == (4, 4)
    cifar(make, "CIFAR10")
    swapped = built(make, "CIFAR10", train_split="test", val_split="train")
    assert (len(swapped.train_source), len(swapped.val_source)) == (3, 7)
    svhn(make, "SVHN")
    extra = built(make, "SVHN", train_split="train+extra")
    assert ours(extra.train_source) == theirs(make, "SVHN", {"split": "train"}, {"split": "extra"})


@pytest.mark.parametrize("split", ["unlabeled", "train+unlabeled"])
def test_torchvision_data__unlabelled_images_of_stl10(make: Maker, split: str) -> None:
    stl10(make, "STL10")
    data = built(make, "STL10", train_split=split)
    assert (data.classes, data.labelled) == ([], False)
    expected = theirs(make, "STL10", {"split": split})
    assert ours(data.train_source) == sorted((image, 0) for image, _ in expected)
    assert ours(data.val_source) == sorted((image, 0) for image, _ in theirs(make, "STL10", {"split": "test"}))
    with pytest.raises(ConfigError, match=r"data\.classes='0' chooses classes.*has images without"):
        built(make, "STL10", train_split=split, classes="0")
    assert built(make, "STL10", classes="bird").classes == ["bird"]


def test_torchvision_data__grey_images_through_the_loader(make: Maker) -> None:
    mnist(make, "MNIST")
    data = built(make, "MNIST", train_transform=TrainTransform(8))
    views, labels = next(iter(data.train_dataloader()))
    assert (views.image.shape, labels.shape) == ((2, 3, 8, 8), (2,))
    images, _ = next(iter(data.val_dataloader()))
    assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("MINST", {}, r"data\.name='MINST' is not known\. Available: CIFAR10, .*MNIST, .*USPS"),
        (
            "DTD",
            {"train_split": "trainval"},
            r"data\.train_split='trainval' of DTD: allowed is any of train, val, test",
        ),
        ("DTD", {"train_split": "train+train"}, r"data\.train_split='train\+train' of DTD"),
        ("DTD", {"val_split": ""}, None),
        ("DTD", {"val_split": "val"}, r"data\.train_split='train\+val' and data\.val_split='val' must have nothing in"),
        ("EuroSAT", {"val_split": "test"}, r"data\.val_split='test' of EuroSAT: allowed is none \(it is not divided\)"),
        ("EuroSAT", {"train_split": "train"}, r"data\.train_split='train' of EuroSAT: allowed is none"),
        ("DTD", {"val_split": "val", "val_fraction": 0.1}, r"data\.val_split='val' and data\.val_fraction=0\.1"),
        ("DTD", {"val_fraction": 1.0}, r"data\.val_fraction=1\.0 must be between 0 and 1"),
    ],
)
def test_torchvision_data__refused(name: str, kwargs: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert TorchvisionData(name, **kwargs).val_splits == ["test"]
        return
    with pytest.raises(ConfigError, match=message):
        TorchvisionData(name, **kwargs)


def test_torchvision_data__downloads_every_split_it_needs(make: Maker, monkeypatch: Patch) -> None:
    asked = []
    svhn(make, "SVHN")
    monkeypatch.setattr(TV.SVHN, "download", lambda self: asked.append(self.split))
    built(make, "SVHN", train_split="extra")
    assert asked == []
    built(make, "SVHN", train_split="extra", download=True)
    assert asked == ["extra", "test"]


@pytest.mark.parametrize(
    "error", [URLError("no route"), RuntimeError("no route"), ValueError("URL is broken: no route")]
)
def test_torchvision_data__download_fails(make: Maker, monkeypatch: Patch, error: Exception) -> None:
    def fails(self: Any) -> None:
        raise error

    monkeypatch.setattr(TV.DTD, "_download", fails)
    with pytest.raises(ConfigError, match=r"data\.name=DTD: could not be downloaded to data\.root=.*no route.*put dtd"):
        built(make, "DTD", download=True)


def test_torchvision_data__cars_cannot_be_downloaded(make: Maker) -> None:
    with pytest.raises(ConfigError, match=r"StanfordCars: could not be downloaded.*stanford_cars"):
        built(make, "StanfordCars", download=True)
