"""Supervised runs from the command line: training, scores, predictions, fine-tuning of published and own weights."""

import csv
import itertools
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from shrunk import CONFIGS, Command, invoke
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision.io import write_png

from vil_lightning import load_weights
from vil_lightning.backbones.weights import to_model_names
from vil_lightning.data import Digits

RECIPE = str(CONFIGS / "train_supervised.yaml")
HARDWARE = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}
KWARGS = "{img_size: 16, patch_size: 8, embed_dim: 32, depth: 2}"
SHRINK = [
    *HARDWARE,
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--trainer.log_every_n_steps", "1"),
    *("--model.backbone.kwargs", KWARGS, "--model.ema_decay", "0.9"),
]
LAST = "checkpoints/train_supervised/last.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished shrunk run: `folder`, `out`, `err`. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    result = invoke(["fit", "--config", RECIPE, *SHRINK], folder)
    assert result.code == 0, result.err
    result.folder = folder
    return result


def raw_name(name: str) -> str:
    """The published name of a parameter of a model whose blocks have one scan."""
    for pattern, raw in (
        (r"blocks\.(\d+)\.norm\.(\w+)", r"xlstm.blocks.\1.xlstm_norm.\2"),
        (r"blocks\.(\d+)\.mixer\.branches\.0\.skip", r"xlstm.blocks.\1.xlstm.learnable_skip"),
        (r"blocks\.(\d+)\.mixer\.branches\.0\.conv\.(\w+)", r"xlstm.blocks.\1.xlstm.conv1d.\2"),
        (r"blocks\.(\d+)\.mixer\.branches\.0\.([if]gate)\.(\w+)", r"xlstm.blocks.\1.xlstm.mlstm_cell.\2.\3"),
        (r"blocks\.(\d+)\.mixer\.branches\.0\.norm\.(\w+)", r"xlstm.blocks.\1.xlstm.mlstm_cell.outnorm.\2"),
        (r"blocks\.(\d+)\.mixer\.branches\.0\.(.+)", r"xlstm.blocks.\1.xlstm.\2"),
        (r"blocks\.(\d+)\.mixer\.(.+)", r"xlstm.blocks.\1.xlstm.\2"),
        (r"norm\.(\w+)", r"xlstm.post_blocks_norm.\1"),
        (r"fc_norm\.(\w+)", r"head.0.\1"),
        (r"head\.(\w+)", r"head.1.\1"),
    ):
        if re.fullmatch(pattern, name):
            return re.sub(pattern, raw, name)
    return name


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A file laid out as the published ones, and the model it holds (ten classes, clearly different answers)."""
    torch.manual_seed(3)
    model = timm.create_model("vil2_tiny_patch16_224", num_classes=10, **SMALL).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    raw: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        gain = raw_name(name).endswith((".xlstm_norm.weight", ".outnorm.weight", ".post_blocks_norm.weight"))
        raw[raw_name(name)] = value - 1 if gain else value.clone()
    assert to_model_names(raw).keys() == model.state_dict().keys()
    path = tmp_path_factory.mktemp("published") / "vil2_tiny16.th"
    torch.save({"state_dict": raw, "ctor_kwargs": {"kind": "x"}, "epoch": 800}, path)
    return path, model


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """The val images as the data module hands them out, and their classes."""
    data = Digits(16, 512)
    data.setup()
    images, labels = next(iter(data.val_dataloader()))
    assert len(images) == 359
    return data.normalize(images), labels


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_predictions(rows: list[dict[str, str]], logits: Tensor, names: Callable[[int], str] | None) -> None:
    """A row per val image; five classes with their probabilities, in descending order, those of `logits`."""
    assert [row["image"] for row in rows] == [f"val/{i}" for i in range(len(logits))]
    expected = logits.softmax(1).topk(5)
    for row, shares, classes in zip(rows, expected.values.tolist(), expected.indices.tolist(), strict=True):
        probabilities = [float(row[f"probability{rank}"]) for rank in range(1, 6)]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1 + 5e-6  # rounded
        assert probabilities == pytest.approx(shares, abs=2e-5)
        if min(a - b for a, b in itertools.pairwise(shares)) > 1e-4:  # no ties
            assert [int(row[f"class{rank}"]) for rank in range(1, 6)] == classes
        for rank in range(1, 6):
            assert row.get(f"name{rank}") == (names(int(row[f"class{rank}"])) if names else None)


def shown(out: str, name: str) -> float:
    """A score in the table that Lightning prints."""
    return float(re.findall(rf"{name}\D+([\d.]+)", out)[-1])


def folders(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir()}


# --- training ---------------------------------------------------------------------------------------------------------


def test_fit__prints_and_writes_what_the_recipe_says(trained: SimpleNamespace) -> None:
    block = trained.out[: trained.out.index("Finished")]
    for part in (
        *("supervised, 10 classes, MixUp 0.8, CutMix 1, p 0.5, EMA 0.9", "vil2_tiny_patch16_224", "6 steps; warm-up 1"),
        *("0.002 = 0.032 x 64 / 1024", "0.05 on 18 tensors, none on 33", "1438 training and 359 val images"),
    ):
        assert part in block, trained.out
    assert "Finished at step 6." in trained.out
    content = torch.load(trained.folder / LAST, weights_only=True)
    assert content["global_step"] == 6
    assert content["classes"] == [str(digit) for digit in range(10)]
    assert (trained.folder / "checkpoints/train_supervised/best.ckpt").is_file()


def test_fit__nothing_is_written_in_a_development_run(command: Command, tmp_path: Path) -> None:
    result = command("fit", "--config", RECIPE, *SHRINK, "--trainer.fast_dev_run", "true")
    assert result.code == 0, result.err
    assert list(tmp_path.rglob("*.ckpt")) == []
    assert not (tmp_path / "checkpoints").exists()


def test_fit__is_continued_from_its_last_checkpoint(trained: SimpleNamespace, command: Command, tmp_path: Path) -> None:
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    result = command("fit", "--config", RECIPE, *SHRINK, "--trainer.max_epochs", "3", "--ckpt_path", LAST)
    assert result.code == 0, result.err
    assert "step 6" in result.out
    assert "Finished at step 9." in result.out
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 9


# --- published weights ------------------------------------------------------------------------------------------------


def with_weights(path: Path) -> list[str]:
    return ["--config", RECIPE, *HARDWARE, "--model.backbone.kwargs", KWARGS, "--model.backbone.weights", str(path)]


def test_published__validate(published: tuple[Path, nn.Module], digits: Any, command: Command, tmp_path: Path) -> None:
    path, model = published
    result = command("validate", *with_weights(path))
    assert result.code == 0, result.err
    with torch.no_grad():
        expected = float(100 * multiclass_accuracy(model(digits[0]), digits[1], num_classes=10, average="micro"))
    assert shown(result.out, "val/acc1") == pytest.approx(expected, abs=1e-3)
    assert "logs/train_supervised_validate" in folders(tmp_path)
    assert "logs/train_supervised" not in folders(tmp_path)
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_published__predict(published: tuple[Path, nn.Module], digits: Any, command: Command, tmp_path: Path) -> None:
    path, model = published
    result = command("predict", *with_weights(path))
    assert result.code == 0, result.err
    assert "Predictions of 359 images: logs/train_supervised_predict/predictions.csv" in result.out
    with torch.no_grad():
        logits = model(digits[0])
    assert logits.softmax(1).max() > 0.5
    assert_predictions(rows_of(tmp_path / "logs/train_supervised_predict/predictions.csv"), logits, names=str)


def test_published__fine_tuning_with_a_new_head(
    published: tuple[Path, nn.Module], command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"]
    still = ["--model.freeze", "[patch_embed., blocks.]", "--model.new_head", "true"]
    result = command("fit", *with_weights(published[0]), *short, *still)
    assert result.code == 0, result.err
    assert "The classifier (10 classes) is new." in caplog.text
    content = torch.load(tmp_path / LAST, weights_only=True)["state_dict"]
    for name, value in published[1].state_dict().items():
        same = torch.allclose(content[f"backbone.{name}"], value, rtol=0, atol=1e-6)
        assert same == name.startswith(("patch_embed.", "blocks.")), name


def test_published__classifier_of_another_size_is_refused(published: tuple[Path, nn.Module], command: Command) -> None:
    result = command("fit", *with_weights(published[0]), "--model.num_classes", "7", "--trainer.max_epochs", "1")
    assert result.code == 2
    assert "model.new_head=true" in result.err
    assert "Traceback" not in result.err


# --- own checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def average(trained: SimpleNamespace) -> nn.Module:
    """The network that the run's checkpoint is used as."""
    model = timm.create_model("vil2_tiny_patch16_224", num_classes=10, **SMALL).eval()
    load_weights(model, trained.folder / LAST)
    content = torch.load(trained.folder / LAST, weights_only=True)["state_dict"]
    assert torch.equal(model.head.weight, content["ema.module.head.weight"])
    return model


def test_own__validate_scores_the_moving_average(
    trained: SimpleNamespace, average: nn.Module, digits: Any, command: Command
) -> None:
    weights = ["--model.backbone.weights", str(trained.folder / LAST)]
    result = command("validate", "--config", RECIPE, *HARDWARE, "--model.backbone.kwargs", KWARGS, *weights)
    assert result.code == 0, result.err
    with torch.no_grad():
        expected = float(100 * multiclass_accuracy(average(digits[0]), digits[1], num_classes=10, average="micro"))
    assert shown(result.out, "val/acc1") == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("by", ["weights", "ckpt_path"])
def test_own__predict_names_the_classes(
    trained: SimpleNamespace, average: nn.Module, digits: Any, command: Command, tmp_path: Path, by: str
) -> None:
    checkpoint = str(trained.folder / LAST)
    settings = ["--model.backbone.kwargs", KWARGS, "--predictions.path", "table.csv"]
    if by == "weights":
        settings += ["--model.backbone.weights", checkpoint]
    else:
        settings += ["--model.ema_decay", "0.9", "--ckpt_path", checkpoint]
    result = command("predict", "--config", RECIPE, *HARDWARE, *settings)
    assert result.code == 0, result.err
    with torch.no_grad():
        logits = average(digits[0])
    assert_predictions(rows_of(tmp_path / "table.csv"), logits, names=str)


def test_own__predict_dir_needs_no_labels(trained: SimpleNamespace, command: Command, tmp_path: Path) -> None:
    (tmp_path / "new/inner").mkdir(parents=True)
    for name in ("b.png", "inner/a.png", "c.png"):
        write_png(torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8), str(tmp_path / "new" / name))
    result = command(
        *("predict", "--model", "Supervised", "--model.backbone.weights", trained.folder / LAST, *HARDWARE),
        *("--data", "ImageFolder", "--data.predict_dir", "new", "--data.img_size", "16", "--data.num_workers", "0"),
    )
    assert result.code == 0, result.err
    (path,) = tmp_path.rglob("predictions.csv")
    rows = rows_of(path)
    assert [row["image"] for row in rows] == ["new/b.png", "new/c.png", "new/inner/a.png"]
    assert all(row["name1"] == row["class1"] for row in rows)  # the names of the digits


# --- what must not happen silently ------------------------------------------------------------------------------------


@pytest.mark.parametrize("subcommand", ["validate", "predict"])
@pytest.mark.parametrize(
    ("settings", "part"), [(["--model.new_head", "true"], "model.new_head"), ([], "no trained weights")]
)
def test_scoring__an_untrained_classifier_is_refused(
    trained: SimpleNamespace, command: Command, subcommand: str, settings: list[str], part: str
) -> None:
    weights = ["--model.backbone.weights", str(trained.folder / LAST)] if settings else []
    result = command(subcommand, "--config", RECIPE, *HARDWARE, "--model.backbone.kwargs", KWARGS, *weights, *settings)
    assert result.code == 2
    assert part in result.err
    assert "Traceback" not in result.err


def test_predict__does_not_replace_an_earlier_table(trained: SimpleNamespace, command: Command, tmp_path: Path) -> None:
    weights = ["--model.backbone.weights", str(trained.folder / LAST)]
    args = ["predict", "--config", RECIPE, *HARDWARE, "--model.backbone.kwargs", KWARGS, *weights]
    assert command(*args).code == 0
    (table,) = tmp_path.rglob("predictions.csv")
    table.write_text("precious")
    result = command(*args)
    assert (result.code, table.read_text()) == (2, "precious")
    assert "--overwrite" in result.err
    assert command(*args, "--overwrite", "true").code == 0
    assert table.read_text() != "precious"


def test_classes__of_other_names_are_reported(trained: SimpleNamespace, command: Command, tmp_path: Path) -> None:
    for split, name in itertools.product(("train", "val"), range(10)):
        folder = tmp_path / f"images/{split}/animal{name}"
        folder.mkdir(parents=True)
        write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(folder / "1.png"))
    with pytest.warns(UserWarning, match="Class 0 is '0' in the weights and 'animal0' in the data"):
        result = command(
            *("validate", "--model", "Supervised", "--model.backbone.weights", trained.folder / LAST, *HARDWARE),
            *("--data", "ImageFolder", "--data.root", "images", "--data.img_size", "16", "--data.num_workers", "0"),
        )
    assert result.code == 0, result.err


def test_fit__several_views_are_refused(command: Command) -> None:
    result = command("fit", "--config", RECIPE, *SHRINK, "--data.train_transform", "MultiCrop")
    assert result.code == 2
    assert "data.train_transform" in result.err


def test_fit__a_frozen_classifier_cannot_be_trained_alone(command: Command) -> None:
    freeze = ["--model.freeze", "[head., fc_norm.]", "--model.head_only", "2 steps"]
    result = command("fit", "--config", RECIPE, *SHRINK, *freeze)
    assert result.code == 2
    assert "model.head_only" in result.err


@pytest.mark.parametrize("guard", ["null", "0"])  # the method's own check, a step late; the guard, before the step
def test_fit__an_error_does_not_replace_the_best_checkpoint(command: Command, tmp_path: Path, guard: str) -> None:
    """Lightning's save_on_exception would write best.ckpt; ours writes last.ckpt, and never a diverged state."""
    args = ["fit", "--config", RECIPE, *SHRINK, "--checkpoint.save_on_exception", "true"]
    args += ["--faults.max_skipped_steps", guard]
    (tmp_path / "poison.py").write_text(
        "import torch\nfrom lightning import Callback\n\n\nclass Poison(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if trainer.global_step == 4:\n            batch[0].fill_(torch.nan)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        if guard == "null":
            with pytest.raises(RuntimeError, match="diverged"):
                command(*args, "--trainer.callbacks+", "poison.Poison")
        else:
            result = command(*args, "--trainer.callbacks+", "poison.Poison")
            assert result.code == 2
            assert "diverged" in result.err
    finally:
        sys.path.remove(str(tmp_path))
    for name in ("best", "last"):
        content = torch.load(tmp_path / f"checkpoints/train_supervised/{name}.ckpt", weights_only=True)
        assert content["global_step"] == (4 if name == "last" and guard == "0" else 3)
        assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_fit__in_every_precision(command: Command, precision: str) -> None:
    result = command("fit", "--config", RECIPE, *SHRINK, "--trainer.precision", precision)
    assert result.code == 0, result.err


def test_fit__a_few_batches_again_and_again(command: Command) -> None:
    result = command("fit", "--config", RECIPE, *SHRINK, "--trainer.overfit_batches", "2")
    assert result.code == 0, result.err
