"""`main.py embed`: the vectors of a network, under the names of their images."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path += [str(Path(__file__).parents[1] / "integration")]
from shrunk import invoke

from vil_lightning.data import Digits
from vil_lightning.evaluation.subject import Subject
from vil_lightning.methods.backbone import BackboneConfig, patch_tokens

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}
NETWORK = ["embed", "--progress", "false", "--backbone.name", "vil2_tiny_patch16_224"]
NETWORK += ["--backbone.kwargs", json.dumps(SMALL)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """`train` and `val` with two classes, one file in `val` damaged; and pictures without classes."""
    generator = np.random.default_rng(0)
    folders = [f"{split}/{name}" for split in ("train", "val") for name in ("cat", "dog")] + ["loose/deep"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "val/cat/1.png").write_bytes(b"no picture")
    return tmp_path


def embed(folder: Path, *args: str) -> dict[str, np.ndarray]:
    result = invoke([*NETWORK, "--out", "x.npz", *args], folder)
    assert result.code == 0, result.err
    with np.load(folder / "x.npz") as archive:
        return dict(archive)


def test_embed__vectors_are_those_of_the_network(tmp_path: Path) -> None:
    found = embed(tmp_path, "--data", "Digits", "--data.img_size", "16", "--split", "val", "--readout", "avg")
    data = Digits(img_size=16, seed=0)
    data.setup("fit")
    network = Subject(BackboneConfig("vil2_tiny_patch16_224", kwargs=SMALL), data).build()
    images, _ = data.val_images([0, 7])
    with torch.no_grad():
        tokens = patch_tokens(network, network.forward_features(data.normalize(images)))  # type: ignore[operator]
    np.testing.assert_allclose(found["vectors"][[0, 7]], tokens.mean(1).numpy(), atol=1e-6)
    assert found["labels"].tolist() == data.val_source.labels
    assert found["ids"][7] == "val/7"


def test_embed__own_readout_unless_told(tmp_path: Path) -> None:
    found = embed(
        tmp_path, "--data", "Digits", "--data.img_size", "16", "--split", "train", "--data.train_fraction", "0.1"
    )
    assert found["vectors"].shape[1] == 64  # both ends of the sequence
    assert found["ids"][0] == "train/0"


def test_embed__files_are_named_by_path_and_unreadable_ones_left_out(photos: Path) -> None:
    folder = ["--data", "ImageFolder", "--data.img_size", "16", "--data.root", str(photos), "--data.num_workers", "0"]
    found = embed(photos, *folder, "--split", "val", "--data.max_bad_fraction", "0.5")
    kept = ["cat/0.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    assert found["ids"].tolist() == [str(photos / "val" / name) for name in kept]
    assert found["labels"].tolist() == [0, 0, 1, 1, 1]


def test_embed__loose_images_have_no_labels(photos: Path) -> None:
    folder = ["--data", "ImageFolder", "--data.img_size", "16", "--data.predict_dir", str(photos / "loose")]
    found = embed(photos, *folder, "--data.num_workers", "0")
    assert found["ids"].tolist() == [str(photos / f"loose/deep/{i}.png") for i in range(3)]
    assert sorted(found) == ["ids", "vectors"]


def test_embed__loose_images_have_no_labels_beside_those_that_have(photos: Path) -> None:
    folder = ["--data", "ImageFolder", "--data.img_size", "16", "--data.root", str(photos), "--data.num_workers", "0"]
    found = embed(photos, *folder, "--data.predict_dir", str(photos / "loose"), "--split", "predict")
    assert sorted(found) == ["ids", "vectors"]
    found = embed(photos, *folder, "--split", "train", "--overwrite", "true")
    expected = [str(photos / f"train/{name}/{i}.png") for name in ("cat", "dog") for i in range(3)]
    assert found["ids"].tolist() == expected


def test_embed__parquet_of_loose_images_has_no_labels_either(photos: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = ["--data", "ImageFolder", "--data.img_size", "16", "--data.predict_dir", str(photos / "loose")]
    result = invoke([*NETWORK, *folder, "--data.num_workers", "0", "--out", "x.parquet"], photos)
    assert result.code == 0, result.err
    table = parquet.read_table(photos / "x.parquet")
    assert table.column_names == ["id", "vector"]
    assert np.array(table["vector"].to_pylist()).shape == (3, 64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x.csv"], "embeddings=x.csv must end in .npz or .parquet"),
        (["--out", "x.npz", "--readout", "mean"], "embed: readout 'mean' is not known. Allowed: auto,"),
        (["--out", "old.npz"], "out=old.npz exists. Choose another --out, or replace it with --overwrite true."),
    ],
)
def test_embed__wrong_arguments_are_refused(args: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "old.npz").touch()
    result = invoke([*NETWORK, "--data", "Digits", "--data.img_size", "16", *args], tmp_path)
    assert result.code == 2
    assert message in result.err


def test_embed__replaces_a_file_if_told(tmp_path: Path) -> None:
    (tmp_path / "x.npz").touch()
    found = embed(tmp_path, "--data", "Digits", "--data.img_size", "16", "--split", "val", "--overwrite", "true")
    assert len(found["ids"]) == len(found["vectors"])
