r"""Pretrain with several methods for the same time and score what was learned in four ways, several seeds, one table.

    python benchmarks/pretraining.py --seeds 0 1 --minutes 5 --parallel 2 --out benchmarks/results/NAME

Every run gets the same CPU time on one thread, which (unlike wall-clock time) hardly depends on what else a machine does: two
short runs of each entry measure its epoch, and the budget is divided by it. Scores on the digits' val images, all with the last
state:

- kNN: k = 20, pooled vector of the recipe's read-out
- 5-shot: logistic regression on 5 images per class, mean over 20 draws (as benchmarks/digits_dino.py)
- linear: configs/linear_probe.yaml, read-out and learning rate chosen on held-out training images
- fine-tune: configs/finetune.yaml on 10 % of the labels (batch 16, 10 epochs)

An entry of the list is `label: {config: recipe, ...}`, with any of: `backbone: {name, kwargs}` in place of the recipe's;
`args`, further arguments of the training command; `finetune_kwargs`, the backbone's in fine-tuning where they differ;
`teacher: label`, whose run of the same seed is passed on as `model.teacher.weights`; `train: false` to score the
untrained network. Started again with the same --out (and --work, where checkpoints of teachers are), it does what is missing.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from compare import read_run, replace, say  # type: ignore[import-not-found]
from digits_dino import scores  # type: ignore[import-not-found]
from mlstm_backends import hardware  # type: ignore[import-not-found]

from vil_lightning.data import Digits
from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import BackboneConfig, build_backbone, resolve_backbone

ROOT = Path(__file__).resolve().parents[1]
_SEEDING = threading.Lock()  # torch's generator is shared by the threads that wait for runs
COLUMNS = {"knn": "kNN", "five_shot": "5-shot", "linear": "linear", "finetune": "fine-tune 10 %"}


@dataclasses.dataclass
class Entry:
    """A line of the table."""

    label: str
    config: str
    backbone: dict[str, Any] | None = None
    args: list[str] = dataclasses.field(default_factory=list)
    finetune_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str | None = None
    train: bool = True


def read_entries(path: str) -> list[Entry]:
    """The entries of a YAML file, in its order."""
    content = yaml.safe_load(Path(path).read_text())
    try:
        entries = [Entry(label, **fields) for label, fields in content.items()]
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"--entries {path}: {error}. Allowed keys: config, backbone, args, kwargs, teacher, train."
        ) from error
    labels = [entry.label for entry in entries]
    for i, entry in enumerate(entries):
        if not (ROOT / entry.config).is_file():
            raise ConfigError(f"--entries {path}: {entry.label}: there is no recipe {entry.config}.")
        if entry.teacher is not None and entry.teacher not in labels[:i]:
            raise ConfigError(f"--entries {path}: {entry.label}: teacher {entry.teacher!r} must be an entry above it.")
    return entries


# --- runs ---------------------------------------------------------------------------------------------------------------


def cli(folder: Path, *args: str) -> float:
    """Run the command line on one thread in `folder`.

    Returns:
        CPU seconds.

    Raises:
        RuntimeError: With the end of its output, if it fails.
    """
    command = [sys.executable, str(ROOT / "main.py"), *args, "--trainer.enable_progress_bar", "false"]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = (folder / "output.txt").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"exit code {process.returncode} of {shlex.join(command)}\n{tail}")
    return usage.ru_utime + usage.ru_stime


def fit_args(entry: Entry, seed: int, epochs: int, teacher: Path | None) -> list[str]:
    args = ["fit", "--config", str(ROOT / entry.config), "--seed_everything", str(seed), "--run_name", "run"]
    args += ["--trainer.max_epochs", str(epochs), *entry.args]
    if entry.backbone is not None:
        args += ["--model.backbone.name", entry.backbone["name"]]
        args += ["--model.backbone.kwargs", json.dumps(entry.backbone["kwargs"])]
    return args + (["--model.teacher.weights", str(teacher)] if teacher is not None else [])


def epochs_in(entry: Entry, cpu_seconds: float, teacher: Path | None) -> int:
    """How many epochs fit into the budget, start-up included."""
    times = []
    for epochs in (2, 6):
        with tempfile.TemporaryDirectory() as folder:
            times.append(cli(Path(folder), *fit_args(entry, 0, epochs, teacher)))
    per_epoch = (times[1] - times[0]) / 4
    return max(1, int((cpu_seconds - times[0] + 2 * per_epoch) / per_epoch))


def score(entry: Entry, weights: Path | None, seed: int) -> dict[str, float]:
    """The four scores of a checkpoint, or of the recipe's untrained network."""
    recipe = yaml.safe_load((ROOT / entry.config).read_text())
    config = BackboneConfig(None, str(weights))
    if weights is None:
        config = BackboneConfig(**(entry.backbone or recipe["model"]["init_args"]["backbone"]))
    config = resolve_backbone(config)
    data = Digits(img_size=config.kwargs["img_size"], seed=0)
    data.setup()
    with _SEEDING:  # scores draw random numbers, too
        torch.manual_seed(seed)
        knn, five_shot = scores(build_backbone(config), data)
    source = ["--seed_everything", str(seed), "--run_name", "run", "--model.backbone.name", str(config.name)]
    source += ["--model.backbone.weights", "null" if weights is None else str(weights)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        kwargs = ["--model.backbone.kwargs", json.dumps(config.kwargs)]
        cli(folder, "fit", "--config", str(ROOT / "configs/linear_probe.yaml"), *source, *kwargs)
        linear = json.loads((folder / "logs/run/results.json").read_text())["linear"]["val_acc1"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few = ["--data.train_fraction", "0.1", "--data.batch_size", "16", "--model.base_lr", "0.064"]  # 1e-3
        kwargs = ["--model.backbone.kwargs", json.dumps({**config.kwargs, **entry.finetune_kwargs})]
        few += ["--trainer.max_epochs", "10"]
        cli(folder, "fit", "--config", str(ROOT / "configs/finetune.yaml"), *source, *kwargs, *few)
        finetune = read_run(folder / "logs/run")["last"]
    return {"knn": knn, "five_shot": five_shot, "linear": linear, "finetune": finetune}


# --- table --------------------------------------------------------------------------------------------------------------


def table(runs: list[dict[str, Any]], entries: list[Entry], budget: dict[str, Any], facts: dict[str, str]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = ["# Pretraining on the built-in digits, one budget for all methods", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines.append(f"- budget: {budget['minutes']:g} minutes of CPU time on one thread for each run, validation included")
    lines += ["", "| method | seeds | " + " | ".join(COLUMNS.values()) + " | epochs | CPU s |", "|---|" + "---:|" * 7]
    for entry in entries:
        own = [run for run in runs if run["label"] == entry.label]
        if not own:
            continue
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in own]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        epochs = "" if not entry.train else str(own[0]["epochs"])
        seconds = "" if not entry.train else f"{statistics.mean(run['cpu_seconds'] for run in own):.0f}"
        lines.append(f"| {entry.label} | {len(own)} | " + " | ".join(cells) + f" | {epochs} | {seconds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", default=str(ROOT / "benchmarks/entries/pretraining_digits.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU time of a run")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--work", help="where checkpoints are kept; a temporary folder if not given")
    parser.add_argument("--out", required=True, help="path of the results, without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            run_all(args, read_entries(args.entries), Path(args.work or temporary).resolve())
    except ConfigError as error:
        sys.exit(f"error: {error}")


class Comparison:
    """The runs of a table, those of an earlier call included.

    Args:
        out: Path of the results, without suffix.
        work: Where runs leave their checkpoints.
    """

    def __init__(self, entries: list[Entry], budget: dict[str, Any], out: str, work: Path) -> None:
        self.entries = entries
        self.budget = budget
        self.out = out
        self.work = work
        self.runs: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        path = Path(f"{out}.json")
        if path.is_file():
            content = json.loads(path.read_text())
            if content["budget"] != budget:
                raise ConfigError(f"{path} holds runs of another budget: {content['budget']}. Use another --out.")
            self.runs = content["runs"]
        self.facts = {
            "date": str(datetime.date.today()),
            "hardware": hardware("cpu"),
            "software": f"torch {torch.__version__}",
            "command": f"`python benchmarks/pretraining.py {shlex.join(sys.argv[1:])}`",
            "scores": "percent of val images, last state, mean ± standard deviation over seeds",
        }

    def find(self, label: str, seed: int | None = None) -> dict[str, Any] | None:
        """A finished run of this entry; of any seed if None."""
        return next((r for r in self.runs if r["label"] == label and seed in (None, r["seed"])), None)

    def folder(self, label: str, seed: int) -> Path:
        return self.work / f"{label}_{seed}".replace(" ", "_").replace("/", "_")

    def checkpoint(self, label: str, seed: int) -> Path:
        return self.folder(label, seed) / "checkpoints/run/last.ckpt"

    def run(self, entry: Entry, seed: int) -> None:
        """Train, score, and write everything anew, so that nothing is lost if the next one fails."""
        run: dict[str, Any] = {"label": entry.label, "seed": seed}
        if entry.train:
            teacher = None if entry.teacher is None else self.checkpoint(entry.teacher, seed)
            earlier = self.find(entry.label)
            epochs = earlier["epochs"] if earlier else epochs_in(entry, 60 * self.budget["minutes"], teacher)
            folder = self.folder(entry.label, seed)
            folder.mkdir(parents=True, exist_ok=True)
            run["cpu_seconds"] = cli(folder, *fit_args(entry, seed, epochs, teacher), "--overwrite", "true")
            run["epochs"] = epochs
        run |= score(entry, self.checkpoint(entry.label, seed) if entry.train else None, seed)
        with self.lock:
            self.runs.append(run)
            Path(self.out).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"budget": self.budget, "runs": self.runs}, indent=1)
            replace(Path(f"{self.out}.json"), text + "\n")
            replace(Path(f"{self.out}.md"), table(self.runs, self.entries, self.budget, self.facts))
        say(f"{entry.label}, seed {seed}: " + ", ".join(f"{name} {run[name]:.1f}" for name in COLUMNS))


def run_all(args: argparse.Namespace, entries: list[Entry], work: Path) -> None:
    """What is missing, seed by seed, so that a table that is stopped early holds all entries."""
    budget = {"minutes": args.minutes, "entries": Path(args.entries).name}
    comparison = Comparison(entries, budget, args.out, work)
    for seed in args.seeds:
        # Students of other entries after these, which may be running at the same time.
        for waiting in (False, True):
            missing = [e for e in entries if (e.teacher is not None) == waiting and not comparison.find(e.label, seed)]
            for entry in missing:
                if entry.teacher is not None and not comparison.checkpoint(entry.teacher, seed).is_file():
                    raise ConfigError(f"{entry.label} needs the run of {entry.teacher}, which --work does not hold.")
            with ThreadPoolExecutor(args.parallel) as pool:
                list(pool.map(lambda entry, seed=seed: comparison.run(entry, seed), missing))
    print(table(comparison.runs, entries, budget, comparison.facts))


if __name__ == "__main__":
    main()
