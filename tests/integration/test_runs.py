"""Whole runs from the command line: what they write, print, refuse to overwrite, and continue."""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from shrunk import CONFIGS, PRETRAIN, PROBE, Command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LAST = "checkpoints/pretrain_dino/last.ckpt"


def files(folder: Path) -> set[str]:
    """Relative names; the changing part of event files is dropped."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {re.sub(r"tfevents\..*", "tfevents", name) for name in names}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_pretraining__writes_exactly_these_files(pretrained: SimpleNamespace) -> None:
    assert files(pretrained.folder) == {
        "logs/pretrain_dino/config.yaml",
        "logs/pretrain_dino/hparams.yaml",
        "logs/pretrain_dino/events.out.tfevents",
        "checkpoints/pretrain_dino/last.ckpt",
        "checkpoints/pretrain_dino/best.ckpt",
    }


def test_pretraining__checkpoint_records_step_and_backbone(pretrained: SimpleNamespace) -> None:
    checkpoint = torch.load(pretrained.folder / LAST, weights_only=True)
    assert checkpoint["global_step"] == 3
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}
    assert checkpoint["backbone"] == {"name": "vil2_tiny_patch16_224", "kwargs": kwargs}


def test_pretraining__saved_config_holds_recipe_and_overrides(pretrained: SimpleNamespace) -> None:
    config = yaml.safe_load((pretrained.folder / "logs/pretrain_dino/config.yaml").read_text())
    assert config["model"]["init_args"]["num_prototypes"] == 32
    recipe = yaml.safe_load((CONFIGS / "pretrain_dino.yaml").read_text())["model"]["init_args"]
    assert config["model"]["init_args"]["final_weight_decay"] == recipe["final_weight_decay"]
    assert config["trainer"]["limit_train_batches"] == 3


def test_pretraining__checkpoint_holds_the_resolved_config(pretrained: SimpleNamespace) -> None:
    text = torch.load(pretrained.folder / LAST, weights_only=True)["config"]
    saved = (pretrained.folder / "logs/pretrain_dino/config.yaml").read_text()
    assert yaml.safe_load(text) == yaml.safe_load(saved)
    assert yaml.safe_load(text)["run_name"] == "pretrain_dino"


def test_pretraining__saved_config_can_be_run_under_another_name(with_run: Path, command: Command) -> None:
    before = digest(with_run / LAST)
    result = command("fit", "--config", "logs/pretrain_dino/config.yaml", "--run_name", "again")
    assert result.code == 0, result.err
    assert (with_run / "checkpoints/again/last.ckpt").is_file()
    assert (with_run / "logs/again/config.yaml").is_file()
    assert digest(with_run / LAST) == before
    assert command("fit", "--config", "logs/pretrain_dino/config.yaml").code == 2  # the same run again


def test_pretraining__prints_start_block_and_next_command(pretrained: SimpleNamespace) -> None:
    block = pretrained.out[: pretrained.out.index("Finished")]
    for part in (
        *("DINO, 32 prototypes", "vil2_tiny_patch16_224", "3 steps", "1438 training and 359 val images, 10 classes"),
        *("16 = 16 x 1 device(s) x 1 accumulated", "0.000125 = 0.002 x 16 / 256", "logs/pretrain_dino", "1 x cpu"),
    ):
        assert part in block, pretrained.out
    assert "Finished at step 3." in pretrained.out
    assert f"python main.py fit --config configs/linear_probe.yaml --model.backbone.weights {LAST}" in pretrained.out


def test_pretraining__tensorboard_scalars_are_grouped(pretrained: SimpleNamespace) -> None:
    log = events(pretrained.folder / "logs/pretrain_dino")
    tags = set(log.Tags()["scalars"])
    schedule = {f"schedule/{name}" for name in ("lr", "weight_decay", "teacher_momentum", "teacher_temp")}
    health = {f"health/{name}" for name in ("loss_over_ln_k", "teacher_entropy", "kl", "feature_std")}
    assert {"train/loss", "train/grad_norm", "val/knn_acc1", "speed/images_per_second"} | schedule | health <= tags
    assert {tag.split("/")[0] for tag in tags} <= {"train", "val", "schedule", "health", "speed", "final", "epoch"}
    # Three steps are written at log_every_n_steps 1, and they differ.
    for tag in ("train/loss", "schedule/lr", "health/teacher_entropy"):
        values = log.Scalars(tag)
        assert len(values) == 3, tag
        assert len({value.step for value in values}) == 3, tag
        assert len({value.value for value in values}) > 1, tag
    assert 0 <= log.Scalars("val/knn_acc1")[0].value <= 100


def test_pretraining__tensorboard_shows_views_and_hyper_parameters(pretrained: SimpleNamespace) -> None:
    log = events(pretrained.folder / "logs/pretrain_dino")
    assert log.Tags()["images"] == ["views/global_then_local"]
    picture = log.Images("views/global_then_local")[0]
    assert (picture.height, picture.width) == (8 * 100 + 4, 3 * 100 + 4)  # 8 images, 2 global views and a local one
    content = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.init_args.num_prototypes" in content
    assert b"data.init_args.batch_size" in content


def test_again__is_refused_and_names_the_ways_out(with_run: Path, command: Command) -> None:
    before = {path: digest(path) for path in with_run.rglob("*") if path.is_file()}
    result = command(*PRETRAIN)
    assert result.code == 2
    for part in (f"--ckpt_path {LAST}", "--run_name", "--overwrite true", "best.ckpt, last.ckpt"):
        assert part in result.err
    assert {path: digest(path) for path in with_run.rglob("*") if path.is_file()} == before


def test_overwrite__starts_anew(with_run: Path, command: Command) -> None:
    (with_run / "logs/pretrain_dino/notes.txt").write_text("no run wrote this, so none deletes it")
    names = files(with_run)
    before = digest(with_run / LAST)
    result = command(*PRETRAIN, "--overwrite", "true", "--trainer.limit_train_batches", "2")
    assert result.code == 0, result.err
    assert files(with_run) == names
    assert digest(with_run / LAST) != before
    assert torch.load(with_run / LAST, weights_only=True)["global_step"] == 2
    assert len(list((with_run / "logs/pretrain_dino").glob("events*"))) == 1


def test_overwrite__keeps_the_old_run_if_the_new_one_cannot_start(with_run: Path, command: Command) -> None:
    before = {path: digest(path) for path in with_run.rglob("*") if path.suffix == ".ckpt"}
    assert with_run / LAST in before
    late = ["--data.train_transform.local_size", "7"]  # found when the backbone is tried, after everything is built
    result = command(*PRETRAIN, "--overwrite", "true", *late)
    assert result.code == 2
    assert "local_size" in result.err
    assert {path: digest(path) for path in before} == before


def test_resume__with_another_backbone_is_refused(with_run: Path, command: Command) -> None:
    result = command(*PRETRAIN, "--ckpt_path", LAST, "--model.backbone.kwargs.embed_dim", "64")
    assert result.code == 2
    assert "model.backbone.weights" in result.err
    assert "Traceback" not in result.err


def test_resume__with_another_head_is_refused(with_run: Path, command: Command) -> None:
    result = command(*PRETRAIN, "--ckpt_path", LAST, "--model.num_prototypes", "17")
    assert result.code == 2
    assert "model.num_prototypes" in result.err


def test_overwrite__may_start_from_the_weights_it_replaces(with_run: Path, command: Command) -> None:
    result = command(*PRETRAIN, "--overwrite", "true", "--model.backbone.weights", LAST)
    assert result.code == 0, result.err


def test_fast_dev_run__leaves_an_earlier_run_alone(with_run: Path, command: Command) -> None:
    before = {path: digest(path) for path in with_run.rglob("*") if path.is_file()}
    durations = ["--model.lr_warmup", "0 steps", "--model.freeze_last_layer", "0 steps"]
    assert command(*PRETRAIN, *durations, "--trainer.fast_dev_run", "true").code == 0
    assert {path: digest(path) for path in with_run.rglob("*") if path.is_file()} == before


def test_run_name__makes_a_second_run(with_run: Path, command: Command) -> None:
    before = digest(with_run / LAST)
    result = command(*PRETRAIN, "--run_name", "second")
    assert result.code == 0, result.err
    assert "checkpoints/second/last.ckpt" in result.out
    assert digest(with_run / LAST) == before
    second = {name.replace("second", "pretrain_dino") for name in files(with_run) if "/second/" in name}
    assert second == {name for name in files(with_run) if "/pretrain_dino/" in name}


def test_resume__continues_at_the_next_step(with_run: Path, command: Command) -> None:
    result = command(*PRETRAIN, "--ckpt_path", LAST, "--trainer.max_epochs", "2")
    assert result.code == 0, result.err
    assert "step 3" in result.out[: result.out.index("Finished")]
    assert "Finished at step 6." in result.out
    checkpoint = torch.load(with_run / LAST, weights_only=True)
    assert (checkpoint["global_step"], checkpoint["epoch"]) == (6, 1)
    kept = {"last.ckpt", "last-1.ckpt", "best.ckpt"}
    assert {path.name for path in (with_run / "checkpoints/pretrain_dino").iterdir()} == kept
    steps = [value.step for value in events(with_run / "logs/pretrain_dino").Scalars("train/loss")]
    assert steps == sorted(set(steps))
    assert len(steps) == 6


def printed_command(out: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith("Next:"))
    return shlex.split(line.removeprefix("Next:"))


def test_probe__runs_with_the_printed_command(with_run: Path, pretrained: SimpleNamespace, command: Command) -> None:
    python, script, *args = printed_command(pretrained.out)
    assert (python, script) == ("python", "main.py")
    (with_run / "configs").symlink_to(CONFIGS)
    # Shorter than printed, otherwise the same.
    result = command(*args, "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    assert result.code == 0, result.err
    (with_run / "configs").unlink()
    assert {name for name in files(with_run) if "/linear_probe/" in name} == {
        "logs/linear_probe/config.yaml",
        "logs/linear_probe/hparams.yaml",
        "logs/linear_probe/events.out.tfevents",
        "logs/linear_probe/results.json",
        "checkpoints/linear_probe/last.ckpt",
        "checkpoints/linear_probe/last-1.ckpt",
        "checkpoints/linear_probe/best.ckpt",
    }
    results = json.loads((with_run / "logs/linear_probe/results.json").read_text())
    assert results["backbone"]["weights"] == LAST
    assert results["backbone"]["kwargs"]["embed_dim"] == 32
    assert results["protocol"]["num_val"] == 359
    tags = events(with_run / "logs/linear_probe").Tags()["scalars"]
    assert {"train/loss", "val/held_out_acc1", "val/linear_acc1", "val/knn20_acc1"} <= set(tags)
    assert f"{results['linear']['val_acc1']:.1f}" in result.out


def test_probe__is_not_resumed(with_run: Path, command: Command) -> None:
    assert command(*PROBE, "--model.backbone.weights", LAST).code == 0
    checkpoint = "checkpoints/linear_probe/last.ckpt"
    result = command(*PROBE, "--model.backbone.weights", LAST, "--ckpt_path", checkpoint)
    assert result.code == 2
    assert "not resumed" in result.err


@pytest.mark.parametrize("code", [0, 2], ids=["success", "refusal"])
def test_main__as_a_script(tmp_path: Path, code: int) -> None:
    name = "vil2_tiny_patch16_224" if code == 0 else "vil3"
    args = [*PRETRAIN, "--trainer.fast_dev_run", "true", "--model.backbone.name", name, "--model.lr_warmup", "0 steps"]
    args += ["--model.freeze_last_layer", "0 steps"]
    script = [sys.executable, str(CONFIGS.parent / "main.py")]
    result = subprocess.run([*script, *args], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert ("error: model.backbone.name='vil3'" in result.stderr) == (code == 2)
    assert ("Finished at step 1" in result.stdout) == (code == 0)
    assert not list(tmp_path.rglob("*.ckpt"))
