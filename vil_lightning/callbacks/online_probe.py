"""Accuracy of a linear classifier on the features, every few epochs."""

from functools import partial

import lightning as L
from torch.nn import functional as F

from vil_lightning.callbacks.backbone_of import backbone_of
from vil_lightning.callbacks.features import (
    check_counts,
    check_labelled,
    check_pooled,
    collect,
    last_epoch,
    pooled_features,
)
from vil_lightning.errors import ConfigError
from vil_lightning.representation import logistic_regression


class OnlineProbe(L.Callback):
    """Logs `val/probe_acc1`: how well a linear classifier separates the val set by the backbone's pooled features.

    The classifier is fitted anew each time, to features of training images that were not augmented: logistic regression by
    L-BFGS on standardised features. It has no state, draws no random number, and neither the backbone nor its optimiser see it.
    `train/probe_loss` is the cross-entropy it reaches on its training images.

    Args:
        every_n_epochs: How often; the last epoch always counts.
        max_bank_size: Use at most this many training images, a fixed random subset.
        weight_decay: Of the classifier: this / 2 times the squared norm of its weights is added to the mean cross-entropy.
        max_iter: Steps of L-BFGS at most.
    """

    def __init__(
        self, every_n_epochs: int = 1, max_bank_size: int = 50_000, weight_decay: float = 1e-3, max_iter: int = 100
    ) -> None:
        check_counts(self, every_n_epochs=every_n_epochs, max_bank_size=max_bank_size, max_iter=max_iter)
        if weight_decay < 0:
            raise ConfigError(
                f"OnlineProbe: weight_decay={weight_decay} must not be negative. Set weight_decay in the callback's init_args."
            )
        self.every_n_epochs = every_n_epochs
        self.max_bank_size = max_bank_size
        self.weight_decay = weight_decay
        self.max_iter = max_iter

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_labelled(self, trainer)
        check_pooled(self, trainer, pl_module, partial(pooled_features, backbone_of(pl_module)))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs and not last_epoch(trainer):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        features_of = partial(pooled_features, backbone_of(pl_module))
        bank, bank_labels = collect(trainer, pl_module, data.eval_train_dataloader(self.max_bank_size), features_of)
        queries, labels = collect(trainer, pl_module, data.val_dataloader(), features_of)
        if not bank.isfinite().all():  # a run that has diverged; it says so itself
            return
        mean, deviation = bank.mean(0), bank.std(0).clamp(min=1e-6)
        weight, bias, loss = logistic_regression(
            (bank - mean) / deviation, bank_labels, data.num_classes, self.weight_decay, self.max_iter
        )
        predictions = F.linear((queries - mean) / deviation, weight, bias).argmax(1)
        accuracy = 100 * float((predictions == labels).float().mean())
        # Every process has gathered the same features, so this needs no reduction.
        values = {"val/probe_acc1": accuracy, "train/probe_loss": loss}
        pl_module.log_dict(values, rank_zero_only=False, sync_dist=False)
