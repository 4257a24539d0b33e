"""ImageNet in its official forms, from tiny archives: three classes, whose official numbers are not those of the names."""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule
from PIL import Image
from torchvision.datasets import imagenet as official

from vil_lightning.data import ImageNet
from vil_lightning.errors import ConfigError

IDS = {1: "n03", 2: "n01", 3: "n02", 4: "n09"}  # the official numbers; 4 is a node above others, without images
TRUTH = [2, 1, 3, 3, 2]  # of the val images 1 to 5
TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
KEYS = {TRAIN: "train", VAL: "val", DEVKIT: "devkit"}


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def content_of(name: str) -> bytes:
    """An archive. Train images have the shades 10, 11, 20, … of their class, val images 200 + their number."""
    if name == TRAIN:
        return tar(
            {
                f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": jpeg(10 * int(wnid[1:]) + i) for i in range(2)})
                for wnid in ("n03", "n01", "n02")
            }
        )
    if name == VAL:
        return tar({val_name(number): jpeg(200 + number) for number in (3, 1, 2, 5, 4)})
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object), ("num_children", object)]
    synsets = np.array(
        [(number, wnid, f"{wnid}, alias", "", 3 * (number == 4)) for number, wnid in IDS.items()], dtype=kind
    )
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12/data"
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    return tar(
        {f"{folder}/meta.mat": meta.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth}, "w:gz"
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "imagenet").mkdir()
    return tmp_path / "imagenet"


@pytest.fixture
def put(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`put(TRAIN, …)` places archives that torchvision takes for the official ones."""

    def place(*names: str) -> None:
        for name in names:
            content = content_of(name)
            (root / name).write_bytes(content)
            monkeypatch.setitem(official.ARCHIVE_META, KEYS[name], (name, hashlib.md5(content).hexdigest()))

    return place


def flat_val(root: Path) -> None:
    (root / "val").mkdir()
    for number in range(1, 6):
        (root / "val" / val_name(number)).write_bytes(jpeg(200 + number))
    (root / "val" / "readme.txt").write_text("no image")


def folders(root: Path, split: str, *names: str) -> None:
    for name in names:
        (root / split / name).mkdir(parents=True)
        for i in range(2):
            (root / split / name / f"{name}_{i}.JPEG").write_bytes(jpeg(10 * int(name[1:]) + i))


def built(root: Path, stage: str = "fit", **kwargs: Any) -> ImageNet:
    data = ImageNet(str(root), img_size=8, batch_size=2, num_workers=0, **kwargs)
    data.prepare_data()
    data.setup(stage)
    return data


def pictures(source: Any, classes: list[str]) -> dict[int, str]:
    """Shade of every image -> its class."""
    return {int(source[i][0].decode()[0, 0, 0]): classes[source[i][1]] for i in range(len(source))}


TRAIN_PICTURES = {10: "n01", 11: "n01", 20: "n02", 21: "n02", 30: "n03", 31: "n03"}
VAL_PICTURES = {201: "n01", 202: "n03", 203: "n02", 204: "n02", 205: "n01"}


def check(data: ImageNet) -> None:
    assert data.classes == ["n01", "n02", "n03"]
    assert pictures(data.train_source, data.classes) == TRAIN_PICTURES
    assert pictures(data.val_source, data.classes) == VAL_PICTURES


def listing(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*")}


# --- archives ---------------------------------------------------------------------------------------------------------


def test_imagenet__archives_are_unpacked_once(root: Path, put: Any) -> None:
    put(TRAIN, VAL, DEVKIT)
    check(built(root))
    assert sorted(path.name for path in root.iterdir()) == sorted([TRAIN, VAL, DEVKIT, "train", "val"])
    assert (root / "val/n02" / val_name(4)).is_file()
    assert not list(root.rglob("n*.tar"))
    before = listing(root)
    check(built(root))
    assert listing(root) == before
    for name in (TRAIN, VAL, DEVKIT):
        (root / name).unlink()
    check(built(root))


@pytest.mark.parametrize("state, unpacked", [("fit", {"train", "val"}), ("validate", {"val"}), ("test", {"val"})])
def test_imagenet__only_what_the_stage_needs_is_unpacked(root: Path, put: Any, state: str, unpacked: set[str]) -> None:
    put(TRAIN, VAL, DEVKIT)
    data = ImageNet(str(root))
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=state))
    data.prepare_data()
    assert {path.name for path in root.iterdir() if path.is_dir()} == unpacked


def test_imagenet__predicting_other_images_unpacks_nothing(root: Path, put: Any, tmp_path: Path) -> None:
    put(TRAIN, VAL, DEVKIT)
    (tmp_path / "new").mkdir()
    data = ImageNet(str(root), predict_dir=str(tmp_path / "new"))
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="predict"))
    data.prepare_data()
    assert not any(path.is_dir() for path in root.iterdir())
    ImageNet(predict_dir=str(tmp_path / "new")).prepare_data()  # without root


@pytest.mark.parametrize("split", ["train", "val"])
def test_imagenet__an_interrupted_attempt_is_repeated(
    root: Path, put: Any, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    put(TRAIN, VAL, DEVKIT)
    whole, calls = official.extract_archive, []

    def interrupted(source: Any, target: Any, **kwargs: Any) -> Any:
        result = whole(source, target, **kwargs)
        calls.append(Path(target))
        wanted = calls[-1].parent.name if split == "train" else calls[-1].name
        if wanted.startswith(split):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(official, "extract_archive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            built(root)
    assert (root / f"{split}.unfinished").is_dir()
    assert not (root / split).exists()
    check(built(root))
    assert not (root / f"{split}.unfinished").exists()


def test_imagenet__one_process_unpacks() -> None:
    assert ImageNet("/").prepare_data_per_node is False


def test_imagenet__a_damaged_archive(root: Path, put: Any) -> None:
    put(TRAIN, VAL, DEVKIT)
    (root / TRAIN).write_bytes((root / TRAIN).read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"data\.root=.*: {TRAIN} could not be unpacked to train/ \(.*corrupted"):
        built(root)
    assert not (root / "train").exists()


@pytest.mark.parametrize("devkit", [None, b"no archive"])
def test_imagenet__val_archive_without_the_devkit(root: Path, put: Any, devkit: bytes | None) -> None:
    put(TRAIN, VAL)
    if devkit is not None:
        (root / DEVKIT).write_bytes(devkit)
    with pytest.raises(
        ConfigError, match=rf"what the val images show is in {DEVKIT}, or in meta\.bin, which cannot be read"
    ):
        built(root)
    assert not (root / "val").exists()


# --- val images that are not divided by class ---------------------------------------------------------------------------


@pytest.mark.parametrize("meta", ["devkit", "meta.bin"])
def test_imagenet__val_images_in_one_folder(root: Path, put: Any, meta: str) -> None:
    folders(root, "train", "n01", "n02", "n03")
    flat_val(root)
    put(DEVKIT)
    if meta == "meta.bin":
        official.parse_devkit_archive(root)
        (root / DEVKIT).unlink()
    before = listing(root)
    data = built(root)
    check(data)
    assert listing(root) == before  # nothing is moved or written
    names = [Path(name).name for name in data.predict_names]
    assert names == [val_name(number) for number in (1, 5, 3, 4, 2)]  # by class
    assert pictures(built(root, "validate").val_source, ["n01", "n02", "n03"]) == VAL_PICTURES
    some = built(root, classes="n03,n01")
    assert (some.classes, some.val_source.labels, len(some.train_source)) == (["n01", "n03"], [0, 0, 1], 4)
    assert [Path(name).name for name in some.predict_names] == [val_name(number) for number in (1, 5, 2)]
    assert len(built(root, labelled=False).val_source) == 5


def test_imagenet__a_val_image_is_missing(root: Path, put: Any) -> None:
    folders(root, "train", "n01", "n02", "n03")
    flat_val(root)
    put(DEVKIT)
    (root / "val" / val_name(4)).unlink()
    with pytest.raises(ConfigError, match=r"of the 5 images .* should hold, 4 are there; number 4 is the first"):
        built(root)
    (root / "val" / val_name(4)).write_bytes(b"")
    (root / "val" / val_name(6)).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"of the 5 images .* should hold, 6 are there; number 6 is the first"):
        built(root)


def test_imagenet__classes_differ(root: Path, put: Any) -> None:
    folders(root, "train", "n01", "n02")
    flat_val(root)
    put(DEVKIT)
    with pytest.raises(ConfigError, match=r"train/ and val/ must hold the same classes, but n03 is in only one"):
        built(root)


def test_imagenet__nothing_says_what_the_val_images_show(root: Path) -> None:
    folders(root, "train", "n01", "n02", "n03")
    flat_val(root)
    with pytest.raises(
        ConfigError, match=rf"what the val images show is in {DEVKIT}, or in meta\.bin.*Put one of them"
    ):
        built(root)
    (root / "meta.bin").write_bytes(b"damaged")
    with pytest.raises(
        ConfigError, match=rf"^data\.root: .*meta\.bin is damaged\. Delete it, and put {DEVKIT} there\.$"
    ):
        built(root)


# --- class folders ------------------------------------------------------------------------------------------------------


def test_imagenet__class_folders_as_in_image_folder(root: Path) -> None:
    for split in ("train", "val"):
        folders(root, split, "n02", "n01")
    before = listing(root)
    data = built(root, classes="0")
    assert (data.classes, data.val_source.labels) == (["n01"], [0, 0])
    assert pictures(data.train_source, data.classes) == {10: "n01", 11: "n01"}
    assert listing(root) == before


def test_imagenet__nothing_there(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root: there is no directory .*train"):
        built(root)
    with pytest.raises(ConfigError, match=r"data\.root=.*nowhere is not a directory"):
        ImageNet(os.path.join(root, "nowhere"))


def test_imagenet__a_folder_that_cannot_be_written(root: Path, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(TRAIN, VAL, DEVKIT)

    def refuses(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(official, "extract_archive", refuses)
    with pytest.raises(ConfigError, match=r"could not be unpacked to train/ \(read-only file system\)"):
        built(root)


def test_imagenet__on_the_command_line(root: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    args = ["--data", "ImageNet", "--data.root", str(root), "--data.crop_pct", "0.875", "--data.predict_dir", str(root)]
    data = parser.instantiate_classes(parser.parse_args(args)).data
    assert (data.eval_transform.short_side, data.predict_dir, data.img_size) == (256, root, 224)
    with pytest.raises(Exception, match="wings"):
        parser.parse_args([*args, "--data.wings", "2"])


def test_imagenet__batches(root: Path, put: Any) -> None:
    put(TRAIN, VAL, DEVKIT)
    images, labels = next(iter(built(root).val_dataloader()))
    assert (images.shape, images.dtype, labels.tolist()) == ((2, 3, 8, 8), torch.uint8, [0, 0])
