"""What to say when a run does not fit into memory: how much was asked for, and what makes it fit."""

import re
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch

_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",  # DefaultCPUAllocator on some systems
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the host, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def describe(error: BaseException, trainer: L.Trainer) -> str:
    """One message: the numbers of the run that did not fit, and what of it can be changed without changing the results' batch.

    Args:
        error: After `is_out_of_memory`.
        trainer: Of that run.
    """
    device = trainer.strategy.root_device
    scoring = _while_scoring(error)
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    asked = asked_bytes(error)
    facts = {
        "asked for": "unknown" if asked is None else _gib(asked),
        **{name: _gib(count) for name, count in memory_of(device).items()},
        "batch": _batch(trainer, data, scoring),
        "images": _image_size(data, scoring),
        "precision": str(trainer.precision),
    }
    if module is not None:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        facts["parameters"] = f"{total / 1e6:.2f} M, {trained / 1e6:.2f} M of them trained"
    doing = "scoring" if scoring else "training"
    lines = [f"out of memory on {device} while {doing}, at step {trainer.global_step}."]
    width = max(map(len, facts))
    lines += [f"  {name:<{width}}  {value}" for name, value in facts.items() if value]
    choices = remedies(trainer, scoring)
    lines += (
        ["Any of these needs less:", *(f"  {choice}" for choice in choices)]
        if choices
        else ["Nothing is left to halve: use a smaller network, smaller images, or a device with more memory."]
    )
    return "\n".join(lines)


def remedies(trainer: L.Trainer, scoring: bool) -> list[str]:
    """Settings that need less memory and are not in force yet; none of them changes the batch of an optimiser step."""
    module: Any = trainer.lightning_module
    data: Any = getattr(trainer, "datamodule", None)
    found = []
    if scoring:
        size = getattr(data, "eval_batch_size", 1)
        if size > 1:
            found.append(f"--data.eval_batch_size {size // 2}   (scores do not depend on it)")
    else:
        size, accumulated = getattr(data, "batch_size", 1), trainer.accumulate_grad_batches
        factor = _divisor(size, even=getattr(module, "mixup", None) is not None)
        if factor is not None:
            found.append(
                f"--data.batch_size {size // factor} --trainer.accumulate_grad_batches {accumulated * factor}   (the same "
                f"{size * accumulated} images per device and step; what looks at a whole batch, such as batch norm, sees fewer)"
            )
        config = getattr(module, "backbone_config", None)
        if config is not None and not config.grad_checkpointing and _can_recompute(module):
            found.append("--model.backbone.grad_checkpointing true   (the same numbers, more time)")
    if str(trainer.precision) in ("32-true", "64-true", "32", "64"):
        found.append("--trainer.precision bf16-mixed   (activations of half the size or less; slightly other numbers)")
    return found


def _while_scoring(error: BaseException) -> bool:
    """Whether an error was raised in validation, test or prediction. (By now the trainer has left its stage.)"""
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    return any(Path(file).name in ("evaluation_loop.py", "prediction_loop.py") for file in files)


def asked_bytes(error: BaseException) -> int | None:
    """How many bytes the failed allocation was to have, where the error tells."""
    found = re.search(r"allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)", str(error))
    if found is None:
        return None
    exponent = ("bytes", "KiB", "MiB", "GiB", "TiB").index(found[2])
    return int(float(found[1]) * 1024**exponent)


def memory_of(device: torch.device) -> dict[str, int]:
    """Bytes that the process has taken at most on a CUDA device, or takes of the host's memory, and how many there are."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
            "total": torch.cuda.mem_get_info(device)[1],
        }
    if device.type != "cpu":
        return {}
    try:
        with open("/proc/self/status") as status, open("/proc/meminfo") as meminfo:
            own, all_ = (dict(line.split(":", 1) for line in file) for file in (status, meminfo))
        return {
            "allocated": 1024 * int(own["VmRSS"].split()[0]),
            "reserved": 1024 * int(own["VmSize"].split()[0]),
            "total": 1024 * int(all_["MemTotal"].split()[0]),
        }
    except (OSError, KeyError, ValueError):  # not Linux
        return {}


def _divisor(size: int, even: bool) -> int | None:
    """The smallest whole factor above 1 by which a batch can shrink; `even` if its images are paired (MixUp)."""
    for factor in range(2, size + 1):
        if size % factor == 0 and not (even and size // factor % 2):
            return factor
    return None


def _can_recompute(module: Any) -> bool:
    """Whether there is a trained backbone whose blocks can be computed again in the backward pass."""
    backbones = [network for name, network in module.named_modules() if name in ("backbone", "student.backbone")]
    return any(
        hasattr(network, "set_grad_checkpointing") and any(p.requires_grad for p in network.parameters())
        for network in backbones
    )


def _batch(trainer: L.Trainer, data: Any, scoring: bool) -> str:
    if scoring:
        return f"{getattr(data, 'eval_batch_size', 'unknown')} images per device"
    size, accumulated = getattr(data, "batch_size", "unknown"), trainer.accumulate_grad_batches
    return f"{size} images per device, x {accumulated} accumulated, x {trainer.world_size} device(s)"


def _image_size(data: Any, scoring: bool) -> str:
    transform: Any = None if scoring else getattr(data, "train_transform", None)
    if hasattr(transform, "global_size"):
        views = f"2 views of {transform.global_size} px"
        local = getattr(transform, "num_local_views", 0)
        return f"{views}, {local} of {transform.local_size} px" if local else views
    size = getattr(transform, "img_size", None) or getattr(data, "img_size", None)
    return "" if size is None else f"{size} px"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
