"""Whether features are still spread out and gates still move, in numbers and in words."""

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vil_lightning.callbacks.backbone_of import backbone_of
from vil_lightning.callbacks.features import (
    check_counts,
    check_pooled,
    collect,
    last_epoch,
    observing,
    pooled_features,
    val_loader,
)
from vil_lightning.callbacks.gates import STATES, GateWatch
from vil_lightning.errors import ConfigError
from vil_lightning.representation import alignment, feature_std, rankme, uniformity


class FeatureHealth(L.Callback):
    """Logs how the backbone's pooled features of val images are spread, and warns when they collapse.

    - `health/rankme`: effective rank (RankMe); `health/rankme_ratio`: the same as a share of what is possible, the width of
      the features or the number of images, whichever is smaller.
    - `health/val_feature_std`: deviation of unit-length features, 1 for a uniform cloud. (`health/feature_std` of some methods
      is that of augmented training images.)
    - `health/uniformity`: from 0 (all features are one) down to about -4 (uniform on the sphere).
    - `health/alignment`: mean squared distance between the first two views of the latest training batch's images; only where
      training images come in several views. If it falls while uniformity rises to 0, that is collapse, not progress.
    - `health/fgate_shut`, `health/fgate_stuck`, `health/igate_extreme`, for Vision-LSTM: shares of its gates, over tokens,
      heads and scans, that forget everything (sigmoid below 0.01), that never forget (above 1 - 1e-5), and that are far out
      (input gate beyond ±15). All are 0 at the start.

    All but the alignment are also logged before the first step. A symptom that lasts is named once, with what to do about it.
    Where only the outputs of a method's head collapse, nothing is seen here: the features may stay apart.

    Args:
        every_n_epochs: How often; the last epoch always counts.
        max_images: Look at this many val images at most, spread over the val set; the same every time.
        patience: Observations in a row after which a symptom is reported.

    References:
        RankMe: Garrido et al. 2023, arXiv:2210.02885. Alignment and uniformity: Wang and Isola 2020, arXiv:2005.10242.
    """

    def __init__(self, every_n_epochs: int = 1, max_images: int = 2048, patience: int = 3) -> None:
        check_counts(self, every_n_epochs=every_n_epochs, patience=patience)
        if max_images < 2:
            raise ConfigError(
                f"FeatureHealth: max_images={max_images} must be at least 2. Set max_images in the callback's init_args."
            )
        self.every_n_epochs = every_n_epochs
        self.max_images = max_images
        self.patience = patience
        self._untrained_rank: float | None = None
        self._counts: dict[str, int] = {}
        self._reported: list[str] = []
        self._views: list[Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_pooled(self, trainer, pl_module, partial(pooled_features, backbone_of(pl_module)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step:  # resumed
            return
        values, _ = self._measure(trainer, pl_module)
        self._untrained_rank = values.get("health/rankme")
        for logger in trainer.loggers:  # what `log` is given here would be averaged with the values of the first epoch
            logger.log_metrics(values, step=0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        views = batch[0] if isinstance(batch, list | tuple) else None
        self._views = []
        if self._due(trainer) and isinstance(views, list) and len(views) > 1 and views[0].shape == views[1].shape:
            self._views = views[:2]  # until the next batch: only one is kept alive, and the epoch may end anywhere

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._due(trainer):
            return
        views, self._views = self._views, []
        values, gates = self._measure(trainer, pl_module)
        if not values:
            return
        if views:
            values["health/alignment"] = self._alignment(trainer, pl_module, views)
        # Every process has measured the same, so this needs no reduction.
        pl_module.log_dict(values, rank_zero_only=False, sync_dist=False)
        for name, diagnosis in self._symptoms(values, gates).items():
            self._counts[name] = self._counts.get(name, 0) + 1 if diagnosis else 0
            if self._counts[name] >= self.patience and name not in self._reported:
                self._reported.append(name)
                rank_zero_warn(f"Step {trainer.global_step}: {diagnosis}")

    def state_dict(self) -> dict[str, Any]:
        return {"untrained_rank": self._untrained_rank, "counts": dict(self._counts), "reported": list(self._reported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._untrained_rank = state_dict["untrained_rank"]
        self._counts, self._reported = dict(state_dict["counts"]), list(state_dict["reported"])

    def _due(self, trainer: L.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0 or last_epoch(trainer)

    def _measure(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """What is logged, and of every mLSTM branch the share of its gates in each state."""
        backbone = backbone_of(pl_module)
        watch = GateWatch(backbone)

        def features_and_gates(images: Tensor) -> Tensor:
            features = pooled_features(backbone, images).float()
            return torch.cat([features, watch.take().flatten(1)], dim=1) if watch.branches else features

        with watch.watching():
            columns, _ = collect(trainer, pl_module, val_loader(trainer, self.max_images), features_and_gates)
        num_shares = len(STATES) * len(watch.branches)
        features, shares = columns.split([columns.shape[1] - num_shares, num_shares], dim=1)
        if not features.isfinite().all():
            if "not finite" not in self._reported:
                self._reported.append("not finite")
                rank_zero_warn(
                    f"Step {trainer.global_step}: FeatureHealth cannot measure features that are not finite. The run has "
                    "diverged: use a lower model.base_lr or a longer model.lr_warmup."
                )
            return {}, {}
        rank = float(rankme(features))
        values = {
            "health/rankme": rank,
            "health/rankme_ratio": rank / min(features.shape),
            "health/val_feature_std": float(feature_std(features)),
            "health/uniformity": float(uniformity(features)),
        }
        by_branch = shares.mean(0).view(len(watch.branches), len(STATES))
        if watch.branches:
            values |= {f"health/{state}": float(share) for state, share in zip(STATES, by_branch.mean(0), strict=True)}
        gates = {
            name: dict(zip(STATES, row.tolist(), strict=True))
            for name, row in zip(watch.branches, by_branch, strict=True)
        }
        return values, gates

    def _alignment(self, trainer: L.Trainer, pl_module: L.LightningModule, views: list[Tensor]) -> float:
        with observing(trainer, pl_module):
            backbone = backbone_of(pl_module)
            first, second = (pooled_features(backbone, view).float() for view in views)
            value = alignment(first, second)
        return float(pl_module.all_gather(value).mean())  # type: ignore[union-attr] # batches are equally large

    def _symptoms(self, values: dict[str, float], gates: dict[str, dict[str, float]]) -> dict[str, str | None]:
        """A diagnosis for each symptom that is there, None for the others."""
        return {
            "complete": _complete_collapse(values),
            "dimensional": _dimensional_collapse(values, self._untrained_rank),
            **{state: _bad_gates(state, gates) for state in STATES if gates},
        }


# Thresholds. On the built-in digits, features of untrained networks have a deviation of 0.15 (ViT) to 0.7 (ViL).
_MIN_FEATURE_STD = 0.02
_MIN_RANK_SHARE = 0.5  # of the untrained network's
_MAX_GATE_SHARE = 0.9  # of one branch's gates


def _complete_collapse(values: dict[str, float]) -> str | None:
    deviation = values["health/val_feature_std"]
    if not deviation < _MIN_FEATURE_STD:
        return None
    return (
        "Complete collapse: all val images have nearly the same feature vector "
        f"(health/val_feature_std {deviation:.2g}, 1 for a uniform cloud). {_REMEDY}"
    )


def _dimensional_collapse(values: dict[str, float], untrained_rank: float | None) -> str | None:
    rank = values["health/rankme"]
    if untrained_rank is None or not rank < _MIN_RANK_SHARE * untrained_rank:
        return None
    return (
        f"Dimensional collapse: the features of val images fill {rank:.1f} dimensions (health/rankme), and filled "
        f"{untrained_rank:.1f} before training. {_REMEDY}"
    )


_REMEDY = (
    "Lower model.base_lr or lengthen model.lr_warmup, check what the method has against collapse (for DINO model.teacher_temp "
    "below model.student_temp and model.center_momentum below 1; for LeJEPA a larger model.sigreg_weight), and let "
    "data.train_transform leave enough of the images to see."
)
_GATE_DIAGNOSES = {
    "fgate_shut": "forget gates are shut: this scan keeps nothing of the tokens before",
    "fgate_stuck": "forget gates never forget: they are saturated, and have hardly a gradient left",
    "igate_extreme": "input gates are far out: single tokens outweigh all others",
}


def _bad_gates(state: str, gates: dict[str, dict[str, float]]) -> str | None:
    worst = max(gates, key=lambda name: gates[name][state])
    share = gates[worst][state]
    if share <= _MAX_GATE_SHARE:
        return None
    return (
        f"In {worst}, {share:.0%} of the {_GATE_DIAGNOSES[state]} (health/{state}). Lower model.base_lr, lengthen "
        "model.lr_warmup, or clip gradients (model.clip_grad or trainer.gradient_clip_val)."
    )
