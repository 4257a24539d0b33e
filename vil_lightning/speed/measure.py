"""Timing several things side by side: interleaved rounds, medians, ratios with their spread, peak memory, matmul peak."""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """Wall-clock seconds of one call, to the end of what it started on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measure returned in each round. In a round all run once, in turn, so that a machine's drift meets all of them.

    Every round starts with another one, so that none always follows the same.
    """
    times: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for i in range(rounds):
        first = i % max(len(names), 1)
        for name in names[first:] + names[:first]:
            times[name].append(measures[name]())
    return times


def ratio(times: list[float], reference: list[float]) -> tuple[float, float, float]:
    """How many times faster than the reference: median over rounds of the ratio within a round, lower and upper quartile."""
    ratios = sorted(r / t for t, r in zip(times, reference, strict=True))
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes by which memory grows at most during a call, above what is held before it.

    On a GPU of torch's allocator; elsewhere of the process, where Linux tells (it rounds, and counts pages that the allocator
    keeps): None if it does not.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    _give_back_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def _give_back_free_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product, the best of several: what a model's share is taken of."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    product()
    return 2 * size**3 / min(seconds(product, device) for _ in range(10))
