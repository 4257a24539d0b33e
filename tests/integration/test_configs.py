"""Every shipped recipe is read by the real command line, and its values arrive."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from shrunk import CONFIGS, Command, invoke
from torchvision.io import write_png

from vil_lightning.callbacks import OnlineKNN, RunProgressBar, RunSummary, Throughput, ViewPictures
from vil_lightning.callbacks.published_curve import read_curves
from vil_lightning.cli import VilCLI, build_cli, run_name_of
from vil_lightning.data import Digits, TrainTransform
from vil_lightning.evaluation.command import embed_parser, evaluate_parser
from vil_lightning.methods import DINO, LinearProbe, Supervised
from vil_lightning.methods.backbone import BackboneConfig
from vil_lightning.methods.fully_sharded import FullyShardedStrategy
from vil_lightning.methods.run_length import split_batch

OVERLAYS = sorted([*(CONFIGS / "overlays").glob("*.yaml"), *(CONFIGS / "trainer").glob("*.yaml")])
SUITES = sorted(CONFIGS.glob("evaluate*.yaml"))  # of other commands
EMBED = CONFIGS / "embed.yaml"
RECIPES = sorted(set(CONFIGS.rglob("*.yaml")) - set(OVERLAYS) - {*SUITES, EMBED})
SUPERVISED = [
    path for path in RECIPES if "methods.Supervised" in (t := path.read_text()) and "data.TrainTransform" in t
]


def recipe_id(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def run_name(path: Path) -> str:
    return yaml.safe_load(path.read_text()).get("run_name") or path.stem


def header(path: Path) -> str:
    """The comments at the top, without their marks, in one line."""
    lines = path.read_text().split("seed_everything")[0].splitlines()
    return " ".join(line.removeprefix("#").strip().removesuffix("\\") for line in lines)


def num_processes(trainer: dict[str, Any]) -> int:
    return trainer.get("devices", 1) * trainer.get("num_nodes", 1)


def global_batch(recipe: dict[str, Any]) -> int:
    trainer = recipe["trainer"]
    return recipe.get("global_batch_size") or recipe["data"]["init_args"]["batch_size"] * num_processes(trainer)


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
    run = re.search(r"# Run: +(python main\.py (?:fit|validate) --config (\S+))", text)
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


def test_run_names__are_unique() -> None:
    names = [run_name(path) for path in RECIPES]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_recipe__what_the_header_names_exists(path: Path) -> None:
    given = {name for other in RECIPES for name in re.findall(r"--run_name (\w+)", header(other))}
    runs = {run_name(other) for other in RECIPES} | given
    text = path.read_text()
    for file in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (CONFIGS.parent / file).is_file(), file
    for name in re.findall(r"\b(\w+)\.yaml", text):
        assert name in {other.stem for other in RECIPES}, name
    for run in re.findall(r"checkpoints/(\w+)/last\.ckpt", text):
        assert run in runs, run


# --- supervised recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUPERVISED, ids=recipe_id)
def test_supervised__arithmetic_of_the_comments(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    model, batch = recipe["model"]["init_args"], global_batch(recipe)
    found = re.search(r"base_lr: \S+ +# x (\d+) / (\d+) = (\S+)", path.read_text())
    assert found is not None
    assert (int(found[1]), int(found[2])) == (batch, model.get("lr_batch_size", 1024))
    assert float(found[3]) == pytest.approx(model["base_lr"] * batch / int(found[2]))
    if path.parent.name != "imagenet":
        return
    trainer = recipe["trainer"]
    factors = [trainer.get("num_nodes", 1), trainer["devices"], recipe["data"]["init_args"]["batch_size"]]
    factors.append(split_batch(batch, factors[2], factors[0] * factors[1], even=True)[1])
    arithmetic = re.search(r"Batch: +([^=]*) = (\d+)\.", header(path))
    assert arithmetic is not None
    assert int(arithmetic[2]) == batch
    written = [int(number) for number in re.findall(r"\d+", arithmetic[1])]
    assert sorted(written) == sorted(factor for factor in factors if factor != 1)


@pytest.mark.parametrize("path", SUPERVISED, ids=recipe_id)
def test_supervised__values_are_accepted_and_sizes_fit(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    data = recipe["data"]["init_args"]
    model = dict(recipe["model"]["init_args"])
    settings, kwargs = model.pop("backbone"), {}
    if settings.get("weights"):  # what their checkpoint records
        (source,) = [other for other in RECIPES if f"/{run_name(other)}/" in settings["weights"]]
        recorded = yaml.safe_load(source.read_text())["model"]["init_args"]["backbone"]
        assert settings["name"] in (None, recorded["name"])
        settings = {**settings, "name": recorded["name"]}
        kwargs.update(recorded.get("kwargs", {}))
    kwargs.update(settings.get("kwargs", {}))
    Supervised(backbone=BackboneConfig(settings["name"], None, kwargs), **model)
    transform = TrainTransform(**data["train_transform"]["init_args"])
    assert transform.img_size == data["img_size"]
    assert data["batch_size"] % 2 == 0  # for MixUp and CutMix
    network = timm.create_model(settings["name"], **{**kwargs, "depth": 1}).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, data["img_size"], data["img_size"])).shape == (1, 1000)


# What the authors of ViL ran, read from their configurations and logs (NX-AI/vision-lstm) and their paper. Columns: epochs,
# global batch, peak learning rate, final learning rate, warm-up in epochs, weight decay, clipping, px, drop path, compiled,
# width, scans (blocks for ViT), parameters (None where none are published).
RUNS: dict[str, tuple[Any, ...]] = {
    "train_vil_tiny_e400": (400, 1024, 1e-3, 1e-6, 5, 0.05, 1.0, 224, 0.0, True, 192, 24, 6_088_360),
    "train_vil_tiny_e800": (800, 2048, 2e-3, 1e-6, 5, 0.05, 1.0, 224, 0.0, True, 192, 24, 6_088_360),
    "train_vil_tinyplus_e400": (400, 1024, 1e-3, 1e-6, 5, 0.05, 1.0, 224, 0.0, True, 192, 29, 7_277_840),
    "train_vil_tinyplus_e800": (800, 2048, 2e-3, 1e-6, 5, 0.05, 1.0, 224, 0.0, True, 192, 29, 7_277_840),
    "train_vil_small": (400, 1024, 1e-3, 1e-6, 5, 0.05, 1.0, 224, 0.05, True, 384, 24, 22_792_360),
    "train_vil_smallplus": (400, 1024, 1e-3, 1e-6, 5, 0.05, 1.0, 224, 0.05, True, 384, 26, 24_628_664),
    "train_vil_base": (400, 2048, 2e-3, 1e-6, 5, 0.05, 1.0, 224, 0.2, True, 768, 24, 88_050_856),
    "train_vil2_tiny_192": (800, 2048, 2e-3, 1e-6, 5, 0.05, 1.0, 192, 0.0, True, 192, 24, 6_381_544),
    "train_vil2_tiny_e400_192": (400, 2048, 2e-3, 1e-6, 5, 0.05, 1.0, 192, 0.0, True, 192, 24, 6_381_544),
    "train_vil2_small_192": (400, 2048, 2e-3, 1e-6, 5, 0.05, 1.0, 192, 0.05, True, 384, 24, 23_378_728),
    "train_vil2_base_192": (400, 2048, 2e-3, 1e-6, 5, 0.05, 1.0, 192, 0.2, True, 768, 24, 89_223_592),
    "finetune_vil2_tiny_224": (20, 1024, 1e-5, 1e-6, 5, 0.05, None, 224, 0.0, False, 192, 24, 6_391_528),
    "finetune_vil2_tiny_e400_224": (20, 1024, 1e-5, 1e-6, 5, 0.05, None, 224, 0.0, False, 192, 24, 6_391_528),
    "finetune_vil2_small_224": (20, 1024, 1e-5, 1e-6, 5, 0.05, None, 224, 0.05, False, 384, 24, 23_398_696),
    "finetune_vil2_base_224": (5, 1024, 1e-5, 1e-6, 1, 0.05, None, 224, 0.2, False, 768, 24, 89_263_528),
    "finetune_vil_tinyplus_stride8": (30, 1024, 1e-5, 1e-5, 5, 1e-8, None, 224, 0.0, True, 192, 29, 7_277_840),
    "finetune_vil_smallplus_stride8": (30, 1024, 1e-5, 1e-5, 5, 1e-8, None, 224, 0.05, True, 384, 26, 24_628_664),
    "finetune_vil_base_stride8": (30, 1024, 1e-5, 1e-5, 5, 1e-8, None, 224, 0.2, True, 768, 24, 88_050_856),
    "train_deit3_tiny_e400_192": (400, 1024, 1e-3, 1e-6, 5, 0.05, None, 192, 0.0, False, 192, 12, None),
    "train_deit3_tiny_e800_192": (800, 1024, 1e-3, 1e-6, 5, 0.05, None, 192, 0.0, False, 192, 12, None),
    "finetune_deit3_tiny_e400_224": (20, 1024, 1e-5, 1e-6, 5, 0.05, None, 224, 0.0, False, 192, 12, None),
    "finetune_deit3_tiny_e800_224": (20, 1024, 1e-5, 1e-6, 5, 0.05, None, 224, 0.0, False, 192, 12, None),
    "in100_block_design": (400, 1024, 1e-3, 1e-6, 50, 0.05, 1.0, 128, 0.0, True, 192, 24, None),
    "pooling_train_192": (400, 1024, 1e-3, 1e-6, 5, 0.05, 1.0, 192, 0.0, True, 192, 24, None),
    "pooling_finetune_224": (30, 1024, 1e-5, 1e-5, 5, 1e-8, None, 224, 0.0, False, 192, 24, None),
}


@pytest.mark.parametrize("stem", RUNS)
def test_published_run_of_vil__every_number(stem: str) -> None:
    epochs, batch, peak, final, warmup, decay, clip, px, drop_path, compiled, width, depth, parameters = RUNS[stem]
    recipe = yaml.safe_load((CONFIGS / "imagenet" / f"{stem}.yaml").read_text())
    trainer, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    assert trainer["max_epochs"] == epochs
    assert trainer["precision"] == "bf16-mixed"
    assert trainer.get("gradient_clip_val") == clip
    assert global_batch(recipe) == batch
    assert model["base_lr"] * batch / model["lr_batch_size"] == pytest.approx(peak)
    assert (model["final_lr"], model["warmup_lr"]) == (final, 0)
    assert model["lr_warmup"].split()[0] == str(warmup)
    assert model["weight_decay"] == decay
    assert model.get("compile", False) == compiled
    assert data["img_size"] == data["train_transform"]["init_args"]["img_size"] == px
    # The same for all of them: AdamW (0.9, 0.999), cross-entropy, MixUp 0.8 or CutMix 1.0, 3-Augment, the whole image in
    # evaluation; no label smoothing, erasing, moving average, repeats or layer-wise decay.
    assert (model["mixup_alpha"], model["cutmix_alpha"], data["crop_pct"]) == (0.8, 1.0, 1.0)
    absent = {
        "loss",
        "label_smoothing",
        "mix_prob",
        "mix_switch_prob",
        "erase_prob",
        "optimizer",
        "betas",
        "layer_decay",
    }
    assert not (absent | {"ema_decay", "freeze", "head_only", "new_head", "num_classes"}) & model.keys()
    assert "repeats" not in data
    view = data["train_transform"]["init_args"]
    assert (view["scale"], view["hflip_prob"]) == ([0.08, 1.0], 0.5)
    assert (view["three_augment"], view["color_jitter"]) == (True, [0.3, 0.3, 0.3, 0.0])
    assert "rand_augment" not in view

    backbone = model["backbone"]
    kwargs = backbone["kwargs"]
    if "deit3" in stem and "finetune" in stem:
        source = CONFIGS / "imagenet" / f"{stem.replace('finetune', 'train').replace('224', '192')}.yaml"
        kwargs = {**yaml.safe_load(source.read_text())["model"]["init_args"]["backbone"]["kwargs"], **kwargs}
    assert kwargs["drop_path_rate"] == drop_path
    assert kwargs.get("stride", 16) == (8 if "stride8" in stem else 16)
    with torch.device("meta"):
        network = timm.create_model(backbone["name"], **kwargs)
    assert (network.embed_dim, len(network.blocks)) == (width, depth)
    if parameters is not None:
        assert sum(p.numel() for p in network.parameters()) == parameters
    # Two scans are one pair of the published version 2: 24 here are its depth of 12.
    rates = {getattr(module, "drop_prob", 0.0) for name, module in network.named_modules() if "drop_path" in name}
    assert rates == {drop_path} or not drop_path


# The baselines, from the official commands and code (facebookresearch/deit, facebookresearch/ConvNeXt, hustvl/Vim). Columns:
# epochs, global batch, peak, final and first learning rate, warm-up in epochs, weight decay, drop path, px, crop_pct, moving
# average, repeats, erasing, label smoothing, RandAugment instead of 3-Augment, precision.
BASELINES: dict[str, tuple[Any, ...]] = {
    "train_deit_tiny": (
        300,
        1024,
        1e-3,
        1e-5,
        1e-6,
        5,
        0.05,
        0.1,
        224,
        0.875,
        0.99996,
        3,
        0.25,
        0.1,
        True,
        "bf16-mixed",
    ),
    "train_deit_small": (
        300,
        1024,
        1e-3,
        1e-5,
        1e-6,
        5,
        0.05,
        0.1,
        224,
        0.875,
        0.99996,
        3,
        0.25,
        0.1,
        True,
        "bf16-mixed",
    ),
    "train_deit_base": (
        300,
        1024,
        1e-3,
        1e-5,
        1e-6,
        5,
        0.05,
        0.1,
        224,
        0.875,
        0.99996,
        3,
        0.25,
        0.1,
        True,
        "bf16-mixed",
    ),
    "train_deit3_small": (800, 2048, 4e-3, 1e-5, 1e-6, 5, 0.05, 0.05, 224, 1.0, None, 3, 0.0, 0.0, False, "bf16-mixed"),
    "train_deit3_base_192": (
        800,
        2048,
        3e-3,
        1e-5,
        1e-6,
        5,
        0.05,
        0.2,
        192,
        1.0,
        None,
        3,
        0.0,
        0.0,
        False,
        "bf16-mixed",
    ),
    "finetune_deit3_base_224": (
        20,
        512,
        1e-5,
        1e-5,
        1e-6,
        5,
        0.1,
        0.2,
        224,
        1.0,
        None,
        1,
        0.0,
        0.1,
        True,
        "bf16-mixed",
    ),
    "train_convnext_isotropic_small": (
        *(300, 4096, 4e-3, 1e-6, 0.0, 50, 0.05, 0.1, 224, 0.875, 0.9999, 1, 0.25, 0.1, True, "bf16-mixed"),
    ),
    "train_convnext_isotropic_base": (
        *(300, 4096, 4e-3, 1e-6, 0.0, 50, 0.05, 0.2, 224, 0.875, 0.9999, 1, 0.25, 0.1, True, "bf16-mixed"),
    ),
    "train_vim_tiny": (300, 1024, 1e-3, 1e-5, 1e-6, 5, 0.1, 0.0, 224, 0.875, 0.99996, 3, 0.25, 0.1, True, "32-true"),
    "train_vim_small": (300, 512, 1e-3, 1e-5, 1e-6, 5, 0.05, 0.05, 224, 0.875, 0.99996, 3, 0.25, 0.1, True, "32-true"),
    "finetune_vim_tiny_stride8": (
        *(30, 1024, 1e-5, 1e-5, 1e-5, 5, 1e-8, 0.0, 224, 0.875, 0.99996, 3, 0.25, 0.1, True, "32-true"),
    ),
    "finetune_vim_small_stride8": (
        *(30, 1024, 1e-5, 1e-5, 1e-5, 5, 1e-8, 0.0, 224, 0.875, 0.99996, 3, 0.25, 0.1, True, "32-true"),
    ),
}


@pytest.mark.parametrize("stem", BASELINES)
def test_baseline__every_number(stem: str) -> None:
    recipe = yaml.safe_load((CONFIGS / "imagenet" / f"{stem}.yaml").read_text())
    trainer, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    batch, view, kwargs = global_batch(recipe), data["train_transform"]["init_args"], model["backbone"]["kwargs"]
    assert BASELINES[stem] == (
        trainer["max_epochs"],
        batch,
        pytest.approx(model["base_lr"] * batch / model["lr_batch_size"]),
        model["final_lr"],
        model["warmup_lr"],
        int(model["lr_warmup"].split()[0]),
        model["weight_decay"],
        kwargs["drop_path_rate"],
        data["img_size"],
        data["crop_pct"],
        model.get("ema_decay"),
        data.get("repeats", 1),
        model.get("erase_prob", 0.0),
        model.get("label_smoothing", 0.0),
        view.get("rand_augment") == "rand-m9-mstd0.5-inc1",
        trainer["precision"],
    )
    assert (model["mixup_alpha"], model["cutmix_alpha"]) == (0.8, 1.0)
    assert "gradient_clip_val" not in trainer
    assert view["three_augment"] == ("rand_augment" not in view)
    assert view["color_jitter"] == ([0.0] * 4 if "rand_augment" in view else [0.3, 0.3, 0.3, 0.0])
    from_scratch_deit3 = stem.startswith("train_deit3")
    assert model.get("optimizer", "adamw") == ("lamb" if from_scratch_deit3 else "adamw")
    assert model.get("loss") == ("binary_cross_entropy" if from_scratch_deit3 else None)
    assert model.get("target_threshold") == (0.0 if from_scratch_deit3 else None)
    assert kwargs.get("stride", 16) == (8 if stem.endswith("stride8") else 16)


def test_published_curves__belong_to_the_runs_of_version_2() -> None:
    curves = {}
    for path in SUPERVISED:
        for callback in yaml.safe_load(path.read_text())["trainer"].get("callbacks", []):
            if callback["class_path"].endswith("PublishedCurve"):
                curves[path.stem] = callback["init_args"]["curve"]
    expected = {}
    for size, run in {
        "tiny": "tiny_e800",
        "tiny_e400": "tiny_e400",
        "small": "small_e400",
        "base": "base_e400",
    }.items():
        expected[f"train_vil2_{size}_192"] = f"vil2_{run}_pretrain_192"
        expected[f"finetune_vil2_{size}_224"] = f"vil2_{run}_finetune_224"
    assert curves == expected
    for stem, name in curves.items():
        assert read_curves()[name].epochs == RUNS[stem][0], stem


def test_finetuning__starts_from_any_run(tmp_path: Path) -> None:
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}
    recorded = {"name": "vil2_tiny_patch16_224", "kwargs": small}
    network = timm.create_model(recorded["name"], num_classes=0, **small)
    state_dict = {f"teacher.backbone.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state_dict, "backbone": recorded}, tmp_path / "weights.ckpt")
    path = CONFIGS / "finetune.yaml"
    cli = build("--config", str(path), "--model.backbone.weights", "weights.ckpt", "--trainer.accelerator", "cpu")
    assert isinstance(cli.model, Supervised)
    cli.model.trainer = cli.trainer
    cli.trainer.datamodule = cli.datamodule
    cli.datamodule.setup("fit")
    cli.model.configure_model()
    key = "patch_embed.proj.weight"
    assert torch.equal(cli.model.backbone.state_dict()[key], network.state_dict()[key])
    assert cli.model.backbone.head.out_features == 10


def setting(model: DINO, key: str) -> Any:
    """Where a setting of DINO is kept: by the module, or by its schedules."""
    for holder, name in ((model, key), (model.distillation, f"wanted_{key}"), (model.distillation, key)):
        if hasattr(holder, name):
            return getattr(holder, name)
    raise AttributeError(key)


def test_pretraining__values_reach_the_objects() -> None:
    path = CONFIGS / "pretrain_dino.yaml"
    recipe = yaml.safe_load(path.read_text())
    cli = build("--config", str(path))
    assert isinstance(cli.model, DINO)
    assert isinstance(cli.datamodule, Digits)
    for key, value in recipe["model"]["init_args"].items():
        if key not in ("backbone", "head_hidden_dim", "head_bottleneck_dim"):  # not kept under these names
            assert setting(cli.model, key) == value, key
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
    assert setting(cli.model, "teacher_momentum") == 0.5
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
    assert setting(cli.model, "teacher_momentum") == 0.7
    (checkpoint,) = cli.trainer.checkpoint_callbacks
    assert Path(checkpoint.dirpath).name == "mine"
    assert Path(cli.trainer.log_dir) == Path("logs/mine")


# --- overlays ---------------------------------------------------------------------------------------------------------


def test_overlay__adds_all_instruments_to_a_recipe() -> None:
    overlay = CONFIGS / "overlays/instruments.yaml"
    cli = build("--config", str(CONFIGS / "pretrain_dino.yaml"), "--config", str(overlay))
    kinds = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    wanted = yaml.safe_load(overlay.read_text())["trainer"]["callbacks+"]
    for entry in wanted:
        name = entry["class_path"].rsplit(".", 1)[1]
        for key, value in entry.get("init_args", {}).items():
            assert getattr(kinds[name], key) == value
    assert {"OnlineKNN", "ViewPictures", *(entry["class_path"].rsplit(".", 1)[1] for entry in wanted)} <= kinds.keys()
    assert cli.run_name == "pretrain_dino"


TRAINERS = sorted((CONFIGS / "trainer").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser() -> Any:
    """Of the command line without a subcommand; building it takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["main.py"])
        return build("--config", str(CONFIGS / "pretrain_dino.yaml")).parser


def check_layers(parser: Any, recipe: Path, overlays: list[Path], root: Path) -> None:
    """The overlays win over the recipe and over one another, and nothing else is lost."""
    files = [recipe, *overlays]
    content = [yaml.safe_load(path.read_text()) for path in files]
    folder = ["--data.root", str(root)] if content[0]["data"]["class_path"].endswith("ImageFolder") else []
    config = parser.parse_args([*(word for path in files for word in ("--config", str(path))), *folder])
    wanted: dict[str, Any] = {}
    for layer in content:
        merge(wanted, layer)
    assert differences(wanted, yaml.safe_load(parser.dump(config, skip_validation=True))) == []
    assert run_name_of(config) == run_name(recipe)


def merge(base: dict[str, Any], layer: dict[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


@pytest.mark.parametrize("path", RECIPES, ids=recipe_id)
def test_overlays_of_the_trainer__are_read_on_top_of_every_recipe(path: Path, root: Path, parser: Any) -> None:
    check_layers(parser, path, TRAINERS, root)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", TRAINERS, ids=recipe_id)
def test_overlay_of_the_trainer__alone_is_read_on_top_of_every_recipe(overlay: Path, root: Path, parser: Any) -> None:
    for path in RECIPES:
        check_layers(parser, path, [overlay], root)


@pytest.mark.parametrize("path", TRAINERS, ids=recipe_id)
def test_overlay_of_the_trainer__says_how_it_is_run(path: Path) -> None:
    text = path.read_text()
    assert f"configs/trainer/{path.name}" in text or "scripts/slurm.sbatch" in text
    for file in re.findall(r"(?:configs|scripts)/[\w/]+\.(?:yaml|sbatch|sh)", text):
        assert (CONFIGS.parent / file).is_file(), file


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "imagenet"], ids=recipe_id)
def test_recipe__global_batch_is_what_its_devices_make_of_it(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    if path.stem in ("evaluate", "linear_probe"):  # train nothing, on one device
        assert "global_batch_size" not in recipe
        return
    batch, largest = recipe["global_batch_size"], recipe["data"]["init_args"]["batch_size"]
    per_device, accumulated = split_batch(batch, largest, num_processes(recipe["trainer"]))
    assert per_device == largest
    written = f" x {accumulated} accumulated" if accumulated > 1 else ""
    assert f" x {largest}{written} = {batch}." in header(path)
    assert "accumulate_grad_batches" not in path.read_text()


@pytest.mark.parametrize(
    "recipe", ["pretrain_dino.yaml", "train_supervised.yaml", "imagenet/pretrain_mae_vil2_base.yaml"]
)
def test_overlay__shards_any_recipe(recipe: str) -> None:
    device = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"]
    data = ["--data.root", "."] if "imagenet" in recipe else []
    cli = build("--config", str(CONFIGS / recipe), "--config", str(CONFIGS / "trainer/fsdp.yaml"), *device, *data)
    assert isinstance(cli.trainer.strategy, FullyShardedStrategy)
    assert cli.run_name == Path(recipe).stem


# --- the recipes of `main.py evaluate` and `main.py embed` -----------------------------------------------------------


@pytest.mark.parametrize("path", SUITES, ids=recipe_id)
def test_evaluation__is_read_completely_and_says_how_it_is_run(path: Path) -> None:
    config = evaluate_parser().parse_args(["--config", str(path)])
    content = yaml.safe_load(path.read_text())
    assert [task.class_path.rsplit(".", 1)[-1] for task in config.tasks] == [
        task["class_path"].rsplit(".", 1)[-1] for task in content["tasks"]
    ]
    assert f"python main.py evaluate --config configs/{path.name}" in path.read_text()


def test_evaluation__unknown_key_is_rejected_by_name(tmp_path: Path) -> None:
    content = yaml.safe_load((CONFIGS / "evaluate.yaml").read_text())
    content["tasks"][0]["init_args"]["kz"] = [1]
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(content))
    result = invoke(["evaluate", "--config", str(tmp_path / "evaluate.yaml")], tmp_path)
    assert result.code == 2
    assert "kz" in result.err


def test_embed__is_read_completely_and_says_how_it_is_run() -> None:
    config = embed_parser().parse_args(["--config", str(EMBED), "--out", "x.npz"])
    assert config.split == "val"
    assert "python main.py embed --config configs/embed.yaml" in EMBED.read_text()
