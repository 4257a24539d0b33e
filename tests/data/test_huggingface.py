"""Data sets of the package `datasets`, from files of its formats: nothing is downloaded."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule
from PIL import Image

from vil_lightning.data import HuggingFaceData
from vil_lightning.data.images import BadImageError, EncodedImage
from vil_lightning.errors import ConfigError

hf: Any = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for each test, and no network."""
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 0, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def split(labels: list[Any], first: int = 0, image: str = "image", label: str = "label", kind: Any = None) -> Any:
    """A split whose images have the shades `first`, `first + 1`, …"""
    features = {image: hf.Image(), label: kind or hf.ClassLabel(names=["cat", "dog", "emu"])}
    content = {image: [{"bytes": png(first + i), "path": None} for i in range(len(labels))], label: labels}
    return hf.Dataset.from_dict(content, features=hf.Features(features))


TRAIN, VAL = [0, 1, 2, 0, 1], [2, 0]


def parquet(folder: Path, **splits: Any) -> str:
    """A folder of parquet files as on the hub, with a column that is not asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        part.add_column("caption", ["words"] * len(part)).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def saved(folder: Path, **splits: Any) -> str:
    hf.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def built(path: str, **kwargs: Any) -> HuggingFaceData:
    data = HuggingFaceData(path, img_size=6, batch_size=2, num_workers=0, **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def shades(source: Any) -> list[int]:
    return [int(source[i][0].decode()[0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize("write", [parquet, saved])
def test_hugging_face__images_labels_and_classes(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "data", train=split(TRAIN), validation=split(VAL, 50), test=split([0], 90))
    data = built(path)
    assert data.classes == ["cat", "dog", "emu"]
    for source, labels, first in ((data.train_source, TRAIN, 0), (data.val_source, VAL, 50)):
        assert source.labels == labels == [source[i][1] for i in range(len(source))]
        assert all(isinstance(source[i][0], EncodedImage) for i in range(len(source)))
        assert shades(source) == list(range(first, first + len(labels)))
    picture: Any = data.val_source[1][0]
    assert picture.name == f"{path}:validation[1]"
    assert picture.encoded() == png(51)
    assert torch.equal(picture.decode()[:, 0, 0], torch.tensor([51, 0, 9], dtype=torch.uint8))
    images, labels_of_batch = next(iter(data.val_dataloader()))
    assert (images.shape, labels_of_batch.tolist()) == ((2, 3, 6, 6), VAL)


def test_hugging_face__workers_read_it(tmp_path: Path) -> None:
    data = HuggingFaceData(
        parquet(tmp_path / "data", train=split(TRAIN), validation=split(VAL, 50)),
        img_size=6,
        batch_size=2,
        num_workers=1,
    )
    data.setup("fit")
    assert [labels.tolist() for _, labels in data.val_dataloader()] == [VAL]


def test_hugging_face__other_splits_and_parts_of_splits(tmp_path: Path) -> None:
    path = parquet(tmp_path / "data", train=split(TRAIN), test=split(VAL, 50))
    data = built(path, train_split="train[1:3]", val_split="test")
    assert (shades(data.train_source), data.train_source.labels) == ([1, 2], [1, 2])
    assert shades(data.val_source) == [50, 51]
    with pytest.raises(ConfigError, match=r"validation could not be loaded: .*data\.val_split .*data\.val_fraction"):
        built(path)
    folder = saved(tmp_path / "saved", train=split(TRAIN), test=split(VAL))
    with pytest.raises(ConfigError, match=r"of the splits train, validation only train, test can be found"):
        built(folder)
    with pytest.raises(ConfigError, match=r"data\.name='small': .*saved holds a single configuration"):
        built(folder, val_split="test", name="small")


def test_hugging_face__an_order_that_was_saved_is_kept(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "data", train=split(TRAIN).select([4, 2, 0]).with_format("numpy"), validation=split(VAL, 50)
    )
    data = built(path)
    assert (shades(data.train_source), data.train_source.labels) == ([4, 2, 0], [1, 2, 0])


def test_hugging_face__held_out_images(tmp_path: Path) -> None:
    split([0] * 10 + [2] * 5).save_to_disk(tmp_path / "one")  # not a dictionary of splits
    data = built(str(tmp_path / "one"), val_fraction=0.2, seed=1)
    assert data.val_source.labels == [0, 0, 2]
    assert sorted(shades(data.train_source) + shades(data.val_source)) == list(range(15))
    assert shades(built(str(tmp_path / "one"), val_fraction=0.2, seed=2).val_source) == shades(data.val_source)
    assert shades(built(str(tmp_path / "one"), val_fraction=0.2, split_seed=1).val_source) != shades(data.val_source)
    chosen = built(str(tmp_path / "one"), val_fraction=0.2, classes="emu")
    assert (chosen.classes, chosen.train_source.labels) == (["emu"], [0] * 4)


@pytest.mark.parametrize(
    ("values", "of_val", "classes", "numbers"),
    [
        (["b", "a", "b"], ["c", "a"], ["a", "b", "c"], [1, 0, 1]),
        ([7, 3, 7], [3, 11], ["3", "7", "11"], [1, 0, 1]),
    ],
)
def test_hugging_face__classes_in_a_plain_column(
    tmp_path: Path, values: list[Any], of_val: list[Any], classes: list[str], numbers: list[int]
) -> None:
    kind = hf.Value("string" if isinstance(values[0], str) else "int64")
    names = {"image": "img", "label": "species", "kind": kind}
    path = parquet(tmp_path / "data", train=split(values, **names), validation=split(of_val, 50, **names))
    with pytest.raises(ConfigError, match=r"data\.label_key is not set, and 0 columns .*ClassLabel.*species \(Value\)"):
        built(path)
    data = built(path, label_key="species")
    assert (data.classes, data.train_source.labels) == (classes, numbers)
    assert data.val_source.labels == [classes.index(str(value)) for value in of_val]


def test_hugging_face__several_columns_of_a_kind(tmp_path: Path) -> None:
    def two(part: Any) -> Any:
        part = part.add_column("fine", [2] * len(part)).cast_column("fine", hf.ClassLabel(names=["x", "y", "z"]))
        return part.add_column("mask", [{"bytes": png(200), "path": None}] * len(part)).cast_column("mask", hf.Image())

    path = parquet(tmp_path / "data", train=two(split(TRAIN)), validation=two(split(VAL, 50)))
    with pytest.raises(ConfigError, match=r"data\.image_key is not set, and 2 columns .*mask \(Image\)"):
        built(path)
    with pytest.raises(
        ConfigError, match=r"data\.label_key is not set, and 2 columns .*labelled=false: .*fine \(ClassLabel\)"
    ):
        built(path, image_key="image")
    data = built(path, image_key="mask", label_key="fine")
    assert (shades(data.val_source), data.classes, data.val_source.labels) == ([200] * 2, ["x", "y", "z"], [2, 2])
    with pytest.raises(
        ConfigError, match=r"data\.image_key='picture': .* has the columns image, label, fine, mask, caption"
    ):
        built(path, image_key="picture", label_key="fine")
    with pytest.raises(ConfigError, match=r"data\.label_key='class': .* has the columns"):
        built(path, image_key="image", label_key="class")
    with pytest.raises(ConfigError, match=r"data\.image_key=label .* holds no images"):
        built(path, image_key="label", label_key="fine")


def test_hugging_face__images_in_plain_columns(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "data"
    folder.mkdir()
    for name, first in (("train", 0), ("validation", 50)):
        images = [png(first + i) for i in range(3)]
        structs = [{"bytes": image, "path": "a.png"} for image in images]
        pq.write_table(pa.table({"raw": images, "struct": structs, "y": [1, 0, 1]}), folder / f"{name}.parquet")
    for key in ("raw", "struct"):
        data = built(str(folder), image_key=key, label_key="y")
        assert (shades(data.train_source), shades(data.val_source)) == ([0, 1, 2], [50, 51, 52])


def test_hugging_face__images_in_files_beside_it(tmp_path: Path) -> None:
    for part, first in (("train", 0), ("validation", 50)):
        for i, kind in enumerate(("cat", "dog")):
            (tmp_path / "files" / part / kind).mkdir(parents=True)
            (tmp_path / "files" / part / kind / "a.png").write_bytes(png(first + i))
    data = built(str(tmp_path / "files"))
    assert (data.classes, sorted(shades(data.train_source)), data.val_source.labels) == (["cat", "dog"], [0, 1], [0, 1])
    assert data.val_source[0][0].name.endswith("validation/cat/a.png")  # type: ignore[union-attr]


def test_hugging_face__a_missing_image(tmp_path: Path) -> None:
    part = split(TRAIN)
    images = [None, *part.cast_column("image", hf.Image(decode=False))["image"][1:]]
    part = hf.Dataset.from_dict({"image": images, "label": TRAIN}, features=part.features)
    data = built(saved(tmp_path / "data", train=part, validation=split(VAL)))
    with pytest.raises(BadImageError, match=r":train\[0\]: is missing"):
        data.train_source[0]
    assert shades(data.val_source) == [0, 1]


def test_hugging_face__without_labels(tmp_path: Path) -> None:
    path = parquet(tmp_path / "data", train=split([-1] * 20), test=split([-1] * 2, 50))
    with pytest.raises(ConfigError, match=r"data\.label_key=label: -1 is no class.*data\.labelled=false"):
        built(path, val_fraction=0.5)
    data = built(path, val_fraction=0.1, labelled=False)
    assert (data.classes, data.labelled, len(data.train_source), data.val_source.labels) == ([], False, 18, [0, 0])
    for key, value in (("classes", "0"), ("label_key", "label")):
        with pytest.raises(ConfigError, match=rf"data\.{key}='{value}' is about classes"):
            HuggingFaceData(path, labelled=False, **{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 1.5])
def test_hugging_face__labels_that_are_none(tmp_path: Path, value: float | None) -> None:
    path = parquet(tmp_path / "data", train=split([1.0, value], kind=hf.Value("float64")))
    with pytest.raises(ConfigError, match=r"data\.label_key=label: .* is no class"):
        built(path, val_fraction=0.5, label_key="label")


def test_hugging_face__arguments_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.val_split='test' and data\.val_fraction=0\.1"):
        HuggingFaceData("x", val_split="test", val_fraction=0.1)
    with pytest.raises(ConfigError, match=r"data\.val_fraction=2 must be between"):
        HuggingFaceData("x", val_fraction=2)
    with pytest.raises(ConfigError, match=r"data\.val_split='train' must not be data\.train_split"):
        HuggingFaceData("x", val_split="train")


@pytest.mark.parametrize("path", ["nobody/nothing", "empty"])
def test_hugging_face__not_to_be_had(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    path = str(tmp_path / path) if path == "empty" else path
    data = HuggingFaceData(path, name="small")
    with pytest.raises(
        ConfigError, match=rf"data\.path={path} \(data\.name=small\): the splits train, validation could not"
    ):
        data.prepare_data()


def test_hugging_face__package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install datasets"):
        HuggingFaceData("x").prepare_data()


def test_hugging_face__imagenet_as_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name alone, train and validation of the columns image and label are used."""
    calls: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return [split(TRAIN), split(VAL)]

    monkeypatch.setattr(hf, "load_dataset", load)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    args = ["--data", "HuggingFaceData", "--data.path", "ILSVRC/imagenet-1k", "--data.crop_pct", "0.875"]
    data = parser.instantiate_classes(parser.parse_args(args)).data
    data.setup("fit")
    assert calls == [(("ILSVRC/imagenet-1k", None), {"split": ["train", "validation"]})]
    assert (len(data.train_source), len(data.val_source), data.eval_transform.short_side) == (5, 2, 256)
    with pytest.raises(Exception, match="wings"):
        parser.parse_args([*args, "--data.wings", "2"])
