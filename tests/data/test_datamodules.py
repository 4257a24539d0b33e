"""The built-in digits, and folders of images."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from measured import draw
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import default_collate

from vil_lightning.data import Digits, ImageDataModule, ImageFolder, MultiCrop, TorchvisionData, TrainTransform
from vil_lightning.data.loading import ImageSource, TensorSource
from vil_lightning.data.photometry import apply, plan
from vil_lightning.data.transforms import EvalTransform
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


def test_batch_transfer__every_view_gets_its_own_photometry() -> None:
    transform = MultiCrop(8, 4, 2)
    data = Digits(train_transform=transform, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8, generator=generator)
    samples = [transform(picture, draw(i)) for i, picture in enumerate(pictures)]
    views, labels = default_collate([(sample, i) for i, sample in enumerate(samples)])
    out, out_labels = data.on_after_batch_transfer(data.on_before_batch_transfer((views, labels), 0), 0)
    assert out_labels is labels
    assert [tuple(view.shape) for view in out] == [(5, 3, 8, 8)] * 2 + [(5, 3, 4, 4)] * 2
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    for i, sample in enumerate(samples):
        for view, (image, parameters) in zip(out, sample, strict=True):
            alone = apply(image[None], plan(parameters[None]), transform.stages)[0]
            torch.testing.assert_close(view[i], (alone - mean) / std)
    plain = [[data.normalize(image) for image, _ in sample] for sample in samples]
    changed = sum(
        float((out[v][i] - view).abs().max()) > 0.1 for i, sample in enumerate(plain) for v, view in enumerate(sample)
    )
    assert changed > 10  # of 20


def test_batch_transfer__one_view() -> None:
    transform = TrainTransform(8)
    data = Digits(train_transform=transform)
    picture = torch.full((3, 9, 9), 200, dtype=torch.uint8)
    views, labels = default_collate([(transform(picture, draw(i)), i) for i in range(4)])
    out, _ = data.on_after_batch_transfer(data.on_before_batch_transfer((views, labels), 0), 0)
    assert torch.equal(out, data._standardize(apply(views.image, plan(views.parameters), transform.stages)))


def test_batch_transfer__evaluation_only_normalises() -> None:
    data = Digits(train_transform=MultiCrop(8, 4, 2))
    images, labels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), torch.tensor([1, 2])
    out, _ = data.on_after_batch_transfer(data.on_before_batch_transfer((images, labels), 0), 0)
    assert torch.equal(out, data.normalize(images))


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_batch_transfer__in_the_precision_of_the_run(precision: str, dtype: torch.dtype) -> None:
    class Dtypes(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen: set[torch.dtype] = set()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen |= {view.dtype for view in batch[0]}
            return self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Dtypes()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = L.Trainer(
        accelerator="cpu", max_steps=1, precision=precision, enable_checkpointing=False, limit_val_batches=0, **quiet
    )
    fit.fit(module, datamodule=Digits(8, 16, train_transform=MultiCrop(8, 4, 1)))
    assert module.seen == {dtype}


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
        picture, label = data.train_source[index]
        image = picture.decode()
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        assert abs(int(image[0].max()) - (40, 200)[label]) <= 2
    grey = data.train_source[1][0].decode()
    assert torch.equal(grey[0], grey[2])
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 0]


def test_image_folder__batches_of_views(root: Path) -> None:
    data = ready(ImageFolder(str(root), 8, 3, 0, train_transform=MultiCrop(8, 4, 2)))
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    assert [tuple(view.image.shape) for view in batches[0][0]] == [(3, 3, 8, 8)] * 2 + [(3, 3, 4, 4)] * 2


def test_image_folder__missing_root(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root=.*nowhere is not a directory.*--data\.root"):
        ImageFolder(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_image_folder__missing_split(root: Path, split: str) -> None:
    (root / split).rename(root / "elsewhere")
    with pytest.raises(ConfigError, match=rf"data\.root: there is no directory .*{split}"):
        ready(ImageFolder(str(root)))


@pytest.mark.parametrize("split", ["train", "val"])
def test_image_folder__no_class_folders(root: Path, split: str) -> None:
    (root / split).rename(root / "elsewhere")
    (root / split).mkdir()
    Image.new("RGB", (4, 4)).save(root / split / "loose.png")
    with pytest.raises(ConfigError, match=rf"{split} holds no class folders"):
        ready(ImageFolder(str(root)))


def test_image_folder__empty_class_folder(root: Path) -> None:
    (root / "val" / "bird").mkdir()
    (root / "val" / "bird" / "notes.txt").write_text("no picture")
    with pytest.raises(ConfigError, match=r"1 class folder\(s\) in .*val hold no images: bird"):
        ready(ImageFolder(str(root)))


def test_image_folder__classes_differ(root: Path) -> None:
    (root / "val" / "dog").rename(root / "val" / "wolf")
    with pytest.raises(ConfigError, match="dog, wolf are in only one of them"):
        ready(ImageFolder(str(root)))


def test_image_folder__one_class_in_train_only(root: Path) -> None:
    (root / "train" / "bird").mkdir()
    Image.new("RGB", (4, 4)).save(root / "train" / "bird" / "a.png")
    with pytest.raises(ConfigError, match="bird is in only one of them"):
        ready(ImageFolder(str(root)))


def test_train_dataloader__batch_larger_than_the_data_set(root: Path) -> None:
    data = ready(ImageFolder(str(root), 8, 7, 0))
    with pytest.raises(ConfigError, match=r"data\.batch_size=7 on 1 process\(es\) needs 7 images.*has 6.*smaller"):
        data.train_dataloader()


def test_train_dataloader__batch_of_the_whole_data_set(root: Path) -> None:
    assert len(ready(ImageFolder(str(root), 8, 6, 0)).train_dataloader()) == 1


@pytest.mark.parametrize("name", ["batch_size", "img_size", "eval_batch_size", "repeats"])
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


# --- evaluation on several processes ----------------------------------------------------------------------------------


class Counted(ImageDataModule):
    """Image i has label i."""

    def __init__(
        self, num_val: int, eval_batch_size: int, rank: int, world_size: int, predicting: bool = False
    ) -> None:
        super().__init__(img_size=2, num_workers=0, eval_batch_size=eval_batch_size)
        self.num_val = num_val
        self.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, predicting=predicting)
        self.setup()

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        source = TensorSource(torch.zeros(self.num_val, 3, 2, 2, dtype=torch.uint8), torch.arange(self.num_val))
        return source, source, ["only"]


@pytest.mark.parametrize("loader", ["val", "test", "predict"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_real_images__every_image_once_over_all_processes(loader: str, world_size: int) -> None:
    padded = 0
    for num_val in (1, 5, 8, 9, 13):
        for batch_size in (1, 2, 5):
            counted: list[int] = []
            lengths = set()
            for rank in range(world_size):
                data = Counted(num_val, batch_size, rank, world_size, predicting=loader == "predict")
                batches = list(getattr(data, f"{loader}_dataloader")())
                lengths.add(tuple(len(labels) for _, labels in batches))
                for batch_idx, (_, labels) in enumerate(batches):
                    real = data.real_images(batch_idx, len(labels))
                    assert (real.dtype, real.shape) == (torch.bool, labels.shape)
                    counted += labels[real].tolist()
                    padded += int((~real).sum())
            assert sorted(counted) == list(range(num_val))
            assert len(lengths) == 1  # all processes make the same steps
    assert (padded == 0) == (world_size == 1)


def test_real_images__counts_those_of_the_loader_in_use(root: Path) -> None:
    """The val set and the images to predict differ in number."""
    image_folder = ImageFolder(str(root), 8, 4, 0, eval_batch_size=3, predict_dir=str(root / "train"))
    image_folder.setup("validate")
    image_folder.setup("predict")
    for predicting, num_images in ((True, 6), (False, 4)):
        image_folder.trainer = SimpleNamespace(world_size=4, global_rank=2, predicting=predicting)
        assert image_folder.real_images(0, 2).tolist() == [True, num_images > 6]
        image_folder.trainer = SimpleNamespace(world_size=4, global_rank=1, predicting=predicting)
        assert image_folder.real_images(0, 2).tolist() == [True, num_images > 5]


def test_real_images__without_a_trainer() -> None:
    assert ready(Digits(8, eval_batch_size=100)).real_images(3, 59).all()


# --- testing and prediction -------------------------------------------------------------------------------------------


class Collector(L.LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, numbers = batch
        return numbers[self.trainer.datamodule.real_images(batch_idx, len(images))]  # type: ignore[attr-defined]


def trainer() -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **quiet)


def test_digits__testing_uses_the_val_set() -> None:
    model, data = Collector(), Digits(8, eval_batch_size=100)
    trainer().test(model, data, verbose=False)
    assert torch.cat([labels for _, labels in model.batches]).tolist() == data.val_source.labels
    expected = data.normalize(data.val_source.images)
    assert torch.equal(torch.cat([images for images, _ in model.batches]), expected)


def test_digits__prediction_gives_numbers() -> None:
    data = Digits(8, eval_batch_size=100)
    predictions = trainer().predict(Collector(), data)
    assert torch.cat(predictions).tolist() == list(range(359))
    assert (len(data.predict_names), data.predict_names[0], data.predict_names[-1]) == (359, "val/0", "val/358")


def test_prediction__is_normalised_even_after_features_were_served() -> None:
    data = ready(Digits(8))
    data.serve(data.train_dataloader(), data.val_dataloader())
    batch = next(iter(data.predict_dataloader()))
    assert data.on_after_batch_transfer(batch, 0) is batch
    as_it_is = SimpleNamespace(convert_input=lambda images: images)
    data.trainer = SimpleNamespace(predicting=True, precision_plugin=as_it_is)
    assert torch.equal(data.on_after_batch_transfer(batch, 0)[0], data.normalize(batch[0]))


def test_crop_pct__of_every_evaluation_loader() -> None:
    data = ready(Digits(8, eval_batch_size=4, crop_pct=0.5))
    source = {"train": data.train_source, "val": data.val_source}
    for loader, split in (
        (data.val_dataloader(), "val"),
        (data.test_dataloader(), "val"),
        (data.predict_dataloader(), "val"),
        (data.eval_train_dataloader(), "train"),
    ):
        images, plain = source[split].images[:4], EvalTransform(8)
        centres = torch.stack([EvalTransform(8, 0.5)(image) for image in images])
        assert not torch.equal(centres, torch.stack([plain(image) for image in images]))
        assert torch.equal(next(iter(loader))[0], centres)
    with pytest.raises(ConfigError, match=r"data\.crop_pct=0"):
        Digits(8, crop_pct=0)


# --- folders by stage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_image_folder__evaluation_needs_no_training_images(root: Path, stage: str) -> None:
    (root / "train").rename(root / "elsewhere")
    data = ImageFolder(str(root), 8, 2, 0)
    data.setup(stage)
    assert (data.classes, len(data.val_source)) == (["cat", "dog"], 4)
    with pytest.raises(ConfigError, match=r"there is no directory .*train"):
        data.setup("fit")
    (root / "elsewhere").rename(root / "train")
    data.setup("fit")
    assert len(data.train_source) == 6


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_image_folder__evaluation_needs_val(root: Path, stage: str) -> None:
    (root / "val").rename(root / "elsewhere")
    with pytest.raises(ConfigError, match=r"there is no directory .*val"):
        ImageFolder(str(root)).setup(stage)


def test_image_folder__setup_builds_only_what_is_missing(root: Path) -> None:
    data = ready(ImageFolder(str(root), 8, 2, 0))
    sources = data.train_source, data.val_source
    for stage in ("validate", "test", "predict", "fit", None):
        data.setup(stage)
        assert (data.train_source, data.val_source) == sources


def test_image_folder__classes_are_compared_when_training_follows_validation(root: Path) -> None:
    (root / "val" / "dog").rename(root / "val" / "wolf")
    data = ImageFolder(str(root))
    data.setup("validate")
    with pytest.raises(ConfigError, match="dog, wolf are in only one of them"):
        data.setup("fit")


def test_image_folder__predicts_val_by_default(root: Path) -> None:
    data = ImageFolder(str(root), 8, 2, 0, eval_batch_size=3)
    data.setup("predict")
    names = [str(root / "val" / name) for name in ("cat/a.png", "cat/b.JPEG", "dog/a.png", "dog/b.JPEG")]
    assert data.predict_names == names
    assert torch.cat([numbers for _, numbers in data.predict_dataloader()]).tolist() == [0, 1, 2, 3]


def test_image_folder__predicts_any_nested_folder(tmp_path: Path) -> None:
    for value, name in ((10, "b/2.png"), (20, "a.PNG"), (30, "b/c/d/1.png"), (40, "b/1.png")):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 12), (value, value, value)).save(tmp_path / "new" / name)
    (tmp_path / "new" / "notes.txt").write_text("no picture")
    data = ImageFolder(None, 8, 2, 0, eval_batch_size=3, predict_dir=str(tmp_path / "new"))
    predictions = trainer().predict(Collector(), data)
    assert torch.cat(predictions).tolist() == [0, 1, 2, 3]
    assert data.predict_names == [
        str(tmp_path / "new" / name) for name in ("a.PNG", "b/1.png", "b/2.png", "b/c/d/1.png")
    ]
    images = torch.cat([images for images, _ in data.predict_dataloader()])
    assert images.shape == (4, 3, 8, 8)
    assert images[:, 0, 0, 0].tolist() == [20, 40, 10, 30]
    assert data.classes == []


def test_image_folder__predictions_are_named_after_the_classes_of_val(root: Path, tmp_path: Path) -> None:
    data = ImageFolder(str(root), 8, 2, 0, predict_dir=str(root / "train" / "cat"))
    data.setup("predict")
    assert (data.classes, len(data.predict_names)) == (["cat", "dog"], 3)
    data.setup("fit")
    assert (len(data.train_source), len(data.val_source), len(data.predict_names)) == (6, 4, 3)


def test_image_folder__bad_predict_dir(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "is not a directory"), ("empty", "holds no images")):
        data = ImageFolder(predict_dir=str(tmp_path / name))
        with pytest.raises(ConfigError, match=rf"data\.predict_dir=.*{name} {message}"):
            data.setup("predict")
        for stage in ("fit", "validate"):
            with pytest.raises(ConfigError, match=r"data\.root is not set.*--data\.root"):
                data.setup(stage)


def test_image_folder__root_not_set() -> None:
    with pytest.raises(ConfigError, match=r"data\.root is not set.*--data\.root"):
        ImageFolder()


def test_image_folder__classes(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "ant").mkdir()
        Image.new("RGB", (4, 4), (7, 7, 7)).save(root / split / "ant" / "a.png")
    (root / "val" / "dog").rename(root / "val" / "wolf")  # not among the first two
    data = ready(ImageFolder(str(root), 8, 2, 0, classes="0-1"))
    assert (data.classes, data.num_classes) == (["ant", "cat"], 2)
    assert data.train_source.labels == [0, 1, 1, 1]
    assert (len(data.train_source), len(data.val_source)) == (4, 3)
    named = ready(ImageFolder(str(root), 8, 2, 0, classes="cat"))
    assert (named.classes, named.train_source.labels, named.val_source.labels) == (["cat"], [0, 0, 0], [0, 0])
    assert named.predict_names == [str(root / "val/cat" / name) for name in ("a.png", "b.JPEG")]
    with pytest.raises(ConfigError, match="dog, wolf are in only one of them"):
        ready(ImageFolder(str(root), classes="1,2"))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_image_folder__more_classes_than_there_are(root: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.classes='0-2': there are 2 classes"):
        ImageFolder(str(root), classes="0-2").setup(stage)


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("MultiCrop", ["--data.train_transform.local_size", "8"], MultiCrop),
        ("vil_lightning.data.MultiCrop", ["--data.train_transform.global_size", "96"], MultiCrop),
        ("TrainTransform", ["--data.train_transform.color_jitter", "[0, 0, 0, 0]"], TrainTransform),
        ("vil_lightning.data.TrainTransform", ["--data.train_transform.crop", "simple"], TrainTransform),
    ],
)
def test_train_transform__either_kind_by_short_or_full_name(name: str, args: list[str], expected: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    config = parser.parse_args(["--data", "Digits", "--data.train_transform", name, *args, "--data.repeats", "2"])
    data = parser.instantiate_classes(config).data
    assert type(data.train_transform) is expected
    key, value = args[0].rsplit(".", 1)[1], args[1]
    assert str(getattr(data.train_transform, key)) in (value, "(0.0, 0.0, 0.0, 0.0)")
    assert data.repeats == 2


# --- few labels -------------------------------------------------------------------------------------------------------


def test_train_fraction__the_same_share_of_every_class() -> None:
    whole, part = Digits(seed=0), Digits(seed=0, train_fraction=0.1)
    for data in (whole, part):
        data.setup("fit")
    of_class = [torch.tensor(whole.train_source.labels).eq(c).sum().item() for c in range(10)]  # type: ignore[attr-defined]
    labels = [part.train_source[i][1] for i in range(len(part.train_source))]
    assert [labels.count(c) for c in range(10)] == [round(0.1 * count) for count in of_class]
    assert len(part.val_source) == len(whole.val_source)
    pixels = {bytes(whole.train_source[i][0].numpy()) for i in range(len(whole.train_source))}
    assert all(bytes(part.train_source[i][0].numpy()) in pixels for i in range(len(part.train_source)))

    def chosen(seed: int, fraction: float = 0.1) -> list[int]:
        data = Digits(seed=seed, train_fraction=fraction)
        data.setup("fit")
        return data.train_source.indices  # type: ignore[attr-defined]

    assert chosen(0) == chosen(0) != chosen(1)
    assert len(chosen(0, 1e-6)) == 10  # one of each


def test_train_fraction__of_a_folder(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    data = ImageFolder(str(tmp_path), img_size=8, batch_size=2, num_workers=0, train_fraction=0.25, seed=0)
    data.setup("fit")
    assert [data.train_source[i][1] for i in range(len(data.train_source))] == [0, 0, 1, 1]
    assert len(data.val_source) == 4


@pytest.mark.parametrize("fraction", [0.0, 1.1, -0.5])
def test_train_fraction__out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.train_fraction={fraction} must be in \(0, 1\]"):
        Digits(train_fraction=fraction)


# --- what a run suggests as the next command --------------------------------------------------------------------------


def test_source_options__nothing_for_the_built_in_images() -> None:
    assert Digits().source_options() == ""


def test_source_options__name_what_differs_from_the_defaults(root: Path) -> None:
    assert ImageFolder(str(root)).source_options() == f"--data ImageFolder --data.root {root}"
    data = ImageFolder(str(root), val_fraction=0.5, labelled=False)
    assert (
        data.source_options() == f"--data ImageFolder --data.root {root} --data.val_fraction 0.5 --data.labelled False"
    )
    few = TorchvisionData("STL10", "my sets", classes="0-4", download=True)
    assert few.source_options() == "--data TorchvisionData --data.name STL10 --data.root 'my sets' --data.classes 0-4"
    assert Digits(classes="3,5").source_options() == "--data Digits --data.classes 3,5"


def test_source_options__are_read_back(root: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    data = ImageFolder(str(root), val_fraction=0.5, split_seed=3, classes="0-1")
    chosen = parser.parse_args(shlex.split(data.source_options())).data.init_args
    assert (chosen.root, chosen.val_fraction, chosen.split_seed, chosen.classes) == (str(root), 0.5, 3, "0-1")
