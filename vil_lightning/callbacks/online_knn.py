"""kNN accuracy of the features, every few epochs."""

from typing import Any

import lightning as L
from torch import Tensor

from vil_lightning.callbacks.features import check_counts, check_labelled, check_pooled, collect
from vil_lightning.knn import knn_accuracy


class OnlineKNN(L.Callback):
    """Logs `val/knn_acc1`: how well the module's `forward` separates the val set, with the training set as bank.

    Args:
        every_n_epochs: How often; the last epoch always counts.
        k: Neighbours.
        max_bank_size: Use at most this many training images, a fixed random subset.
    """

    def __init__(self, every_n_epochs: int = 1, k: int = 20, max_bank_size: int = 50_000) -> None:
        check_counts(self, every_n_epochs=every_n_epochs, k=k, max_bank_size=max_bank_size)
        self.every_n_epochs = every_n_epochs
        self.k = k
        self.max_bank_size = max_bank_size

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_labelled(self, trainer)
        check_pooled(self, trainer, pl_module, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.global_step >= trainer.estimated_stepping_batches
        if epoch % self.every_n_epochs and not last:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        bank, bank_labels = self._features(trainer, pl_module, data.eval_train_dataloader(self.max_bank_size))
        queries, query_labels = self._features(trainer, pl_module, data.val_dataloader())
        accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, ks=(self.k,))[self.k]
        # Every process has gathered the same features, so this needs no reduction.
        pl_module.log("val/knn_acc1", accuracy, prog_bar=True, rank_zero_only=False, sync_dist=False)

    def _features(self, trainer: L.Trainer, module: L.LightningModule, loader: Any) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of all processes."""
        return collect(trainer, module, loader, module)
