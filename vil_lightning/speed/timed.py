"""One network at one kind of work, ready to be timed: in this process, or in one of its own."""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vil_lightning.allocator import keep_freed_memory
from vil_lightning.speed.cases import Entry, Resolution, Settings, Step, make_step
from vil_lightning.speed.measure import peak_memory, seconds

FAILURES = (RuntimeError, ValueError, MemoryError)  # out of memory; a compiler's or a backend's


class Timed(Protocol):
    """What is measured of a step. Each may raise one of `FAILURES`."""

    kept: bool  # whether freed memory stays with the process

    def seconds(self) -> float:
        """Wall-clock seconds of one step."""

    def peak_memory(self) -> int | None:
        """Bytes, see `measure.peak_memory`."""

    def flops(self) -> float:
        """Floating-point operations of one step."""

    def close(self) -> None:
        """Free what it holds."""


class Here:
    """A step in this process.

    Args:
        kept: Whether this process keeps freed memory; only recorded.
        case: Arguments of `make_step`.
    """

    def __init__(self, kept: bool, *case: Any) -> None:
        self.kept = kept
        self.case: tuple[Entry, Resolution, str, int, Settings] = case
        self.step: Step | None = make_step(*self.case)

    def _step(self) -> Step:
        assert self.step is not None, "closed"
        return self.step

    def seconds(self) -> float:
        return seconds(self._step(), self.case[4].device)

    def peak_memory(self) -> int | None:
        return peak_memory(self._step(), self.case[4].device)

    def flops(self) -> float:
        """Those of one image, of which a batch's are a multiple. (Counting takes attention's S x S matrices.)"""
        entry, resolution, work, batch, settings = self.case
        eager = dataclasses.replace(settings, compile_mode=None)
        return batch * count_flops(make_step(entry, resolution, work, 1, eager))

    def close(self) -> None:
        self.step = None


class InOwnProcess:
    """A step in a process of its own, which waits while others are timed.

    Args:
        keep: Whether that process is to keep freed memory (`keep_freed_memory`), or its allocator decides.
        limit_memory: Whether memory that the machine cannot serve is refused there, see `refuse_memory_in_time`.
        case: Arguments of `make_step`.

    Raises:
        RuntimeError: What failed there, in one line, or that the process has ended; of all methods but `close`, too.
    """

    def __init__(self, keep: bool, limit_memory: bool, *case: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork could use no GPU, and shares its parent's heap
        self.connection, theirs = context.Pipe()
        arguments = (theirs, keep, limit_memory, torch.get_num_threads(), case)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # or its end would not be noticed
        try:
            self.kept: bool = self._receive()
        except BaseException:
            self.close()
            raise

    def seconds(self) -> float:
        return float(self._ask("seconds"))

    def peak_memory(self) -> int | None:
        memory: int | None = self._ask("peak_memory")
        return memory

    def flops(self) -> float:
        return float(self._ask("flops"))

    def close(self) -> None:
        self.connection.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()

    def _ask(self, what: str) -> Any:
        with contextlib.suppress(OSError):  # it has ended, which is told below
            self.connection.send(what)
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from error
        if failed:
            raise RuntimeError(answer)
        return answer


def _serve(connection: Connection, keep: bool, limit_memory: bool, threads: int, case: tuple[Any, ...]) -> None:
    """Answer as `Here` would, first with whether freed memory is kept, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends, and closes its end
    torch.set_num_threads(threads)
    kept = keep and keep_freed_memory()
    if limit_memory:
        refuse_memory_in_time()
    here: Here | None = None
    question = ""
    while True:
        answer: Any
        try:
            if here is None:
                here = Here(kept, *case)
                answer = False, kept
            else:
                answer = False, getattr(here, question)()
        except FAILURES as error:
            answer = True, short(error)
        try:
            connection.send(answer)
            question = connection.recv()
        except (EOFError, OSError):
            return


def refuse_memory_in_time() -> None:
    """Let an allocation that the machine cannot serve fail with an error; otherwise the whole process would be killed."""
    try:
        meminfo = Path("/proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable"))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, StopIteration):
        return  # not Linux
    import resource  # only there

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = used + int(0.9 * available)
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def count_flops(step: Step) -> float:
    # Fused attention is counted in its parts, which all devices know.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward_flops})
    with counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return float(counter.get_total_flops())


def _conv_backward_flops(  # type: ignore[no-untyped-def]
    grad_shape,
    x_shape,
    weight_shape,
    bias,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
    wanted,
    **kwargs,
) -> int:
    """As much as forwards for each gradient. torch's own formula forgets the groups: depthwise ones count E times."""
    product = math.prod(x_shape if transposed else grad_shape) * math.prod(weight_shape[1:])
    return 2 * product * sum(wanted[:2])


def short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    if "can't allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError | MemoryError):
        text = "out of memory"
    return text if len(text) <= 120 else text[:117] + "..."
