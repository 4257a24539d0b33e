"""Where the time of one training step goes: ViL as published and ViL as it is here, by kind of operator. Prints Markdown.

python benchmarks/profile_step.py --size 224 --batch 8
"""

import argparse
import datetime
import platform
import shlex
import sys
from collections import defaultdict

import torch
from mlstm_backends import hardware  # type: ignore[import-not-found]
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vil_lightning.speed.cases import Entry, Resolution, Settings, entries, make_step

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "addmv", "linear"),
    "convolutions": ("convolution", "conv"),
    "norms": ("layer_norm", "group_norm"),
    "copies": ("copy", "clone", "cat", "flip", "repeat", "constant_pad_nd", "index", "contiguous", "fill", "zero"),
    "exponentials and gates": ("exp", "log_sigmoid", "cumsum", "cummax", "silu", "sigmoid"),
    "sums and maxima": ("sum", "amax", "max", "mean"),
    "optimiser": ("adamw", "adam"),
    "element by element": (
        "mul",
        "add",
        "sub",
        "div",
        "where",
        "masked_fill",
        "addcmul",
        "neg",
        "sign",
        "abs",
        "clamp",
    ),
}


def kind_of(name: str) -> str:
    words = name.removeprefix("aten::").strip("_")
    for kind, parts in KINDS.items():
        if words in parts or any(part in words for part in parts if len(part) > 4):
            return kind
    return next((kind for kind, parts in KINDS.items() if any(words.startswith(part) for part in parts)), "other")


def measure(entry: Entry, resolution: Resolution, batch: int, settings: Settings) -> tuple[dict[str, float], int]:
    """Milliseconds of a step by kind, and the number of operators."""
    step = make_step(entry, resolution, "train", batch, settings)
    for _ in range(3):
        step()
    cuda = settings.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        step()
    times: dict[str, float] = defaultdict(float)
    count = 0
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CUDA:
            continue  # kernels, which count with the operators that start them
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        times[kind_of(event.key)] += micros / 1000
        count += event.count if event.key.startswith("aten::") else 0
    return times, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", choices=("tiny", "small", "base"), default="tiny")
    parser.add_argument("--size", default="224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    settings = Settings(torch.device(args.device), getattr(torch, args.dtype))
    chosen = {entry.label: entry for entry in entries(args.model_size, [args.backend])}
    labels = ["ViL as published", f"ViL, {args.backend}"]
    results = [measure(chosen[label], Resolution.parse(args.size), args.batch, settings) for label in labels]

    print(f"- date: {datetime.date.today()}; hardware: {hardware(args.device)}")
    print(f"- torch {torch.__version__}, Python {platform.python_version()}; `python {shlex.join(sys.argv)}`\n")
    print(f"| ms of a training step, {args.batch} images of {args.size} px | " + " | ".join(labels) + " |")
    print("|---|---:|---:|")
    kinds = sorted(set(results[0][0]) | set(results[1][0]), key=lambda kind: -results[0][0].get(kind, 0))
    for kind in kinds:
        print(f"| {kind} | " + " | ".join(f"{times.get(kind, 0):.0f}" for times, _ in results) + " |")
    print("| **sum** | " + " | ".join(f"**{sum(times.values()):.0f}**" for times, _ in results) + " |")
    print("| operators called | " + " | ".join(f"{count:,}" for _, count in results) + " |")


if __name__ == "__main__":
    main()
