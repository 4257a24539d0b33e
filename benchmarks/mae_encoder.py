"""Time the encoder on a quarter of the patches against the encoder on all of them, and print a Markdown table.

What MAE saves by leaving hidden patches out: the encoder's share of a pretraining step.

    python benchmarks/mae_encoder.py > benchmarks/results/mae_encoder_<hardware>_<date>.md
"""

import argparse
import datetime
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import vil_lightning  # noqa: F401 - registers the ViL models with timm
from vil_lightning.masking import hidden_mask, num_hidden, visible_positions
from vil_lightning.methods.masked import encode_visible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vil2_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--mask-ratio", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--rounds", type=int, default=5, help="measurements per table entry; the median is printed")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own choice if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    print("# Encoder of MAE on visible patches\n")
    print(f"- date: {datetime.date.today()}")
    print(f"- hardware: {hardware(args.device)}")
    print(f"- software: torch {torch.__version__}, Python {platform.python_version()}")
    print(f"- command: `python {shlex.join(sys.argv)}`")
    if hasattr(os, "getloadavg"):
        print(f"- load average of the last minute when started: {os.getloadavg()[0]:.2f}")
    print(f"- {args.model}, {args.batch} images of {args.img_size} px, float32, eager, training mode")
    print(f"- median of {args.rounds} rounds; in a round, all ratios run one after the other\n")
    print("Milliseconds; in brackets, the share of the time with all patches.\n")
    print("| hidden | patches | forward | forward and backward |\n| ---: | ---: | ---: | ---: |")

    device = torch.device(args.device)
    network = timm.create_model(args.model, img_size=args.img_size, num_classes=0).to(device).train()
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=device)
    ratios = [0.0, *args.mask_ratio]
    shown = [positions(network, args.batch, ratio, device) for ratio in ratios]
    columns = []
    for backward in (False, True):
        calls = [make_call(network, images, visible, backward) for visible in shown]
        for call in calls:
            seconds(call, device)  # warm-up
        rounds = [[seconds(call, device) for call in calls] for _ in range(args.rounds)]
        columns.append([statistics.median(times) for times in zip(*rounds, strict=True)])
    for i, (ratio, visible) in enumerate(zip(ratios, shown, strict=True)):
        cells = [f"{1000 * column[i]:.1f} ({column[i] / column[0]:.2f})" for column in columns]
        print(f"| {ratio:.0%} | {visible.shape[1]} | {' | '.join(cells)} |", flush=True)


def positions(network: nn.Module, batch: int, ratio: float, device: torch.device) -> Tensor:
    """Visible patches (B, K) of random masks."""
    h, w = network.patch_embed.grid_size  # type: ignore[union-attr,misc]
    hidden = hidden_mask("random", batch, (h, w), ratio, device)
    return visible_positions(hidden, h * w - num_hidden("random", (h, w), ratio))


def make_call(network: nn.Module, images: Tensor, visible: Tensor, backward: bool) -> Callable[[], object]:
    def call() -> object:
        if not backward:
            with torch.no_grad():
                return encode_visible(network, images, visible)
        network.zero_grad()
        return encode_visible(network, images, visible).square().mean().backward()

    return call


def seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def hardware(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores visible, {torch.get_num_threads()} torch threads"


if __name__ == "__main__":
    main()
