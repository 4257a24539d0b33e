"""One network at one kind of work, ready to be timed: in this process, or in one of its own."""

import dataclasses
import math
import multiprocessing
from multiprocessing.connection import Connection
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vil_lightning.allocator import keep_freed_memory
from vil_lightning.speed.cases import Entry, Resolution, Settings, Step, make_step
from vil_lightning.speed.measure import peak_memory, seconds


class Timed(Protocol):
    """What is measured of a step. Each may raise what the step raises."""

    def seconds(self) -> float:
        """Of one step."""

    def peak_memory(self) -> int | None:
        """See `measure.peak_memory`."""

    def flops(self) -> float:
        """Of one step."""

    def close(self) -> None:
        """Free what it holds."""


class Here:
    """A step in this process.

    Args: of `make_step`.
    """

    def __init__(self, entry: Entry, resolution: Resolution, work: str, batch: int, settings: Settings) -> None:
        self.case = entry, resolution, work, batch, settings
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
        return batch * count_flops(
            make_step(entry, resolution, work, 1, dataclasses.replace(settings, compile_mode=None))
        )

    def close(self) -> None:
        self.step = None
        if self.case[4].device.type == "cuda":
            torch.cuda.empty_cache()


class InOwnProcess:
    """A step in a process of its own, which waits while others are timed.

    Args:
        keep_freed: Whether that process keeps freed memory (`keep_freed_memory`), or its allocator decides.
        case: Arguments of `make_step`.
    """

    def __init__(self, keep_freed: bool, *case: object) -> None:
        context = multiprocessing.get_context("spawn")  # a fork could use no GPU, and shares its parent's heap
        self.connection, theirs = context.Pipe()
        arguments = (theirs, keep_freed, torch.get_num_threads(), case)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # or its end would not be noticed
        try:
            self._receive()
        except Exception:
            self.close()
            raise

    def seconds(self) -> float:
        return float(self._ask("seconds"))  # type: ignore[arg-type]

    def peak_memory(self) -> int | None:
        return self._ask("peak_memory")  # type: ignore[return-value]

    def flops(self) -> float:
        return float(self._ask("flops"))  # type: ignore[arg-type]

    def close(self) -> None:
        self.connection.close()
        self.process.join(5)
        self.process.kill()

    def _ask(self, what: str) -> object:
        self.connection.send(what)
        return self._receive()

    def _receive(self) -> object:
        try:
            failed, answer = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from error
        if failed:
            raise RuntimeError(answer)
        return answer


def _serve(connection: Connection, keep_freed: bool, threads: int, case: tuple[object, ...]) -> None:
    torch.set_num_threads(threads)
    if keep_freed:
        keep_freed_memory()
    here = None
    question = "make"
    while True:
        try:
            if here is None:
                here, answer = Here(*case), None  # type: ignore[arg-type]
            else:
                answer = getattr(here, question)()
        except (RuntimeError, ValueError, MemoryError) as error:
            connection.send((True, short(error)))
        else:
            connection.send((False, answer))
        try:
            question = connection.recv()
        except EOFError:
            return


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
