"""From any data set to shards, interrupted or not."""

import hashlib
import io
import itertools
import json
import multiprocessing
import runpy
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vil_lightning.data import Digits, ImageFolder
from vil_lightning.data.convert import main
from vil_lightning.data.loading import ImageSource
from vil_lightning.data.streaming import StreamingData


def noise(rng: np.random.Generator, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """15 training and 6 val images of three classes, in several formats; some with a suffix of another one."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for split, count in (("train", 5), ("val", 2)):
        for name in ("ant", "bee", "cow"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            files = {
                "0.jpg": noise(rng, "JPEG", exif=exif),
                "1.png": noise(rng, "PNG"),
                "2.webp": noise(rng, "WEBP"),
                "3.jpg": noise(rng, "PNG"),
                "4.bmp": noise(rng, "BMP"),
            }
            for file in list(files)[:count]:
                (folder / file).write_bytes(files[file])
    return tmp_path / "pictures"


def convert(pictures: Path, out: Path, *args: str, per_shard: int = 4) -> None:
    what = ["--data=ImageFolder", f"--data.root={pictures}", f"--out={out}"]
    main([*what, f"--images_per_shard={per_shard}", "--workers=0", *args])


def refused(capsys: pytest.CaptureFixture[str], run: Callable[[], None]) -> str:
    """The message with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("\nerror: ")
    assert error.count("error: ") == 1
    return error


def files(folder: Path) -> dict[str, str]:
    """Checksums of all that is in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shards(folder: Path) -> list[tuple[str, bytes, int]]:
    """Name, file and class of every image, as tarfile finds them."""
    images: list[tuple[str, bytes, int]] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            read = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        for (name, content), (label_name, label) in zip(read[::2], read[1::2], strict=True):
            assert label_name == f"{name.split('.')[0]}.cls"
            images.append((name, content, int(label)))
    return images


def pixels(source: ImageSource) -> list[tuple[bytes, tuple[int, ...], int]]:
    found = []
    for index in range(len(source)):
        picture, label = source[index]
        image = picture if isinstance(picture, torch.Tensor) else picture.decode()
        found.append((image.contiguous().numpy().tobytes(), tuple(image.shape), label))
    return found


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_convert__files_are_untouched(pictures: Path, tmp_path: Path) -> None:
    convert(pictures, tmp_path / "out")
    for split, count in (("train", 15), ("val", 6)):
        originals = sorted(
            (path.read_bytes(), ("ant", "bee", "cow").index(path.parent.name))
            for path in (pictures / split).rglob("*.*")
        )
        assert len(originals) == count
        assert sorted((content, label) for _, content, label in shards(tmp_path / "out" / split)) == originals
    names = [path.name for path in sorted((tmp_path / "out" / "train").iterdir())]
    assert names == ["index.json", "index.npy", *(f"shard-{i:06d}.tar" for i in range(4))]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["conversion.json", "train", "val"]


def test_convert__suffixes_of_the_true_formats(pictures: Path, tmp_path: Path) -> None:
    convert(pictures, tmp_path / "out")
    for name, content, _ in shards(tmp_path / "out" / "train"):
        kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP"}[name.split(".")[1]]
        assert Image.open(io.BytesIO(content)).format == kind


def test_convert__formats_that_few_know_become_png(pictures: Path, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image.save(pictures / "val" / "ant" / "9.png", "TGA")
    convert(pictures, tmp_path / "out")
    name, content, label = shards(tmp_path / "out" / "val")[2]
    assert (name, label) == ("00000002.png", 0)
    assert Image.open(io.BytesIO(content)).format == "PNG"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(image))


def test_convert__training_images_shuffled_val_images_in_order(pictures: Path, tmp_path: Path) -> None:
    convert(pictures, tmp_path / "out")
    val = ImageFolder(str(pictures), num_workers=0)
    val.setup("fit")
    expected = [(val.val_source[i][0].encoded(), val.val_source[i][1]) for i in range(6)]  # type: ignore[union-attr]
    assert [(content, label) for _, content, label in shards(tmp_path / "out" / "val")] == expected
    labels = [label for *_, label in shards(tmp_path / "out" / "train")]
    assert sum(a == b for a, b in itertools.pairwise(labels)) < 12  # in sorted folders it is 12
    convert(pictures, tmp_path / "other", "--seed=1")
    other = shards(tmp_path / "other" / "train")
    assert other != shards(tmp_path / "out" / "train")
    assert shards(tmp_path / "other" / "val") == shards(tmp_path / "out" / "val")


def test_convert__the_same_images_for_training(pictures: Path, tmp_path: Path) -> None:
    convert(pictures, tmp_path / "out")
    source = ImageFolder(str(pictures), img_size=8, batch_size=3, num_workers=0)
    streamed = StreamingData(str(tmp_path / "out"), img_size=8, batch_size=3, num_workers=0)
    source.setup("fit")
    streamed.setup("fit")
    assert streamed.classes == source.classes == ["ant", "bee", "cow"]
    assert pixels(streamed.val_source) == pixels(source.val_source)
    assert sorted(pixels(streamed.train_source)) == sorted(pixels(source.train_source))
    for (images, labels), (others, other_labels) in zip(
        streamed.val_dataloader(), source.val_dataloader(), strict=True
    ):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
    batches = [labels for _, labels in streamed.train_dataloader()]
    assert torch.cat(batches).bincount().tolist() == [5, 5, 5]


def test_convert__images_in_memory_lose_nothing(tmp_path: Path) -> None:
    main(["--data=Digits", f"--out={tmp_path}", "--workers=0", "--data.classes=3,8", "--data.train_fraction=0.1"])
    source = Digits(classes="3,8", train_fraction=0.1)
    streamed = StreamingData(str(tmp_path))
    source.setup("fit")
    streamed.setup("fit")
    assert streamed.classes == ["3", "8"]
    assert pixels(streamed.val_source) == pixels(source.val_source)
    assert sorted(pixels(streamed.train_source)) == sorted(pixels(source.train_source))
    assert all(name.endswith(".png") for name, *_ in shards(tmp_path / "train"))


def test_convert__images_without_classes(pictures: Path, tmp_path: Path) -> None:
    convert(pictures, tmp_path / "out", "--data.labelled=false")
    data = StreamingData(str(tmp_path / "out"))
    data.setup("fit")
    assert data.classes == []
    assert data.train_source.labels == [0] * 15


def test_convert__same_shards_from_any_number_of_workers(tmp_path: Path) -> None:
    for workers in (0, 1, 2):
        args = [f"--out={tmp_path / str(workers)}", f"--workers={workers}", "--images_per_shard=100"]
        main(["--data=Digits", "--data.classes=0-1", *args])
    assert len(files(tmp_path / "0")) == 1 + (3 + 2) + (1 + 2)
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(tmp_path / "2")


def test_convert__says_what_it_made(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(pictures, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "train").glob("*.tar"))
    shown = capsys.readouterr().out
    assert f"train: 15 images, 4 shards, {size:,} bytes, intact" in shown
    assert "val: 6 images, 2 shards" in shown
    assert f"--data StreamingData --data.root {tmp_path / 'out'}" in shown


# --- interrupted ------------------------------------------------------------------------------------------------------


def test_convert__killed_and_started_again(tmp_path: Path) -> None:
    args = ["--data=Digits", "--images_per_shard=60"]
    main([*args, f"--out={tmp_path / 'whole'}", "--workers=0"])
    killed = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(
        target=main, args=([*args, f"--out={killed}", "--workers=1"],)
    )
    process.start()
    while process.is_alive() and len(list(killed.glob("train/*.tar"))) < 8:
        time.sleep(0.001)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in (killed / "train").glob("*.tar")}
    assert 8 <= len(done) < 24
    assert not (killed / "train" / "index.json").exists()
    main([*args, f"--out={killed}", "--workers=0"])
    assert files(killed) == files(tmp_path / "whole")
    kept = [name for name, changed in done.items() if (killed / "train" / name).stat().st_mtime_ns == changed]
    assert len(kept) >= len(done) - 1  # one may have been without its record


@pytest.mark.parametrize("state", ["no record", "half a shard", "damaged", "truncated", "index only", "records left"])
def test_convert__goes_on_from(pictures: Path, tmp_path: Path, state: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(pictures, whole)
    broken = pictures / "val" / "ant" / "0.jpg"
    content = broken.read_bytes()
    broken.write_bytes(b"")  # stops the conversion in val, and so leaves the records
    with pytest.raises(SystemExit):
        convert(pictures, out)
    broken.write_bytes(content)
    train, val = out / "train", out / "val"
    (val / "shard-000000.json").unlink()
    shard = val / "shard-000000.tar"
    if state == "half a shard":
        shard.rename(val / "shard-000000.tar.part")
        (val / "shard-000000.json.0123.part").write_text("{")
    elif state in ("damaged", "truncated"):
        shard.write_bytes((whole / "val" / shard.name).read_bytes()[: -1 if state == "truncated" else None])
        record = {"file": shard.name, "num_images": 4, "num_bytes": (whole / "val" / shard.name).stat().st_size}
        digest = files(whole)["val/shard-000000.tar"]
        (val / "shard-000000.json").write_text(json.dumps({"shard": record | {"sha256": digest}, "left_out": []}))
        if state == "damaged":
            shard.write_bytes(b"x" + shard.read_bytes()[1:])
    elif state == "index only":
        (train / "index.json").unlink()
    elif state == "records left":
        (train / "shard-000000.json").write_text("{}")
    convert(pictures, out)
    assert files(out) == files(whole)


def test_convert__finished_already(pictures: Path, tmp_path: Path) -> None:
    convert(pictures, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()}
    convert(pictures, tmp_path / "out", "--workers=1", "--data.batch_size=3")  # of no influence
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_convert__refuses_other_arguments(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    convert(pictures, out)
    before = files(out)
    message = refused(capsys, lambda: convert(pictures, out, "--seed=4", per_shard=5))
    assert "holds a conversion with other arguments" in message
    assert "\n  images_per_shard: was 4, now 5\n  seed: was 0, now 4\n" in message
    assert "data.classes: was None, now 'ant'" in refused(capsys, lambda: convert(pictures, out, "--data.classes=ant"))
    (pictures / "train" / "ant" / "new.png").write_bytes((pictures / "train" / "ant" / "1.png").read_bytes())
    assert "train.num_images: was 15, now 16" in refused(capsys, lambda: convert(pictures, out))
    assert files(out) == before


def test_convert__refuses_a_folder_with_other_things(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, lambda: convert(pictures, pictures))
    assert "must be an empty or a new folder, but holds train, val" in message
    assert "cannot be written" in refused(capsys, lambda: convert(pictures, pictures / "val" / "ant" / "1.png"))


def _convert_slowly(out: Path, started: Any, finish: Any) -> None:
    from vil_lightning.data.convert import _claimed

    with _claimed(out, {}):
        started.set()
        finish.wait(60)


def test_convert__one_at_a_time(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    started, finish = context.Event(), context.Event()
    process = context.Process(target=_convert_slowly, args=(tmp_path / "out", started, finish))
    process.start()
    assert started.wait(60)
    message = refused(capsys, lambda: convert(pictures, tmp_path / "out"))
    finish.set()
    process.join(60)
    assert "another process is converting into this folder" in message


# --- bad images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(pictures: Path) -> Path:
    """Two of the 15 training images are damaged."""
    path = pictures / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    (pictures / "train" / "cow" / "0.jpg").write_bytes(b"no image")
    return pictures


def test_bad_images__are_left_out_and_named(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(damaged, tmp_path / "out", "--data.max_bad_fraction=0.14")
    shown = capsys.readouterr().out.replace("\n", "")
    assert "train: 2 left out, unreadable" in shown
    for name in ("bee/1.png", "cow/0.jpg"):
        assert str(damaged / "train" / name) in shown
    left_out = json.loads((tmp_path / "out" / "train" / "index.json").read_text())["left_out"]
    assert sorted(name for name, _ in left_out) == [str(damaged / "train" / n) for n in ("bee/1.png", "cow/0.jpg")]
    kept = sorted(content for _, content, _ in shards(tmp_path / "out" / "train"))
    assert kept == sorted(
        path.read_bytes() for path in (damaged / "train").rglob("*.*") if str(path) not in dict(left_out)
    )
    assert len(kept) == 13


def test_bad_images__other_shards_stay_as_they_are(pictures: Path, tmp_path: Path) -> None:
    convert(pictures, tmp_path / "sound", "--data.max_bad_fraction=0")
    content = shards(tmp_path / "sound" / "train")[5][1]  # the second one of the second shard
    path = next(path for path in (pictures / "train").rglob("*.*") if path.read_bytes() == content)
    path.write_bytes(b"no image")
    convert(pictures, tmp_path / "out", "--data.max_bad_fraction=0.1")
    before = {name: digest for name, digest in files(tmp_path / "sound").items() if name.endswith(".tar")}
    changed = [name for name, digest in before.items() if files(tmp_path / "out")[name] != digest]
    assert len(changed) == 1
    kept = shards(tmp_path / "out" / "train")
    assert kept == [image for image in shards(tmp_path / "sound" / "train") if image[1] != content]


def test_bad_images__too_many(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, lambda: convert(damaged, tmp_path / "out", "--data.max_bad_fraction=0.13"))
    assert "2 of 15 images of train cannot be read so far, more than data.max_bad_fraction=0.13" in message
    assert "bee/1.png: " in message
    assert "cow/0.jpg: is no image" in message
    assert "0x" not in message
    assert not list(tmp_path.rglob("index.json"))
    assert "no finished conversion" in refused(capsys, lambda: main([f"--out={tmp_path / 'out'}", "--verify"]))
    convert(damaged, tmp_path / "out", "--data.max_bad_fraction=0.2")
    convert(damaged, tmp_path / "at once", "--data.max_bad_fraction=0.2")
    assert files(tmp_path / "out") == files(tmp_path / "at once")


def test_bad_images__a_shard_of_nothing_else(pictures: Path, tmp_path: Path) -> None:
    for path in (pictures / "val").rglob("*.*"):
        if path.parent.name in ("ant", "bee"):
            path.write_bytes(b"")
    convert(pictures, tmp_path / "out", "--data.max_bad_fraction=1")
    data = StreamingData(str(tmp_path / "out"))
    data.setup("fit")
    assert data.val_source.labels == [2, 2]


# --- command line -----------------------------------------------------------------------------------------------------


def test_verify__finds_damage(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    convert(pictures, out)
    main([f"--out={out}", "--verify"])
    path = out / "val" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 255
    path.write_bytes(content)
    assert "shard-000001.tar: sha256" in refused(capsys, lambda: main([f"--out={out}", "--verify"]))
    assert "shard-000001.tar: sha256" in refused(capsys, lambda: convert(pictures, out))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data=ImageFolder", "--data.root=nowhere", "--out=OUT"], "data.root=nowhere is not a directory"),
        (["--data=Nothing", "--out=OUT"], "Nothing"),
        (["--data=Digits"], "out"),
        (["--out=OUT"], "--data is not set"),
        (["--data=Digits", "--out=OUT", "--images_per_shard=0"], "--images_per_shard 0 must be at least 1"),
        (["--data=Digits", "--out=OUT", "--workers=-1"], "--workers -1"),
        (["--data=Digits", "--out=OUT", "--data.batch_size=0"], "data.batch_size=0 must be at least 1"),
        (["--data=Digits", "--out=OUT", "--data.classes=77"], "data.classes='77'"),
        (["--data=Digits", "--out=OUT", "--unknown=1"], "unknown"),
        (["--out=OUT", "--verify"], "there is no finished conversion"),
    ],
)
def test_main__refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    out = tmp_path / "out"
    assert message in refused(capsys, lambda: main([arg.replace("OUT", str(out)) for arg in args]))
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_main__is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", "--verify", f"--out={tmp_path}"])
    message = refused(capsys, lambda: runpy.run_module("vil_lightning.data.convert", run_name="__main__"))
    assert message == f"\nerror: --out {tmp_path}: there is no finished conversion: train/index.json is missing.\n"
