"""Stop a diverged run on all ranks at once, before it can replace a good checkpoint."""

import lightning as L
import torch
from torch import Tensor


class FiniteCheck:
    """Watches loss and gradient norm of the latest step, and raises in words once one of them is not finite.

    Values are read a step late: by then they are computed, and reading them does not stall the device. Where a callback looks
    at every step before it is taken, and skips bad ones (it has a true `skips`; the command line adds one), nothing is left
    to do here.

    Args:
        remedies: End of the message: what to change.
    """

    def __init__(self, remedies: str) -> None:
        self.remedies = remedies
        self._value: Tensor | None = None

    def watch_loss(self, module: L.LightningModule, loss: Tensor) -> Tensor:
        """Returns the mean over all processes, for the log."""
        # Of all ranks: their gradients are averaged, so one broken loss breaks every rank, and all have to stop together.
        mean: Tensor = module.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        if not _guarded(module):
            self._value = mean
        return mean

    def watch_grad_norm(self, module: L.LightningModule, grad_norm: Tensor) -> None:
        scaler = getattr(module.trainer.precision_plugin, "scaler", None)
        if scaler is None and self._value is not None:  # with one, steps with infinite gradients are skipped
            self._value = self._value + 0 * grad_norm.to(self._value)

    def raise_if_not_finite(self, module: L.LightningModule, lr: float) -> None:
        """Call before a step, and before a checkpoint is written.

        Raises:
            RuntimeError: If the latest loss or gradient was not finite.
        """
        value, self._value = self._value, None
        if value is not None and not torch.isfinite(value):
            self._value = value  # a checkpoint that is written because of this error must be refused, too
            raise RuntimeError(
                f"train/loss or the gradient is {value.item()} at step {module.trainer.global_step} "
                f"(lr={lr:.3g}, precision={module.trainer.precision}). The run has diverged. Resume from the last "
                f"checkpoint with {self.remedies}"
            )


def _guarded(module: L.LightningModule) -> bool:
    """Whether a callback decides about bad steps before they are taken."""
    return any(getattr(callback, "skips", False) for callback in module.trainer.callbacks)  # type: ignore[attr-defined]
