"""What compilers make of the Triton kernels, for GPUs that need not be there: registers, spills, shared memory, matrix units.

    python benchmarks/kernels.py > benchmarks/results/kernels_<date>.md

It calls the mLSTM forward and backward, notes how the kernels would be launched instead of launching them, and has Triton
compile them for each GPU. It ends with status 1 if a kernel does not compile, or asks for more shared memory than the GPU gives
a program: such a launch would fail. Nothing is run, so nothing is said of speed but this: registers that are spilled go through
memory, and programs that share a multiprocessor hide each other's waiting.
"""

import argparse
import datetime
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # kernels that are interpreted are not compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vil_lightning.ops import triton_kernels, triton_mlstm

# KiB of shared memory that a program may have: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability";
# of AMD's local data share.
SHARED = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SHARED |= {"gfx90a": 64, "gfx942": 64, "gfx1100": 64}
NAMES = ("gates", "states", "forward", "denominator_grad", "query_grad", "key_value_grad")
WARPS = {
    "sm_75": 32,
    "sm_80": 64,
    "sm_86": 48,
    "sm_89": 48,
    "sm_90": 64,
    "sm_100": 64,
    "sm_120": 48,
}  # of a multiprocessor
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


class Launch(NamedTuple):
    """A kernel and what it would be called with."""

    name: str
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Compiled(NamedTuple):
    """Registers of a thread, what it spills (bytes; registers on AMD GPUs), bytes of a program's shared memory."""

    registers: int
    spilled: int
    shared: int
    matrix_instructions: int


def launches(dtype: str, head_dim: int, seq_len: int, amd: bool) -> Iterator[Launch]:
    """The kernels of a forward and a backward pass, each once; `dtype` is one of `DTYPES`."""
    found: dict[str, Launch] = {}

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                name = self.kernel.__name__.removesuffix("_kernel") + ("_grad" if kwargs.get("BACKWARD") else "")
                found.setdefault(name, Launch(name, self.kernel, args, kwargs))

            return launch

    q, k, v = (torch.zeros(1, seq_len, 4, head_dim, dtype=DTYPES[dtype]).transpose(1, 2) for _ in range(3))
    igate, wide = torch.zeros(1, 4, seq_len), torch.zeros(1, 4, seq_len, dtype=torch.float64)
    block = triton_mlstm._tiles(q).block
    chunk_size = block * math.ceil((seq_len if seq_len <= triton_mlstm.ONE_PASS_UP_TO else 64) / block)
    settings = (True, chunk_size, block, 1e-6)
    with ExitStack() as stack:
        for name in NAMES:
            kernel = f"{name}_kernel"
            stack.enter_context(mock.patch.object(triton_kernels, kernel, Recorder(getattr(triton_kernels, kernel))))
        stack.enter_context(mock.patch.object(torch.version, "hip", "any" if amd else None))
        precision = "high" if dtype == "tf32" else "highest"
        stack.enter_context(mock.patch.object(torch, "get_float32_matmul_precision", return_value=precision))
        hidden, read_sum = triton_mlstm._forward(q, k, v, wide, igate, wide.clone(), *settings)
        triton_mlstm._backward(
            torch.zeros_like(hidden), q, k, v, wide, igate, wide.clone(), hidden, read_sum, *settings
        )
    yield from found.values()


def compile_for(target: str, launch: Launch) -> Compiled:
    """What the compiler of a GPU, `sm_…` or `gfx…`, makes of a kernel."""
    _, kernel, args, kwargs = launch
    amd = target.startswith("gfx")
    signature: dict[str, str] = {}
    constants = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):  # as a launch specialises them
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, int) and value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor) and amd:
            attributes[i,].append(["tt.pointer_range", 32])  # below 2 GiB
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    gpu = GPUTarget("hip", target, 64 if target[3] == "9" else 32) if amd else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=gpu, options=options)
    if amd:
        code = result.asm["amdgcn"]
        numbers = (re.search(rf"\.{name}:\s+(\d+)", code) for name in ("vgpr_count", "vgpr_spill_count"))
        registers, spilled = (int(number[1]) for number in numbers if number is not None)
        return Compiled(registers, spilled, result.metadata.shared, code.count("v_mfma") + code.count("v_wmma"))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    numbers = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    registers, spilled = (int(number[1]) for number in numbers if number is not None)
    code = result.asm["ptx"]
    units = sum(code.count(word) for word in ("mma.sync", "mma_async", "tcgen05.mma"))
    return Compiled(registers, spilled, result.metadata.shared, units)


def programs_at_once(target: str, compiled: Compiled, num_warps: int) -> int:
    """How many programs a multiprocessor of an NVIDIA GPU holds, by registers, shared memory and warps; 16 is 16 or more."""
    system = 0 if target == "sm_75" else 1024  # bytes of shared memory that each program takes besides
    by_memory = (SHARED[target] * 1024 + system) // max(compiled.shared + system, 1)
    registers = math.ceil(compiled.registers / 8) * 8  # as they are given out
    by_registers = 4 * (16384 // (registers * 32)) // num_warps  # in four parts with a scheduler each
    return min(by_registers, by_memory, WARPS[target] // num_warps, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["sm_80", "sm_89", "sm_90", "sm_120", "gfx942"]
    parser.add_argument(
        "--targets", nargs="+", choices=SHARED, default=default, metavar="TARGET", help=", ".join(SHARED)
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--head_dims", type=int, nargs="+", default=[16, 24, 96, 192, 384])
    parser.add_argument("--seq_lens", type=int, nargs="+", default=[1024], help="up to 512 tokens no state is kept")
    args = parser.parse_args()
    # Triton's own settings are not to decide how kernels are compiled.
    warnings.filterwarnings("error", message=".*FP_FUSION.*")
    failed = 0
    print("# The Triton kernels, compiled\n")
    print(f"- date: {datetime.date.today()}")
    print(f"- software: torch {torch.__version__}, triton {triton.__version__}")
    print(f"- command: `python {shlex.join(sys.argv)}`")
    print(
        "- registers and spills of a thread; programs: how many a multiprocessor holds, up to 16; matrix units: instructions\n"
    )
    print(
        "| GPU | dtype | DH | tokens | kernel | warps | registers | spilled | shared (KiB) | of | programs | matrix units |"
    )
    print("|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for target in args.targets:
        for dtype in args.dtypes:
            for head_dim, seq_len in ((d, s) for d in args.head_dims for s in args.seq_lens):
                for launch in launches(dtype, head_dim, seq_len, target.startswith("gfx")):
                    name, num_warps = launch.name, launch.kwargs["num_warps"]
                    start = f"| {target} | {dtype} | {head_dim} | {seq_len} | {name} | {num_warps} |"
                    try:
                        compiled = compile_for(target, launch)
                    except Exception as error:  # of whatever kind: the others are compiled all the same
                        failed += 1
                        print(f"{start} does not compile: {type(error).__name__} |", flush=True)
                        print(f"{name}, {target}, {dtype}, {head_dim} channels: {error}", file=sys.stderr)
                        continue
                    fits = compiled.shared <= SHARED[target] * 1024
                    failed += not fits
                    programs = "" if target.startswith("gfx") else programs_at_once(target, compiled, num_warps)
                    print(
                        f"{start} {compiled.registers} | {compiled.spilled} | {compiled.shared / 1024:.1f} | {SHARED[target]}"
                        f"{'' if fits else ' **too much**'} | {programs} | {compiled.matrix_instructions} |",
                        flush=True,
                    )
    if failed:
        print(f"\n{failed} kernels cannot be launched.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
