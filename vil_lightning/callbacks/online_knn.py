"""kNN accuracy of the features, every few epochs."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from vil_lightning.knn import knn_accuracy


class OnlineKNN(L.Callback):
    """Logs `val/knn_acc1`: how well the module's `forward` separates the val set, with the training set as bank.

    Args:
        every_n_epochs: How often; the last epoch always counts.
        k: Neighbours.
        max_bank_size: Use at most this many training images, a fixed random subset.
    """

    def __init__(self, every_n_epochs: int = 1, k: int = 20, max_bank_size: int = 50_000) -> None:
        self.every_n_epochs = every_n_epochs
        self.k = k
        self.max_bank_size = max_bank_size

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

    @torch.no_grad()
    def _features(self, trainer: L.Trainer, module: L.LightningModule, loader: Any) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of all processes."""
        was_training = module.training
        module.eval()
        features, labels = [], []
        # A loader draws a seed from torch's generator when it starts.
        with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
            for images, batch_labels in loader:
                images = trainer.datamodule.normalize(images.to(module.device))  # type: ignore[attr-defined]
                features.append(module(images).float())
                labels.append(batch_labels.to(module.device))
        module.train(was_training)
        gathered, gathered_labels = torch.cat(features), torch.cat(labels)
        if trainer.world_size > 1:
            # The sampler deals images out in turn and repeats the first ones to even the end out: undo both.
            total = len(loader.dataset)
            gathered = module.all_gather(gathered).transpose(0, 1).flatten(0, 1)[:total]  # type: ignore[union-attr]
            gathered_labels = module.all_gather(gathered_labels).transpose(0, 1).flatten()[:total]  # type: ignore[union-attr]
        return gathered, gathered_labels
