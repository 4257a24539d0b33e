"""Every shipped recipe is read by the real command line, and its values arrive."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shrunk import CONFIGS, Command
from torchvision.io import write_png

from vil_lightning.callbacks import OnlineKNN, RunProgressBar, RunSummary, Throughput, ViewPictures
from vil_lightning.cli import VilCLI, build_cli
from vil_lightning.data import Digits
from vil_lightning.methods import DINO, LinearProbe

RECIPES = sorted(CONFIGS.rglob("*.yaml"))


def recipe_id(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def build(*args: str) -> VilCLI:
    """All objects of a run; `main` is not involved."""
    with contextlib.redirect_stderr(io.StringIO()):
        return build_cli(list(args), run=False)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main.py"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # removed again afterwards
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / f"images/{split}/cat").mkdir(parents=True)
        write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / f"images/{split}/cat/1.png"))
    return tmp_path / "images"


def differences(wanted: Any, got: Any, key: str = "") -> list[str]:
    """Values of a recipe that are not in the parsed configuration."""
    if isinstance(wanted, dict):
        if not isinstance(got, dict):
            return [f"{key}: {got!r} is no mapping"]
        return [text for k, v in wanted.items() for text in differences(v, got.get(k), f"{key}.{k}")]
    if isinstance(wanted, list):
        if not isinstance(got, list) or len(got) < len(wanted):
            return [f"{key}: {wanted!r} became {got!r}"]
        return [text for w, g in zip(wanted, got, strict=False) for text in differences(w, g, f"{key}[]")]
    return [] if wanted == got else [f"{key}: {wanted!r} became {got!r}"]


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_recipe__is_read_completely_and_without_a_warning(path: Path, root: Path, command: Command) -> None:
    recipe = yaml.safe_load(path.read_text())
    folder = recipe["data"]["class_path"].endswith("ImageFolder")
    extra = ["--data.root", str(root)] if folder else []
    result = command("fit", "--config", path, "--print_config", *extra)
    assert (result.code, result.err) == (0, "")
    printed = yaml.safe_load(result.out)
    assert differences(recipe, printed) == []
    if folder:
        assert printed["data"]["init_args"]["root"] == str(root)


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_recipe__conventions(path: Path) -> None:
    text = path.read_text()
    recipe = yaml.safe_load(text)
    for key in ("model", "data"):
        module, name = recipe[key]["class_path"].rsplit(".", 1)
        assert hasattr(__import__(module, fromlist=[name]), name)
    assert "optimizer" not in recipe
    assert "lr_scheduler" not in recipe
    # The command in the header is one that works from the repository's root, with this very file.
    run = re.search(r"# Run: +(python main\.py fit --config (\S+))", text)
    assert run is not None
    assert CONFIGS.parent / run[2] == path


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_recipe__unknown_key_is_rejected_by_name(path: Path, root: Path, command: Command, tmp_path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    recipe["model"]["init_args"]["momentumm"] = 0.5
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(recipe))
    result = command("fit", "--config", wrong)
    assert result.code == 2
    assert "momentumm" in result.err


def test_pretraining__values_reach_the_objects() -> None:
    path = CONFIGS / "pretrain_dino.yaml"
    recipe = yaml.safe_load(path.read_text())
    cli = build("--config", str(path))
    assert isinstance(cli.model, DINO)
    assert isinstance(cli.datamodule, Digits)
    for key, value in recipe["model"]["init_args"].items():
        if key not in ("backbone", "head_hidden_dim", "head_bottleneck_dim"):  # not kept under these names
            assert getattr(cli.model, key) == value, key
    assert cli.model.student["head"].last_layer.in_features == recipe["model"]["init_args"]["head_bottleneck_dim"]
    assert cli.model.student["backbone"].num_features > 0
    assert cli.model.backbone_config.kwargs == recipe["model"]["init_args"]["backbone"]["kwargs"]
    for key, value in recipe["data"]["init_args"]["train_transform"]["init_args"].items():
        assert getattr(cli.datamodule.train_transform, key) == (tuple(value) if isinstance(value, list) else value)
    assert cli.datamodule.batch_size == recipe["data"]["init_args"]["batch_size"]
    assert cli.trainer.max_epochs == recipe["trainer"]["max_epochs"]
    assert cli.trainer.log_every_n_steps == recipe["trainer"]["log_every_n_steps"]


def test_pretraining__logs_checkpoints_and_callbacks() -> None:
    cli = build("--config", str(CONFIGS / "pretrain_dino.yaml"))
    (checkpoint,) = cli.trainer.checkpoint_callbacks
    assert (checkpoint.monitor, checkpoint.mode, checkpoint.filename) == ("val/knn_acc1", "max", "best")
    assert Path(checkpoint.dirpath) == Path.cwd() / "checkpoints/pretrain_dino"
    assert checkpoint.save_last
    assert Path(cli.trainer.log_dir) == Path("logs/pretrain_dino")
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    for kind in (OnlineKNN, ViewPictures, RunProgressBar, RunSummary, Throughput):
        assert kinds.count(kind) == 1, kind
    recipe = yaml.safe_load((CONFIGS / "pretrain_dino.yaml").read_text())
    every = recipe["trainer"]["callbacks"][0]["init_args"]["every_n_epochs"]
    assert next(c for c in cli.trainer.callbacks if isinstance(c, OnlineKNN)).every_n_epochs == every


def test_pretraining__optimizer_is_the_methods_own() -> None:
    cli = build("--config", str(CONFIGS / "pretrain_dino.yaml"))
    assert cli.model.configure_optimizers.__func__ is DINO.configure_optimizers  # not patched by the CLI
    assert "optimizer" not in cli.config


def test_probe__values_and_weights_reach_the_objects(tmp_path: Path) -> None:
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}
    source = build(
        *("--model", "DINO", "--model.backbone.name", "vil2_tiny_patch16_224", "--model.backbone.kwargs", str(small)),
        *("--model.num_prototypes", "8", "--model.head_hidden_dim", "8", "--data", "Digits"),
    ).model
    recorded = {"name": "vil2_tiny_patch16_224", "kwargs": small}
    torch.save({"state_dict": source.state_dict(), "backbone": recorded}, tmp_path / "weights.ckpt")
    path = CONFIGS / "linear_probe.yaml"
    cli = build("--config", str(path), "--model.backbone.weights", "weights.ckpt")
    assert isinstance(cli.model, LinearProbe)
    assert cli.model.backbone_config.kwargs == small
    key = "patch_embed.proj.weight"
    assert torch.equal(cli.model.backbone.state_dict()[key], source.teacher["backbone"].state_dict()[key])
    (checkpoint,) = cli.trainer.checkpoint_callbacks
    assert (checkpoint.monitor, checkpoint.mode) == ("val/held_out_acc1", "max")
    assert cli.trainer.max_epochs == yaml.safe_load(path.read_text())["trainer"]["max_epochs"]


def test_command_line__short_class_names() -> None:
    cli = build(
        *("--model", "DINO", "--data", "Digits", "--model.backbone.name", "vil2_tiny_patch16_224"),
        *("--model.backbone.kwargs", "{img_size: 16, patch_size: 8, embed_dim: 32, depth: 2}"),
        *("--model.num_prototypes", "8", "--model.head_hidden_dim", "8", "--data.batch_size", "12"),
    )
    assert isinstance(cli.model, DINO)
    assert cli.datamodule.batch_size == 12
    assert Path(cli.trainer.log_dir) == Path("logs/run")  # without a recipe


def test_command_line__a_second_recipe_overrides_the_first(tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text(
        "trainer: {max_epochs: 7}\n"
        "model: {init_args: {teacher_momentum: 0.5}}\n"
        "data: {init_args: {train_transform: {init_args: {num_local_views: 1}}}}\n"
    )
    cli = build("--config", str(CONFIGS / "pretrain_dino.yaml"), "--config", str(layer))
    assert cli.trainer.max_epochs == 7
    assert cli.model.teacher_momentum == 0.5
    assert cli.datamodule.train_transform.num_local_views == 1
    first = yaml.safe_load((CONFIGS / "pretrain_dino.yaml").read_text())
    assert cli.model.num_prototypes == first["model"]["init_args"]["num_prototypes"]
    views = first["data"]["init_args"]["train_transform"]["init_args"]
    assert cli.datamodule.train_transform.rotation == views["rotation"]
    assert cli.run_name == "pretrain_dino"


def test_command_line__beats_the_recipe_and_names_the_run() -> None:
    cli = build(
        *("--config", str(CONFIGS / "pretrain_dino.yaml"), "--model.teacher_momentum", "0.7", "--run_name", "mine")
    )
    assert cli.model.teacher_momentum == 0.7
    (checkpoint,) = cli.trainer.checkpoint_callbacks
    assert Path(checkpoint.dirpath).name == "mine"
    assert Path(cli.trainer.log_dir) == Path("logs/mine")
