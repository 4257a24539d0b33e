"""What a user can get wrong ends before the first step, with exit code 2 and one message that says what to change."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shrunk import CONFIGS, PRETRAIN, PROBE, Command
from torchvision.io import write_png


def assert_refused(result: SimpleNamespace, *parts: str) -> None:
    """Exit code 2; the message holds all parts; no step was made and no traceback is shown."""
    assert result.code == 2, result.out + result.err
    message = result.err[result.err.rindex("error: ") :]
    for part in parts:
        assert part in message, message
    assert "Traceback" not in result.out + result.err
    assert result.err.count("error: ") == 1
    assert "Finished" not in result.out


def small(**kwargs: int) -> str:
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, **kwargs}
    return "{" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        pytest.param(
            ["--model.backbone.name", "vil2_tiny_patch16"],
            ["model.backbone.name='vil2_tiny_patch16'", "vil2_tiny_patch16_224"],
            id="unknown_backbone",
        ),
        pytest.param(
            ["--model.backbone.kwargs", small(img_size=20)],
            ["model.backbone", "img_size=(20, 20)", "patch_size=8"],
            id="image_not_divisible_by_patch",
        ),
        pytest.param(
            ["--model.backbone.kwargs", "{img_size: 16, wings: 2}"], ["model.backbone", "wings"], id="unknown_kwarg"
        ),
        pytest.param(
            ["--config", str(CONFIGS / "trainer/fsdp.yaml"), "--trainer.precision", "16-mixed"],
            ["trainer.precision=16-mixed", "FullyShardedStrategy", "bf16-mixed"],
            id="precision_of_sharded_training",
        ),
        pytest.param(
            ["--model.backbone.kwargs", small(patch_size=True)],
            ["model.backbone", "True", "patch_size"],
            id="true_for_a_number",
        ),
        pytest.param(
            ["--trainer.log_every_n_steps", "-1"],
            ["trainer.log_every_n_steps=-1", "0 for no logs"],
            id="negative_log_steps",
        ),
        pytest.param(
            ["--data.img_size", "12"], ["OnlineKNN", "data.img_size=12", "patch_size=8"], id="scored_image_does_not_fit"
        ),
        pytest.param(
            ["--data.train_transform.global_size", "20"],
            ["data.train_transform.global_size=20", "patch_size=8"],
            id="global_crop_not_divisible_by_patch",
        ),
        pytest.param(
            ["--data.train_transform.local_size", "12"],
            ["data.train_transform.local_size=12", "patch_size=8"],
            id="local_crop_not_divisible_by_patch",
        ),
        pytest.param(
            ["--data.train_transform.local_size", "32"],
            ["data.train_transform.local_size=32", "global_size=16"],
            id="local_crop_larger_than_global",
        ),
        pytest.param(
            [
                *("--data.train_transform.num_local_views", "1000000"),
                *("--model.num_prototypes", "4096", "--data.batch_size", "512"),
            ],
            ["num_local_views=1000000", "data.batch_size=512", "model.num_prototypes=4096", "GiB", "Reduce"],
            id="too_many_local_crops_for_the_memory",
        ),
        pytest.param(
            ["--model.lr_warmup", "10 epochs"],
            ["model.lr_warmup='10 epochs'", "30 steps", "the run has 3", "trainer.max_epochs"],
            id="warm_up_longer_than_the_run",
        ),
        pytest.param(["--model.lr_warmup", "soon"], ["model.lr_warmup='soon'", "10 epochs"], id="no_duration"),
        pytest.param(["--trainer.max_epochs", "-1"], ["trainer.max_epochs"], id="run_without_an_end"),
        pytest.param(["--data.batch_size", "5000"], ["data.batch_size=5000", "1438"], id="batch_larger_than_the_data"),
        pytest.param(["--model.student_temp", "0"], ["model.student_temp=0", "positive"], id="zero_temperature"),
        pytest.param(["--run_name", "a/b"], ["run_name='a/b'", "slashes"], id="run_name_with_a_slash"),
        pytest.param(["--run_name", ".."], ["run_name='..'"], id="run_name_that_leaves_the_folder"),
        pytest.param(["--ckpt_path", "no.ckpt"], ["ckpt_path", "no.ckpt"], id="missing_checkpoint"),
        pytest.param(
            ["--model.backbone.weights", "no.pth"], ["model.backbone.weights", "no.pth"], id="missing_weights"
        ),
        pytest.param(["--model.teacher_momentumm", "0.5"], ["teacher_momentumm"], id="unknown_key_of_the_model"),
        pytest.param(["--data.wings", "2"], ["wings"], id="unknown_key_of_the_data"),
        pytest.param(["--wings", "2"], ["wings"], id="unknown_key"),
        pytest.param(["--model.num_prototypes", "many"], ["num_prototypes", "int", "many"], id="wrong_type"),
        pytest.param(["--config", "no.yaml"], ["no.yaml"], id="missing_config"),
        pytest.param(["--seed_everything", "-1"], ["seed_everything", "-1"], id="seed_below_zero"),
        pytest.param(["--model.base_lr", ".inf"], ["model.base_lr=inf", "finite"], id="infinite_rate"),
        pytest.param(["--model.weight_decay", ".nan"], ["model.weight_decay=nan", "finite"], id="no_number"),
        pytest.param(["--model.weight_decay", "-1"], ["model.weight_decay=-1", "negative"], id="negative_decay"),
        pytest.param(["--model.clip_grad", "0"], ["model.clip_grad=0", "positive"], id="clipping_everything"),
        pytest.param(
            ["--model.head_hidden_dim", "1000000000"], ["model.head_hidden_dim", "1048576"], id="absurd_width"
        ),
        pytest.param(["--model.num_prototypes", "0"], ["model.num_prototypes=0", "at least 1"], id="no_prototypes"),
        pytest.param(
            ["--model.backbone.kwargs", "{depth: 1000000000}"],
            ["model.backbone.kwargs.depth", "10000"],
            id="absurd_depth",
        ),
        pytest.param(
            [
                *("--model.backbone.name", "vit_tiny_patch16_224"),
                *("--model.backbone.kwargs", "{img_size: 16, patch_size: 8, drop_path_rate: 3}"),
            ],
            ["model.backbone.kwargs.drop_path_rate=3", "[0, 1)"],
            id="drop_path_of_another_library",
        ),
        pytest.param(["--data.num_workers", "1000000000"], ["data.num_workers", "512"], id="too_many_workers"),
        pytest.param(["--data.img_size", "1000000000"], ["data.img_size", "16384"], id="absurd_image"),
        pytest.param(["--data.std", "[0.3, 0, 0.3]"], ["data.std", "positive"], id="deviation_of_zero"),
        pytest.param(
            ["--data.train_transform.blur_probs", "[-1, 0, 0]"],
            ["data.train_transform.blur_probs", "[0, 1]"],
            id="negative_probability",
        ),
        pytest.param(
            ["--data.train_transform.blur_sigma", "[2, 1]"],
            ["data.train_transform.blur_sigma", "smallest"],
            id="range_upside_down",
        ),
        pytest.param(
            ["--trainer.callbacks", "[{class_path: vil_lightning.callbacks.ReconstructionPictures}]"],
            ["ReconstructionPictures", "DINO", "trainer.callbacks"],
            id="callback_for_other_methods",
        ),
        pytest.param(
            [
                "--trainer.callbacks",
                "[{class_path: vil_lightning.callbacks.OnlineKNN, init_args: {every_n_epochs: 0}}]",
            ],
            ["OnlineKNN", "every_n_epochs=0"],
            id="never",
        ),
    ],
)
def test_bad_input__is_refused_with_one_message(command: Command, tmp_path: Path, args: list[str], parts: list[str]):
    assert_refused(command(*PRETRAIN, *args), *parts)
    assert not (tmp_path / "checkpoints").exists()


def test_bad_input__training_without_views(command: Command) -> None:
    model = ["--model", "DINO", "--model.backbone.name", "vil2_tiny_patch16_224", "--model.num_prototypes", "8"]
    args = [*model, "--model.backbone.kwargs", small(), "--model.lr_warmup", "1 step", "--trainer.max_epochs", "1"]
    assert_refused(command("fit", *args, "--data", "Digits"), "data.train_transform", "MultiCrop")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {wings: 2, class_path: DINO, init_args: {}}", ["model.wings", "init_args"]),
        (
            "trainer: {callbacks: [{class_path: vil_lightning.callbacks.ViewPictures, size: 3}]}",
            ["trainer.callbacks.size"],
        ),
        ("checkpoint: [many]", ["checkpoint", "many"]),
        ("model: {init_args: {backbone: 3.0}}", ["backbone"]),
        ("model: {init_args: {backbone: 0}}", ["backbone"]),
        ("data: {init_args: {train_transform: {init_args: {local_size: null}}}}", ["data.train_transform.local_size"]),
        (
            "trainer: {callbacks: [{class_path: vil_lightning.callbacks.FeatureHealth}, "
            "{class_path: vil_lightning.callbacks.FeatureHealth}]}",
            ["trainer", "FeatureHealth"],
        ),
    ],
    ids=[
        "beside_class_path",
        "beside_class_path_in_a_list",
        "list_for_a_section",
        "number_for_a_section",
        "zero_for_a_section",
        "null",
        "twice",
    ],
)
def test_bad_input__in_a_file(command: Command, tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    assert_refused(command(*PRETRAIN, "--config", "wrong.yaml"), *parts)


def test_bad_input__usage_does_not_bury_the_message(command: Command) -> None:
    result = command(*PRETRAIN, "--model.num_prototypes", "many")
    assert len(result.err.splitlines()) < 25


def test_bad_input__validating_what_has_no_scores(command: Command) -> None:
    assert_refused(command("validate", *PRETRAIN[1:]), "model.class_path=DINO", "validation_step")


def test_bad_input__probe_without_weights(command: Command) -> None:
    assert_refused(command(*PROBE), "model.backbone.name", "--model.backbone.weights")


def test_bad_input__method_without_validation(with_run: Path, command: Command) -> None:
    args = [*PROBE[1:], "--model.backbone.weights", "checkpoints/pretrain_dino/last.ckpt"]
    assert_refused(command("validate", *args), "validat")


# --- data on disk -------------------------------------------------------------------------------------------------------


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(path))


def folders(*args: object) -> list[str]:
    return [*PRETRAIN, "--data", "ImageFolder", "--data.num_workers", "0", *map(str, args)]


def test_bad_input__data_root_not_set(command: Command) -> None:
    assert_refused(command(*folders()), "root")


def test_bad_input__missing_data_root(command: Command) -> None:
    assert_refused(command(*folders("--data.root", "nowhere")), "data.root=nowhere", "--data.root")


def test_bad_input__missing_val_folder(command: Command, tmp_path: Path) -> None:
    image(tmp_path / "root/train/cat/1.png")
    assert_refused(command(*folders("--data.root", "root")), "data.root", "root/val")


def test_bad_input__empty_class_folder(command: Command, tmp_path: Path) -> None:
    for split in ("train", "val"):
        image(tmp_path / f"root/{split}/cat/1.png")
        (tmp_path / f"root/{split}/dog").mkdir()
    assert_refused(command(*folders("--data.root", "root")), "data.root", "no images", "dog")


def test_bad_input__different_classes_in_train_and_val(command: Command, tmp_path: Path) -> None:
    for name in ("train/cat", "val/cat", "val/dog"):
        image(tmp_path / f"root/{name}/1.png")
    assert_refused(command(*folders("--data.root", "root")), "data.root", "same classes", "dog")


# --- files of weights ---------------------------------------------------------------------------------------------------


class Payload:
    """What has no place in a file of weights."""


def damaged(folder: Path, kind: str) -> str:
    """Write a file that cannot be used; returns its name."""
    good = folder / "checkpoints/pretrain_dino/last.ckpt"
    path = folder / f"{kind}.ckpt"
    match kind:
        case "truncated":
            path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
        case "text":
            path.write_text("hello")
        case "empty":
            path.write_bytes(b"")
        case "objects":
            torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Payload()}, path)
        case "pickle":
            path.write_bytes(pickle.dumps({"state_dict": Payload()}, protocol=2))
        case "list":
            torch.save([torch.zeros(1)], path)
    return path.name


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("key", ["model.backbone.weights", "ckpt_path"])
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("truncated", "damaged"),
        ("text", "damaged"),
        ("empty", "damaged"),
        ("objects", "Python objects"),
        ("pickle", ""),
        ("list", "holds a list"),
    ],
)
def test_bad_input__damaged_file(with_run: Path, command: Command, kind: str, part: str, key: str) -> None:
    name = damaged(with_run, kind)
    result = command(*PRETRAIN, "--run_name", "next", f"--{key}", name)
    assert_refused(result, key, name, part)
    assert not (with_run / "checkpoints/next").exists()


@pytest.mark.parametrize("recipe", [PRETRAIN, PROBE], ids=["pretrain", "probe"])
def test_bad_input__weights_of_another_architecture(with_run: Path, command: Command, recipe: list[str]) -> None:
    weights = ["--model.backbone.weights", "checkpoints/pretrain_dino/last.ckpt"]
    result = command(*recipe, *weights, "--model.backbone.kwargs", small(embed_dim=48), "--run_name", "next")
    assert_refused(result, "model.backbone.weights", "does not fit", "patch_embed.proj.weight: file (32, 3, 8, 8)")


def test_bad_input__resuming_from_weights_only(with_run: Path, command: Command) -> None:
    content = torch.load(with_run / "checkpoints/pretrain_dino/last.ckpt", weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, with_run / "weights.ckpt")
    result = command(*PRETRAIN, "--run_name", "next", "--ckpt_path", "weights.ckpt")
    assert_refused(result, "ckpt_path=weights.ckpt", "cannot be resumed", "--model.backbone.weights")


@pytest.mark.parametrize(
    "mistake", [["--model.backbone.name", "vil3"], ["--data.train_transform.local_size", "32"]], ids=["model", "data"]
)
def test_bad_input__nothing_is_overwritten_by_a_run_that_cannot_start(
    with_run: Path, command: Command, mistake: list[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in with_run.rglob("*") if path.is_file()}
    assert command(*PRETRAIN, "--overwrite", "true", *mistake).code == 2
    assert {path: path.stat().st_mtime_ns for path in with_run.rglob("*") if path.is_file()} == before
