"""Steps that would ruin a run are passed over, and named; a run that no longer recovers is stopped.

A batch with a broken image, an overflow or a bad device gives a loss or gradient that is not finite; one such step, if taken,
makes every weight NaN. A loss far above what it was a moment ago (a spike) often comes before a run diverges.
"""

import dataclasses
import itertools
import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vil_lightning.backbones.weights import read_file
from vil_lightning.errors import ConfigError
from vil_lightning.sharding import is_sharded, local

log = logging.getLogger(__name__)


class DivergedError(ConfigError):
    """The run does not recover; the message says where it began and what to change."""


@dataclasses.dataclass
class FaultPolicy:
    """What happens to steps whose loss or gradient is not finite, and to spikes of the loss.

    Args:
        max_skipped_steps: So many steps in a row are skipped (weights, statistics and optimiser stay as they are) before the
            run is stopped; 0 stops it at the first. Deciding this before the step makes the device wait once a step; with null
            nothing is skipped, and the methods' own check, which reads a step late, stops the run.
        spike_factor: A loss is a spike if it lies so many standard deviations (estimated from quartiles) above the median of
            the last `spike_window` batches; it is named in the log. null looks for none.
        spike_window: See there. No spikes are seen before half of it has passed.
        roll_back: After a spike, take weights and optimiser back to `last.ckpt`, and go on with the images that follow.
        max_roll_backs: So many in a run before it is stopped.
        save_batches: Keep the batch of a skipped step in the log folder, to be looked at.
    """

    max_skipped_steps: int | None = 3
    spike_factor: float | None = 10.0
    spike_window: int = 200
    roll_back: bool = False
    max_roll_backs: int = 3
    save_batches: bool = True

    def __post_init__(self) -> None:
        if self.max_skipped_steps is not None and self.max_skipped_steps < 0:
            raise ConfigError(f"faults.max_skipped_steps={self.max_skipped_steps} must not be negative, or null.")
        if self.spike_factor is not None and not self.spike_factor > 0:
            raise ConfigError(f"faults.spike_factor={self.spike_factor} must be positive, or null for none.")
        if self.spike_window < 10:
            raise ConfigError(f"faults.spike_window={self.spike_window} must be at least 10 steps.")
        if self.max_roll_backs < 1:
            raise ConfigError(f"faults.max_roll_backs={self.max_roll_backs} must be at least 1.")
        if self.roll_back and self.spike_factor is None:
            raise ConfigError("faults.roll_back=true needs a faults.spike_factor to know a spike by.")


class StepGuard(L.Callback):
    """Carries out a `FaultPolicy`.

    Args:
        policy: What to do.
        last: The `last.ckpt` to roll back to; None if the run keeps none.
    """

    def __init__(self, policy: FaultPolicy, last: Path | None = None) -> None:
        if policy.roll_back and last is None:
            raise ConfigError("faults.roll_back=true needs checkpoint.save_last=true: there is nothing to go back to.")
        self.policy = policy
        self.last = last
        self.skipped_in_row = 0
        self.skipped = 0
        self.roll_backs = 0
        self._loss: tuple[int, Tensor] | None = None  # of the latest batch, over all processes, with its step
        self._step = 0
        self._finite: Tensor | None = None
        self._batches: list[tuple[int, Any]] = []  # of this step: batch_idx, batch
        self._buffers: dict[str, Tensor] = {}
        self._window: deque[float] = deque(maxlen=policy.spike_window)
        self._watched = _FirstNonFinite()

    @property
    def skips(self) -> bool:
        """Whether steps are looked at before they are taken."""
        return self.policy.max_skipped_steps is not None

    # --- in the order of a step ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _check_same_start(trainer)
        if self.policy.roll_back and is_sharded(pl_module):
            raise ConfigError(
                "faults.roll_back=true cannot be used with sharded weights (trainer.strategy=FullyShardedStrategy). Set it to "
                "false, or trainer.strategy to ddp."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step
        if not self.skips:
            return
        if not self._batches:  # the first of a step
            # Centres and running means move in the forward pass, before it is known whether the step is any good.
            self._buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
            self._finite = None
        self._batches.append((batch_idx, batch))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        loss = loss.detach()
        self._finite = loss.isfinite() if self._finite is None else self._finite & loss.isfinite()

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.skips:
            return
        gradients = [
            (name, local(parameter.grad))
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None
        ]
        # A gradient scaler (16-mixed) finds its scale by overflowing, and skips these steps itself: the loss alone counts.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        finite = self._finite
        if finite is None:  # a step without a loss
            finite = torch.ones((), dtype=torch.bool, device=pl_module.device)
        if gradients and not scaled:
            norms = torch._foreach_norm([gradient for _, gradient in gradients])
            finite = finite & torch.stack([norm.float() for norm in norms]).isfinite().all()
        if trainer.world_size > 1:
            finite = torch.as_tensor(trainer.strategy.reduce(finite.float(), reduce_op="sum")) >= trainer.world_size
        if bool(finite):
            self.skipped_in_row = 0
            self._watched.stop()
        else:
            self._skip(trainer, pl_module, gradients)
        self._batches = []

    # --- a step that is not finite ------------------------------------------------------------------------------------

    def _skip(self, trainer: L.Trainer, pl_module: L.LightningModule, gradients: list[tuple[str, Tensor]]) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        broken = [name for name, gradient in gradients if not bool(gradient.isfinite().all())]
        own = self._finite is not None and not bool(self._finite)  # this process's batches, not only those of others
        ids = [image for batch_idx, _ in self._batches for image in batch_images(trainer, batch_idx)]
        parts = [
            f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {', '.join(str(i) for i, _ in self._batches)})",
            f"rank {trainer.global_rank}: loss {'not finite' if own else 'finite'}",
            f"gradients not finite in {len(broken)} of {len(gradients)} tensors"
            + (f" ({', '.join(broken[:3])}{', …' if len(broken) > 3 else ''})" if broken else ""),
        ]
        spoiled = [i for i, batch in self._batches if not _finite_inputs(batch)]
        if spoiled:
            parts.append(f"the images of batch {spoiled[0]} are not finite themselves")
        if self._watched.name is not None:
            parts.append(f"the first module whose output is not finite is {self._watched.name}")
        if ids:
            parts.append(f"images {_some(ids)}")
        if self.policy.save_batches and (own or spoiled or trainer.world_size == 1):
            parts.append(f"kept in {self._keep_batches(trainer, pl_module, ids)}")
        message = "; ".join(parts)

        for parameter in pl_module.parameters():
            parameter.grad = None  # the optimiser passes over what has no gradient: no step, no decay, no momentum
        for name, buffer in pl_module.named_buffers():
            if name in self._buffers:
                buffer.copy_(self._buffers[name])
        allowed = self.policy.max_skipped_steps
        assert allowed is not None
        if self.skipped_in_row > allowed:
            raise DivergedError(
                f"Loss or gradient is not finite in {self.skipped_in_row} step(s) in a row, more than faults.max_skipped_steps="
                f"{allowed} allows. The run has diverged. The latest: {message}. precision={trainer.precision}. Continue from "
                "the last checkpoint (--resume auto) with a lower model.base_lr, a longer model.lr_warmup, a smaller "
                "trainer.gradient_clip_val, or trainer.precision=bf16-mixed instead of 16-mixed."
            )
        log.warning("Skipped a step that is not finite (%d in a row): %s", self.skipped_in_row, message)
        self._watched.start(pl_module)

    def _keep_batches(self, trainer: L.Trainer, pl_module: L.LightningModule, ids: list[int]) -> Path | str:
        """Write this step's batches with the weights they met; tensors and plain values only."""
        folder = Path(_log_dir(trainer)) / "faults"
        path = folder / f"step={trainer.global_step:08d}-rank={trainer.global_rank}.pt"
        content = {
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "rank": trainer.global_rank,
            "images": ids,
            "batches": [{"batch_idx": i, "batch": _plain(batch)} for i, batch in self._batches],
        }
        if not is_sharded(pl_module):  # whole weights would need all processes
            content["state_dict"] = {
                name: self._buffers.get(name, value).cpu() for name, value in pl_module.state_dict().items()
            }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(content, path)
        except (OSError, RuntimeError) as error:
            return f"no file ({error})"
        return path

    # --- spikes -------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.policy.spike_factor is None:
            return
        before, self._loss = self._loss, None
        loss = outputs["loss"].detach() if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss * trainer.accumulate_grad_batches  # Lightning has divided it
            self._loss = self._step, torch.as_tensor(trainer.strategy.reduce(loss.clone(), reduce_op="mean"))
        if before is not None:  # a batch late: by then it is computed, and the device is not waited for
            self._look_for_spike(trainer, pl_module, before[0], float(before[1]))

    def _look_for_spike(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        window = sorted(self._window)
        self._window.append(loss)
        if len(window) < self.policy.spike_window // 2:
            return
        assert self.policy.spike_factor is not None
        median = statistics.median(window)
        low, _, high = statistics.quantiles(window, n=4)
        deviation = max(
            (high - low) / 1.349, 1e-3 * abs(median), 1e-12
        )  # of a normal distribution with these quartiles
        if loss <= median + self.policy.spike_factor * deviation:
            return
        said = (
            f"Loss spike: {loss:.4g} at step {step}, {(loss - median) / deviation:.0f} deviations above the "
            f"median {median:.4g} of the last {len(window)} batches"
        )
        if not self.policy.roll_back:
            log.warning("%s. (faults.roll_back=true would go back to last.ckpt.)", said)
            return
        self.roll_backs += 1
        if self.roll_backs > self.policy.max_roll_backs:
            raise DivergedError(
                f"{said}, after {self.policy.max_roll_backs} roll-backs (faults.max_roll_backs). Lower model.base_lr, or clip "
                "with trainer.gradient_clip_val."
            )
        assert self.last is not None
        if not self.last.is_file():
            log.warning("%s. There is no %s to go back to yet.", said, self.last)
            return
        checkpoint = read_file(self.last)
        pl_module.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        self._window.clear()
        self._loss = None
        log.warning(
            "%s: weights and optimiser are those of step %s again (%s); the images of the steps between are passed over.",
            said,
            checkpoint["global_step"],
            self.last,
        )


class _FirstNonFinite:
    """Looks at what every module returns, and remembers the first that is not finite. Slow: only after a bad step."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._handles: list[RemovableHandle] = []

    def start(self, root: nn.Module) -> None:
        self.name = None
        if self._handles:
            return
        for name, module in root.named_modules():
            if name and not any(module.children()):
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.name = [], None

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            known = self.name is not None or not isinstance(output, Tensor)
            if not known and not bool(output.isfinite().all()):
                self.name = name

        return look


def batch_images(trainer: L.Trainer, batch_idx: int) -> list[int]:
    """Numbers (in the training set) of the images of this process's batch, where the loader tells them."""
    loader = trainer.train_dataloader
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if size is None or not hasattr(sampler, "keys_from"):
        return []
    return [index for _, index in itertools.islice(sampler.keys_from(batch_idx * size), size)]  # type: ignore[union-attr]


def _check_same_start(trainer: L.Trainer) -> None:
    """Processes that start from different steps (one of them saw another checkpoint) would train nonsense.

    Raises:
        ConfigError: If they differ.
    """
    if trainer.world_size == 1:
        return
    step = torch.tensor(float(trainer.global_step), device=trainer.strategy.root_device)
    highest = float(trainer.strategy.reduce(step.clone(), reduce_op="max"))
    lowest = -float(trainer.strategy.reduce(-step.clone(), reduce_op="max"))
    if highest != lowest:
        raise ConfigError(
            f"Processes start at different steps, {lowest:.0f} and {highest:.0f} (rank {trainer.global_rank}: "
            f"{trainer.global_step}): they do not see the same checkpoints. Put checkpoint.dirpath on a disk that all nodes "
            "share."
        )


def _log_dir(trainer: L.Trainer) -> str:
    """Without a broadcast, which `trainer.log_dir` is: not every process asks."""
    logger = trainer.logger
    return str(getattr(logger, "log_dir", None) or trainer.default_root_dir)


def _finite_inputs(batch: Any) -> bool:
    if isinstance(batch, Tensor):
        return not batch.is_floating_point() or bool(batch.isfinite().all())
    if isinstance(batch, dict):
        batch = list(batch.values())
    return all(_finite_inputs(part) for part in batch) if isinstance(batch, list | tuple) else True


def _plain(batch: Any) -> Any:
    """Tensors on the CPU, in lists and dictionaries."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if isinstance(batch, dict):
        return {str(key): _plain(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_plain(part) for part in batch]
    return batch if isinstance(batch, int | float | str | bool | None) else str(batch)


def _some(numbers: list[int]) -> str:
    return f"{numbers[:8]}" if len(numbers) <= 8 else f"{numbers[:8]} and {len(numbers) - 8} more"
