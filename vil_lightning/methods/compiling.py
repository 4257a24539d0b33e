"""torch.compile for the networks of a method, in one place.

`model.compile` is `true` (the compiler's default mode), `false`, or a mode. Networks are compiled in place, so that checkpoints
do not depend on it. Two of the modes replay CUDA graphs, `reduce-overhead` and, on a CUDA device, `max-autotune`: what such a
network returns lies in memory that its next call writes to. So outputs are copied, and a new step is announced before the old
step's memory may be used again: by `begin_step`, and before every call that records no gradients. A method's calls without
gradients therefore come before those with gradients: the teacher first.

Neither the speed of the modes nor CUDA graphs have been measured or tried on a GPU.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vil_lightning.errors import ConfigError

Mode = Literal["default", "reduce-overhead", "max-autotune"]
CompileMode = bool | Mode


def resolve_mode(compile: CompileMode) -> Mode | None:
    """The compiler's mode, None for none.

    Raises:
        ConfigError: For an unknown one.
    """
    if compile is False:
        return None
    if compile is True:
        return "default"
    if compile not in get_args(Mode):
        raise ConfigError(f"model.compile={compile!r} must be true, false, or one of {', '.join(get_args(Mode))}.")
    return compile


def compile_network(network: nn.Module, compile: CompileMode) -> None:
    """Compile a network in place; afterwards calling it runs the compiled code. Nothing for false."""
    mode = resolve_mode(compile)
    if mode is None:
        return
    _allow_variants(1)
    network.compile(**_options(mode))
    if _replays_graphs(mode):
        network._compiled_call_impl = outside_of_graphs(network._compiled_call_impl)  # type: ignore[arg-type]


def compile_function(function: Callable[..., Any], compile: CompileMode) -> Callable[..., Any]:
    """A function as compiled code, or as it is."""
    mode = resolve_mode(compile)
    if mode is None:
        return function
    _allow_variants(1)
    compiled = torch.compile(function, **_options(mode))
    return outside_of_graphs(compiled) if _replays_graphs(mode) else compiled


def compile_blocks(network: nn.Module, compile: CompileMode) -> None:
    """Compile every block in place. (Compiling the network would compile `forward`, which masked methods do not call.)

    Raises:
        ConfigError: For `reduce-overhead`: what a block returns is the next one's input, and would be copied every time.
    """
    mode = resolve_mode(compile)
    if mode is None:
        return
    if mode == "reduce-overhead":
        raise ConfigError(
            "model.compile=reduce-overhead: this method compiles its networks block by block, and CUDA graphs of single blocks "
            "would have to copy whatever passes between them. Set model.compile to true, or to max-autotune, which then goes "
            "without CUDA graphs."
        )
    blocks: Any = network.blocks
    _allow_variants(len(blocks))
    for block in blocks:
        block.compile(**({"mode": "max-autotune-no-cudagraphs"} if mode == "max-autotune" else {}))


def check_compile(module: L.LightningModule, compile: CompileMode, by_blocks: bool = False) -> None:
    """Refuse what CUDA graphs cannot do. In `on_fit_start`, where the device is known.

    Args:
        by_blocks: The method uses `compile_blocks`, which replays no graphs.

    Raises:
        ConfigError: For `reduce-overhead` without a CUDA device, and for CUDA graphs with accumulated gradients: these would
            lie in memory that the next batch's backward pass writes to (pytorch/pytorch#169545).
    """
    mode, device = resolve_mode(compile), module.trainer.strategy.root_device.type
    if mode == "reduce-overhead" and device != "cuda":
        raise ConfigError(
            f"model.compile=reduce-overhead replays CUDA graphs, which the device {device} does not have. Set "
            "model.compile=true, or trainer.accelerator=gpu on a machine with a CUDA device."
        )
    batches = module.trainer.accumulate_grad_batches
    if mode in ("reduce-overhead", "max-autotune") and device == "cuda" and batches > 1 and not by_blocks:
        raise ConfigError(
            f"model.compile={mode} replays CUDA graphs, which do not add up gradients over trainer.accumulate_grad_batches="
            f"{batches}. Set model.compile=true, or trainer.accumulate_grad_batches=1."
        )


def begin_step(compile: CompileMode) -> None:
    """First in `training_step`: whatever graphs have written in the step before may be overwritten."""
    mode = resolve_mode(compile)
    if mode is not None and _replays_graphs(mode):
        torch.compiler.cudagraph_mark_step_begin()


def outside_of_graphs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Hand out copies of what a compiled function returns, which no later call overwrites."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, torch.clone, compiled(*args, **kwargs))

    return call


def _replays_graphs(mode: Mode) -> bool:
    return mode in ("reduce-overhead", "max-autotune")


def _options(mode: Mode) -> dict[str, Any]:
    return {} if mode == "default" else {"mode": mode}


def _allow_variants(num_networks: int) -> None:
    """Let the compiler keep one variant of its code for every case.

    Blocks share their code, and a variant holds for one direction of the scan, one rate of drop path, for training or for a
    teacher, for one size or for all: at most 6 for each block of a network. Beyond its limit (8) the compiler would run further
    blocks uncompiled.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 + 6 * num_networks)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 256 + 12 * num_networks)
