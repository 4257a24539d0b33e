"""What the processes of a distributed run tell each other. With one process, all of this is a plain call."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from vil_lightning.errors import ConfigError

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; all have to call this."""
    _, world_size = processes()
    values: list[Any] = [value] * world_size
    if world_size > 1:
        distributed.all_gather_object(values, value)
    return values


def on_first(function: Callable[[], T]) -> T:
    """Call a function on the first process alone; its result, or its error, is that of all. All have to call this."""
    rank, world_size = processes()
    if world_size == 1:
        return function()
    box: list[Any] = [None, None]
    error = None
    if rank == 0:
        try:
            box[0] = function()
        except Exception as caught:
            error, box[1] = caught, portable(caught)
    distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise error or box[1]
    return box[0]


def portable(error: Exception | None) -> Exception | None:
    """An error that can be sent to other processes."""
    if error is None or isinstance(error, ConfigError):
        return error
    return RuntimeError(f"another process failed: {type(error).__name__}: {error}")
