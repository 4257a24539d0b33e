"""Fine-tuning as a score: the whole network is trained on, with the learning rate decaying towards the lower layers."""

import copy
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, distributed

from vil_lightning.data.loading import SubsetSource
from vil_lightning.data.transforms import TrainingTransform, TrainTransform
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.cache import content_key
from vil_lightning.evaluation.inputs import few_labels
from vil_lightning.evaluation.scores import Score
from vil_lightning.evaluation.subject import Subject
from vil_lightning.evaluation.tasks import Task, mean_interval
from vil_lightning.methods.backbone import build_backbone, check_input_size
from vil_lightning.methods.supervised import Supervised


class FineTune(Task):
    """Accuracy after the last epoch of fine-tuning with a new classifier (never that of the best epoch on val).

    The recipe is that of `configs/finetune.yaml`: AdamW, cosine with warm-up, layer-wise decay as in BEiT (Bao et al. 2021,
    arXiv:2106.08254), the classifier alone at first, no MixUp. It is `vil_lightning.methods.Supervised`, for one process.

    Args:
        epochs: Passes over the training images.
        base_lr: Peak learning rate per 1,024 images of the batch.
        layer_decay: Factor of the learning rate per layer below the head (pairs of scans for ViL).
        weight_decay: Of AdamW.
        batch_size: Cut to the number of training images.
        head_epochs: During these only the classifier is trained.
        label_smoothing: Share of the target that is spread over all classes.
        drop_path_rate: Stochastic depth.
        train_transform: None takes that of the data; if it is none for supervised training, crops of 60 to 100 % of the area
            without flips.
        fraction: Share of the training images of each class to train on, or
        per_class: number of them; by neither, all.
        num_draws: How often the images are drawn and the network is trained; the score is the mean.
    """

    def __init__(
        self,
        epochs: int = 15,
        base_lr: float = 1.6e-2,
        layer_decay: float = 0.75,
        weight_decay: float = 0.05,
        batch_size: int = 64,
        head_epochs: int = 2,
        label_smoothing: float = 0.1,
        drop_path_rate: float = 0.0,
        train_transform: TrainingTransform | None = None,
        fraction: float | None = None,
        per_class: int | None = None,
        num_draws: int = 1,
    ) -> None:
        if epochs < 1 or batch_size < 1 or num_draws < 1 or not 0 <= head_epochs < epochs:
            raise ConfigError(
                f"FineTune: epochs={epochs}, batch_size={batch_size} and num_draws={num_draws} must be at least 1, and "
                f"head_epochs={head_epochs} from 0 to below epochs."
            )
        if fraction is None and per_class is None and num_draws > 1:
            raise ConfigError(
                f"FineTune: num_draws={num_draws} draws images, but all are used. Set fraction or per_class."
            )
        if not 0 <= drop_path_rate < 1:
            raise ConfigError(f"FineTune: drop_path_rate={drop_path_rate} must be in [0, 1).")
        if train_transform is not None and not isinstance(train_transform, TrainTransform):
            raise ConfigError(f"FineTune: train_transform={type(train_transform).__name__} must be a TrainTransform.")
        self.epochs = epochs
        self.batch_size = batch_size
        self.head_epochs = head_epochs
        self.drop_path_rate = drop_path_rate
        self.train_transform = train_transform
        self.fraction, self.per_class = fraction, per_class
        self.num_draws = num_draws
        self.settings: dict[str, Any] = {
            "base_lr": base_lr,
            "layer_decay": layer_decay,
            "weight_decay": weight_decay,
            "label_smoothing": label_smoothing,
        }

    def check(self, subject: Subject) -> None:
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ConfigError(
                "FineTune trains on one process. Start `main.py evaluate` without torchrun for this task."
            )
        labels = torch.tensor(subject.data.train_source.labels)
        for draw in range(self.num_draws):
            self._rows(labels, subject.seed + draw)
        config = self._method(subject).backbone_config  # refuses settings out of range
        with isolate_rng():
            network = build_backbone(config, quiet=True)  # refuses drop_path_rate where there is none
        check_input_size(network, self._transform(subject).img_size, "FineTune: train_transform.img_size")

    def run(self, subject: Subject) -> list[Score]:
        labels = torch.tensor(subject.data.train_source.labels)
        hits = []
        for draw in range(self.num_draws):
            rows = self._rows(labels, subject.seed + draw)
            hits.append(
                fine_tune(
                    subject, self._method(subject), rows, self._transform(subject), self.epochs, self.batch_size, draw
                )
            )
        share = torch.stack(hits).double().mean(0)
        low, high = mean_interval(share)
        kind = "all" if self.fraction is None and self.per_class is None else f"{self.per_class}-per-class"
        what = "all labels" if kind == "all" else f"{self.per_class} per class"
        if self.fraction is not None:
            kind, what = f"{100 * self.fraction:g}%", f"{100 * self.fraction:g} % of the labels"
        settings = "/".join(f"{key}={value:g}" for key, value in self.settings.items())
        protocol = f"fine-tune/{kind}/epochs={self.epochs}/{settings}/batch={self.batch_size}/head={self.head_epochs}"
        augmentation = {key: value for key, value in vars(self._transform(subject)).items() if not key.startswith("_")}
        protocol += f"/drop-path={self.drop_path_rate:g}/draws={self.num_draws}/views={content_key(augmentation)[:8]}"
        notes = ("last epoch", f"views {content_key(augmentation)[:8]}: {json.dumps(augmentation)}")
        return [Score(f"fine-tuned, {what}", 100 * float(share.mean()), low, high, protocol, len(share), "", notes)]

    def _rows(self, labels: Tensor, seed: int) -> Tensor | None:
        if self.fraction is None and self.per_class is None:
            return None
        return few_labels(labels, fraction=self.fraction, per_class=self.per_class, seed=seed)

    def _transform(self, subject: Subject) -> TrainTransform:
        own = self.train_transform or subject.data.train_transform
        if isinstance(own, TrainTransform):
            return own
        none: dict[str, Any] = {"hflip_prob": 0.0, "three_augment": False, "color_jitter": (0.0, 0.0, 0.0, 0.0)}
        return TrainTransform(subject.data.img_size, scale=(0.6, 1.0), **none)

    def _method(self, subject: Subject) -> Supervised:
        config = copy.deepcopy(subject.backbone)
        if self.drop_path_rate:
            config.kwargs["drop_path_rate"] = self.drop_path_rate
        else:
            config.kwargs.pop("drop_path_rate", None)  # that of pretraining
        head_only = f"{self.head_epochs} epochs" if self.head_epochs else 0
        return Supervised(config, new_head=True, head_only=head_only, mix_prob=0.0, lr_warmup="10%", **self.settings)


def fine_tune(
    subject: Subject,
    method: Supervised,
    rows: Tensor | None,
    transform: TrainTransform | None,
    epochs: int,
    batch_size: int,
    draw: int = 0,
    gradient_clip_val: float | None = 1.0,
) -> Tensor:
    """Train on some of the training images, and tell which val images the network then classifies correctly, bool (M,).

    Neither the subject nor the state of the random numbers is changed.

    Args:
        rows: Numbers of the training images; None for all.
        transform: Of the training images; None takes that of the evaluation.
        draw: Makes the seed of the new classifier and of the order of the images, with the subject's.
        gradient_clip_val: Largest global norm of the gradient; None for none.
    """
    data = copy.copy(subject.data)
    data.train_source = data.train_source if rows is None else SubsetSource(data.train_source, rows.tolist())
    data.train_transform = transform
    data.batch_size = min(batch_size, len(data.train_source))
    data.seed = subject.seed + draw
    data._eval_datasets, data._train_loader, data.known_bad = {}, None, dict(data.known_bad)
    data.setup = data.prepare_data = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    with isolate_rng(), quiet(), tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        config = method.backbone_config
        if config.weights is None and not config.kwargs.get("pretrained"):
            # An untrained network is that of the other scores, too, not another draw.
            config.weights = str(Path(folder) / "untrained.pt")
            torch.save(subject.build().state_dict(), config.weights)
        torch.manual_seed(subject.seed + draw)
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu" if subject.place == "cpu" else "gpu",
            devices=1,
            precision="bf16-mixed" if subject.precision == "bf16" else "32-true",
            gradient_clip_val=gradient_clip_val,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=subject.progress,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(method, datamodule=data)
        network = method.backbone.eval().to(subject.place)
        hits = []
        with (
            torch.no_grad(),
            torch.autocast(torch.device(subject.place).type, torch.bfloat16, subject.precision == "bf16"),
        ):
            loader = data.val_dataloader()
            for images, labels in loader:
                logits = network(data.normalize(images.to(subject.place)))
                hits.append(logits.argmax(1).cpu() == labels)
        correct = torch.cat(hits)
        kept = torch.ones(len(correct), dtype=torch.bool)
        kept[list(data._eval_datasets["val"].unreadable)] = False
    return correct[kept]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says about each of many trainings; warnings stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
