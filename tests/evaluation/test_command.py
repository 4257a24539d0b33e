"""`main.py evaluate` and `main.py compare`: every kind of checkpoint, honest reports, refusals before anything is computed."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

sys.path += [str(Path(__file__).parents[1] / name) for name in ("integration", "backbones", "methods")]
from shrunk import CONFIGS, PRETRAIN, invoke
from test_golden import fill, read_golden
from tiny import run_in_two_processes

from vil_lightning.data import Digits
from vil_lightning.evaluation import FewLabels, LinearProbe, LogisticRegression, Task, command, report, tasks
from vil_lightning.evaluation.subject import Subject, own_pooling
from vil_lightning.knn import knn_accuracy
from vil_lightning.methods.backbone import BackboneConfig, build_backbone, resolve_backbone

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ONE_RUN = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
KWARGS = ["--model.backbone.kwargs", "{img_size: 16, patch_size: 8, embed_dim: 32, depth: 2}"]
SUITE: dict[str, Any] = {
    "data": {
        "class_path": "vil_lightning.data.Digits",
        "init_args": {"img_size": 16, "classes": "0-3", "train_fraction": 0.3},
    },
    "tasks": [
        {"class_path": "vil_lightning.evaluation.KNN", "init_args": {"ks": [5, 20]}},
        {"class_path": "vil_lightning.evaluation.LogisticRegression", "init_args": {"Cs": [0.01, 1.0]}},
        {"class_path": "vil_lightning.evaluation.FewLabels", "init_args": {"fractions": [], "per_class": [2]}},
    ],
    "progress": False,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arguments that name each kind of network."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "dino": PRETRAIN,
        "mae": ["fit", "--config", str(CONFIGS / "pretrain_mae.yaml"), *ONE_RUN, *KWARGS, "--model.decoder_dim", "32"],
        "ema": [
            "fit",
            "--config",
            str(CONFIGS / "train_supervised.yaml"),
            *ONE_RUN,
            *KWARGS,
            "--model.ema_decay",
            "0.9",
        ],
    }
    found = {}
    for name, args in runs.items():
        result = invoke([*args, "--run_name", name], folder)
        assert result.code == 0, result.err
        found[name] = ["--weights", str(folder / f"checkpoints/{name}/last.ckpt")]
    raw = {key: fill(key, shape).float() for key, shape in read_golden("vil2_tiny")["shapes"].items()}
    torch.save({"state_dict": raw, "ctor_kwargs": {"kind": "x"}, "epoch": 800}, folder / "published.th")
    found["published"] = ["--weights", str(folder / "published.th"), "--backbone.name", "vil2_tiny_patch16_224"]
    found["published"] += [
        "--backbone.kwargs",
        "{img_size: 32}",
        "--data.img_size",
        "32",
        "--data.train_fraction",
        "0.1",
    ]
    found["vit"] = ["--backbone.name", "vit_tiny_patch16_224", "--backbone.kwargs", json.dumps(VIT)]
    return found


@pytest.fixture
def suite(tmp_path: Path) -> list[str]:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    return ["evaluate", "--config", "suite.yaml"]


def evaluated(folder: Path, args: list[str], name: str = "it") -> SimpleNamespace:
    result = invoke([*args, "--run_name", name], folder)
    if result.code == 0:
        result.results = json.loads((folder / "evaluations" / name / "results.json").read_text())
    return result


# --- every kind of network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dino", "mae", "ema", "published", "vit"])
def test_evaluate__every_kind_of_checkpoint(
    tmp_path: Path, suite: list[str], checkpoints: dict[str, list[str]], kind: str
) -> None:
    run = evaluated(tmp_path, [*suite, *checkpoints[kind]])
    assert run.code == 0, run.err
    scores = {score["name"]: score for score in run.results["scores"]}
    assert list(scores) == ["kNN, k=5", "kNN, k=20", "logistic regression", "logistic, 2 per class"]
    for score in scores.values():
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 100
        assert score["num_images"] == run.results["data"]["num_val"] > 100
        assert score["name"] in run.out
    assert scores["kNN, k=5"]["value"] > 40  # of four digits; chance is 25
    pooling = {"dino": "bilateral_concat", "published": "bilateral_concat", "vit": "avg"}.get(kind)
    assert {score["protocol"].split("/")[-1] for score in scores.values()} == {"own-readout"}
    assert pooling is None or {score["readout"] for score in scores.values()} == {pooling}
    assert len(run.results["backbone"]["hash"]) == 64
    assert run.results["data"]["num_classes"] == 4
    card = (tmp_path / "evaluations/it/model_card.md").read_text()
    assert run.results["backbone"]["hash"] in card
    assert all(score["protocol"] in card for score in scores.values())
    assert "patches.png" in card
    assert Image.open(tmp_path / "evaluations/it/patches.png").size[0] > 300


def test_evaluate__knn_is_that_of_the_network_itself(
    tmp_path: Path, suite: list[str], checkpoints: dict[str, list[str]]
) -> None:
    """Against features from `backbone(images)`, and the project's other kNN."""
    run = evaluated(tmp_path, [*suite, *checkpoints["dino"]])
    backbone = build_backbone(resolve_backbone(BackboneConfig(None, checkpoints["dino"][1]))).eval()
    data = Digits(16, classes="0-3", train_fraction=0.3, seed=0)
    data.setup()
    sets = []
    for loader in (data.eval_train_dataloader(), data.val_dataloader()):
        with torch.no_grad():
            sets += [torch.cat([backbone(data.normalize(x)) for x, _ in loader]), torch.cat([y for _, y in loader])]
    expected = knn_accuracy(*sets, ks=(5, 20))
    for score in run.results["scores"][:2]:
        k = int(score["name"].removeprefix("kNN, k="))
        assert score["value"] == pytest.approx(expected[k], abs=1e-6)


def test_evaluate__cached_and_fresh_features_give_the_same_scores(
    tmp_path: Path, suite: list[str], checkpoints: dict[str, list[str]]
) -> None:
    cached = [*suite, *checkpoints["mae"], "--cache_dir", "cache"]
    first, second = (evaluated(tmp_path, cached, name).results for name in ("first", "second"))
    fresh = evaluated(tmp_path, [*suite, *checkpoints["mae"]], "fresh").results
    assert first["scores"] == second["scores"] == fresh["scores"]
    assert list((tmp_path / "cache").iterdir())
    other = evaluated(tmp_path, [*suite, *checkpoints["ema"], "--cache_dir", "cache"], "other").results
    assert other["scores"] != first["scores"]
    assert other["backbone"]["hash"] != first["backbone"]["hash"]


def test_evaluate__resolutions(tmp_path: Path, suite: list[str], checkpoints: dict[str, list[str]]) -> None:
    content = {**SUITE, "tasks": [{"class_path": "KNN", "init_args": {"ks": [5], "sizes": [16, 32]}}]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    scores = evaluated(tmp_path, [*suite, *checkpoints["dino"]]).results["scores"]
    assert [score["name"] for score in scores] == ["kNN, k=5", "kNN, k=5, 16 px", "kNN, k=5, 32 px"]
    assert scores[0]["value"] == scores[1]["value"]
    assert scores[2]["protocol"].endswith("/32px")


def test_evaluate__run_is_named_after_its_checkpoint() -> None:
    named = command.run_name_of
    assert named(BackboneConfig(None, "checkpoints/pretrain_dino/last.ckpt")) == "pretrain_dino"
    assert named(BackboneConfig("x", "checkpoints/vil2_tiny16_e800_in1k.th")) == "vil2_tiny16_e800_in1k"
    assert named(BackboneConfig("vil2_tiny_patch16_224")) == "vil2_tiny_patch16_224_untrained"


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("vil2_tiny_patch16_224", SMALL, "bilateral_concat"),
        ("vil2_tiny_patch16_224", {**SMALL, "global_pool": "avg"}, "avg"),
        ("vil_tiny_patch16_224", SMALL, "bilateral_avg"),
        ("vit_tiny_patch16_224", VIT, "avg"),
        ("convnext_atto", {}, "avg"),
    ],
)
def test_own_pooling__is_what_the_network_is_made_for(name: str, kwargs: dict[str, Any], expected: str) -> None:
    assert own_pooling(build_backbone(BackboneConfig(name, None, kwargs))) == expected


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--weights", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--backbone.name", "vil9"], "vil9"),
        (["--data.classes", "0-20"], "data.classes='0-20'"),
        (["--data.img_size", "17"], "data.img_size=17"),
        (["--tasks", "[{class_path: KNN, init_args: {ks: [0]}}]"], "ks=[0] must be numbers from 1"),
        (["--tasks", "[{class_path: KNN, init_args: {readout: middle}}]"], "readout 'middle' is not known"),
        (["--tasks", "[{class_path: LinearProbe, init_args: {protocol: moco}}]"], "protocol='moco' is not known"),
        (["--tasks", "[{class_path: FewLabels, init_args: {per_class: [1000]}}]"], "per_class=1000"),
        (["--tasks", "[]"], "tasks is empty"),
    ],
)
def test_evaluate__bad_input_is_one_error_before_features(
    tmp_path: Path, suite: list[str], monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.setattr(tasks, "pair", lambda *_: pytest.fail("features were computed"))
    network = ["--backbone.name", "vil2_tiny_patch16_224", "--backbone.kwargs", json.dumps(SMALL)]
    result = invoke([*suite, *network, *args], tmp_path)
    assert result.code == 2, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "evaluations").exists()


def test_evaluate__classes_missing_in_val_or_labels_outside() -> None:
    data = Digits(8, seed=0)
    data.setup()
    data.val_source.labels = [0 if label == 7 else label for label in data.val_source.labels]  # type: ignore[misc]
    with pytest.raises(command.ConfigError, match=r"1 of 10 classes have no image in the val set \(7\)"):
        command.check_classes(data)
    data.val_source.labels[0] = 10
    with pytest.raises(command.ConfigError, match=r"the val set has labels 0 to 10, but there are 10 classes"):
        command.check_classes(data)


def test_tasks__are_open_to_others(tmp_path: Path, suite: list[str]) -> None:
    """A class of the user's own."""
    assert issubclass(LinearProbe, Task)
    data = Digits(16, classes="0-3", train_fraction=0.3, seed=0)
    data.setup()
    subject = Subject(BackboneConfig("vil2_tiny_patch16_224", None, SMALL), data, progress=False)
    (score,) = LinearProbe("dino", ["auto"]).run(subject)
    assert score.protocol.startswith("probe/dino/cached")
    assert score.protocol.endswith("/own-readout")
    assert score.readout == "bilateral_concat"
    (score,) = LinearProbe("dino", ["max"]).run(subject)
    assert score.protocol.endswith("/max")
    (score,) = LogisticRegression(Cs=[0.1]).run(subject)
    few = FewLabels([0.5], [3], num_draws=2).run(subject)
    assert [one.name for one in few] == ["logistic, 50 % of the labels", "logistic, 3 per class"]
    assert few[1].value < score.value


# --- several processes ------------------------------------------------------------------------------------------------


def evaluate_shared(world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    network = ["--backbone.name", "vil2_tiny_patch16_224", "--backbone.kwargs", json.dumps(SMALL)]
    command.evaluate(
        ["--config", "suite.yaml", *network, "--cache_dir", f"cache{world_size}", "--run_name", f"w{world_size}"]
    )


@pytest.mark.timeout(300)
def test_evaluate__two_processes_give_the_numbers_of_one(
    tmp_path: Path, suite: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate_shared(1, tmp_path)
    results = run_in_two_processes(__file__, "evaluate_shared", tmp_path, timeout=250)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    one, two = (json.loads((tmp_path / f"evaluations/w{size}/results.json").read_text()) for size in (1, 2))
    assert one["scores"] == two["scores"]
    assert one["data"] == two["data"]


# --- side by side -----------------------------------------------------------------------------------------------------


def test_compare__table_and_plot(tmp_path: Path, suite: list[str], checkpoints: dict[str, list[str]]) -> None:
    for kind in ("dino", "mae"):
        evaluated(tmp_path, [*suite, *checkpoints[kind]], kind)
    result = invoke(
        ["compare", "evaluations/dino", "evaluations/mae/results.json", "--out", "table.md", "--plot", "plot.png"],
        tmp_path,
    )
    assert result.code == 0, result.err
    table = (tmp_path / "table.md").read_text()
    dino = json.loads((tmp_path / "evaluations/dino/results.json").read_text())
    assert "| network | kNN, k=5 | kNN, k=20 | logistic regression | logistic, 2 per class |" in table
    line = next(line for line in table.splitlines() if line.startswith("| dino |"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [report.cell(score) for score in dino["scores"]]
    assert table.count("python main.py evaluate") == 2
    assert Image.open(tmp_path / "plot.png").size[0] > 400


def test_compare__refuses_what_cannot_be_compared(
    tmp_path: Path, suite: list[str], checkpoints: dict[str, list[str]]
) -> None:
    evaluated(tmp_path, [*suite, *checkpoints["dino"]], "dino")
    evaluated(tmp_path, [*suite, *checkpoints["dino"], "--data.classes", "0-4"], "more")
    result = invoke(["compare", "evaluations/dino", "evaluations/more"], tmp_path)
    assert result.code == 2
    assert "made on different images" in result.err
    content = json.loads((tmp_path / "evaluations/dino/results.json").read_text())
    content["scores"][0]["protocol"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(content))
    result = invoke(["compare", "evaluations/dino", "other.json"], tmp_path)
    assert result.code == 2
    assert "Only equal protocols can be compared" in result.err
    (tmp_path / "broken.json").write_text("{")
    result = invoke(["compare", "broken.json"], tmp_path)
    assert result.code == 2
    assert "broken.json is no results.json" in result.err
