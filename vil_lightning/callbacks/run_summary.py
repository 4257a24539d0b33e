"""The run's first and last lines, and its hyper-parameters in TensorBoard."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.panel import Panel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of those that are being trained; frozen networks and teachers are in eval mode."""
    return [(name, part) for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.training]


def statistics_of(module: L.LightningModule) -> str:
    """What is computed over the images of a micro batch of all devices, with its verb; empty if nothing is."""
    parts = [getattr(module, "micro_batch_statistics", "")]
    if batch_norms(module):
        parts.append("batch norms take their statistics")
    return ", ".join(part for part in parts if part)


class RunSummary(L.Callback):
    """Prints what is about to run, and at the end what to run next.

    A module may add lines with `run_info() -> dict[str, str]`, a command with `next_command(checkpoint) -> str`, and results
    that are known only at the end with `final_metrics: dict[str, float]`; its parts may say `mlstm_info() -> str`.
    What it computes over a micro batch it says, with a verb, in `micro_batch_statistics: str`.

    Args:
        hyper_parameters: Flat settings for TensorBoard's HPARAMS page.
    """

    def __init__(self, hyper_parameters: dict[str, Any] | None = None) -> None:
        self.hyper_parameters = hyper_parameters or {}
        self.console = Console()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_dir = trainer.log_dir  # a broadcast: every process must ask
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
        lines = getattr(pl_module, "run_info", lambda: {"method": type(pl_module).__name__})()
        lines["parameters"] = f"{trainable / 1e6:.2f} M trained, {frozen / 1e6:.2f} M not"
        if hasattr(data, "train_source"):
            lines["data"] = (
                f"{type(data).__name__}: {len(data.train_source)} training and {len(data.val_source)} val images, "
                f"{data.num_classes or 'no'} classes"
            )
            batch = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
            lines["batch"] = (
                f"{batch} = {data.batch_size} x {trainer.world_size} device(s) x {trainer.accumulate_grad_batches} accumulated"
            )
            acting = statistics_of(pl_module)
            if acting and trainer.accumulate_grad_batches > 1:
                lines["batch"] += f"; not as in one batch of {batch}: {acting} once per accumulated batch"
        alone = [
            name
            for name, norm in batch_norms(pl_module)
            if not isinstance(norm, nn.SyncBatchNorm) and not getattr(norm, "synchronised", False)
        ]
        if alone and trainer.world_size > 1:
            rank_zero_warn(
                f"{len(alone)} batch norms ({alone[0]}, ...) see the images of their own device only, so the run depends on "
                "the number of devices. Set trainer.sync_batchnorm=true for statistics of all devices."
            )
        steps = trainer.estimated_stepping_batches
        lines["length"] = f"{trainer.max_epochs} epochs, {steps} steps"
        lines["hardware"] = f"{trainer.num_devices} x {trainer.strategy.root_device.type}, {trainer.precision}"
        # Of networks with mLSTMs, once for each kind.
        backends = {module.mlstm_info(): None for module in pl_module.modules() if hasattr(module, "mlstm_info")}  # type: ignore[operator]
        if backends:
            lines["mLSTM"] = "; ".join(backends)
        if trainer.global_step:
            lines["resumed at"] = f"step {trainer.global_step}"
        lines["logs"] = f"{log_dir}   (tensorboard --logdir logs)"
        if self._checkpoint_dir(trainer):
            lines["checkpoints"] = str(self._checkpoint_dir(trainer))
        width = max(map(len, lines))
        text = "\n".join(f"[bold]{key:<{width}}[/bold]  {value}" for key, value in lines.items())
        self.console.print(Panel(text, title="vil_lightning", expand=False))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "train/loss"))}
        metrics.update(getattr(pl_module, "final_metrics", {}))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self.hyper_parameters:
                logger.log_hyperparams(self.hyper_parameters, {f"final/{k}": v for k, v in metrics.items()})
        if not trainer.is_global_zero:
            return
        for callback in trainer.checkpoint_callbacks:
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in trainer.callback_metrics and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_warn(
                    f"checkpoint.monitor={monitor!r} was never logged, so there is no best.ckpt of this run. "
                    f"Logged were: {', '.join(sorted(trainer.callback_metrics))}."
                )
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.console.print(f"Finished at step {trainer.global_step}. {shown}")
        bad = getattr(trainer.datamodule, "known_bad", {})  # type: ignore[attr-defined]
        if bad:
            self.console.print(f"Unreadable images skipped by this process: {len(bad)}, such as {next(iter(bad))}")
        directory = self._checkpoint_dir(trainer)
        last = Path(directory) / "last.ckpt" if directory else None
        next_command = getattr(pl_module, "next_command", None)
        if last is not None and last.is_file() and next_command is not None:
            self.console.print(f"Weights: {last}\nNext:    {next_command(str(last))}", soft_wrap=True)

    @staticmethod
    def _checkpoint_dir(trainer: L.Trainer) -> Path | None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                path = Path(callback.dirpath)
                return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return None
