"""Time the mLSTM backends against each other and print a Markdown table.

The table sets two numbers in `vil_lightning/ops/mlstm.py`: the sequence length up to which `auto` takes the parallel
form, and the default chunk size.

    python benchmarks/mlstm_backends.py > benchmarks/results/mlstm_backends_<hardware>_<date>.md
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

import torch
from torch import Tensor

from vil_lightning.evaluation.report import processor
from vil_lightning.ops import mlstm

SEQUENCE_LENGTHS = (16, 64, 144, 196, 256, 384, 512, 729, 1024, 2048)
CHUNK_SIZES = (32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, nargs="+", default=SEQUENCE_LENGTHS)
    parser.add_argument("--chunk-size", type=int, nargs="+", default=CHUNK_SIZES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=96)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of q, k and v")
    parser.add_argument("--rounds", type=int, default=7, help="measurements per table entry; the median is printed")
    parser.add_argument("--min-time", type=float, default=0.02, help="seconds a measurement takes at least")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own choice if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    print("# mLSTM backends\n")
    print(f"- date: {datetime.date.today()}")
    print(f"- hardware: {hardware(args.device)}")
    print(f"- software: torch {torch.__version__}, Python {platform.python_version()}")
    print(f"- command: `python {shlex.join(sys.argv)}`")
    if hasattr(os, "getloadavg"):
        print(f"- load average of the last minute when started: {os.getloadavg()[0]:.2f}")
    print(f"- shapes: B={args.batch}, NH={args.heads}, DH={args.head_dim}, {args.dtype}, eager")
    print(f"- median of {args.rounds} rounds; in a round, all backends run one after the other\n")
    print("Milliseconds; in brackets, how many times faster than `parallel`.")
    for backward in (False, True):
        print(f"\n## {'Forward and backward' if backward else 'Forward'}\n")
        columns = ["S", "parallel", *(f"chunkwise {size}" for size in args.chunk_size), *triton_columns(args)]
        print("| " + " | ".join(columns) + " |")
        print("| ---: " * len(columns) + "|")
        for seq_len in args.seq_len:
            parallel, *others = measure(args, seq_len, backward)
            cells = [f"{1000 * parallel:.2f}"] + [f"{1000 * t:.2f} ({parallel / t:.2f}×)" for t in others]
            print(f"| {seq_len} | " + " | ".join(cells) + " |", flush=True)


def measure(args: argparse.Namespace, seq_len: int, backward: bool) -> list[float]:
    """Median seconds of one call: first `parallel`, then `chunkwise` with every chunk size, then `triton` on a GPU."""
    shape = (args.batch, args.heads, seq_len)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    q, k, v = (torch.randn(*shape, args.head_dim, device=device, dtype=dtype) for _ in range(3))
    igate, fgate = torch.randn(shape, device=device), 4 + torch.randn(shape, device=device)
    inputs = [x.requires_grad_(backward) for x in (q, k, v, igate, fgate)]
    grad = torch.randn_like(q)

    calls = [make_call(inputs, grad, backward, "parallel", 64)]
    calls += [make_call(inputs, grad, backward, "chunkwise", size) for size in args.chunk_size]
    calls += [make_call(inputs, grad, backward, backend, 64) for backend in triton_columns(args)]
    repeats = []
    for call in calls:
        seconds(call, 1, device)  # warm-up
        repeats.append(max(1, round(args.min_time / max(seconds(call, 1, device), 1e-6))))
    rounds = [[seconds(c, n, device) / n for c, n in zip(calls, repeats, strict=True)] for _ in range(args.rounds)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def triton_columns(args: argparse.Namespace) -> list[str]:
    """On a CPU the kernels are interpreted, which times the interpreter."""
    return ["triton"] if torch.device(args.device).type == "cuda" else []


def make_call(
    inputs: list[Tensor], grad: Tensor, backward: bool, backend: str, chunk_size: int
) -> Callable[[], object]:
    q, k, v, igate, fgate = inputs

    def call() -> object:
        out = mlstm(q, k, v, igate, fgate, backend=backend, chunk_size=chunk_size)
        return torch.autograd.grad(out, inputs, grad) if backward else out

    return call


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise()
    return time.perf_counter() - start


def hardware(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {os.cpu_count()} cores visible, {torch.get_num_threads()} torch threads"


if __name__ == "__main__":
    main()
