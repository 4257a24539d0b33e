"""Does a long run stay as it began? Half an hour of DINO on the built-in digits: memory, file handles, threads and speed.

    python benchmarks/soak.py --minutes 30 --out benchmarks/results/soak

Runs the shipped recipe, with its validation, pictures and checkpoints, and samples this process. The first tenth is left out
(allocators and caches fill up); of the rest the first third is compared with the last. Speed is given per second, per second of
CPU time, which hardly feels other programs on the machine, and per yardstick: at every sample a fixed piece of the same kind of
work is timed in another process, so that a machine that gets faster or slower does not pass for a run that does.
"""

import argparse
import csv
import datetime
import gc
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch

from vil_lightning import cli

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("seconds", "cpu_seconds", "step", "yardstick_seconds", "memory_mib", "handles", "threads", "objects")


class Sampler(L.Callback):
    """Looks at this process every few seconds."""

    def __init__(self, path: Path, every: float) -> None:
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerow(COLUMNS)
        self.every, self.start, self.next = every, time.monotonic(), 0.0
        command = [sys.executable, __file__, "--yardstick", "--out", "."]
        self.other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def yardstick(self) -> float:
        """Seconds of the same work each time, in a process of its own: what slows this one down does not slow that."""
        assert self.other.stdin is not None
        assert self.other.stdout is not None
        self.other.stdin.write("\n")
        self.other.stdin.flush()
        return float(self.other.stdout.readline())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        now = time.monotonic() - self.start
        if now < self.next:
            return
        yardstick = self.yardstick()
        self.start += time.monotonic() - self.start - now  # which is no part of the run
        self.next = now + self.every
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        row = (
            round(now, 2),
            round(time.process_time(), 2),
            trainer.global_step,
            round(yardstick, 5),
            round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            len(gc.get_objects()),
        )
        self.writer.writerow(row)
        self.file.flush()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.other.communicate()  # it ends with its input


def answer_with_times() -> None:
    """The other process: for every line read, the median of five training steps of a small network."""
    network = timm.create_model("vil2_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=64, depth=4)
    images = torch.randn(64, 3, 16, 16)
    for _ in sys.stdin:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.autograd.grad(network(images).sum(), list(network.parameters()))
            times.append(time.perf_counter() - start)
        print(statistics.median(times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "pretrain_dino.yaml")
    parser.add_argument("--out", type=Path, required=True, help="PATH.md and PATH.csv are written")
    parser.add_argument("--yardstick", action="store_true", help=argparse.SUPPRESS)
    args, extra = parser.parse_known_args()
    if args.yardstick:
        return answer_with_times()
    out = args.out.resolve()
    started = datetime.datetime.now(datetime.timezone.utc)
    load = os.getloadavg()[0]
    before = cli.VilCLI.before_fit

    def before_fit(self: cli.VilCLI) -> None:
        before(self)
        self.trainer.callbacks.append(Sampler(out.with_suffix(".csv"), args.every))  # type: ignore[attr-defined]

    cli.VilCLI.before_fit = before_fit  # type: ignore[method-assign]
    seconds = round(60 * args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.argv[1:] = []
        limit = f"00:{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        cli.main(
            ["fit", "--config", str(args.config), "--trainer.max_epochs", "5000", "--trainer.max_time", limit, *extra]
        )
        os.chdir(ROOT)
    rows = [[float(value) for value in row] for row in list(csv.reader(out.with_suffix(".csv").open()))[1:]]
    text = report(rows, started, load, f"python benchmarks/soak.py --minutes {args.minutes:g} {shlex.join(extra)}")
    print("\n" + text)
    out.with_suffix(".md").write_text(text)


def report(rows: list[list[float]], started: datetime.datetime, load: float, command: str) -> str:
    """What the two thirds have in common."""
    rows = rows[len(rows) // 10 :]
    third = len(rows) // 3
    parts = rows[:third], rows[-third:]

    def speed(part: list[list[float]], clock: int) -> float:
        return (part[-1][2] - part[0][2]) / (part[-1][clock] - part[0][clock])

    place = COLUMNS.index("yardstick_seconds")
    yardsticks = [statistics.median(row[place] for row in part) for part in parts]
    lines = [
        ("steps per second", speed(parts[0], 0), speed(parts[1], 0)),
        ("steps per second of CPU time", speed(parts[0], 1), speed(parts[1], 1)),
        ("steps per yardstick", speed(parts[0], 0) * yardsticks[0], speed(parts[1], 0) * yardsticks[1]),
    ]
    for name in COLUMNS[3:]:
        place = COLUMNS.index(name)
        first, last = (statistics.median(row[place] for row in part) for part in parts)
        lines.append((name.replace("_", " "), first, last))
    return "\n".join(
        [
            "# Soak",
            "",
            f"- date: {started.isoformat(timespec='seconds')}; {rows[-1][0] / 60:.1f} minutes, {rows[-1][2]:.0f} steps",
            f"- hardware: {platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads; "
            f"load average when started {load:.2f}",
            f"- software: python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}",
            f"- command: `{command.strip()}`",
            "",
            "| | first third | last third | change |",
            "|---|---:|---:|---:|",
            *(f"| {name} | {a:.4g} | {b:.4g} | {100 * (b / a - 1):+.1f} % |" for name, a, b in lines),
            "",
        ]
    )


if __name__ == "__main__":
    main()
