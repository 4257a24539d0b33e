"""Folders of images that are not divided, or have no classes, and who may use these."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor

from vil_lightning.callbacks import ClassificationPictures, EmbeddingProjector, OnlineKNN, OnlineProbe
from vil_lightning.data import ImageFolder, MultiCrop, TrainTransform
from vil_lightning.data.files import FileSource, hold_out, image_paths
from vil_lightning.data.images import EncodedImage
from vil_lightning.data.loading import TensorSource
from vil_lightning.errors import ConfigError
from vil_lightning.methods import DINO, BackboneConfig, LinearProbe, Supervised

BACKBONE = BackboneConfig("vil2_tiny_patch16_224", None, {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2})


def write(path: Path, value: int = 0, size: int = 8) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)
    return str(path)


def folder(root: Path, **kwargs: Any) -> ImageFolder:
    data = ImageFolder(str(root), 8, 2, 0, **kwargs)
    data.setup("fit")
    return data


def relative(source: Any, root: Path) -> list[str]:
    """Paths of the images of a source, as they are read."""
    return [str(Path(source[i][0].name).relative_to(root)) for i in range(len(source))]


# --- files ------------------------------------------------------------------------------------------------------------


def test_file_source__gives_files_that_are_not_decoded(tmp_path: Path) -> None:
    source = FileSource([(write(tmp_path / "a.png", 7), 3), (str(tmp_path / "none.png"), 1)])
    assert (source.labels, source.paths) == ([3, 1], [str(tmp_path / "a.png"), str(tmp_path / "none.png")])
    picture, label = source[0]
    assert isinstance(picture, EncodedImage)
    assert label == 3
    assert torch.equal(picture.decode(), torch.full((3, 8, 8), 7, dtype=torch.uint8))
    assert source[1][1] == 1  # nothing was opened yet


def test_image_paths__any_depth_case_and_link_in_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.png", "a.jpg", "c/d/e.TIFF"):
        write(tmp_path / "real" / name)
    (tmp_path / "real/notes.txt").write_text("no image")
    (tmp_path / "real/link").symlink_to(tmp_path / "real/c")
    (tmp_path / "real/z.png").symlink_to(tmp_path / "real/a.jpg")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    names = ["a.jpg", "b/10.png", "b/2.PNG", "c/d/e.TIFF", "link/d/e.TIFF", "z.png"]
    assert image_paths(tmp_path / "root") == [str(tmp_path / "root" / name) for name in names]


# --- held-out images --------------------------------------------------------------------------------------------------


def labelled_as(*counts: int) -> TensorSource:
    """Image i of all is i; class c has `counts[c]` images, dealt in turn."""
    left, labels = list(counts), []
    while sum(left):
        for label in range(len(left)):
            if left[label]:
                left[label] -= 1
                labels.append(label)
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    return TensorSource(images, torch.tensor(labels))


def numbers(source: Any) -> list[int]:
    return [int(source[i][0][0, 0, 0]) for i in range(len(source))]


@pytest.mark.parametrize(
    ("fraction", "held"),
    [(0.25, [10, 2, 1, 1, 0]), (0.5, [20, 5, 2, 1, 0]), (0.01, [1, 1, 1, 1, 0]), (0.99, [39, 9, 3, 1, 0])],
)
def test_hold_out__of_every_class(fraction: float, held: list[int]) -> None:
    source = labelled_as(40, 10, 4, 2, 1)  # 0.25 x 10 is rounded to even
    train, val = hold_out(source, fraction, seed=0)
    assert [val.labels.count(c) for c in range(5)] == held
    assert [train.labels.count(c) for c in range(5)] == [n - h for n, h in zip((40, 10, 4, 2, 1), held, strict=True)]
    assert sorted(numbers(train) + numbers(val)) == list(range(57))
    assert numbers(train) == sorted(numbers(train))
    for part in (train, val):
        assert part.labels == [part[i][1] for i in range(len(part))] == [source.labels[i] for i in numbers(part)]


def test_hold_out__depends_on_its_seed_alone() -> None:
    source = labelled_as(40, 10)
    torch.manual_seed(1)
    first = numbers(hold_out(source, 0.2, 0)[1])
    torch.manual_seed(2)
    assert numbers(hold_out(source, 0.2, 0)[1]) == first
    assert numbers(hold_out(source, 0.2, 1)[1]) != first
    assert min(first) > 0 or first[:8] != list(range(0, 16, 2))  # not simply the first ones


@pytest.fixture
def undivided(tmp_path: Path) -> Path:
    """Class folders: 10 cats, 5 dogs (one in a folder below), a single emu."""
    for i in range(10):
        write(tmp_path / f"root/cat/{i}.png", i)
    for i in range(4):
        write(tmp_path / f"root/dog/{i}.png", 100 + i)
    write(tmp_path / "root/dog/more/x.JPG", 104)
    write(tmp_path / "root/emu/only.png", 200)
    return tmp_path / "root"


def test_val_fraction__of_class_folders(undivided: Path) -> None:
    data = folder(undivided, val_fraction=0.2, seed=3)
    assert data.classes == ["cat", "dog", "emu"]
    train, val = relative(data.train_source, undivided), relative(data.val_source, undivided)
    assert sorted(train + val) == [str(Path(path).relative_to(undivided)) for path in image_paths(undivided)]
    assert [sum(path.startswith(name) for path in val) for name in data.classes] == [2, 1, 0]
    for source, paths in ((data.train_source, train), (data.val_source, val)):
        assert source.labels == [data.classes.index(path.split("/")[0]) for path in paths]
    assert data.predict_names == [str(undivided / path) for path in val]
    other_run, other_split = (
        folder(undivided, val_fraction=0.2, seed=4),
        folder(undivided, val_fraction=0.2, split_seed=1),
    )
    assert relative(other_run.val_source, undivided) == val != relative(other_split.val_source, undivided)


@pytest.mark.parametrize("stage", ["validate", "predict", "test"])
def test_val_fraction__is_the_same_in_every_stage(undivided: Path, stage: str) -> None:
    data = ImageFolder(str(undivided), 8, 2, 0, val_fraction=0.4)
    data.setup(stage)
    val = data.val_source
    data.setup("fit")
    assert data.val_source is val
    assert data.predict_names == folder(undivided, val_fraction=0.4).predict_names
    assert not set(relative(data.train_source, undivided)) & set(relative(val, undivided))


def test_val_fraction__of_train_where_there_is_no_val(undivided: Path) -> None:
    undivided.rename(undivided.parent / "train")
    data = folder(undivided.parent, val_fraction=0.2)
    assert (data.classes, len(data.train_source), len(data.val_source)) == (["cat", "dog", "emu"], 13, 3)
    with pytest.raises(ConfigError, match=r"no directory .*val.*data\.val_fraction"):
        folder(undivided.parent)


def test_val_fraction__a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus/a", "bus/b", "train/a", "train/b", "val/a", "val/b"):
        write(tmp_path / f"{name}.png")
    assert folder(tmp_path, val_fraction=0.5).classes == ["bus", "train", "val"]


def test_val_fraction__together_with_classes_and_few_labels(undivided: Path) -> None:
    data = folder(undivided, val_fraction=0.2, classes="1-2", train_fraction=0.5)
    assert data.classes == ["dog", "emu"]
    assert (data.train_source.labels, data.val_source.labels) == ([0, 0, 1], [0])
    assert data.val_source.labels == [0]
    assert relative(data.val_source, undivided)[0].startswith("dog/")
    assert all(name.startswith(str(undivided / "dog")) for name in data.predict_names)


def test_val_fraction__predictions_of_other_images_are_named(undivided: Path, tmp_path: Path) -> None:
    new = write(tmp_path / "new/a.png")
    data = ImageFolder(str(undivided), 8, 2, 0, val_fraction=0.2, classes="cat,emu", predict_dir=str(tmp_path / "new"))
    data.setup("predict")
    assert (data.classes, data.predict_names) == (["cat", "emu"], [new])


def test_val_fraction__refused(undivided: Path) -> None:
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match=rf"data\.val_fraction={fraction} must be between 0 and 1"):
            ImageFolder(str(undivided), val_fraction=fraction)
    with pytest.raises(ConfigError, match=r"no directory .*train.*data\.val_fraction \(such as 0\.1\).*labelled=false"):
        folder(undivided)
    for name in ("train/cat/a", "val/cat/a"):
        write(undivided / f"{name}.png")
    with pytest.raises(ConfigError, match=r"data\.val_fraction=0\.1 would hold out .*but there is .*val\..*to null"):
        folder(undivided, val_fraction=0.1)


def test_val_fraction__single_images(tmp_path: Path) -> None:
    write(tmp_path / "cat/a.png")
    with pytest.raises(ConfigError, match=r"1 image\(s\) in .* are too few"):
        folder(tmp_path, val_fraction=0.5)


# --- images without classes ---------------------------------------------------------------------------------------------


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """40 images, at any depth."""
    for i in range(40):
        write(tmp_path / "pile" / ("/".join("abc"[: i % 4])) / f"{i}.png", i, size=16)
    return tmp_path / "pile"


def test_labelled_false__takes_everything_below_root(pile: Path) -> None:
    data = folder(pile, labelled=False)
    assert (data.classes, data.labelled, data.num_classes) == ([], False, 0)
    train, val = relative(data.train_source, pile), relative(data.val_source, pile)
    assert (len(train), len(val)) == (38, 2)  # 5 %
    assert sorted(Path(path).stem for path in train + val) == sorted(map(str, range(40)))
    assert data.train_source.labels == [0] * 38
    assert {label for _, label in (data.train_source[i] for i in range(38))} == {0}
    assert len(folder(pile, labelled=False, val_fraction=0.25).val_source) == 10
    assert len(folder(pile, labelled=False, val_fraction=0.25, train_fraction=0.1).train_source) == 3
    images, labels = next(iter(data.val_dataloader()))
    assert (images.shape, labels.tolist()) == ((2, 3, 8, 8), [0, 0])


def test_labelled_false__train_and_val_where_they_exist(pile: Path) -> None:
    pile.rename(pile.parent / "train")
    root = pile.parent
    assert len(folder(root, labelled=False).val_source) == 2
    write(root / "elsewhere/loose.png")  # beside train/ and val/, so neither
    write(root / "val/deep/1.png")
    data = folder(root, labelled=False)
    assert (len(data.train_source), relative(data.val_source, root)) == (40, ["val/deep/1.png"])
    assert data.predict_names == [str(root / "val/deep/1.png")]
    with pytest.raises(ConfigError, match=r"data\.val_fraction=0\.5 would hold out"):
        folder(root, labelled=False, val_fraction=0.5)


def test_labelled_false__refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no images \(\.jpg"):
        folder(tmp_path, labelled=False)
    write(tmp_path / "val/a.png")
    with pytest.raises(ConfigError, match=r"no directory .*train\. There is only val/"):
        folder(tmp_path, labelled=False)
    with pytest.raises(ConfigError, match=r"data\.classes='0-3' chooses classes.*data\.labelled=false"):
        ImageFolder(str(tmp_path), labelled=False, classes="0-3")


def run(model: Any, data: ImageFolder, *callbacks: L.Callback, method: str = "fit", path: Path | None = None) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_val_batches=0 if method == "fit" else None,
        callbacks=list(callbacks),
        logger=L.pytorch.loggers.TensorBoardLogger(path, name="", version="run") if path else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    getattr(trainer, method)(model, datamodule=data)


def dino() -> DINO:
    return DINO(
        BACKBONE, num_prototypes=16, head_hidden_dim=16, head_bottleneck_dim=8, lr_warmup=0, freeze_last_layer=0
    )


def unlabelled(pile: Path, **kwargs: Any) -> ImageFolder:
    return ImageFolder(str(pile), 16, 4, 0, labelled=False, **kwargs)


class Steps(L.Callback):
    """Counts the steps."""

    steps = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("callback", [OnlineKNN, OnlineProbe, ClassificationPictures])
def test_unlabelled__what_scores_by_classes_refuses(pile: Path, callback: type[L.Callback]) -> None:
    data, steps = unlabelled(pile, train_transform=MultiCrop(16, 8, 1)), Steps()
    name = callback.__name__
    expected = rf"^{name} scores by classes.*Leave {name} out of trainer\.callbacks.*--checkpoint\.monitor null"
    with pytest.raises(ConfigError, match=expected):
        run(dino(), data, callback(), steps)
    assert steps.steps == 0


@pytest.mark.parametrize("method", ["fit", "validate", "test"])
def test_unlabelled__supervised_refuses(pile: Path, method: str) -> None:
    data, steps = unlabelled(pile, train_transform=TrainTransform(16)), Steps()
    with pytest.raises(ConfigError, match=r"^Supervised .*the images have no classes .*self-supervised"):
        run(Supervised(BACKBONE, num_classes=3), data, steps, method=method)
    assert steps.steps == 0


def test_unlabelled__supervised_predicts(pile: Path) -> None:
    run(Supervised(BACKBONE, num_classes=3), unlabelled(pile), method="predict")


def test_unlabelled__linear_probe_refuses(pile: Path) -> None:
    with pytest.raises(ConfigError, match=r"^LinearProbe .*the images have no classes"):
        run(LinearProbe(BACKBONE), unlabelled(pile))


def test_unlabelled__pretraining_runs(pile: Path, tmp_path: Path) -> None:
    data, steps = unlabelled(pile, train_transform=MultiCrop(16, 8, 1)), Steps()
    run(dino(), data, steps, EmbeddingProjector(num_images=2), path=tmp_path)
    assert steps.steps == 9  # 38 images
    labels: list[str] = next(tmp_path.rglob("metadata.tsv")).read_text().split("\n")
    assert labels[:2] == ["no class", "no class"]


def test_labelled__is_known_of_folders_with_classes(undivided: Path) -> None:
    assert folder(undivided, val_fraction=0.2).labelled


def test_unlabelled__batch_reaches_the_network_normalised(pile: Path) -> None:
    data = folder(pile, labelled=False)
    images: Tensor = next(iter(data.val_dataloader()))[0]
    shades = [int(Path(path).stem) for path in relative(data.val_source, pile)]
    expected = torch.tensor(shades).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert torch.equal(images, expected.to(torch.uint8))


# --- on the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("CIFAR10", []),
        ("CIFAR100", ["--data.download", "false"]),
        ("Digits", []),
        ("ImageFolder", ["--data.root", ".", "--data.val_fraction", "0.1"]),
        ("TorchvisionData", ["--data.name", "MNIST"]),
    ],
)
def test_command_line__every_source_has_the_options_of_all(name: str, args: list[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    args = ["--data", name, *args, "--data.crop_pct", "0.9", "--data.classes", "0-3", "--data.img_size", "18"]
    data = parser.instantiate_classes(parser.parse_args(args)).data
    assert (data.eval_transform.short_side, data.class_subset) == (20, "0-3")
    with pytest.raises(Exception, match="wings"):
        parser.parse_args([*args, "--data.wings", "2"])
