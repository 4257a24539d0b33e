"""Linear probe and kNN of a frozen backbone.

Features are computed once, without augmentation, in eval mode. Then one linear classifier for every combination of read-out
and learning rate is trained side by side in a single pass. The winner is chosen on a held-out part of the training set and
reported on val: unlike in the published protocols, the set that is reported never takes part in the choice.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vil_lightning.errors import ConfigError
from vil_lightning.knn import knn_accuracy
from vil_lightning.methods.backbone import (
    CHECKPOINT_KEY,
    BackboneConfig,
    build_backbone,
    check_input_size,
    patch_tokens,
    recorded_backbone,
    resolve_backbone,
    weights_hash,
)
from vil_lightning.methods.fully_sharded import refuse_sharding
from vil_lightning.optim import scale_lr

# Read-outs of normalised patch tokens (B, S, D). `last4` is made of intermediate layers, see `extract_features`.
_READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilateral_concat": lambda x: torch.cat([x[:, 0], x[:, -1]], dim=-1),
    "bilateral_avg": lambda x: (x[:, 0] + x[:, -1]) / 2,
    "avg": lambda x: x.mean(dim=1),
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
}
READOUTS = (*_READOUTS, "last4")


class LinearProbe(L.LightningModule):
    """Score a frozen backbone by linear classifiers and by its nearest neighbours.

    Args:
        backbone: The network; with only `weights` set, name and kwargs come from the checkpoint.
        poolings: Read-outs to try: `bilateral_concat`, `bilateral_avg`, `avg`, `first`, `last`, and `last4`, the averages of
            the tokens after each of the last four blocks (scans), concatenated.
        base_lrs: Learning rates to try, per 256 images.
        weight_decay: Of all classifiers.
        held_out: Share of the training set on which the winner is chosen.
        num_shots: Train on this many images per class only (drawn by the run's seed), and choose
            the winner on others; None uses all.
        knn_ks: Neighbourhood sizes for kNN.
        knn_pooling: Read-out used for kNN.

    Features are standardised with the mean and deviation of the training set, as MAE's probe does by batch norm, so that
    one grid of learning rates serves every backbone. SGD with momentum 0.9, cosine to 0.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        poolings: Sequence[str] = READOUTS,
        base_lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        weight_decay: float = 0.0,
        held_out: float = 0.1,
        num_shots: int | None = None,
        knn_ks: Sequence[int] = (10, 20, 100, 200),
        knn_pooling: str = "bilateral_concat",
    ) -> None:
        super().__init__()
        for name in (*poolings, knn_pooling):
            if name not in READOUTS:
                raise ConfigError(f"model.poolings: {name!r} is not known. Available: {', '.join(READOUTS)}.")
        if not 0 < held_out < 1:
            raise ConfigError(f"model.held_out={held_out} must be between 0 and 1 (exclusive).")
        if not base_lrs or min(base_lrs) <= 0:
            raise ConfigError(f"model.base_lrs={list(base_lrs)} must be positive numbers.")
        if num_shots is not None and num_shots < 1:
            raise ConfigError(f"model.num_shots={num_shots} must be at least 1.")
        self.backbone_config = resolve_backbone(backbone)
        self.poolings = list(dict.fromkeys(poolings))
        self.base_lrs = list(base_lrs)
        self.weight_decay = weight_decay
        self.held_out = held_out
        self.num_shots = num_shots
        self.knn_ks = list(knn_ks)
        self.knn_pooling = knn_pooling
        self.backbone = build_backbone(self.backbone_config)
        self.backbone.requires_grad_(False)
        self.backbone.eval()
        self.heads = nn.ModuleDict()
        self.results: dict[str, Any] = {}

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.backbone.eval()
        return self

    # --- features -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage != "fit":
            raise ConfigError(
                "LinearProbe trains and scores in one go: use `fit`. It has no separate validate or test."
            )
        if self.trainer.world_size > 1:
            raise ConfigError("LinearProbe runs on one device: set trainer.devices=1.")
        refuse_sharding(self.trainer, "LinearProbe", "it runs on one device", "auto")
        if not getattr(getattr(self.trainer, "datamodule", None), "labelled", True):
            raise ConfigError(
                "LinearProbe trains classifiers, but the images have no classes (data.labelled=false, or a split without "
                "labels). Use data with labels."
            )

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "eval_train_dataloader"):
            raise ConfigError("LinearProbe needs one of this project's data modules (data.class_path).")
        check_input_size(self.backbone, data.img_size, "data.img_size")
        before = weights_hash(self.backbone)
        wanted = list(dict.fromkeys([*self.poolings, self.knn_pooling]))
        train, train_labels = self._extract(data.eval_train_dataloader(), wanted)
        val, val_labels = self._extract(data.val_dataloader(), wanted)
        assert weights_hash(self.backbone) == before, "feature extraction changed the frozen backbone"

        generator = torch.Generator().manual_seed(data.seed)
        kept, held = split_for_selection(train_labels, self.num_shots, self.held_out, generator)
        # kNN has nothing to choose, so without a limit on the labels it may use the held-out images, too.
        bank = kept if self.num_shots is not None else torch.cat([kept, held])
        self.knn = knn_accuracy(
            train[self.knn_pooling][bank], train_labels[bank], val[self.knn_pooling], val_labels, ks=self.knn_ks
        )
        train = {name: train[name] for name in self.poolings}
        val = {name: val[name] for name in self.poolings}
        statistics = {name: (x[kept].mean(0), x[kept].std(0).clamp(min=1e-6)) for name, x in train.items()}
        train, val = (
            {name: (x - statistics[name][0]) / statistics[name][1] for name, x in split.items()}
            for split in (train, val)
        )

        self.num_train, self.num_held_out, self.num_val = len(kept), len(held), len(val_labels)
        self._held = {name: x[held] for name, x in train.items()}, train_labels[held]
        self._val = val, val_labels
        batch_size = min(data.batch_size, len(kept))
        self.lrs = {f"lr{i}": scale_lr(lr, batch_size) for i, lr in enumerate(self.base_lrs)}
        for name in self.poolings:
            dim = train[name].shape[1]
            heads = nn.ModuleDict({key: nn.Linear(dim, data.num_classes) for key in self.lrs})
            for head in heads.values():
                nn.init.normal_(head.weight, std=0.01)  # type: ignore[arg-type]
                nn.init.zeros_(head.bias)  # type: ignore[arg-type]
            self.heads[name] = heads
        self.heads.to(self.device)
        kept_set = TensorDataset(*(train[name][kept] for name in self.poolings), train_labels[kept])
        train_loader = DataLoader(
            kept_set,
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(data.seed),
        )
        data.serve(train_loader, DataLoader(TensorDataset(val_labels)))
        # Lightning asked for optimisers before there were heads; only now is the number of steps known, too.
        self.trainer.strategy.setup_optimizers(self.trainer)

    @torch.no_grad()
    def _extract(self, loader: DataLoader[Any], names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Features (N, D) of each read-out in float32 on the CPU, and labels (N,)."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        labels: list[Tensor] = []
        with self.trainer.precision_plugin.forward_context():
            for images, batch_labels in loader:
                images = data.normalize(images.to(self.device))
                for name, features in extract_features(self.backbone, images, names).items():
                    parts[name].append(features.float().cpu())
                labels.append(batch_labels)
        real = torch.ones(sum(map(len, labels)), dtype=torch.bool)
        real[list(getattr(loader.dataset, "unreadable", ()))] = False  # others stand in their places
        return {name: torch.cat(features)[real] for name, features in parts.items()}, torch.cat(labels)[real]

    # --- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        *features, labels = batch
        losses = [
            F.cross_entropy(head(x.float()), labels)  # the classifiers are float32 also with bf16-true
            for name, x in zip(self.poolings, features, strict=True)
            for head in self.heads[name].values()  # type: ignore[operator]
        ]
        loss = torch.stack(losses)
        self.log("train/loss", loss.mean(), prog_bar=True)
        return loss.sum()  # the heads share no parameters, so this trains each on its own loss

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for name in self.poolings for p in self.heads[name][key].parameters()], "lr": lr}  # type: ignore[index]
            for key, lr in getattr(self, "lrs", {}).items()
        ]
        if not groups:
            return None
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_end(self) -> None:
        best = self._scores(*self._held)
        self.log("val/held_out_acc1", max(best.values())[0], prog_bar=True)

    @torch.no_grad()
    def _scores(self, features: dict[str, Tensor], labels: Tensor) -> dict[tuple[str, str], tuple[float, float]]:
        """Accuracy in percent of every head, and minus its cross-entropy, which decides between equal accuracies."""
        labels = labels.to(self.device)
        scores = {}
        for name in self.poolings:
            for key, head in self.heads[name].items():  # type: ignore[operator]
                logits = head(features[name].to(self.device))
                accuracy = 100 * float((logits.argmax(1) == labels).float().mean())
                scores[name, key] = accuracy, -float(F.cross_entropy(logits, labels))
        return scores

    # --- results ------------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        held, val = self._scores(*self._held), self._scores(*self._val)
        learning_rates = dict(zip(self.lrs, self.base_lrs, strict=True))
        rows = {}
        for name in self.poolings:
            key = max(learning_rates, key=lambda k, name=name: held[name, k])  # type: ignore[misc]
            rows[name] = {
                "base_lr": learning_rates[key],
                "held_out_acc1": held[name, key][0],
                "val_acc1": val[name, key][0],
            }
        winner = max(held, key=lambda head: held[head])[0]
        interval = 196 * math.sqrt(max(p := rows[winner]["val_acc1"] / 100, 1e-9) * (1 - p) / self.num_val)
        self.results = {
            "backbone": {
                "name": self.backbone_config.name,
                "kwargs": self.backbone_config.kwargs,
                "weights": self.backbone_config.weights,
                "sha256": weights_hash(self.backbone),
            },
            "protocol": {
                "features": "frozen, eval transform, standardised",
                "selection": f"{self.num_held_out} held-out training images",
                "num_train": self.num_train,
                "num_val": self.num_val,
                "num_shots": self.num_shots,
                "base_lrs": self.base_lrs,
                "epochs": self.trainer.max_epochs,
                "knn_pooling": self.knn_pooling,
            },
            "linear": {"winner": winner, **rows[winner], "val_acc1_95": interval, "by_pooling": rows},
            "knn": {str(k): accuracy for k, accuracy in self.knn.items()},
        }
        self.final_metrics = {"val/linear_acc1": rows[winner]["val_acc1"]}
        self.final_metrics.update({f"val/knn{k}_acc1": accuracy for k, accuracy in self.knn.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics(self.final_metrics, step=self.trainer.global_step)
        if self.trainer.is_global_zero:
            self._report()

    @rank_zero_only
    def _report(self) -> None:
        linear = self.results["linear"]
        table = Table(title=f"Linear probe on {self.num_val} val images, {self.num_train} for training")
        for column in ("read-out", "base lr", "held-out %", "val %"):
            table.add_column(column, justify="left" if column == "read-out" else "right")
        for name, row in linear["by_pooling"].items():
            mark = "[bold green]" if name == linear["winner"] else ""
            table.add_row(
                f"{mark}{name}", f"{row['base_lr']:g}", f"{row['held_out_acc1']:.1f}", f"{mark}{row['val_acc1']:.1f}"
            )
        console = Console()
        console.print(table)
        console.print(
            f"Chosen on held-out data: {linear['winner']}, val {linear['val_acc1']:.1f} ± {linear['val_acc1_95']:.1f} %"
        )
        neighbours = ", ".join(f"k={k}: {accuracy:.1f}" for k, accuracy in self.results["knn"].items())
        console.print(f"kNN on {self.knn_pooling}: {neighbours} %")
        if self.trainer.log_dir:
            path = Path(self.trainer.log_dir) / "results.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.results, indent=2) + "\n")
            console.print(f"Written to {path}")

    def run_info(self) -> dict[str, str]:
        count = len(self.poolings) * len(self.base_lrs)
        return {
            "method": f"linear probe ({count} classifiers) and kNN",
            "backbone": f"{self.backbone_config.name}, weights {self.backbone_config.weights or 'untrained'}",
            "images": f"{self.num_train} to train on, {self.num_held_out} held out to choose the classifier",
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        raise ConfigError("A linear probe is not resumed: it takes a minute. Start it again without --ckpt_path.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = recorded_backbone(self.backbone_config)


def extract_features(backbone: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Read-outs of one batch, by name; those of `READOUTS` work on any timm model with `forward_intermediates`."""
    results: dict[str, Tensor] = {}
    if "last4" in names:
        depth = len(backbone.feature_info)  # type: ignore[arg-type]
        tokens, layers = backbone.forward_intermediates(images, indices=min(4, depth), norm=False)  # type: ignore[operator]
        norm = backbone.norm if isinstance(getattr(backbone, "norm", None), nn.LayerNorm) else nn.Identity()
        maps = [norm(layer.flatten(2).transpose(1, 2)) for layer in layers]  # type: ignore[operator]
        results["last4"] = torch.cat([x.mean(1) for x in maps], dim=-1)
    else:
        tokens = backbone.forward_features(images)  # type: ignore[operator]
    tokens = patch_tokens(backbone, tokens)
    return {name: results[name] if name in results else _READOUTS[name](tokens) for name in names}


def split_for_selection(
    labels: Tensor, num_shots: int | None, held_out: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those on which the winner is chosen.

    Args:
        labels: (N,).
        num_shots: Train on this many random images per class; None trains on all that are not held out.
        held_out: Share of all N images to hold out; with `num_shots`, taken from the images that are not shots.

    Raises:
        ConfigError: If a class has too few images.
    """
    num_held = max(1, round(held_out * len(labels)))
    order = torch.randperm(len(labels), generator=generator)
    if num_shots is None:
        return order[num_held:], order[:num_held]
    is_shot = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        if len(members) < num_shots:
            raise ConfigError(
                f"model.num_shots={num_shots}, but class {int(label)} has {len(members)} training images."
            )
        is_shot[members[:num_shots]] = True
    others = order[~is_shot[order]]
    if len(others) == 0:
        raise ConfigError(f"model.num_shots={num_shots} leaves no training image to choose the winner on.")
    return order[is_shot[order]], others[:num_held]
