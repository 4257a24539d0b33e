"""A drill: runs are killed, starved, poisoned and damaged, and have to end with the weights of an undisturbed run.

    python benchmarks/faults.py --out benchmarks/results/faults

For each method, a small run on the built-in digits is made once without a fault. Then it is made again and again under one
kind of fault, restarted each time with the very same command (`--resume auto`), and its last checkpoint (weights, teacher,
statistics, optimiser, counters) is compared with the undisturbed one, `torch.equal` for every tensor. Prints a Markdown table.

    kill      SIGKILL at random moments: while it starts, while it trains, and in the middle of writing a checkpoint
    term      SIGTERM at random moments (exit code 143 once training has begun)
    nan       one batch is NaN: the step is skipped and the run ends well; all batches from a step on: it stops, and says where
    worker    a data worker is killed: the run ends with the cause; restarted, it goes on
    raise     reading an image raises an unforeseen error: likewise
    full      the disk that holds the checkpoints fills up (a small tmpfs, if this may be mounted; else a limit of file sizes)
    readonly  the log folder cannot be written to: refused before the first step
    damage    last.ckpt is cut off at random lengths and has random bits flipped: the newest good one is taken
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import os
import platform
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vil_lightning.backbones.weights import read_file
from vil_lightning.checkpoint_io import newest_good
from vil_lightning.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"dino": "pretrain_dino", "mae": "pretrain_mae", "supervised": "train_supervised"}
FAULTS = ("kill", "term", "nan", "worker", "raise", "full", "readonly", "damage")
SMALL = "{img_size: 16, patch_size: 4, embed_dim: 32, depth: 4, drop_path_rate: 0.1}"


@dataclasses.dataclass
class Row:
    """A line of the table."""

    fault: str
    method: str
    times: str
    observed: str
    ok: bool
    seconds: float


class Run:
    """A run in a folder of its own, started as a user would."""

    def __init__(self, method: str, folder: Path, epochs: int, extra: tuple[str, ...] = ()) -> None:
        self.method, self.name, self.folder = method, RECIPES[method], folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "output.txt"
        self.checkpoints = folder / "checkpoints" / self.name
        self.args = [
            *("fit", "--config", str(ROOT / "configs" / f"{self.name}.yaml"), "--resume", "auto"),
            *("--trainer.max_epochs", str(epochs), "--model.backbone.kwargs", SMALL),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
            *("--checkpoint.every_n_train_steps", "7"),
            *extra,
        ]
        if method == "dino":
            self.args += ["--model.num_prototypes", "64", "--model.head_hidden_dim", "64"]
            self.args += ["--data.train_transform.num_local_views", "2"]

    def start(self, inject: str = "", limit: int | None = None) -> subprocess.Popen[bytes]:
        """Start or restart it. `inject` is for `poisoned_main`; `limit` for the size of files, in bytes."""
        program = [str(ROOT / "main.py")] if not inject else [__file__, "--inject", inject]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

        def restrict() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *program, *self.args],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=restrict,
            )

    def finish(self, inject: str = "", limit: int | None = None) -> tuple[int, str]:
        """Run it to its end; returns the exit code and what it printed."""
        before = self.log.stat().st_size if self.log.exists() else 0
        code = self.start(inject, limit).wait(timeout=600)
        return code, self.log.read_bytes()[before:].decode(errors="replace")

    @property
    def config(self) -> Path:
        """Written when a start has built everything, just before its first step."""
        return self.folder / "logs" / self.name / "config.yaml"

    def last(self) -> dict[str, Any]:
        """What its last checkpoint holds of the training (not paths, which differ, nor when it was written)."""
        content = read_file(self.checkpoints / "last.ckpt")
        return {key: content[key] for key in ("state_dict", "optimizer_states", "global_step", "epoch")}


def same(a: Any, b: Any) -> bool:
    """Equality of nested containers, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


class Drill:
    """All faults of one method against one undisturbed run."""

    def __init__(self, method: str, folder: Path, epochs: int, seed: int) -> None:
        self.method, self.folder, self.epochs = method, folder, epochs
        self.random = random.Random(f"{seed} {method}")
        self.whole = Run(method, folder / "undisturbed", epochs)
        started = time.monotonic()
        code, out = self.whole.finish()
        if code:
            raise RuntimeError(f"The undisturbed run of {method} failed ({code}):\n{out[-3000:]}")
        self.seconds = time.monotonic() - started
        self.expected = self.whole.last()

    def run(self, name: str, *extra: str) -> Run:
        return Run(self.method, self.folder / name, self.epochs, extra)

    def compare(self, run: Run) -> tuple[str, bool]:
        equal = same(run.last(), self.expected)
        return f"final state {'equal' if equal else 'DIFFERS'}", equal

    # --- killed at random moments -------------------------------------------------------------------------------------

    def interrupt(self, number: int, count: int) -> tuple[str, str, bool]:
        """Signals until there were `count`, then to the end."""
        run = self.run(signal.Signals(number).name.lower())
        moments = {"starting": 0, "training": 0, "writing": 0}
        codes: dict[int, int] = {}
        while True:
            remaining = count - sum(moments.values())
            started = time.time()
            process = run.start()
            if remaining <= 0:
                code = process.wait(timeout=600)
                codes[code] = codes.get(code, 0) + 1
                break
            kind = self.random.choices(("starting", "training", "writing"), (0.15, 0.5, 0.35))[0]
            hit = self._wait_for(kind, run, process, started)
            process.send_signal(number)
            code = process.wait(timeout=120)
            codes[code] = codes.get(code, 0) + 1
            if code == 0:
                break  # it was faster
            moments[hit] += 1
        said, equal = self.compare(run)
        times = f"{sum(moments.values())} ({', '.join(f'{n} {kind}' for kind, n in moments.items())})"
        codes_said = ", ".join(f"{code}: {n}" for code, n in sorted(codes.items()))
        allowed = {0, -number, 128 + number} if number == signal.SIGTERM else {0, -number}
        enough = sum(moments.values()) >= count
        return times, f"{said}; exit codes {codes_said}", equal and enough and set(codes) <= allowed

    def _wait_for(self, kind: str, run: Run, process: subprocess.Popen[bytes], started: float) -> str:
        """Returns the kind of moment that came."""
        if kind == "starting":
            time.sleep(self.random.uniform(0, 4))
            return kind
        while process.poll() is None and not (run.config.exists() and run.config.stat().st_mtime >= started):
            time.sleep(0.01)
        if kind == "writing":
            deadline = time.monotonic() + 5
            while process.poll() is None and time.monotonic() < deadline:
                if run.checkpoints.is_dir() and any(name.endswith(".partial") for name in os.listdir(run.checkpoints)):
                    return kind
        time.sleep(self.random.uniform(0, 1.2))
        return "training"

    # --- poisoned data ------------------------------------------------------------------------------------------------

    def nan(self) -> tuple[str, str, bool]:
        run = self.run("nan")
        code, out = run.finish("nan:40:1")
        finite = all(bool(v.isfinite().all()) for v in run.last()["state_dict"].values() if v.is_floating_point())
        once = code == 0 and finite and "Skipped a step" in out and "step 40 " in out
        stopped = self.run("nan_forever")
        code, out = stopped.finish("nan:40:1000")
        said = [line for line in out.splitlines() if line.startswith("error: ")]
        last = newest_good(stopped.checkpoints)
        step = int(read_file(last)["global_step"]) if last else -1
        named = (
            code == 2 and len(said) == 1 and "has diverged" in said[0] and "rank 0" in said[0] and "images [" in said[0]
        )
        good = named and 0 < step <= 44
        return (
            "2",
            f"one batch: {'skipped, ended well' if once else 'FAILED'}; all: exit code {code}, "
            + (f"cause named, last.ckpt of step {step} finite" if good else f"NOT NAMED {said[:1]}"),
            once and good,
        )

    def dies_and_continues(self, name: str, inject: str, words: str, *extra: str) -> tuple[str, str, bool]:
        run = self.run(name, *extra)
        code, out = run.finish(inject)
        named = code != 0 and words in out
        tail = out.strip().splitlines()[-1][:100] if out.strip() else ""
        code_then, _ = run.finish()
        said, equal = self.compare(run)
        return (
            "1",
            f"exit code {code}, {'cause named' if named else f'NOT NAMED ({tail})'}; restarted: {said}",
            (named and code_then == 0 and equal),
        )

    # --- disks --------------------------------------------------------------------------------------------------------

    def full(self) -> tuple[str, str, bool]:
        size = (self.whole.checkpoints / "last.ckpt").stat().st_size
        run = self.run("full", "--keep.last", "1")
        run.checkpoints.mkdir(parents=True)
        room = int(3.5 * size)  # best.ckpt, last.ckpt, and the next one while it is written
        mounted = mount(run.checkpoints, int(2.5 * size))
        try:
            # Without a disk of its own: no file may become as large as a checkpoint, from the second start on.
            if mounted:
                code, out = run.finish()
            else:
                run.start().wait(timeout=600)
                (run.checkpoints / "last.ckpt").unlink()
                code, out = run.finish(limit=size // 2)
            named = code == 2 and ("No space left" in out or "File too large" in out) and "checkpoint.dirpath" in out
            kept = newest_good(run.checkpoints)
            good = kept is not None or not mounted
            state = f"{kept.name} of step {read_file(kept)['global_step']} good" if kept else "none"
            if mounted:
                subprocess.run(["mount", "-o", f"remount,size={4 * room}", str(run.checkpoints)], check=True)
            code_then, _ = run.finish()
            said, equal = self.compare(run)
        finally:
            if mounted:
                shutil.copytree(run.checkpoints, run.folder / "kept")
                subprocess.run(["umount", str(run.checkpoints)], check=True)
        how = "small tmpfs" if mounted else "limit of file sizes"
        return (
            "1",
            f"{how}: exit code {code}, {'cause named' if named else 'NOT NAMED'}; {state}; with room: {said}",
            (named and good and code_then == 0 and equal),
        )

    def readonly(self) -> tuple[str, str, bool]:
        run = self.run("readonly")
        logs = run.folder / "logs"
        logs.mkdir()
        mounted = mount(logs, 1 << 20)
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(logs)], check=True)
        else:
            logs.chmod(0o500)
        try:
            code, out = run.finish()
        finally:
            if mounted:
                subprocess.run(["umount", str(logs)], check=True)
            logs.chmod(0o700)
        said = [line for line in out.splitlines() if line.startswith("error: ")]
        named = code == 2 and len(said) == 1 and "trainer.logger" in said[0]
        clean = not run.checkpoints.exists()
        verdict = "cause named" if named else f"NOT NAMED {said}"
        return "1", f"exit code {code}, {verdict}, {'no' if clean else 'A'} run begun", named and clean

    def damage(self, count: int) -> tuple[str, str, bool]:
        """Cut off and flip; in this process, a few also through whole restarts."""
        folder = self.folder / "damage"
        shutil.copytree(self.whole.checkpoints, folder / "checkpoints" / self.whole.name)
        checkpoints = folder / "checkpoints" / self.whole.name
        last = checkpoints / "last.ckpt"
        data = last.read_bytes()
        right = {"cut": 0, "flipped": 0}
        for kind in right:
            for _ in range(count):
                if kind == "cut":
                    last.write_bytes(data[: self.random.randrange(len(data))])
                else:
                    flipped = bytearray(data)
                    flipped[self.random.randrange(len(data) - 73)] ^= 1 << self.random.randrange(8)
                    last.write_bytes(flipped)
                with contextlib.suppress(ConfigError):
                    right[kind] += newest_good(checkpoints) == checkpoints / "last-1.ckpt"
        run = Run(self.method, folder, self.epochs)
        code, out = run.finish()
        said, equal = self.compare(run)
        ok = all(n == count for n in right.values()) and code == 0 and equal and "passed over" in out
        seen = ", ".join(f"{n} of {count} {kind}" for kind, n in right.items())
        return str(2 * count), f"last-1.ckpt taken for {seen}; restarted: {said}", ok


def mount(folder: Path, size: int) -> bool:
    """A small disk of its own, if this process may make one."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


def poisoned_main(inject: str, args: list[str]) -> None:
    """The command line with a fault in its data: `nan:STEP:COUNT`, `worker:READS`, `raise:READS`."""
    import lightning as L

    from vil_lightning import cli
    from vil_lightning.data.loading import TensorSource

    kind, *numbers = inject.split(":")
    first = int(numbers[0])
    if kind == "nan":

        class Poison(L.Callback):
            def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if first <= trainer.global_step < first + int(numbers[1]):
                    for view in batch[0] if isinstance(batch[0], list) else batch[:1]:
                        view.fill_(torch.nan)

        before = cli.VilCLI.before_fit

        def before_fit(self: cli.VilCLI) -> None:
            before(self)
            self.trainer.callbacks.insert(0, Poison())  # type: ignore[attr-defined]

        cli.VilCLI.before_fit = before_fit  # type: ignore[method-assign]
    else:
        read, reads = TensorSource.__getitem__, 0

        def broken(self: TensorSource, index: int) -> Any:
            nonlocal reads
            reads += 1
            if reads == first:
                if kind == "worker":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("the drill has broken this image")
            return read(self, index)

        TensorSource.__getitem__ = broken  # type: ignore[method-assign]
    cli.main(args)


def main() -> None:
    if sys.argv[1:2] == ["--inject"]:
        return poisoned_main(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each method")
    parser.add_argument("--terms", type=int, default=6, help="SIGTERMs for each method")
    parser.add_argument("--damages", type=int, default=100, help="of each kind")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep what the runs write here")
    parser.add_argument("--out", type=Path, help="PATH.md is written")
    args = parser.parse_args()
    rows: list[Row] = []
    started = datetime.datetime.now(datetime.timezone.utc)
    with tempfile.TemporaryDirectory() as temporary:
        for method in args.methods:
            drill = Drill(method, (args.folder or Path(temporary)) / method, args.epochs, args.seed)
            print(f"{method}: undisturbed, {drill.expected['global_step']} steps, {drill.seconds:.0f} s", flush=True)
            worker = ("worker", "worker:2000", "data worker died", "--data.num_workers", "2")
            todo: dict[str, Callable[[], tuple[str, str, bool]]] = {
                "kill": functools.partial(drill.interrupt, signal.SIGKILL, args.kills),
                "term": functools.partial(drill.interrupt, signal.SIGTERM, args.terms),
                "nan": drill.nan,
                "worker": functools.partial(drill.dies_and_continues, *worker),
                "raise": functools.partial(drill.dies_and_continues, "raise", "raise:4000", "the drill has broken"),
                "full": drill.full,
                "readonly": drill.readonly,
                "damage": functools.partial(drill.damage, args.damages),
            }
            for fault in args.faults:
                clock = time.monotonic()
                try:
                    times, observed, ok = todo[fault]()
                except Exception as error:
                    times, observed, ok = "?", f"the drill itself failed: {error!r}"[:300], False
                rows.append(Row(fault, method, times, observed, ok, time.monotonic() - clock))
                print(line(rows[-1]), flush=True)
    text = report(rows, started)
    print("\n" + text)
    if args.out:
        args.out.with_suffix(".md").write_text(text)
    sys.exit(0 if all(row.ok for row in rows) else 1)


def line(row: Row) -> str:
    verdict = "ok" if row.ok else "**NOT OK**"
    return f"| {row.fault} | {row.method} | {row.times} | {row.observed} | {verdict} | {row.seconds:.0f} |"


def report(rows: list[Row], started: datetime.datetime) -> str:
    """The table, with when, where and how."""
    return "\n".join(
        [
            "# Faults",
            "",
            f"- date: {started.isoformat(timespec='seconds')}",
            f"- hardware: {platform.machine()}, {os.cpu_count()} CPU cores, one torch thread a run",
            f"- software: python {platform.python_version()}, torch {torch.__version__}",
            f"- command: `python benchmarks/faults.py {shlex.join(sys.argv[1:])}`",
            "",
            "| fault | method | times | observed | verdict | seconds |",
            "|---|---|---:|---|---|---:|",
            *(line(row) for row in rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
