"""How a run compares, epoch by epoch, with the ViL authors' own run of the recipe.

The numbers are those of the official training logs (github.com/NX-AI/vision-lstm, `logs/`), every epoch that the logs hold:
`vil2_tiny_e800_pretrain_192` lacks epochs 377 to 380 and 390, `vil2_tiny_e400_pretrain_192` starts at epoch 361. Accuracies
are in percent, at the resolution in the curve's name; training loss and accuracy are on mixed images.

    python -m vil_lightning.callbacks.published_curve --logdir logs --steps_per_epoch 625

writes all curves as TensorBoard runs, without training.
"""

import argparse
import csv
import math
import os
from pathlib import Path
from typing import NamedTuple

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from vil_lightning.errors import ConfigError

CSV_FILE = Path(__file__).with_name("vil2_imagenet_curves.csv")
# Column of the file -> the name under which our runs log it, and the factor to our unit.
TAGS = {
    "train_loss": ("train/loss", 1.0),
    "train_top1": ("train/acc1", 100.0),
    "val_loss": ("val/loss", 1.0),
    "val_top1": ("val/acc1", 100.0),
}
METRICS = ("val/acc1", "val/loss")  # what a validation can be compared by


class Curve(NamedTuple):
    """A published run: its length in epochs, and its values as `values[epoch][tag]`; epochs count from 1."""

    epochs: int
    values: dict[int, dict[str, float]]


def read_curves() -> dict[str, Curve]:
    """All published curves by name, e.g. `vil2_tiny_e800_pretrain_192`."""
    curves: dict[str, Curve] = {}
    with CSV_FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curve = curves.setdefault(f"{row['model']}_{row['stage']}", Curve(int(row["epochs"]), {}))
            curve.values[int(row["epoch"])] = {tag: float(row[key]) * unit for key, (tag, unit) in TAGS.items()}
    return curves


def write_curve(name: str, root: str | Path, steps_per_epoch: int) -> Path:
    """Write a curve as the TensorBoard run `<root>/published_<name>`, in place of an earlier one.

    Args:
        steps_per_epoch: Optimizer steps per epoch of the run to compare with, so that both share the axis.

    Returns:
        The run's folder.
    """
    folder = Path(root) / f"published_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    # One fixed name and one rename: whoever reads the folder finds the old file or the new one, never both.
    path, draft = folder / "events.out.tfevents.0.published", folder / f".draft-{os.getpid()}"
    with draft.open("wb") as file:
        writer = RecordWriter(file)
        # No time of day: the logs have none, and so the same curve is always the same file.
        writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())
        for epoch, values in sorted(read_curves()[name].values.items()):
            scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            # Lightning counts steps from 0 and gives what it logs at an epoch's end the number of its last step.
            step = epoch * steps_per_epoch - 1
            writer.write(Event(wall_time=0.0, step=step, summary=Summary(value=scalars)).SerializeToString())
    if path.is_file() and path.read_bytes() == draft.read_bytes():
        draft.unlink()  # a TensorBoard that is watching would show a replaced file's values twice
    else:
        draft.replace(path)
    return folder


class PublishedCurve(L.Callback):
    """Shows the authors' run next to ours: as a TensorBoard run of its own, and in a line after every validation.

    The TensorBoard run is `published_<curve>`, beside the folder of our run. Its steps are those of our epochs.

    Args:
        curve: A name of `read_curves()`, e.g. `vil2_tiny_e800_pretrain_192`.
        metric: What the line compares: `val/acc1` (percent) or `val/loss`.
    """

    def __init__(self, curve: str, metric: str = "val/acc1") -> None:
        curves = read_curves()
        if curve not in curves:
            raise ConfigError(
                f"PublishedCurve: curve={curve!r} is not a published curve. Available: {', '.join(sorted(curves))}. "
                "Set curve in the callback's init_args."
            )
        if metric not in METRICS:
            raise ConfigError(
                f"PublishedCurve: metric={metric!r} cannot be compared after a validation. Available: {', '.join(METRICS)}. "
                "Set metric in the callback's init_args."
            )
        self.name = curve
        self.curve = curves[curve]
        self.metric = metric
        self._warned = False

    # Not `on_fit_start`: the number of batches is not known before the loaders are.
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.max_epochs != self.curve.epochs:
            length = f"{trainer.max_epochs} epochs" if (trainer.max_epochs or -1) > 0 else "no fixed number of epochs"
            rank_zero_warn(
                f"PublishedCurve: this run has {length}, {self.name} had {self.curve.epochs}. Their schedules differ, so equal "
                "epochs are not at equal learning rates; only runs of the same length are comparable before their end."
            )
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers or not trainer.is_global_zero:
            return
        if not math.isfinite(trainer.num_training_batches):
            rank_zero_warn("PublishedCurve: the training data has no length, so the curve cannot be put on its steps.")
            return
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        for logger in loggers:
            # The logger's own folder: `trainer.log_dir` would be a broadcast, and may belong to another logger.
            write_curve(self.name, Path(logger.log_dir).parent, steps_per_epoch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        if self.metric not in trainer.callback_metrics:
            if not self._warned:
                rank_zero_warn(
                    f"PublishedCurve: metric={self.metric!r} was not logged by this validation: there is nothing to compare. "
                    f"Logged were: {', '.join(sorted(trainer.callback_metrics)) or 'none'}."
                )
                self._warned = True
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress
        part = 1.0 if batches.is_last_batch else batches.current.ready / trainer.num_training_batches
        line = self.verdict(trainer.current_epoch + part, float(trainer.callback_metrics[self.metric]))
        if line is not None:
            print(line, flush=True)

    def verdict(self, epoch: float, value: float) -> str | None:
        """One line on a value reached after `epoch` epochs; None if the log holds nothing up to there."""
        earlier = [known for known in self.curve.values if known <= epoch]
        if not earlier:
            return None
        nearest = max(earlier)
        published = self.curve.values[nearest][self.metric]
        digits = 3 if self.metric.endswith("loss") else 1
        difference = round(value - published, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
        line = f"epoch {epoch:g}: {self.metric} {value:.{digits}f}, published {published:.{digits}f} ({difference:+.{digits}f})"
        return line if nearest == epoch else f"{line} at epoch {nearest}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write all published curves as TensorBoard runs.")
    parser.add_argument("--logdir", default="logs", help="folder that TensorBoard reads")
    parser.add_argument("--steps_per_epoch", type=int, required=True, help="optimizer steps per epoch of your runs")
    args = parser.parse_args()
    if args.steps_per_epoch < 1:
        parser.error(f"--steps_per_epoch {args.steps_per_epoch} must be at least 1")
    for name in read_curves():
        print(write_curve(name, args.logdir, args.steps_per_epoch))


if __name__ == "__main__":
    main()
