"""The files of TensorBoard's projector: a vector, a picture and a name for each image."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import FewDigits, digits, features_of, fit, val_digits

from vil_lightning.callbacks.projector import TAG, EmbeddingProjector, small_pictures
from vil_lightning.errors import ConfigError


def folder_of(run: Path, step: int) -> Path:
    return run / "run" / f"{step:05d}" / TAG


def test_projector__writes_vector_picture_and_class_of_each_image(tmp_path: Path) -> None:
    data = digits(eval_batch_size=4)
    data.setup()
    data.classes = [f"digit {i}" if i != 3 else "a\tname\nin two lines" for i in range(10)]
    _, model, _ = fit(tmp_path, [EmbeddingProjector(num_images=10)], data=data)
    places = [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]
    images, labels = val_digits(data, places)

    files = folder_of(tmp_path, 2)
    vectors = np.loadtxt(files / "tensors.tsv", delimiter="\t")
    expected = features_of(model.teacher["backbone"], data.normalize(images))
    assert vectors.shape == (10, 64)
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-5)

    names = (files / "metadata.tsv").read_text().splitlines()
    assert names == ["a name in two lines" if label == 3 else f"digit {label}" for label in labels.tolist()]
    assert 3 in labels

    sprite = np.asarray(Image.open(files / "sprite.png"))
    assert sprite.shape == (64, 64, 3)  # 4 x 4 places for ten pictures
    for i in range(10):
        y, x = 16 * (i // 4), 16 * (i % 4)
        difference = sprite[y : y + 16, x : x + 16].astype(int) - images[i].permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 1

    config = (tmp_path / "run" / "projector_config.pbtxt").read_text()
    for part in ("tensors.tsv", "metadata.tsv", "sprite.png"):
        assert f'"00002/{TAG}/{part}"' in config
    assert config.count("single_image_dim: 16") == 2


@pytest.mark.parametrize(("every", "expected"), [(None, [6]), (1, [2, 4, 6]), (2, [4, 6])])
def test_projector__at_the_end_and_every_few_epochs(tmp_path: Path, every: int | None, expected: list[int]) -> None:
    fit(tmp_path, [EmbeddingProjector(num_images=2, every_n_epochs=every)], max_epochs=3)
    written = sorted(int(path.parent.parent.name) for path in tmp_path.glob("run/*/*/tensors.tsv"))
    assert written == expected
    config = (tmp_path / "run" / "projector_config.pbtxt").read_text()
    assert config.count("tensor_name") == len(expected)


@pytest.mark.parametrize(
    ("num_images", "side", "size", "sheet", "expected"),
    [
        (2, 16, 64, 8192, 16),
        (2, 96, 64, 8192, 64),
        (2, 96, 200, 8192, 96),
        (50, 32, 64, 100, 12),
        (49, 32, 64, 100, 14),
    ],
)
def test_small_pictures__fit_the_largest_sheet(
    num_images: int, side: int, size: int, sheet: int, expected: int
) -> None:
    images = torch.zeros(num_images, 3, side, side, dtype=torch.uint8)
    assert small_pictures(images, size, sheet).shape == (num_images, 3, expected, expected)
    assert expected * math.ceil(math.sqrt(num_images)) <= sheet


def test_small_pictures__keep_the_colours() -> None:
    ramp = torch.arange(0, 128, 2, dtype=torch.uint8).expand(3, 64, 64) + torch.tensor([0, 50, 100]).view(3, 1, 1)
    pictures = small_pictures(ramp[None].to(torch.uint8), 16)
    by_hand = ramp.float().view(3, 16, 4, 16, 4).mean((2, 4)) / 255
    assert (pictures[0] - by_hand)[:, 2:-2, 2:-2].abs().max() < 0.01
    assert torch.equal(small_pictures(ramp[None].to(torch.uint8), 64)[0], ramp.to(torch.uint8).float() / 255)


def test_projector__without_tensorboard_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("images were read")

    monkeypatch.setattr("vil_lightning.callbacks.projector.val_images", refuse)
    fit(tmp_path, [EmbeddingProjector()], logger=False)


def test_projector__takes_all_images_where_there_are_fewer(tmp_path: Path) -> None:
    fit(tmp_path, [EmbeddingProjector()], data=FewDigits(16, 32, train_transform=digits().train_transform, seed=0))
    assert len((folder_of(tmp_path, 2) / "tensors.tsv").read_text().splitlines()) == 40


@pytest.mark.parametrize("name", ["num_images", "every_n_epochs", "size"])
def test_projector__refuses_counts_below_1(name: str) -> None:
    with pytest.raises(ConfigError, match=f"EmbeddingProjector: {name}=0 must be at least 1"):
        EmbeddingProjector(**{name: 0})
