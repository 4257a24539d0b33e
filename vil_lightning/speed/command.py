"""`python main.py speed`: images per second, memory and FLOP/s of ViL beside other networks, on this machine.

python main.py speed --sizes 224 512 --work forward train --out speed
"""

import argparse
import csv
import dataclasses
import functools
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vil_lightning.allocator import keep_freed_memory
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.report import circumstances
from vil_lightning.ops import MLSTM_BACKENDS
from vil_lightning.speed.cases import WORK, Entry, Resolution, Settings, entries
from vil_lightning.speed.measure import interleaved, matmul_peak, ratio
from vil_lightning.speed.timed import FAILURES, Here, InOwnProcess, Timed, refuse_memory_in_time, short

REFERENCE = "ViL as published"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass
class Row:
    """A line of the table: one network, doing one kind of work at one resolution.

    Args:
        milliseconds: Median of a step.
        times: Faster than the published formulation: median over rounds, and quartiles. None without it.
        memory: Bytes a step needs at most, beside weights and optimiser state.
        flops: Of a step, as counted in what runs; selective scans and element-wise work are not.
        freed_memory: "kept" by the process, or "given back" as its allocator decides.
        note: Why there are no numbers.
    """

    network: str
    size: str
    tokens: int
    work: str
    compiled: bool
    batch: int
    milliseconds: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    images_per_second: float | None = None
    times: float | None = None
    times_low: float | None = None
    times_high: float | None = None
    memory: int | None = None
    flops: float | None = None
    share_of_peak: float | None = None
    freed_memory: str = ""
    note: str = ""


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python main.py speed", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model_size", choices=("tiny", "small", "base"), default="tiny")
    parser.add_argument(
        "--sizes", nargs="+", default=["224", "224/8", "512"], help="px, or px/stride; up to 1024 is usual"
    )
    parser.add_argument("--work", nargs="+", choices=WORK, default=["forward", "train"])
    parser.add_argument("--backends", nargs="+", choices=MLSTM_BACKENDS, default=["auto"], help="of ViL's mLSTM")
    parser.add_argument("--networks", nargs="+", help="labels to keep, or parts of them; all if not given")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager"])
    parser.add_argument("--compile_mode", choices=COMPILE_MODES, default="default", help="of torch.compile")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what autocast computes in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tokens", type=int, help="per batch; the number of images follows (default 1568, on GPUs 25088)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each number")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds; a network with a slower step is left out")
    parser.add_argument("--prototypes", type=int, default=4096, help="of the DINO head")
    parser.add_argument("--channels_last", action="store_true", help="images and weights in this memory format")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    parser.add_argument(
        "--processes",
        choices=("one", "own"),
        default="one",
        help="own: each network in a process of its own, with the allocator settings it is normally run with "
        "(published: glibc's, others: freed memory kept); one: the same process and settings for all",
    )
    parser.add_argument("--out", help="PATH.md, PATH.csv, PATH.json and PATH.png are written")
    options = parser.parse_args(args)
    for name in ("tokens", "rounds", "threads", "prototypes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1.")
    if options.limit <= 0:
        raise ConfigError(f"--limit {options.limit} must be positive.")
    options.resolutions = [Resolution.parse(text) for text in options.sizes]
    device = torch.device(options.device)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"--device {options.device} cannot be used here. Available: cpu{', cuda' * torch.cuda.is_available()}."
        )
    if device.type == "cpu" and "triton" in options.backends:
        raise ConfigError("--backends triton runs on GPUs. On a CPU leave it out.")
    return options


def main(args: list[str]) -> None:
    try:
        run(args)
    except ConfigError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: list[str]) -> list[Row]:
    """Measure, print and write; returns the rows."""
    options = parse(args)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    chosen = choose(entries(options.model_size, options.backends), options.networks)
    on_cpu = device.type == "cpu"
    limit_memory = on_cpu and "compiled" not in options.modes  # compilers reserve far more than they use
    if options.processes == "own":

        def prepare(entry: Entry, *case: Any) -> Timed:
            # As `main.py` lets its runs keep freed memory, and the published code does not.
            return InOwnProcess(on_cpu and not entry.published, limit_memory, entry, *case)

    else:
        kept = on_cpu and keep_freed_memory()
        prepare = functools.partial(Here, kept)
        if limit_memory:
            refuse_memory_in_time()
    peak = matmul_peak(device, DTYPES[options.dtype])
    facts = {
        **circumstances(),
        "threads": torch.get_num_threads(),
        # Of the allocator and of threads: they decide more on a CPU than most code does. So does `freed_memory` of a row.
        "processes": "one for all" if options.processes == "one" else "one for each network",
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_", "OMP_", "MKL_", "LD_PRELOAD"))
        },
        "command": shlex.join(["python", "main.py", "speed", *args]),
        "model_size": options.model_size,
        "dtype": options.dtype,
        "matmul_peak_flops": peak,
        "rounds": options.rounds,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    tokens = options.tokens or (25088 if device.type == "cuda" else 1568)
    rows: list[Row] = []
    for resolution in options.resolutions:
        for work in options.work:
            for mode in options.modes:
                settings = Settings(
                    device=device,
                    dtype=DTYPES[options.dtype],
                    channels_last=options.channels_last,
                    num_prototypes=options.prototypes,
                    checkpointing=options.checkpointing,
                    compile_mode=options.compile_mode if mode == "compiled" else None,
                )
                batch = max(1, round(tokens / resolution.num_tokens))
                group = measure(
                    chosen,
                    resolution,
                    work,
                    batch,
                    settings,
                    options.rounds,
                    options.limit,
                    peak,
                    prepare,
                )
                rows += group
                print("\n".join(table(group)) + "\n", flush=True)
                if options.out:  # after each group: what is measured stays if a later one fails
                    write(Path(options.out), facts, rows)
    return rows


def choose(all_entries: list[Entry], words: list[str] | None) -> list[Entry]:
    if not words:
        return all_entries
    labels = [entry.label for entry in all_entries]
    for word in words:
        if not any(word.lower() in label.lower() for label in labels):
            raise ConfigError(f"--networks {word!r} is in none of the labels: {', '.join(labels)}.")
    return [entry for entry in all_entries if any(word.lower() in entry.label.lower() for word in words)]


def measure(
    chosen: list[Entry],
    resolution: Resolution,
    work: str,
    batch: int,
    settings: Settings,
    rounds: int,
    limit: float,
    peak: float,
    prepare: Callable[..., Timed],
) -> list[Row]:
    """Rows of one group, timed in turn.

    Args:
        prepare: Makes what is timed, from the arguments of `make_step`.
    """
    compiled = settings.compile_mode is not None
    rows = {
        entry.label: Row(entry.label, str(resolution), resolution.num_tokens, work, compiled, batch) for entry in chosen
    }
    ready: dict[str, Timed] = {}

    def measured_once(label: str) -> float:
        try:
            return ready[label].seconds()
        except FAILURES as error:  # here, too: memory is shared with other processes
            rows[label].note = short(error)
            return math.nan

    try:
        for entry in chosen:
            row = rows[entry.label]
            try:
                timed = prepare(entry, resolution, work, batch, settings)
                ready[entry.label] = timed
                row.freed_memory = "kept" if timed.kept else "given back"
                timed.seconds()
                first = timed.seconds()
                if first > limit:
                    row.note = f"a step takes {first:.0f} s, more than --limit {limit:g}"
                else:
                    # The pools of CUDA graphs are held between steps, so that a step itself seems to need nothing.
                    graphs = settings.compile_mode in ("reduce-overhead", "max-autotune")
                    row.memory = None if graphs and settings.device.type == "cuda" else timed.peak_memory()
                    row.flops = timed.flops()
            except FAILURES as error:
                row.note = short(error)
            if row.note:
                if entry.label in ready:
                    ready.pop(entry.label).close()
                if settings.device.type == "cuda":
                    torch.cuda.empty_cache()
        times = interleaved({label: functools.partial(measured_once, label) for label in ready}, rounds)
    finally:
        for timed in ready.values():
            timed.close()
    times = {label: measured for label, measured in times.items() if not rows[label].note}
    for label, measured in times.items():
        row = rows[label]
        middle = statistics.median(measured)
        row.milliseconds, row.low_ms, row.high_ms = 1000 * middle, 1000 * min(measured), 1000 * max(measured)
        row.images_per_second = batch / middle
        if REFERENCE in times:
            row.times, row.times_low, row.times_high = ratio(measured, times[REFERENCE])
        if row.flops:
            row.share_of_peak = row.flops / middle / peak
    return list(rows.values())


# --- what is shown ------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> list[str]:
    """Markdown of one group."""
    first = rows[0]
    mode = "compiled" if first.compiled else "eager"
    lines = [
        f"## {first.work}, {first.size} px, {first.tokens} tokens, {first.batch} images, {mode}",
        "",
        f"| network | ms (min to max) | images/s | against {REFERENCE} (quartiles) | GiB | GFLOP | share of peak |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.milliseconds is None:
            lines.append(f"| {row.network} | {row.note} | | | | | |")
            continue
        times = "" if row.times is None else f"{row.times:.2f}× ({row.times_low:.2f} to {row.times_high:.2f})"
        cells = [
            f"{row.milliseconds:.1f} ({row.low_ms:.1f} to {row.high_ms:.1f})",
            f"{row.images_per_second:.2f}",
            times,
            "" if row.memory is None else f"{row.memory / 2**30:.2f}",
            "" if row.flops is None else f"{row.flops / 1e9:.1f}",
            "" if row.share_of_peak is None else f"{100 * row.share_of_peak:.0f} %",
        ]
        lines.append(f"| {row.network} | " + " | ".join(cells) + " |")
    return lines


def describe_memory(rows: list[Row]) -> str:
    """What becomes of freed memory, and whose, if that differs."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        if row.freed_memory and row.network not in labels.setdefault(row.freed_memory, []):
            labels[row.freed_memory].append(row.network)
    if len(labels) < 2:
        return ", ".join(labels) or "not known"
    return "; ".join(f"{what} by {' and '.join(map(repr, networks))}" for what, networks in labels.items())


def write(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    """Table, CSV, JSON and picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dictionaries = [dataclasses.asdict(row) for row in rows]
    path.with_suffix(".json").write_text(json.dumps({**facts, "rows": dictionaries}, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dictionaries[0]))
        writer.writeheader()
        writer.writerows(dictionaries)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"# Speed, {facts['model_size']} models, {facts['dtype']}",
        "",
        f"- date: {facts['date']}",
        f"- hardware: {facts['hardware']}, {facts['threads']} torch threads",
        f"- load average of the last minute when started: {facts['load_average']}",
        f"- software: {versions}",
        f"- processes: {facts['processes']}",
        f"- memory that is freed: {describe_memory(rows)}",
        f"- environment: {' '.join(f'{k}={v}' for k, v in facts['environment'].items()) or 'nothing set'}",
        f"- command: `{facts['command']}`",
        f"- peak of a matrix product: {facts['matmul_peak_flops'] / 1e9:.0f} GFLOP/s",
        f"- medians of {facts['rounds']} rounds; in a round, all networks run once, in turn; ratios are taken within rounds",
        "- GiB: by which a step's memory grows beyond what is held before; GFLOP: of products and convolutions, with what",
        "  the `chunkwise` mLSTM computes again backwards, without what fused attention does",
        "",
    ]
    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.size, row.work, row.compiled), []).append(row)
    for group in groups.values():
        lines += [*table(group), ""]
    path.with_suffix(".md").write_text("\n".join(lines))
    plot(path.with_suffix(".png"), rows)


def plot(path: Path, rows: list[Row]) -> None:
    """Speed and memory against tokens, log-log, a column for each kind of work. With linear cost, speed is level.

    (Of DINO's ten views of an image, the tokens of one large one are counted.)
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot, ticker
    except ImportError:
        print("No picture: it needs matplotlib, pip install 'vil-lightning[bench]'.", file=sys.stderr)
        return
    kinds = list(dict.fromkeys((row.work, row.compiled) for row in rows))
    figure, axes = pyplot.subplots(2, len(kinds), figsize=(5 * len(kinds), 7.5), squeeze=False, sharex=True)
    networks = list(dict.fromkeys(row.network for row in rows))
    for column, kind in enumerate(kinds):
        for network in networks:
            color = f"C{networks.index(network)}"
            marker = "s--" if network == REFERENCE else "o-" if network.startswith("ViL") else "^:"
            found = [r for r in rows if (r.work, r.compiled) == kind and r.network == network and r.milliseconds]
            found.sort(key=lambda r: r.tokens)
            tokens = [r.tokens for r in found]
            speed = [r.images_per_second * r.tokens for r in found if r.images_per_second]
            axes[0, column].plot(tokens, speed, marker, color=color, label=network)
            held = [(r.tokens, r.memory / r.batch / 2**20) for r in found if r.memory]
            axes[1, column].plot([t for t, _ in held], [m for _, m in held], marker, color=color)
        axes[0, column].set_title(f"{kind[0]}, {'compiled' if kind[1] else 'eager'}", loc="left")
        for axis in axes[:, column]:
            axis.set(xscale="log", yscale="log")
            axis.grid(which="both", alpha=0.25)
        ticks = sorted({row.tokens for row in rows})
        axes[1, column].set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes[1, column].xaxis.set_minor_locator(ticker.NullLocator())
        axes[1, column].set_xlabel("tokens an image")
    axes[0, 0].set_ylabel("images per second x tokens an image")
    axes[1, 0].set_ylabel("memory of a step, MiB an image")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
