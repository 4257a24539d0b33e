"""The built-in digits, and folders of images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vil_lightning.data import Digits, ImageFolder, MultiCrop
from vil_lightning.errors import ConfigError


def ready(data: Any) -> Any:
    data.setup("fit")
    return data


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits__sizes_and_classes() -> None:
    data = ready(Digits(img_size=8))
    assert (len(data.train_source), len(data.val_source)) == (1438, 359)
    assert (data.num_classes, data.classes) == (10, [str(i) for i in range(10)])
    image, label = data.train_source[0]
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert 0 <= label <= 9
    images = torch.cat([data.train_source.images, data.val_source.images])
    assert (int(images.min()), int(images.max())) == (0, 255)


def test_digits__split_is_stratified_and_disjoint() -> None:
    data = ready(Digits(img_size=8))
    train, val = torch.tensor(data.train_source.labels), torch.tensor(data.val_source.labels)
    for digit in range(10):
        share = (val == digit).sum() / ((val == digit).sum() + (train == digit).sum())
        assert float(share) == pytest.approx(0.2, abs=0.005)
    # Were an image in both parts, some other one would be in neither.
    everything = (torch.from_numpy(load_digits().images) * 255 / 16).round().to(torch.uint8).flatten(1)
    split = torch.cat([data.train_source.images, data.val_source.images])[:, 0].flatten(1)
    assert sorted(split.tolist()) == sorted(everything.tolist())


def test_digits__split_does_not_depend_on_the_seed() -> None:
    first = ready(Digits(img_size=8, seed=1))
    torch.manual_seed(99)
    second = ready(Digits(img_size=8, seed=2))
    assert torch.equal(first.train_source.images, second.train_source.images)
    assert first.val_source.labels == second.val_source.labels


def test_digits__every_val_image_once_in_fixed_order() -> None:
    data = ready(Digits(img_size=8, eval_batch_size=100))
    batches = list(data.val_dataloader())
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 59]
    assert torch.cat([labels for _, labels in batches]).tolist() == data.val_source.labels
    assert torch.equal(torch.cat([images for images, _ in batches]), data.val_source.images)


def test_digits__bank_is_the_training_set_in_fixed_order() -> None:
    data = ready(Digits(img_size=8, train_transform=MultiCrop(8, 4, 1)))
    labels = torch.cat([labels for _, labels in data.eval_train_dataloader()])
    assert labels.tolist() == data.train_source.labels


def test_train_dataloader__drops_the_last_smaller_batch() -> None:
    data = ready(Digits(img_size=8, batch_size=500))
    sizes = [len(labels) for _, labels in data.train_dataloader()]
    assert sizes == [500, 500] == [500] * len(data.train_dataloader())


def test_train_dataloader__without_views_trains_on_the_evaluation_transform() -> None:
    images, labels = next(iter(ready(Digits(img_size=12, batch_size=4)).train_dataloader()))
    assert images.shape == (4, 3, 12, 12)
    assert labels.shape == (4,)


def test_seed__from_the_run_if_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert Digits().seed == 17
    assert Digits(seed=3).seed == 3


def test_state_dict__resumes_the_training_loader() -> None:
    whole = [labels.tolist() for _, labels in ready(Digits(8, 200, seed=3)).train_dataloader()]
    interrupted = ready(Digits(8, 200, seed=3))
    assert interrupted.state_dict() == {}  # no batch was asked for yet
    iterator = iter(interrupted.train_dataloader())
    for _ in range(3):
        next(iterator)
    resumed = ready(Digits(8, 200, seed=3))
    resumed.load_state_dict(interrupted.state_dict())
    assert [labels.tolist() for _, labels in resumed.train_dataloader()] == whole[3:]
    assert [labels.tolist() for _, labels in resumed.train_dataloader()] == whole  # once only


# --- normalisation ----------------------------------------------------------------------------------------------------


def test_normalize__round_trip() -> None:
    data = Digits(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    normalised = data.normalize(images)
    assert normalised.dtype == torch.float32
    for channel, (mean, std) in enumerate(((0.1, 0.4), (0.2, 0.5), (0.3, 0.6))):
        expected = (images[:, channel].double() / 255 - mean) / std
        torch.testing.assert_close(normalised[:, channel].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal((data.denormalize(normalised) * 255).round().to(torch.uint8), images)


def test_normalize__floats_pass_unchanged() -> None:
    images = torch.randn(2, 3, 4, 4)
    assert Digits().normalize(images) is images


def test_on_after_batch_transfer__every_view() -> None:
    data = Digits()
    views = [torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8) for size in (8, 8, 4)]
    labels = torch.tensor([1, 2])
    out, out_labels = data.on_after_batch_transfer((views, labels), 0)
    assert out_labels is labels
    assert all(torch.equal(a, data.normalize(b)) for a, b in zip(out, views, strict=True))
    single, _ = data.on_after_batch_transfer((views[0], labels), 0)
    assert torch.equal(single, data.normalize(views[0]))


def test_default_statistics__are_those_of_the_digits() -> None:
    data = ready(Digits(img_size=8))
    pixels = data.train_source.images.float() / 255
    assert data.mean[0] == pytest.approx(float(pixels.mean()), abs=2e-3)
    assert data.std[0] == pytest.approx(float(pixels.std()), abs=2e-3)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of three training and two val images: PNG and JPEG, colour and grey."""
    for split, count in (("train", 3), ("val", 2)):
        for value, name in ((40, "cat"), (200, "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 12), (value, 10, 90)).save(folder / "a.png")
            Image.new("L", (16, 16), value).save(folder / "b.JPEG")
            if count == 3:
                Image.new("RGB", (9, 9), (value, value, value)).save(folder / "c.jpg")
    return tmp_path


def test_image_folder__reads_png_and_jpeg_as_rgb(root: Path) -> None:
    data = ready(ImageFolder(str(root), img_size=8, batch_size=2, num_workers=0))
    assert data.classes == ["cat", "dog"]
    assert (len(data.train_source), len(data.val_source), data.num_classes) == (6, 4, 2)
    for index in range(6):
        image, label = data.train_source[index]
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert abs(int(image[0].max()) - (40, 200)[label]) <= 2
    grey, _ = data.train_source[1]
    assert torch.equal(grey[0], grey[2])
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 0]


def test_image_folder__batches_of_views(root: Path) -> None:
    data = ready(ImageFolder(str(root), 8, 3, 0, train_transform=MultiCrop(8, 4, 2)))
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    assert [tuple(view.shape) for view in batches[0][0]] == [(3, 3, 8, 8)] * 2 + [(3, 3, 4, 4)] * 2


def test_image_folder__missing_root(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root=.*nowhere is not a directory.*--data\.root"):
        ImageFolder(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_image_folder__missing_split(root: Path, split: str) -> None:
    (root / split).rename(root / "elsewhere")
    with pytest.raises(ConfigError, match=rf"data\.root: there is no directory .*{split}"):
        ImageFolder(str(root))


@pytest.mark.parametrize("split", ["train", "val"])
def test_image_folder__no_class_folders(root: Path, split: str) -> None:
    (root / split).rename(root / "elsewhere")
    (root / split).mkdir()
    Image.new("RGB", (4, 4)).save(root / split / "loose.png")
    with pytest.raises(ConfigError, match=rf"{split} holds no class folders"):
        ImageFolder(str(root))


def test_image_folder__empty_class_folder(root: Path) -> None:
    (root / "val" / "bird").mkdir()
    (root / "val" / "bird" / "notes.txt").write_text("no picture")
    with pytest.raises(ConfigError, match=r"1 class folder\(s\) in .*val hold no images: bird"):
        ImageFolder(str(root))


def test_image_folder__classes_differ(root: Path) -> None:
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(ConfigError, match="dog, wolf are in only one of them"):
        ImageFolder(str(root))


def test_image_folder__one_class_in_train_only(root: Path) -> None:
    (root / "train" / "bird").mkdir()
    Image.new("RGB", (4, 4)).save(root / "train" / "bird" / "a.png")
    with pytest.raises(ConfigError, match="bird is in only one of them"):
        ImageFolder(str(root))


def test_train_dataloader__batch_larger_than_the_data_set(root: Path) -> None:
    data = ready(ImageFolder(str(root), 8, 7, 0))
    with pytest.raises(ConfigError, match=r"data\.batch_size=7 on 1 process\(es\) needs 7 images.*has 6.*smaller"):
        data.train_dataloader()


def test_train_dataloader__batch_of_the_whole_data_set(root: Path) -> None:
    assert len(ready(ImageFolder(str(root), 8, 6, 0)).train_dataloader()) == 1


@pytest.mark.parametrize("name", ["batch_size", "img_size", "eval_batch_size"])
def test_arguments__not_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name}=0 must be at least 1"):
        Digits(**{name: 0})


def test_eval_train_dataloader__takes_a_fixed_random_subset() -> None:
    data = Digits(seed=3)
    data.setup()

    def labels() -> torch.Tensor:
        return torch.cat([batch[1] for batch in data.eval_train_dataloader(max_images=200)])

    everything = torch.cat([batch[1] for batch in data.eval_train_dataloader()])
    assert len(labels()) == 200
    assert torch.equal(labels(), labels())
    assert not torch.equal(labels(), everything[:200])  # not simply the first ones
    assert set(labels().tolist()) == set(range(10))
