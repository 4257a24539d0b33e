"""Does every wrong recipe end in a clear error? Every YAML of configs/, with random mistakes in it.

    python benchmarks/fuzz_configs.py --count 1000 --seed 0 [--jobs 2] [--out FILE.md]
    python benchmarks/fuzz_configs.py --seed 0 --case 17        # one case again, with its YAML and all it printed

A case is one shipped recipe, made small enough to run here (`shrink`), with one mistake in it, every fifth time two: a value
of a wrong type or out of range, an unknown or a deleted key, another class, a section of another recipe. Overlays are laid over
`pretrain_dino.yaml`. It has to end as

- valid run: `trainer.fast_dev_run` (one batch of training, one of validation) is finished with finite weights; the commands
  `evaluate` and `embed` are run to their end; or
- clear error: exit code 2 and one message that names the key, without a traceback and before the first batch.

Everything else is a failure: an error that does not name the key (`keyless`), is longer than a screen (`page`), a traceback,
work before the error (`late`), weights that are not finite (`not finite`), no end within a minute (`hang`), a process that
died (`crash`). The network is closed; a case may map 12 GiB.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision.datasets
import yaml  # type: ignore[import-untyped]
from PIL import Image
from sklearn.datasets import load_digits

import vil_lightning.callbacks
import vil_lightning.cli
import vil_lightning.data
import vil_lightning.evaluation
import vil_lightning.methods
from vil_lightning.evaluation import features as extraction
from vil_lightning.methods.backbone import CHECKPOINT_KEY

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
OVERLAYS = ("overlays", "trainer")  # folders of files that are laid over a recipe
PASSED = ("valid run", "clear error")
FAILED = ("keyless", "page", "traceback", "late", "not finite", "hang", "crash")
SECONDS = 60  # for one case
MEMORY = 12 * 2**30  # bytes of address space
LINES = 40  # of a message: a screen

CLASSES = {
    "methods": vil_lightning.methods.__all__,
    "data": [
        name for name in vil_lightning.data.__all__ if not name.endswith(("Transform", "Crop", "ImageDataModule"))
    ],
    "transforms": ["MultiCrop", "TrainTransform", "SegmentationTransform"],
    "callbacks": vil_lightning.callbacks.__all__,
    "evaluation": [name for name in vil_lightning.evaluation.__all__ if name not in ("Task",)],
}
WRONG_TYPES: list[Any] = ["many", 3, 2.5, True, None, ["many"], {"wings": 2}]
OUT_OF_RANGE: list[Any] = [-1, 0, 10**9, 1e30, math.nan, math.inf, -math.inf, "", [], -0.5, 2]
UNKNOWN = "wings"
# More devices than one start processes, which load their own copy of everything.
STARTS_PROCESSES = {"devices": (2, 3, 2.5, 10**9), "num_nodes": (2, 3, 2.5, 10**9), "num_workers": (10**9,)}

Keys = tuple[str | int, ...]


# --- recipes that run here --------------------------------------------------------------------------------------------

_SIDES = {"global_size": 16, "local_size": 8, "eval_size": 16, "window": 16, "base_size": [32, 16]}
_SMALL = {
    "batch_size": 8,
    "koleo_group": 2,
    "num_workers": 0,
    "num_prototypes": 32,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "proj_dim": 16,
    "num_directions": 16,
    "width": 16,
    "blocks": [0, 1, 2, 3],
    "compile": False,
    "num_classes": 10,
    "cluster_size": 2,
    "classes": "0-9",
    "epochs": 1,
}
TEACHER = "checkpoints/teacher/last.ckpt"
_TRAINER = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}


def shrink(recipe: dict[str, Any], weights: bool = True) -> dict[str, Any]:
    """The recipe with a tiny network and little data; keys are only added, never taken away.

    Args:
        weights: Name a checkpoint where the network is to be given on the command line.
    """
    recipe = copy.deepcopy(recipe)
    if "trainer" in recipe:
        recipe["trainer"].update({key: value for key, value in _TRAINER.items() if key in recipe["trainer"]})
        recipe["trainer"]["accelerator"] = "cpu"
    if recipe.get("global_batch_size") is not None:
        recipe["global_batch_size"] = 16
    for section in [recipe.get("model"), recipe.get("data"), *recipe.get("tasks", [])]:
        _shrink_section(section)
    data = recipe.get("data", {})
    arguments = data.setdefault("init_args", {}) if data else {}
    kind = str(data.get("class_path")).rsplit(".", 1)[-1]
    if kind in ("ImageFolder", "SegmentationFolder"):
        arguments["root"] = {"ImageFolder": "images", "SegmentationFolder": "masks"}[kind]
    if kind == "ShapesSegmentation":
        arguments["num_train"] = arguments["num_val"] = 16
    if "model" not in recipe and kind != "None":  # to embed or to evaluate
        arguments["train_fraction"] = 0.1
    for task in recipe.get("tasks", []):
        if task["class_path"].endswith("VTAB1k"):
            task["init_args"].update(num_train=40, num_val=20)
    if "model" in recipe:
        model = recipe["model"]["init_args"]
        for key in ("backbone", "teacher"):
            if key in model:
                model[key] = _small_backbone(model[key], weights)
        if recipe["model"]["class_path"].endswith("Supervised") and not model["backbone"].get("name"):
            model["backbone"]["weights"] = model["backbone"]["weights"].replace("pretrain_dino", "train_vil2_tiny_192")
    elif "backbone" in recipe:
        recipe["backbone"] = _small_backbone(recipe["backbone"], weights)
    return recipe


def _shrink_section(node: Any) -> None:
    """Sizes and counts at any depth. Networks are `_small_backbone`'s."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in _SMALL:
            node[key] = copy.copy(_SMALL[key])
        elif key in _SIDES:
            node[key] = copy.copy(_SIDES[key])
        elif (key == "img_size" and value != 32) or key == "eval_batch_size":
            node[key] = 16
        elif key == "stride":  # of a sliding window
            node[key] = 12
        elif key not in ("backbone", "teacher"):
            _shrink_section(value)


def small_kwargs(name: str) -> dict[str, Any]:
    """Arguments that make any of the recipes' networks tiny: 16 px in patches of 4."""
    small: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4}
    return small | ({"num_heads": 2} if name.startswith(("vit", "deit")) else {})


def _small_backbone(backbone: dict[str, Any], weights: bool) -> dict[str, Any]:
    backbone = copy.deepcopy(backbone)
    kwargs = backbone.get("kwargs") or {}
    if backbone.get("weights") is None and not backbone.get("name"):
        return backbone | ({"weights": "checkpoints/pretrain_dino/last.ckpt"} if weights else {})
    if backbone.get("name") is not None:
        kwargs = {**kwargs, **small_kwargs(backbone["name"])}
        if "pretrained" in kwargs:  # a teacher from the hub
            kwargs["pretrained"] = False
            backbone["weights"] = TEACHER
    elif "img_size" in kwargs:
        kwargs["img_size"] = 16
    if kwargs.get("stride") == 8:
        kwargs["stride"] = 2
    return backbone | ({"kwargs": kwargs} if kwargs else {})


def load_recipes() -> dict[Path, dict[str, Any]]:
    return {path: yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.rglob("*.yaml"))}


def small_files(folder: Path, recipes: dict[Path, dict[str, Any]]) -> None:
    """What the recipes read: images in class folders, masks, and checkpoints of the runs that they go on from."""
    digits = load_digits()
    for i in range(200):
        picture = Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).convert("RGB").resize((32, 32))
        seen = int((digits.target[:i] == digits.target[i]).sum())  # every class is in both sets
        split, part = ("val", "validation") if seen % 4 == 0 else ("train", "training")
        for path in (f"images/{split}/{digits.target[i]}/{i}.png", f"masks/images/{part}/{i}.png"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(folder / path)
        mask = np.where(np.asarray(picture)[..., 0] > 100, digits.target[i] + 1, 1).astype(np.uint8)
        (folder / f"masks/annotations/{part}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / f"masks/annotations/{part}/{i}.png")
    names = {
        path.stem: recipe["model"]["init_args"]["backbone"] for path, recipe in recipes.items() if "model" in recipe
    }
    names["teacher"] = {"name": "vit_base_patch14_reg4_dinov2.lvd142m"}
    wanted = {
        "pretrain_dino",
        "teacher",
        *re.findall(r"checkpoints/(\w+)/last", yaml.safe_dump(list(recipes.values()))),
    }
    for run in sorted(wanted):
        backbone = names[run]
        while backbone.get("name") is None:  # the name is in the checkpoint that this run started from
            backbone = names[Path(backbone["weights"]).parent.name]
        name, own = backbone["name"], names[run].get("kwargs") or {}
        kwargs = {**own, **small_kwargs(name)}
        if kwargs.get("stride") == 8:
            kwargs["stride"] = 2
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0 if run.startswith(("pretrain", "teacher")) else 10, **kwargs)
        state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
        (folder / f"checkpoints/{run}").mkdir(parents=True)
        content = {"state_dict": state, CHECKPOINT_KEY: {"name": name, "kwargs": kwargs}}
        torch.save(content, folder / f"checkpoints/{run}/last.ckpt")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Mistake:
    """One mistake in a recipe.

    Attributes:
        kind: What was done.
        key: Where, as a dotted path.
        text: For a reader.
        names: What a message may call it; one of them is enough.
    """

    kind: str
    key: str
    text: str
    names: list[str]


def paths(node: Any, prefix: Keys = ()) -> Iterator[Keys]:
    """Paths of all keys and list items below `node`."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def at(node: Any, path: Keys) -> Any:
    for key in path:
        node = node[key]
    return node


def dotted(path: Keys) -> str:
    """As on the command line: `data.train_transform.scale`, without `init_args` and numbers of list items."""
    return ".".join(
        str(key).removesuffix("+")
        for key in path
        if key not in ("init_args", "class_path") and not isinstance(key, int)
    )


def names_of(path: Keys) -> list[str]:
    """What a message may call the key: its dotted path, its last part, and `class_path` or `init_args` where it is one."""
    known = [str(key).removesuffix("+") for key in path if not isinstance(key, int)]
    whole = dotted(path)
    return sorted({whole, whole.split(".")[-1], known[-1]})


def inner_names(value: Any) -> list[str]:
    """Keys and class names in a section."""
    found = {str(path[-1]) for path in paths(value) if isinstance(path[-1], str)} - {"init_args", "class_path"}
    for path in paths(value):
        if path[-1] == "class_path":
            found.add(str(at(value, path)).rsplit(".", 1)[-1])
    if isinstance(value, dict) and "class_path" in value:
        found.add(str(value["class_path"]).rsplit(".", 1)[-1])
    return sorted(found)


def make_mistake(
    recipe: dict[str, Any], shipped: dict[str, Any], others: list[dict[str, Any]], rng: random.Random
) -> Mistake:
    """Change `recipe` in place, at a key that the shipped file has."""
    kinds = ["out of range"] * 7 + ["wrong type"] * 4 + ["unknown key"] * 2 + ["deleted key"] * 3
    kind = rng.choice(kinds + ["other class"] * 3 + ["other section"] * 2)
    present = [path for path in paths(shipped) if _exists(recipe, path)]
    leaves = [path for path in present if not isinstance(at(recipe, path), dict | list)]
    if not leaves:  # the first of two mistakes has left nothing to change
        kind = "unknown key"
    # Without a size, 224 px would be cut into patches of 4 px: right, but minutes long with a scan token by token.
    scans = "vim" in str(recipe.get("model", {}))
    if kind == "other class":
        places = [path for path in present if path[-1] == "class_path"]
        kind = kind if places else "unknown key"
    if kind in ("out of range", "wrong type"):
        path = rng.choice(leaves if rng.random() < 0.8 else present)
        old = at(recipe, path)
        pool = OUT_OF_RANGE if kind == "out of range" else [v for v in WRONG_TYPES if type(v) is not type(old)]
        forbidden = STARTS_PROCESSES.get(str(path[-1]), ()) if path[0] == "trainer" else ()
        new = rng.choice([value for value in pool if value not in forbidden])
        at(recipe, path[:-1])[path[-1]] = copy.copy(new)
        return Mistake(kind, dotted(path), f"{dotted_full(path)}: {short(old)} -> {short(new)}", names_of(path))
    if kind == "unknown key":
        sections: list[Keys] = [(), *(path for path in present if isinstance(at(recipe, path), dict))]
        path = rng.choice(sections)
        at(recipe, path)[UNKNOWN] = 2
        return Mistake(kind, dotted((*path, UNKNOWN)), f"{dotted_full((*path, UNKNOWN))}: 2", [UNKNOWN])
    if kind == "deleted key":
        path = rng.choice([p for p in present if isinstance(p[-1], str) and not (scans and p[-1] == "img_size")])
        old = at(recipe, path)
        del at(recipe, path[:-1])[path[-1]]
        return Mistake(
            kind, dotted(path), f"{dotted_full(path)}: {short(old)} deleted", names_of(path) + inner_names(old)
        )
    if kind == "other class":
        path = rng.choice(places)
        old = at(recipe, path)
        group = next(
            (group for group, names in CLASSES.items() if old.rsplit(".", 1)[-1] in names and _package(group) in old),
            "data",
        )
        name = rng.choice([name for name in CLASSES[group] if name != old.rsplit(".", 1)[-1]])
        new = f"vil_lightning.{_package(group)}.{name}"
        section = at(recipe, path[:-1])
        section["class_path"] = new
        names = [*names_of(path), name, *inner_names(section)]
        return Mistake(kind, dotted(path), f"{dotted_full(path)}: {old} -> {new}", names)
    sections = [path for path in present if isinstance(at(recipe, path), dict)]
    path = rng.choice(sections)
    found = [at(other, path) for other in others if _exists(other, path) and at(other, path) != at(recipe, path)]
    if rng.random() < 0.3 or not found:  # a section that belongs elsewhere
        found = [at(recipe, other) for other in sections if other != path] or [{UNKNOWN: 2}]
    old, new = at(recipe, path), copy.deepcopy(rng.choice(found))
    at(recipe, path[:-1])[path[-1]] = new
    names = [*names_of(path), *inner_names(old), *inner_names(new)]
    return Mistake("other section", dotted(path), f"{dotted_full(path)}: -> {short(new, 300)}", names)


def _package(group: str) -> str:
    return "data" if group == "transforms" else group


def _exists(node: Any, path: Keys) -> bool:
    try:
        at(node, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def dotted_full(path: Keys) -> str:
    return ".".join(str(key) for key in path)


def short(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + " …"


@dataclasses.dataclass
class Case:
    """A recipe with mistakes, and the command that reads it."""

    number: int
    recipe: str  # path below configs/
    mistakes: list[Mistake]
    config: dict[str, Any]
    args: list[str]


def make_case(seed: int, number: int, recipes: dict[Path, dict[str, Any]]) -> Case:
    """Case `number` depends on `seed` and itself alone; the recipes take turns."""
    rng = random.Random(f"{seed}/{number}")
    path = list(recipes)[number % len(recipes)]
    shipped, config = recipes[path], shrink(recipes[path])
    similar = [shrink(other) for key, other in recipes.items() if key != path and set(other) >= {"data"}]
    mistakes = [make_mistake(config, shipped, similar, rng) for _ in range(2 if rng.random() < 0.2 else 1)]
    return Case(number, path.relative_to(CONFIGS).as_posix(), mistakes, config, command_of(path, shipped))


def command_of(path: Path, shipped: dict[str, Any]) -> list[str]:
    """Arguments of main.py; what the recipe leaves to the command line is given there."""
    own = ["--config", path.name]
    network = [*("--backbone.name", "vil2_tiny_patch16_224"), *("--backbone.kwargs", json.dumps(small_kwargs("vil")))]
    if "tasks" in shipped:
        return ["evaluate", *own, *network, "--device", "cpu", "--progress", "false"]
    overlay = path.parent.name in OVERLAYS
    if "model" not in shipped and not overlay:
        return ["embed", *own, *network, "--device", "cpu", "--progress", "false", "--out", "vectors.npz"]
    command = "validate" if path == CONFIGS / "imagenet/evaluate.yaml" else "fit"
    if overlay:
        own = ["--config", "base.yaml", *own]
    return [command, *own, "--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false"]


# --- one case ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """How a command ended: `code` is None for an exception that nobody caught."""

    code: int | None
    out: str = ""
    err: str = ""
    worked: bool = False  # a batch was trained on, or features were computed
    finite: bool = True
    ended: str = "exit"  # or hang, crash
    seconds: float = 0.0


def judge(outcome: Outcome, mistakes: list[Mistake]) -> str:
    """One of `PASSED` or `FAILED`."""
    if outcome.ended != "exit":
        return outcome.ended
    text = outcome.out + outcome.err
    if outcome.code is None or "Traceback (most recent call last)" in text:
        return "traceback"
    if outcome.code == 0:
        return "valid run" if outcome.finite else "not finite"
    starts = [match.start() for match in re.finditer(r"^error: ", outcome.err, re.MULTILINE)]
    if outcome.code != 2 or len(starts) != 1:
        return "traceback"  # no error that was meant
    if outcome.worked:
        return "late"
    message = outcome.err[starts[0] :]
    # jsonargparse shows whole sections at the end, in which any key can be found.
    said = re.sub(r"^\s*(Given value|Subtypes|- Expected a path but)\b.*$", "", message, flags=re.MULTILINE)
    names = {name for mistake in mistakes for name in mistake.names}
    if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said) for name in names if name):
        return "keyless"
    usage = outcome.err[outcome.err.find("usage: ") : starts[0]] if "usage: " in outcome.err else ""
    return "page" if len((usage + message).splitlines()) > LINES else "clear error"


class _Watch(vil_lightning.cli.L.Callback):
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_train_batch_start(self, *_: Any) -> None:
        self.outcome.worked = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.outcome.finite = all(bool(torch.isfinite(p).all()) for p in pl_module.parameters())


def _watched(function: Callable[..., Any], outcome: Outcome) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        outcome.worked = True
        return function(*args, **kwargs)

    return call


class _FakeCIFAR:
    """In the place of torchvision's classes, whose archives are to be downloaded."""

    base_folder = "cifar-10-batches-py"
    classes = [str(i) for i in range(10)]

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        if root != "data":
            raise RuntimeError(f"{root} does not hold the files, and there is no network")
        self.data = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(100)]


_connect = socket.socket.connect


def _refuse(*_: Any) -> None:
    raise OSError("the network is closed")


def _connect_locally(self: socket.socket, address: Any) -> None:
    if self.family != socket.AF_UNIX:  # how worker processes share memory
        _refuse()
    _connect(self, address)


def _execute(case: Case, folder: Path, outcome: Outcome) -> None:
    """In a process of its own: close the network, watch, run the command."""
    socket.socket.connect = _connect_locally  # type: ignore[method-assign,assignment]
    socket.getaddrinfo = _refuse  # type: ignore[assignment]
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", COLUMNS="120")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torchvision.datasets.CIFAR10 = torchvision.datasets.CIFAR100 = _FakeCIFAR
    torch.set_num_threads(1)

    class WatchedCLI(vil_lightning.cli.VilCLI):
        def before_fit(self) -> None:
            super().before_fit()
            self.trainer.callbacks.append(_Watch(outcome))  # type: ignore[attr-defined]

    vil_lightning.cli.VilCLI = WatchedCLI  # type: ignore[misc]
    for name in ("_compute_in_memory", "_compute_on_disk"):
        setattr(extraction, name, _watched(getattr(extraction, name), outcome))
    os.chdir(folder)
    sys.argv = ["main.py"]
    vil_lightning.cli.main(case.args)


def prepare(case: Case, folder: Path, files: Path) -> None:
    """Write the recipe to an empty folder, beside what it reads."""
    folder.mkdir(parents=True)
    for name in ("images", "masks"):
        (folder / name).symlink_to(files / name)
    shutil.copytree(files / "checkpoints", folder / "checkpoints", copy_function=os.link)
    (folder / Path(case.recipe).name).write_text(yaml.safe_dump(case.config, sort_keys=False))
    if "base.yaml" in case.args:
        base = shrink(yaml.safe_load((CONFIGS / "pretrain_dino.yaml").read_text()))
        (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))


def start(case: Case, folder: Path) -> int:
    """Fork a process that runs the case and leaves `outcome.json`; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # so that its workers can be ended with it
        for number, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 - until the process ends
        outcome = Outcome(0)
        try:
            _execute(case, folder, outcome)
        except SystemExit as stop:
            outcome.code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        except BaseException:
            outcome.code = None
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "outcome.json").write_text(json.dumps(dataclasses.asdict(outcome)))
        code = 0
    finally:
        os._exit(code)


def finish(folder: Path, ended: str, seconds: float) -> Outcome:
    """What the process left."""
    texts = {name: (folder / f"{name}.txt").read_text(errors="replace") for name in ("out", "err")}
    path = folder / "outcome.json"
    if ended == "exit" and not path.is_file():
        ended = "crash"
    kept = json.loads(path.read_text()) if path.is_file() else {"code": None}
    return Outcome(**{**kept, **texts, "ended": ended, "seconds": seconds})


def run_cases(cases: Iterator[Case], files: Path, jobs: int) -> Iterator[tuple[Case, Outcome]]:
    """All cases, each in a process and a folder of its own, `jobs` at a time."""
    running: dict[int, tuple[Case, Path, float]] = {}
    waiting = True
    while waiting or running:
        while waiting and len(running) < jobs:
            case = next(cases, None)
            if case is None:
                waiting = False
                break
            folder = files / f"case{case.number}"
            prepare(case, folder, files)
            running[start(case, folder)] = (case, folder, time.monotonic())
        time.sleep(0.01)
        for child, (case, folder, began) in list(running.items()):
            seconds, ended = time.monotonic() - began, "exit"
            done, _ = os.waitpid(child, os.WNOHANG)
            if not done and seconds > SECONDS:
                ended = "hang"
            if not done and ended == "exit":
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
            if not done:
                os.waitpid(child, 0)
            del running[child]
            outcome = finish(folder, ended, seconds)
            shutil.rmtree(folder)
            yield case, outcome


# --- reports ----------------------------------------------------------------------------------------------------------


def describe(case: Case, outcome: Outcome, verdict: str, seed: int) -> str:
    """A failure, with what is needed to see it again."""
    lines = [f"- case {case.number}: **{verdict}**, {case.recipe}, `--seed {seed} --case {case.number}`"]
    lines += [f"  - {mistake.kind}: `{mistake.text}`" for mistake in case.mistakes]
    if outcome.ended == "exit" and outcome.code != 0:
        position = outcome.err.rfind("\nerror: ")
        tail = outcome.err[position:] if position >= 0 else outcome.err
        tail = re.sub(r'File "[^"]*/([^"/]+/[^"/]+)"', r'File "\1"', tail)
        lines += ["  ```", *(f"  {line[:240]}" for line in tail.strip().splitlines()[-6:]), "  ```"]
    return "\n".join(lines)


def report(results: list[tuple[Case, Outcome, str]], seed: int, seconds: float, recipes: int) -> str:
    counts = collections.Counter(verdict for _, _, verdict in results)
    passed = sum(counts[name] for name in PASSED)
    kinds = sorted({mistake.kind for case, _, _ in results for mistake in case.mistakes})
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    lines = [
        "# Recipes with mistakes in them",
        "",
        f"{len(results)} cases of {len({case.recipe for case, _, _ in results})} of {recipes} recipes: {passed} end as they "
        f"should, {len(results) - passed} do not.",
        "",
        f"- date: {datetime.date.today()}",
        f"- hardware: {os.cpu_count()} CPU cores ({processor()}), shared with other work; {seconds:.0f} s",
        f"- software: Python {platform.python_version()}, torch {torch.__version__}",
        f"- commit: {commit.stdout.strip() or 'unknown'}",
        f"- command: `{shlex.join(['python', 'benchmarks/fuzz_configs.py', *sys.argv[1:]])}`",
        "",
        "| how it ended | cases |",
        "| --- | --- |",
        *(f"| {name} | {counts[name]} |" for name in (*PASSED, *FAILED)),
        "",
        "| mistake | " + " | ".join((*PASSED, "failures")) + " |",
        "| --- | --- | --- | --- |",
    ]
    for kind in kinds:
        own = collections.Counter(v for case, _, v in results if any(m.kind == kind for m in case.mistakes))
        failures = sum(own.values()) - sum(own[name] for name in PASSED)
        lines.append(f"| {kind} | {own[PASSED[0]]} | {own[PASSED[1]]} | {failures} |")
    ran = sorted(
        f"`{mistake.text}`"
        for case, _, verdict in results
        if verdict == PASSED[0] and len(case.mistakes) == 1
        for mistake in case.mistakes
        if mistake.kind in ("out of range", "wrong type")
    )
    lines += ["", "Values that were accepted: " + ("; ".join(dict.fromkeys(ran)) or "none") + "."]
    lines += ["", "## Failures", ""]
    described = [describe(c, o, v, seed) for c, o, v in sorted(results, key=lambda r: r[0].number) if v not in PASSED]
    return "\n".join([*lines, *(described or ["None."])]) + "\n"


def processor() -> str:
    with contextlib.suppress(OSError):
        names = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if names:
            return names[1]
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone and print everything")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--unchanged", action="store_true", help="run every shrunk recipe once, without a mistake")
    parser.add_argument("--out", type=Path, help="file for the report in Markdown")
    args = parser.parse_args()
    recipes = load_recipes()
    torch.set_num_threads(1)
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        small_files(Path(folder), recipes)
        if args.unchanged:
            plain = enumerate(recipes.items())
            cases = (
                Case(i, path.relative_to(CONFIGS).as_posix(), [], shrink(own), command_of(path, own))
                for i, (path, own) in plain
            )
        else:
            numbers = range(args.count) if args.case is None else [args.case]
            cases = (make_case(args.seed, number, recipes) for number in numbers)
        for case, outcome in run_cases(cases, Path(folder), args.jobs):
            verdict = judge(outcome, case.mistakes)
            results.append((case, outcome, verdict))
            if args.case is not None:
                print(f"{shlex.join(case.args)}\n\n{yaml.safe_dump(case.config, sort_keys=False)}")
                print(f"{outcome.out}\n{outcome.err}\n{[m.text for m in case.mistakes]} {outcome.code}\n{verdict}")
            elif verdict not in PASSED:
                print(f"[{outcome.seconds:.1f} s] {describe(case, outcome, verdict, args.seed)}", flush=True)
    if args.case is not None:
        return
    text = report(results, args.seed, time.monotonic() - began, len(recipes))
    print(text.split("## Failures")[0])
    if args.out:
        args.out.write_text(text)
    sys.exit(any(verdict not in PASSED for _, _, verdict in results))


if __name__ == "__main__":
    main()
