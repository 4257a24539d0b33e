"""Linear probes on cached features or on augmented images: published protocols by name, and a sweep of our own.

Every protocol trains one linear classifier ("head") for each combination of read-out, learning rate and weight decay, all side
by side in one pass over the features. With more than one head, the winner is chosen on held-out training images and reported
on val; val's labels take no part in anything but the reported numbers.

What is published (with the code that was read) and what differs here is in `PROTOCOLS`; the `deviations` belong to the result.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.heads import Heads
from vil_lightning.evaluation.inputs import (
    channel_statistics,
    check_features,
    check_labels,
    few_labels,
    split_held_out,
)
from vil_lightning.evaluation.scores import Score, accuracy_score
from vil_lightning.optim import scale_lr
from vil_lightning.schedules import cosine, linear_then_constant

# Of batches of row numbers (B,): the same numbers, and features (B, D) of views of these images by read-out.
Views = Callable[[Iterator[Tensor]], Iterator[tuple[Tensor, Mapping[str, Tensor]]]]

__all__ = ["PROTOCOLS", "Head", "ProbeResult", "Protocol", "Views", "few_labels", "probe"]


@dataclass(frozen=True)
class Protocol:
    """How heads are trained. Change one with `dataclasses.replace`: the score's protocol id then names what was changed.

    Args:
        name: Of the protocol, a key of `PROTOCOLS`.
        base_lrs: Learning rates per 256 images, scaled linearly with the batch.
        batch_size: Of all processes together; cut to the number of training images.
        epochs: Passes over the training images, or
        iterations: steps, whichever is given.
        weight_decays: L2 penalties of the weights (not of the biases), added to the gradient.
        optimizer: `sgd` or `lars` (trust coefficient 0.001 on the weights, biases as in SGD); momentum 0.9.
        warmup_epochs: Linear from 0 at the first step; then half a cosine to 0.
        cosine_per: Whether the cosine moves at every step or epoch.
        scaling: Of the features: `none`, `batch_norm` (without gain and shift, eps 1e-6), or `standardise` with the mean and
            deviation of the training images.
        drop_last: Whether an epoch ends without the images that do not fill a batch.
        published: What is published, where.
        deviations: What differs here.
    """

    name: str
    base_lrs: tuple[float, ...]
    batch_size: int
    epochs: int | None = None
    iterations: int | None = None
    weight_decays: tuple[float, ...] = (0.0,)
    optimizer: Literal["sgd", "lars"] = "sgd"
    warmup_epochs: int = 0
    cosine_per: Literal["step", "epoch"] = "step"
    scaling: Literal["none", "batch_norm", "standardise"] = "none"
    drop_last: bool = False
    published: str = field(default="", compare=False)
    deviations: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for key in ("base_lrs", "weight_decays"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values) or min(values) < 0 or (key == "base_lrs" and 0 in values):
                raise ConfigError(f"probe {self.name}: {key}={list(values)} must be different positive numbers.")
        if (self.epochs is None) == (self.iterations is None):
            raise ConfigError(f"probe {self.name}: set epochs or iterations, one of them.")
        for key in ("batch_size", "epochs", "iterations"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"probe {self.name}: {key}={getattr(self, key)} must be at least 1.")
        if self.warmup_epochs and not 0 < self.warmup_epochs < (self.epochs or 0):
            raise ConfigError(
                f"probe {self.name}: warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}."
            )
        if self.optimizer == "lars" and len(self.base_lrs) * len(self.weight_decays) > 1:
            raise ConfigError(f"probe {self.name}: LARS trains one learning rate and one weight decay, not a grid.")


_CACHED = "features of the eval transform, computed once, instead of random resized crops and flips in every epoch"
_READOUT = "the read-outs are those passed in, instead of the class token"
_LAST_EPOCH = "the head of the last epoch, instead of the epoch that is best on val"
_STATISTICS = "features are standardised by the statistics of unchanged training images"
_HELD_OUT = "the head is chosen on held-out training images, which it is not trained on, instead of on val"
_ONE_PROCESS = "batches of one process, without the repeated images that fill up the last batch of several"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "dino",
            base_lrs=(0.001,),
            batch_size=1024,
            epochs=100,
            cosine_per="epoch",
            published="facebookresearch/dino eval_linear.py: SGD without weight decay, 0.001 per 256 images at 8 x 128, "
            "cosine per epoch, 100 epochs, weights from N(0, 0.01). Class tokens of the last 4 blocks (S), or of the last "
            "one with the mean of its patches (B). 'We recommend tweaking the LR depending on the checkpoint evaluated.'",
            deviations=(_CACHED, _READOUT, _LAST_EPOCH, _ONE_PROCESS),
        ),
        Protocol(
            "ibot",
            base_lrs=tuple(digit * 10.0**exponent for exponent in range(-4, 1) for digit in range(1, 10)),
            batch_size=1024,
            epochs=100,
            cosine_per="epoch",
            published="bytedance/ibot evaluation/eval_linear_multi.py --sweep_lr_only: as DINO, with 45 learning rates "
            "1e-4, 2e-4, ..., 9 per 256 images; the best on val.",
            deviations=(_CACHED, _READOUT, _LAST_EPOCH, _HELD_OUT, _ONE_PROCESS),
        ),
        Protocol(
            "mae",
            base_lrs=(0.1,),
            batch_size=16384,
            epochs=90,
            optimizer="lars",
            warmup_epochs=10,
            scaling="batch_norm",
            drop_last=True,
            published="facebookresearch/mae main_linprobe.py: batch norm without gain and shift, LARS without weight decay, "
            "0.1 per 256 images at 16,384, 10 epochs of warm-up, cosine per step, 90 epochs (50 for ViT-L and H), class "
            "token of the last block, weights from N(0, 0.01).",
            deviations=(
                _CACHED,
                _READOUT,
                _LAST_EPOCH,
                "batch norm over the whole batch, instead of one process's 512",
            ),
        ),
        Protocol(
            "dinov2",
            base_lrs=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
            batch_size=1024,
            iterations=12_500,
            drop_last=True,
            published="facebookresearch/dinov2 dinov2/eval/linear.py: SGD without weight decay, 13 learning rates x {1, 4} "
            "blocks x {class token, with mean of patches}, 10 x 1,250 iterations of 128 per GPU (8: 1,024), cosine per "
            "step, weights from N(0, 0.01); the best on val.",
            deviations=(
                _CACHED,
                _READOUT,
                _HELD_OUT,
                "an epoch's incomplete last batch is dropped, instead of continued",
            ),
        ),
        Protocol(
            "sweep",
            base_lrs=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
            batch_size=256,
            epochs=50,
            weight_decays=(0.0, 1e-4, 1e-3),
            scaling="standardise",
            published="of this project: standardised features, so that one grid serves every backbone.",
        ),
    )
}


@dataclass(frozen=True)
class Head:
    """One classifier of a probe; accuracies in percent, `held_out` None where nothing was chosen."""

    name: str
    readout: str
    base_lr: float
    weight_decay: float
    held_out: float | None
    val: float


@dataclass(frozen=True)
class ProbeResult:
    """Score of the winner, and for transparency the numbers of every head."""

    score: Score
    winner: Head
    heads: list[Head]
    num_train: int
    num_held_out: int
    batch_size: int
    num_steps: int
    published: str
    deviations: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the score should know."""
        notes = [f"deviation: {text}" for text in self.deviations]
        winner = self.winner
        if winner.held_out is not None:
            notes.insert(
                0, f"chosen on {self.num_held_out} held-out images: {winner.name}, {winner.held_out:.1f} % there"
            )
        for key, what in (("base_lr", "learning rate"), ("weight_decay", "weight decay")):
            values = sorted({getattr(head, key) for head in self.heads})
            ends = [value for value in (values[0], values[-1]) if value > 0]
            if len(values) > 2 and getattr(winner, key) in ends:
                notes.append(f"the chosen {what} {getattr(winner, key):g} is at the end of those tried")
        return tuple(notes)


def probe(
    protocol: str | Protocol,
    train: Mapping[str, Tensor],
    train_labels: Tensor,
    val: Mapping[str, Tensor],
    val_labels: Tensor,
    *,
    num_classes: int | None = None,
    rows: Tensor | None = None,
    held_out: float | Tensor = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
    views: Views | None = None,
) -> ProbeResult:
    """Train all heads of a protocol, choose, and score val.

    A head's result does not depend on which others are trained beside it, but for rounding: all see the same batches, and
    those of one read-out start from the same weights. Of equal held-out accuracies the lower cross-entropy decides.

    Args:
        protocol: Name in `PROTOCOLS`, or a changed one.
        train: By read-out, features (N, D), any float dtype, may be memory-mapped.
        train_labels: (N,).
        val: By read-out, (M, D).
        val_labels: (M,).
        num_classes: None takes those of the training labels.
        rows: The training images to use, of `few_labels`; None uses all N.
        held_out: With more than one head: share of the images of each class to choose on, or the numbers of other training
            images, which are then not trained on.
        seed: Of the held-out images, the weights and the order of the images.
        device: Where heads are trained; features are moved there a batch at a time.
        progress: Called with the steps done and their total.
        views: Of the batches of row numbers (B,), the features of new views of these images, by read-out, that are trained on.
            None trains on `train`, which otherwise serves for statistics and the held-out images only.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ConfigError(f"probe: protocol {protocol!r} is not known. Available: {', '.join(PROTOCOLS)}.")
        protocol = PROTOCOLS[protocol]
    num_classes = _check(train, train_labels, val, val_labels, num_classes, protocol.name)
    grid = [(lr, wd) for lr in protocol.base_lrs for wd in protocol.weight_decays]
    kept, held = _split(train_labels, rows, held_out, seed, choose=len(grid) * len(train) > 1)
    batch_size = min(protocol.batch_size, len(kept))
    per_epoch = len(kept) // batch_size if protocol.drop_last else -(-len(kept) // batch_size)
    num_steps = protocol.iterations or per_epoch * (protocol.epochs or 1)

    heads = {
        name: Heads(
            features.shape[1],
            num_classes,
            lrs=[scale_lr(lr, batch_size) for lr, _ in grid],
            weight_decays=[wd for _, wd in grid],
            optimizer=protocol.optimizer,
            batch_norm=protocol.scaling == "batch_norm",
            statistics=channel_statistics(features, kept) if protocol.scaling == "standardise" else None,
            seed=seed,
            device=device,
        )
        for name, features in train.items()
    }
    batches = itertools.islice(_batches(kept, batch_size, per_epoch, torch.Generator().manual_seed(seed)), num_steps)
    for step, (batch, features) in enumerate((views or _cached(train))(batches)):
        for name, group in heads.items():
            group.step(features[name], train_labels[batch], factor=_lr_factor(protocol, step, num_steps, per_epoch))
        if progress is not None:
            progress(step + 1, num_steps)

    # The held-out numbers of all heads first: nothing of val is known when the winner is chosen.
    chosen_on = {name: group.evaluate(train[name], train_labels, held) for name, group in heads.items() if len(held)}
    ranking = {
        (name, i): (accuracies[i], -losses[i])
        for name, (accuracies, losses, _) in chosen_on.items()
        for i in range(len(grid))
    }
    readout, index = max(ranking, key=lambda head: ranking[head]) if ranking else (next(iter(train)), 0)
    results, winner, correct = [], None, None
    for name, group in heads.items():
        accuracies, _, hits = group.evaluate(val[name], val_labels, None)
        for i, (lr, wd) in enumerate(grid):
            chosen = chosen_on[name][0][i] if len(held) else None
            head = Head(f"{name}/lr={lr:.6g}/wd={wd:.6g}", name, lr, wd, chosen, accuracies[i])
            results.append(head)
            if (name, i) == (readout, index):
                winner, correct = head, hits[i]
    assert winner is not None
    assert correct is not None
    return ProbeResult(
        score=accuracy_score(
            f"linear probe, {protocol.name}", correct, _protocol_id(protocol, batch_size, held_out, held, views)
        ),
        winner=winner,
        heads=results,
        num_train=len(kept),
        num_held_out=len(held),
        batch_size=batch_size,
        num_steps=num_steps,
        published=protocol.published,
        deviations=_deviations(protocol, len(held) > 0, views),
    )


def _deviations(protocol: Protocol, chosen: bool, views: Views | None) -> tuple[str, ...]:
    found = protocol.deviations + (_HELD_OUT,) * (chosen and _HELD_OUT not in protocol.deviations)
    if views is None:
        return found
    of_statistics = (_STATISTICS,) * (protocol.scaling == "standardise")
    return tuple(text for text in found if text != _CACHED) + of_statistics


def _cached(train: Mapping[str, Tensor]) -> Views:
    """The views that every image has in the cache."""

    def views(batches: Iterator[Tensor]) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        for batch in batches:
            yield batch, {name: features[batch] for name, features in train.items()}

    return views


def _lr_factor(protocol: Protocol, step: int, num_steps: int, per_epoch: int) -> float:
    """Share of the peak learning rate at a step, from 0."""
    warmup = protocol.warmup_epochs * per_epoch
    if step < warmup:
        return linear_then_constant(step, warmup, 0.0, 1.0)
    if protocol.cosine_per == "epoch":
        step = step // per_epoch * per_epoch
    return cosine(step - warmup, num_steps - warmup, 1.0, 0.0)


def _batches(rows: Tensor, batch_size: int, per_epoch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of one batch after the other, epochs in random order, without end."""
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from order.split(batch_size)[:per_epoch]


def _split(
    labels: Tensor, rows: Tensor | None, held_out: float | Tensor, seed: int, choose: bool
) -> tuple[Tensor, Tensor]:
    """Row numbers to train on and to choose on; none of the latter if there is nothing to choose."""
    rows = torch.arange(len(labels)) if rows is None else rows
    none = torch.zeros(0, dtype=torch.int64)
    for numbers, what in ((rows, "rows"), (held_out, "held_out")):
        if isinstance(numbers, Tensor) and (
            len(numbers) == 0
            or int(numbers.min()) < 0
            or int(numbers.max()) >= len(labels)
            or len(numbers.unique()) < len(numbers)
        ):
            raise ConfigError(f"probe: {what} must be different row numbers from 0 to {len(labels) - 1}, at least one.")
    if isinstance(held_out, Tensor):
        kept = rows[~torch.isin(rows, held_out)]
        if len(kept) == 0:
            raise ConfigError(f"probe: all {len(rows)} training images are held out to choose the winner on.")
        return kept, held_out
    if not choose:
        return rows, none
    kept, held = split_held_out(labels[rows], held_out, seed)
    return rows[kept], rows[held]


def _check(
    train: Mapping[str, Tensor],
    train_labels: Tensor,
    val: Mapping[str, Tensor],
    val_labels: Tensor,
    num_classes: int | None,
    name: str,
) -> int:
    """The number of classes, or a ConfigError."""
    if not train or set(train) != set(val):
        raise ConfigError(f"probe {name}: read-outs of train {sorted(train)} and val {sorted(val)} must be the same.")
    for readout in train:
        check_features(train[readout], train_labels, f"probe {name}: train {readout}")
        check_features(val[readout], val_labels, f"probe {name}: val {readout}")
        if train[readout].shape[1] != val[readout].shape[1]:
            raise ConfigError(
                f"probe {name}: {readout} has width {train[readout].shape[1]} in train, {val[readout].shape[1]} in val."
            )
    num_classes = num_classes if num_classes is not None else int(train_labels.max()) + 1
    check_labels(train_labels, num_classes, f"probe {name}: train")
    check_labels(val_labels, num_classes, f"probe {name}: val")
    return num_classes


def _protocol_id(
    protocol: Protocol, batch_size: int, held_out: float | Tensor, held: Tensor, views: Views | None
) -> str:
    """`probe/NAME/cached` (or `augmented`), then what differs from that protocol, and how many images were held out."""
    parts = ["probe", protocol.name, "cached" if views is None else "augmented"]
    standard = PROTOCOLS.get(protocol.name)
    for key in (item.name for item in fields(Protocol) if item.compare):
        value = batch_size if key == "batch_size" else getattr(protocol, key)
        if standard is None or value != getattr(standard, key):
            parts.append(f"{key}={','.join(f'{x:g}' for x in value) if isinstance(value, tuple) else value}")
    if len(held):
        parts.append(f"held-out={len(held) if isinstance(held_out, Tensor) else held_out}")
    return "/".join(parts)
