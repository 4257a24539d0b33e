"""How callbacks look at a network without leaving a trace, and which images they show it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vil_lightning.data.loading import EpochSampler, ResumableLoader, SubsetSource, TransformedDataset, collate
from vil_lightning.errors import ConfigError
from vil_lightning.sharding import gathered, is_sharded


@contextmanager
def observing(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Evaluation mode, no gradients, the run's precision; afterwards every part's mode and the random state are as before."""
    modes = [(part, part.training) for part in module.modules()]
    devices = [module.device] if module.device.type == "cuda" else []
    module.eval()
    try:
        # Also a loader draws a seed from torch's generator when it starts.
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            trainer.precision_plugin.forward_context(),
            gathered(module),
        ):
            yield
    finally:
        for part, training in modes:  # a part may have been kept in evaluation mode
            part.training = training


def pooled_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Pooled vectors (B, D): what `backbone(images)` gives without a classifier, also where there is one."""
    if not hasattr(backbone, "forward_head"):  # not a timm model
        return backbone(images)
    return backbone.forward_head(backbone.forward_features(images), pre_logits=True)  # type: ignore[operator]


def collect(
    trainer: L.Trainer, module: L.LightningModule, loader: DataLoader[Any], function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """What `function` makes of a loader's images, on all processes: results (N, ...) in float32 and labels (N,).

    Every process gets the results for every image, once and in order, but for images that cannot be read. All of them have to
    call this.
    """
    parts, label_parts = [], []
    with observing(trainer, module):
        for images, batch_labels in loader:
            images = trainer.datamodule.normalize(images.to(module.device))  # type: ignore[attr-defined]
            parts.append(function(images).float())
            label_parts.append(batch_labels.to(module.device))
    results, labels = torch.cat(parts), torch.cat(label_parts)
    real = torch.ones(len(loader.dataset), dtype=torch.int64, device=module.device)  # type: ignore[arg-type]
    real[list(getattr(loader.dataset, "unreadable", ()))] = 0
    if trainer.world_size > 1:
        # The sampler deals images out in turn and repeats the first ones to even the end out: undo both.
        total = len(loader.dataset)  # type: ignore[arg-type]
        results = module.all_gather(results).transpose(0, 1).flatten(0, 1)[:total]  # type: ignore[union-attr]
        labels = module.all_gather(labels).transpose(0, 1).flatten()[:total]  # type: ignore[union-attr]
        real = module.all_gather(real).amin(dim=0)  # type: ignore[union-attr]  # each process knows of its own images
    if not real.all():
        results, labels = results[real.bool()], labels[real.bool()]
    return results, labels


def spread(total: int, count: int) -> list[int]:
    """`count` places, or all if there are fewer, evenly spread over `total`: folders are sorted by class."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long().tolist()


def val_loader(trainer: L.Trainer, max_images: int) -> DataLoader[Any]:
    """At most `max_images` images spread over the val set, in fixed order, dealt to the processes in turn."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    source = SubsetSource(data.val_source, spread(len(data.val_source), max_images))
    dataset = TransformedDataset(source, data.eval_transform, data.seed, data.max_bad_fraction, data.known_bad)
    sampler = EpochSampler(
        dataset, trainer.world_size, trainer.global_rank, shuffle=False, seed=data.seed, drop_last=False
    )
    return ResumableLoader(
        dataset,
        batch_size=data.eval_batch_size,
        sampler=sampler,
        num_workers=data.num_workers,
        collate_fn=collate,
        timeout=data.worker_timeout if data.num_workers else 0,
    )


def val_images(trainer: L.Trainer, num_images: int) -> tuple[Tensor, list[int]]:
    """uint8 (n, 3, H, W) of images spread over the val set, and their classes; on the calling process alone."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data.val_images(spread(len(data.val_source), num_images))


def last_epoch(trainer: L.Trainer) -> bool:
    """Whether the epoch that ends is the last one planned, in epochs or in steps."""
    return trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step >= trainer.estimated_stepping_batches


def board_writers(trainer: L.Trainer) -> list[Any]:
    """The TensorBoard writers of this process; none on other processes than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def looks(trainer: L.Trainer, module: L.LightningModule) -> bool:
    """Whether this process has to run the network for TensorBoard: the first one, or all if each has a slice of it."""
    boards = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
    return boards and (trainer.is_global_zero or is_sharded(module))


def check_counts(callback: L.Callback, **counts: int | None) -> None:
    """Refuse a count below 1.

    Raises:
        ConfigError: Naming the argument.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(
                f"{type(callback).__name__}: {name}={count} must be at least 1. Set {name} in the callback's init_args."
            )


def check_labelled(callback: L.Callback, trainer: L.Trainer) -> None:
    """Refuse images without classes, before the first step.

    Raises:
        ConfigError: Saying how to do without the callback.
    """
    if not getattr(trainer.datamodule, "labelled", True):  # type: ignore[attr-defined]
        name = type(callback).__name__
        raise ConfigError(
            f"{name} scores by classes, but the images have none (data.labelled=false, or a split without labels). Leave "
            f"{name} out of trainer.callbacks (--trainer.callbacks '[]' leaves out all of a recipe's), and set "
            "--checkpoint.monitor null if the recipe monitors what it logs."
        )


def check_pooled(
    callback: L.Callback, trainer: L.Trainer, module: L.LightningModule, function: Callable[[Tensor], Tensor]
) -> None:
    """Refuse a `function` that does not make one vector of each image, before the first step. All processes call it.

    Raises:
        ConfigError: If images of `data.img_size` do not fit the network, or it returns something else than vectors.
    """
    name, size = type(callback).__name__, getattr(trainer.datamodule, "img_size", None)  # type: ignore[attr-defined]
    if size is None:  # somebody's own data
        return
    # Eagerly: a compiler would make code for this one image.
    with observing(trainer, module), torch.compiler.set_stance("force_eager"):
        try:
            features = function(torch.zeros(1, 3, size, size, device=module.device))
        except (ValueError, RuntimeError, AssertionError) as error:
            if isinstance(error, RuntimeError) and "size" not in str(error):  # too little memory, a lost process, ...
                raise
            raise ConfigError(
                f"{name} shows images of data.img_size={size} px to the network, which they do not fit: {error}"
            ) from error
    if features.ndim != 2:
        raise ConfigError(
            f"{name} reads one vector of each image, the network returns {tuple(features.shape[1:])} numbers. Set "
            f"model.backbone.kwargs.global_pool to a read-out that pools, or take {name} out of trainer.callbacks."
        )
