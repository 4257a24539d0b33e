r"""Train a list of models under one budget and put accuracy next to size, cost, speed and memory.

    python benchmarks/compare.py --recipe configs/train_supervised.yaml --entries benchmarks/entries/backbones_32px.yaml \
        --seeds 0 1 2 --out benchmarks/results/backbones_32px [-- extra command-line arguments of every run]

Writes NAME.md, NAME.csv, NAME.json and NAME.png after every run. Started again with the same --out, it does what is missing.

An entry is `label: {name: timm model, kwargs: {...}, args: [extra command-line arguments of this entry]}`. Every run works in
an empty folder of its own, so paths in extra arguments have to be absolute. Every recipe that logs `val/acc1` will do.

Columns: accuracy is `val/acc1` at the end of the run and at its best epoch, mean and standard deviation over seeds; MACs see
benchmarks/macs.py (`causal`); images/s is the median of `speed/images_per_second` without the first value, which includes the
start; peak memory is `speed/peak_memory_gib` if the run logs it, else the largest resident set of a process of the run; seconds
are those of the whole command, validation included.
"""

import argparse
import csv
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
import yaml  # type: ignore[import-untyped]
from macs import count_macs  # type: ignore[import-not-found]
from mlstm_backends import hardware  # type: ignore[import-not-found]
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vil_lightning.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
METRIC = "val/acc1"


@dataclasses.dataclass
class Entry:
    """A line of the table: which model, and what else is different in its runs."""

    label: str
    name: str
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: list[str] = dataclasses.field(default_factory=list)

    def build(self, num_classes: int) -> torch.nn.Module:
        try:
            return timm.create_model(self.name, num_classes=num_classes, **self.kwargs)
        except (TypeError, ValueError, RuntimeError, AssertionError, IndexError) as error:
            raise ConfigError(
                f"Entry {self.label!r}: {self.name} cannot be built with kwargs={self.kwargs}: {error}. "
                "Change name or kwargs of that entry."
            ) from error


def read_entries(path: str | Path) -> list[Entry]:
    """The entries of a YAML file, in its order.

    Raises:
        ConfigError: Naming the entry that is not understood.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--entries {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--entries {path} must hold a mapping of labels to entries, `label: {{name: timm model}}`.")
    entries = []
    for label, fields in content.items():
        if not isinstance(fields, dict) or "name" not in fields or set(fields) - {"name", "kwargs", "args"}:
            raise ConfigError(
                f"--entries {path}: entry {label!r} is {fields!r}, but must be a mapping with the key name, and perhaps kwargs "
                "(a mapping) and args (a list)."
            )
        kwargs, args = fields.get("kwargs") or {}, fields.get("args") or []
        if not isinstance(kwargs, dict) or not isinstance(args, list):
            raise ConfigError(f"--entries {path}: entry {label!r}: kwargs must be a mapping and args a list.")
        empty = [key for key, value in kwargs.items() if value is None]
        if empty:  # the command line hands a null inside a mapping on as the text "None"
            raise ConfigError(
                f"--entries {path}: entry {label!r}: kwargs.{empty[0]} is null. Leave it out, or give a value."
            )
        entries.append(Entry(str(label), str(fields["name"]), kwargs, [str(arg) for arg in args]))
    return entries


# --- one run ------------------------------------------------------------------------------------------------------------


def run_command(entry: Entry, seed: int, recipe: Path, extra: list[str]) -> list[str]:
    command = [sys.executable, str(ROOT / "main.py"), "fit", "--config", str(recipe)]
    command += ["--model.backbone.name", entry.name, "--model.backbone.kwargs", json.dumps(entry.kwargs)]
    command += ["--seed_everything", str(seed), "--run_name", "run", "--trainer.enable_progress_bar", "false"]
    return [*command, *extra, *entry.args]


def train(entry: Entry, seed: int, recipe: Path, extra: list[str]) -> dict[str, Any]:
    """Run one entry with one seed.

    Returns:
        What it reached and what it took.

    Raises:
        RuntimeError: With the end of its output, if it fails or logs no accuracy.
    """
    with tempfile.TemporaryDirectory() as temporary:
        output, folder = Path(temporary) / "output.txt", Path(temporary) / "run"
        folder.mkdir()
        started = time.monotonic()
        with output.open("w") as file:
            command = run_command(entry, seed, recipe, extra)
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)  # like wait(), with the memory of this child alone
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if process.returncode:
            tail = output.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"exit code {process.returncode} of {shlex.join(command)}\n{tail}")
        result = read_run(folder / "logs" / "run")
        config = yaml.safe_load((folder / "logs" / "run" / "config.yaml").read_text())
    result["seconds"] = seconds
    result["img_size"] = config["data"]["init_args"]["img_size"]
    result["memory_of"] = "GPU" if "peak_memory_gib" in result else "process"
    # Kilobytes, but bytes on macOS.
    result.setdefault("peak_memory_gib", usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20))
    return result


def read_run(folder: Path) -> dict[str, Any]:
    """Accuracy, speed and (if logged) GPU memory from a run's TensorBoard files."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = log.Tags()["scalars"]

    def values(tag: str) -> list[float]:
        return [event.value for event in log.Scalars(tag)] if tag in tags else []

    accuracies, speeds, memory = values(METRIC), values("speed/images_per_second"), values("speed/peak_memory_gib")
    if not accuracies:
        raise RuntimeError(f"the run logged no {METRIC}. Logged were: {', '.join(sorted(tags)) or 'none'}.")
    result: dict[str, Any] = {"last": accuracies[-1], "best": max(accuracies)}
    if speeds:
        result["images_per_second"] = statistics.median(speeds[1:] or speeds)
    if memory:
        result["peak_memory_gib"] = max(memory)
    return result


# --- the file of finished runs ------------------------------------------------------------------------------------------


class Results:
    """Finished runs, kept in `<out>.json`, and the report that is made of them.

    Args:
        out: Path without suffix.
        budget: What all runs of the file have in common.
    """

    def __init__(self, out: str | Path, budget: dict[str, Any], draw: bool = True) -> None:
        self.out = str(out)
        self.budget = budget
        self.draw = draw
        self.runs: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        path = Path(f"{out}.json")
        if path.is_file():
            content = json.loads(path.read_text())
            differing = [key for key in budget if content["budget"].get(key) != budget[key]]
            if differing:
                raise ConfigError(
                    f"{path} holds runs of another budget: "
                    + "; ".join(f"{key} was {content['budget'].get(key)!r}, is {budget[key]!r}" for key in differing)
                    + ". Use another --out, or delete the file."
                )
            self.runs = content["runs"]

    def finished(self, entry: Entry, seed: int) -> bool:
        for run in self.runs:
            if run["entry"]["label"] == entry.label:
                if run["entry"] != dataclasses.asdict(entry):
                    raise ConfigError(
                        f"{self.out}.json holds runs of another entry {entry.label!r}: {run['entry']}, not "
                        f"{dataclasses.asdict(entry)}. Give the entry another label, or use another --out."
                    )
                if run["seed"] == seed:
                    return True
        return False

    def add(self, run: dict[str, Any]) -> None:
        """Take in a run and write everything anew, so that nothing is lost if the next one fails."""
        with self._lock:
            self.runs.append(run)
            self.write()

    def write(self) -> None:
        Path(self.out).parent.mkdir(parents=True, exist_ok=True)
        rows = summarise(self.runs)
        replace(Path(f"{self.out}.json"), json.dumps({"budget": self.budget, "runs": self.runs}, indent=1) + "\n")
        replace(Path(f"{self.out}.md"), markdown(rows, self.runs, self.budget))
        with Path(f"{self.out}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        if self.draw and rows:
            plot(rows, Path(f"{self.out}.png"), title=Path(self.out).name)


def replace(path: Path, text: str) -> None:
    """Write a file in one move: it is the old or the new one, never a part."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


# --- the report ---------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("entry", "name", "seeds", "last", "last_std", "best", "best_std", "parameters", "macs"),
    *("images_per_second", "peak_memory_gib", "seconds"),
)


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per entry: means over its seeds; standard deviations need two of them."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_label.setdefault(run["entry"]["label"], []).append(run)
    rows = []
    for label, group in by_label.items():
        row: dict[str, Any] = {"entry": label, "name": group[0]["entry"]["name"], "seeds": len(group)}
        row |= {key: group[0][key] for key in ("parameters", "macs")}
        for key in ("last", "best", "images_per_second", "peak_memory_gib", "seconds"):
            values = [run[key] for run in group if key in run]
            row[key] = statistics.mean(values) if values else None
            if key in ("last", "best"):
                row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], runs: list[dict[str, Any]], budget: dict[str, Any]) -> str:
    def distinct(key: str) -> str:
        return "; ".join(dict.fromkeys(str(run[key]) for run in runs))

    lines = [f"# Comparison under {budget['recipe']}", ""]
    for title, key in (("date", "date"), ("hardware", "hardware"), ("software", "software"), ("command", "command")):
        lines.append(f"- {title}: " + (f"`{distinct(key)}`" if key == "command" else distinct(key)))
    memory = " and ".join(sorted({run["memory_of"] for run in runs}))
    lines.append(f"- accuracy: {METRIC} in percent, mean ± standard deviation over seeds; peak memory of the {memory}")
    if any(run["parallel"] > 1 for run in runs):
        lines.append("- several runs shared the machine: speed and seconds are not those of a run alone")
    unit, name = (1e9, "GMACs") if any(row["macs"] >= 1e9 for row in rows) else (1e6, "MMACs")
    lines += ["", f"| model | seeds | at the end | best epoch | M parameters | {name} | images/s | GiB | seconds |"]
    lines.append("|---|" + "---:|" * 8)
    for row in rows:
        accuracies = [
            f"{row[key]:.2f}" + (f" ± {row[key + '_std']:.2f}" if row[key + "_std"] is not None else "")
            for key in ("last", "best")
        ]
        speed = "" if row["images_per_second"] is None else f"{row['images_per_second']:.0f}"
        cells = [row["entry"], str(row["seeds"]), *accuracies, f"{row['parameters'] / 1e6:.2f}"]
        cells += [f"{row['macs'] / unit:.3g}", speed, f"{row['peak_memory_gib']:.2f}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy against MACs and against training time, a labelled point per entry."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only the plot needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("MMACs per image, forward", lambda row: row["macs"] / 1e6),
        ("training time in s", lambda row: row["seconds"]),
    ]
    for axes, (name, x_of) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        middle = (min(map(x_of, rows)) + max(map(x_of, rows))) / 2
        for row in rows:
            x, y = x_of(row), row["last"]
            axes.errorbar(x, y, yerr=row["last_std"], marker="o", capsize=3, linestyle="none")
            left = x > middle  # or the label would run out of the picture
            offset, side = ((-6, 4), "right") if left else ((6, 4), "left")
            axes.annotate(row["entry"], (x, y), xytext=offset, textcoords="offset points", fontsize=8, ha=side)
        axes.set_xlabel(name)
        axes.set_ylabel(f"{METRIC} at the end, %")
        axes.margins(x=0.2, y=0.1)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


# --- the command --------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="YAML file of the runs")
    parser.add_argument("--entries", required=True, help="YAML file of the models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", required=True, help="path of the results, without suffix")
    parser.add_argument("--num_classes", type=int, default=10, help="of the recipe's data, for parameters and MACs")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; more than one spoils the timings")
    parser.add_argument("--no_plot", action="store_true", help="do without matplotlib")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # the table alone goes to stdout


def compare(args: argparse.Namespace, command: str) -> int:
    """Run what is missing; returns the number of failed runs."""
    recipe = Path(args.recipe).resolve()
    if not recipe.is_file():
        raise ConfigError(f"--recipe {args.recipe} does not exist. Give the path of a YAML file, e.g. one in configs/.")
    if args.parallel < 1:
        raise ConfigError(f"--parallel {args.parallel} must be at least 1.")
    if not args.no_plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("The plot needs matplotlib: pip install 'vil-lightning[bench]'. Or do without it: --no_plot.")
    budget = {
        "recipe": recipe.name,
        "recipe_sha256": hashlib.sha256(recipe.read_bytes()).hexdigest()[:16],
        "extra": args.extra,
        "num_classes": args.num_classes,
    }
    entries = read_entries(args.entries)
    results = Results(args.out, budget, draw=not args.no_plot)
    for entry in entries:
        entry.build(args.num_classes)  # before hours are spent on the entries above it
    # Seed by seed, so that a table that is stopped early holds all entries.
    missing = [(entry, seed) for seed in args.seeds for entry in entries if not results.finished(entry, seed)]
    say(f"{len(missing)} runs of {len(entries) * len(args.seeds)} to do")
    machine = hardware("cpu") + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")

    def work(entry: Entry, seed: int) -> bool:
        try:
            run = train(entry, seed, recipe, args.extra)
        except RuntimeError as error:
            say(f"{entry.label}, seed {seed}: FAILED, {error}")
            return False
        model = entry.build(args.num_classes)
        run |= {"entry": dataclasses.asdict(entry), "seed": seed, "parallel": args.parallel, "hardware": machine}
        run |= {"date": str(datetime.date.today()), "software": f"torch {torch.__version__}", "command": command}
        run["parameters"] = sum(p.numel() for p in model.parameters())
        with counting:  # its settings of torch are global
            run["macs"] = count_macs(model, run["img_size"]).causal
        results.add(run)
        say(f"{entry.label}, seed {seed}: {METRIC} {run['last']:.2f} in {run['seconds']:.0f} s")
        return True

    counting = threading.Lock()
    with ThreadPoolExecutor(args.parallel) as pool:
        done = list(pool.map(lambda pair: work(*pair), missing))
    if results.runs:
        results.write()
        print(Path(f"{args.out}.md").read_text())
    return done.count(False)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        failed = compare(parse(argv), f"python benchmarks/compare.py {shlex.join(argv)}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if failed:
        sys.exit(f"{failed} run(s) failed; the same command runs them again")


if __name__ == "__main__":
    main()
