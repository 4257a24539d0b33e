"""Fully sharded training (FSDP2): what is trained is cut into one piece per process, and put together where it is needed.

Zhao et al. 2023, arXiv:2304.11277; torch's `fully_shard`. Every parameter becomes a `DTensor` of which a process keeps a slice
along the first dimension, and with it a slice of the gradient, of the optimiser's state and of a moving average. Blocks are put
together one at a time, just before they run; all else (embeddings, norms, heads, tokens) for the length of a step.

The functions here do nothing to modules and tensors that are not sharded.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(root: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard all parameters below `root` over the processes of a one-dimensional mesh, in place.

    Every module of a container called `blocks` is a unit of its own; a network without one is put together as a whole. Also
    frozen parameters are sharded, student and teacher alike, so that one can follow the other slice by slice. Buffers are not.
    All processes start with the weights of the first one, as they do under DDP.

    `root.training_step` then puts together what does not belong to a block. Anything else that runs a part of `root` does so
    within `gathered`.
    """
    blocks = [
        block
        for name, part in root.named_modules()
        if name.split(".")[-1] == "blocks"
        for block in part.children()
        if next(block.parameters(), None) is not None and not isinstance(block, nn.ModuleList | nn.ModuleDict)
    ]
    # One at a time, so that a device never has to hold the whole network; blocks within blocks first, as torch asks for.
    for block in reversed(blocks):
        _align(block.to(device), mesh)
        fully_shard(block, mesh=mesh)
    _align(root.to(device), mesh)
    name = type(root).__name__
    # It stays together from the forward to the backward pass of a step.
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    type(root).__name__ = name  # by which messages call it; torch puts FSDP before it
    root._gather = lambda: None  # type: ignore[assignment] # only for the hooks before and after it
    for name in ("training_step", "_gather"):
        register_fsdp_forward_method(root, name)


def _align(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give all processes the first one's parameters and buffers, but for what is sharded already."""
    group = mesh.get_group()
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), group=group, group_src=0)


def is_sharded(root: nn.Module) -> bool:
    """Whether `shard` has been called on it."""
    return isinstance(root, FSDPModule)


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Parts of a sharded module can be called in here; blocks put themselves together. All processes have to enter."""
    if not isinstance(root, FSDPModule) or not _any_sharded(root):  # there already: within another `gathered`
        yield
        return
    root._gather()  # type: ignore[operator]
    try:
        yield
    finally:
        root.reshard()


def gathering(root: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a sharded module, run within `gathered`."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with gathered(root):
            return method(*args, **kwargs)

    return run


def _any_sharded(root: nn.Module) -> bool:
    """Whether a parameter of `root` that belongs to no block is sharded now."""
    units = {
        id(part)
        for unit in root.modules()
        if isinstance(unit, FSDPModule) and unit is not root
        for part in unit.modules()
    }
    own = (p for part in root.modules() if id(part) not in units for p in part.parameters(recurse=False))
    return any(isinstance(parameter, DTensor) for parameter in own)


def local(tensor: Tensor) -> Tensor:
    """This process's slice; shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every process. All of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut a tensor that every process has as `like` is cut."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """Sum of what every process has found for its slices of tensors that are sharded as `like` is."""
    if isinstance(like, DTensor):
        values = values.clone()
        dist.all_reduce(values, group=like.device_mesh.get_group())
    return values
