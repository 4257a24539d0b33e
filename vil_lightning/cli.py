"""The command line: Lightning's CLI, with this project's conventions for runs.

A run is named after its recipe (or `--run_name`). Logs go to `logs/<run>/`, checkpoints to `checkpoints/<run>/last.ckpt` and
`best.ckpt`. A run never replaces the checkpoints of another one unless told to with `--overwrite true`.
"""

import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import vil_lightning.data
import vil_lightning.methods  # noqa: F401 - makes the short class names known
from vil_lightning.allocator import keep_freed_memory
from vil_lightning.backbones.weights import WeightsError, read_file
from vil_lightning.callbacks import LastCheckpoint, PredictionWriter, RunProgressBar, RunSummary, Throughput
from vil_lightning.checkpoint_io import LAST, AtomicCheckpointIO, KeepPolicy, newest_good, remove_partial
from vil_lightning.checks import check_sections, check_values
from vil_lightning.data.loading import dead_worker, death_of_worker
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.command import main as evaluation_command
from vil_lightning.methods.batch_norm import BatchNormSync
from vil_lightning.methods.fully_sharded import FullyShardedStrategy, check_precision
from vil_lightning.methods.run_length import divide_batch
from vil_lightning.out_of_memory import describe, is_out_of_memory
from vil_lightning.reliability import FaultPolicy, Preemption, StepGuard, lost_peer, watch_launcher
from vil_lightning.speed.command import main as speed_command

LOG_ROOT = Path("logs")
CHECKPOINT_ROOT = Path("checkpoints")


class SaveRunConfig(SaveConfigCallback):
    """Saves a run's settings so that they can be run again under another name.

    Without the folders that were made from its name, without the permission to delete an earlier run, and without the
    checkpoint that this start found.
    """

    def __init__(self, parser: Any, config: Namespace, *args: Any, **kwargs: Any) -> None:
        config = config.clone()
        if config.get("overwrite") is not None:
            config.overwrite = False
        if config.get("resume") == "auto":
            config.ckpt_path = None
        if config.checkpoint.dirpath is not None and Path(config.checkpoint.dirpath).parent == CHECKPOINT_ROOT:
            config.run_name = Path(config.checkpoint.dirpath).name
            config.checkpoint.dirpath = None
        logger = config.trainer.logger
        if isinstance(logger, Namespace) and logger.get("init_args", {}).get("save_dir") == str(LOG_ROOT):
            config.trainer.logger = True
        super().__init__(parser, config, *args, **kwargs)
        self._text = ""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._text = self.parser.dump(self.config, skip_none=False)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says how it was made, also where it has lost its folder: `config`, the text of config.yaml."""
        checkpoint["config"] = self._text


class VilCLI(LightningCLI):
    """Lightning's arguments, and `run_name`, `overwrite`, `resume`, `global_batch_size`, `checkpoint`, `keep`, `faults` and
    `predictions`.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Name of the folders for logs and checkpoints; the recipe's name if not set.",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Delete logs and checkpoints of an earlier run of this name."
        )
        parser.add_argument(
            "--resume",
            type=Literal["never", "auto"],
            default="never",
            help="auto: continue the run of this name from its newest undamaged checkpoint, or start it if there is none. The "
            "same command then starts a run and restarts it after any fault.",
        )
        parser.add_argument(
            "--global_batch_size",
            type=int | None,
            default=None,
            help="Images per optimiser step over all devices. data.batch_size is then the largest batch of one device, and "
            "accumulation follows from both and the number of devices.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_class_arguments(KeepPolicy, "keep")
        parser.add_class_arguments(FaultPolicy, "faults")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )

    def _parse_ckpt_path(self) -> None:
        # Lightning reads the checkpoint here, and would fail on a damaged one with a traceback.
        config = self.config[self.config.subcommand] if self.config.get("subcommand") else self.config
        if config.get("resume") == "auto" and self.config.get("subcommand") == "fit":
            config.ckpt_path = checkpoint_to_resume(config)
        path = config.get("ckpt_path") if self.config.get("subcommand") else None
        if path:
            check_resumable(path, training=self.config.subcommand == "fit")
        super()._parse_ckpt_path()

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigError(f"seed_everything: {error}.") from error

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        for key in ("trainer", "checkpoint", "predictions", "keep", "faults"):
            if not isinstance(config[key], Namespace):
                raise ConfigError(f"{key}={config[key]!r} must be a section of settings, `key: value`.")
        check_values({key: config[key] for key in ("trainer", "checkpoint", "keep", "faults", "model", "data")})
        if (config.trainer.log_every_n_steps or 0) < 0:
            raise ConfigError(
                f"trainer.log_every_n_steps={config.trainer.log_every_n_steps} must be a number of steps, or 0 for no logs."
            )
        self.run_name = run_name_of(config)
        # Scores and predictions of a run get a folder of their own: they must not change the run's curves or config.yaml.
        log_name = self.run_name if self.subcommand in (None, "fit") else f"{self.run_name}_{self.subcommand}"
        checkpoint_dir, log_dir = CHECKPOINT_ROOT / self.run_name, LOG_ROOT / log_name
        if config.trainer.logger in (None, True):
            config.trainer.logger = Namespace(
                class_path="lightning.pytorch.loggers.TensorBoardLogger",
                init_args=Namespace(save_dir=str(LOG_ROOT), name="", version=log_name, default_hp_metric=False),
            )
        if getattr(config.trainer.strategy, "class_path", "").endswith(f".{FullyShardedStrategy.__name__}"):
            check_precision(config.trainer.precision)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(checkpoint_dir)
        if config.checkpoint.save_last not in (True, False, None):
            raise ConfigError(f"checkpoint.save_last={config.checkpoint.save_last!r} must be true or false.")
        config.predictions.overwrite = config.predictions.overwrite or config.overwrite
        if config.trainer.enable_progress_bar is False:
            self.trainer_defaults["callbacks"] = [
                callback for callback in self.trainer_defaults["callbacks"] if not isinstance(callback, RunProgressBar)
            ]
        if config.get("ckpt_path"):
            config.weights_only = True
        self.to_delete: list[Path] = []
        if self.subcommand == "fit" and not config.trainer.fast_dev_run:
            # Every process refuses, so that none waits for the others; one deletes.
            paths = claim_run(Path(config.checkpoint.dirpath), log_dir, config.get("ckpt_path"), config.overwrite)
            self.to_delete = paths if getattr(rank_zero_only, "rank", 0) == 0 else []

    def _run_subcommand(self, subcommand: str) -> None:
        watch_launcher()
        try:
            super()._run_subcommand(subcommand)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise ConfigError(describe(error, self.trainer)) from error
            if (reason := death_of_worker(error)) is not None:
                raise dead_worker(reason) from error
            message = lost_peer(error, self.trainer)
            if message is None:
                raise
            traceback.print_exc()
            print(f"\nerror: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # other ways out wait for the lost process

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError, ValueError) as error:  # of Lightning, which says which argument it means
            raise find_repairable(error) or ConfigError(f"trainer: {error}") from error

    def before_fit(self) -> None:
        strategy = self.trainer.strategy
        if (images := self.config["fit"].global_batch_size) is not None:
            divide_batch(self.trainer, self.model, self.datamodule, images)
        if getattr(strategy, "_layer_sync", None) is not None:  # trainer.sync_batchnorm
            strategy._layer_sync = BatchNormSync(on_cpu=strategy.root_device.type == "cpu")  # type: ignore[attr-defined]
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            keep = KeepPolicy(**self.config["fit"].keep.as_dict())
            writer = AtomicCheckpointIO(keep)
            strategy.checkpoint_io = AsyncCheckpointIO(writer) if keep.asynchronous else writer
        last = self._replace_save_last()
        self._add_reliability(last)
        if self.to_delete:
            self.trainer.callbacks.append(_DeleteAtStart(self.to_delete))  # type: ignore[attr-defined]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunSummary):
                callback.hyper_parameters = flatten(self.config["fit"], keys=("model", "data", "seed_everything"))

    def before_validate(self) -> None:
        self._check_has("validation_step")
        self._check_trained()

    def before_test(self) -> None:
        self._check_has("test_step")
        self._check_trained()

    def before_predict(self) -> None:
        self._check_trained()

    def _check_has(self, step: str) -> None:
        if getattr(type(self.model), step) is getattr(L.LightningModule, step):
            raise ConfigError(
                f"model.class_path={type(self.model).__name__} has no {step}, so `{self.subcommand}` cannot score it. Name "
                "another model, or use `main.py evaluate`, which scores the network of any run."
            )

    def _check_trained(self) -> None:
        if hasattr(self.model, "check_trained"):
            self.model.check_trained(self.config[self.subcommand].get("ckpt_path"))

    def _add_reliability(self, last: LastCheckpoint | None) -> None:
        """Guard the steps, and stop in order when told to. The latter comes last, so that all others have seen the step."""
        folder = Path(self.config["fit"].checkpoint.dirpath)
        guard = StepGuard(
            FaultPolicy(**self.config["fit"].faults.as_dict()), folder / LAST if last is not None else None
        )
        self.trainer.callbacks.insert(0, guard)  # type: ignore[attr-defined]
        stop = Preemption(last)
        stop.listen()
        self.trainer.callbacks.append(stop)  # type: ignore[attr-defined]
        if not self.trainer.fast_dev_run and self.trainer.is_global_zero:  # type: ignore[attr-defined]
            if last is not None:
                check_writable(folder, "checkpoint.dirpath")
            if self.trainer.logger is not None:
                check_writable(LOG_ROOT, "trainer.logger")
            remove_partial(folder)

    def _replace_save_last(self) -> LastCheckpoint | None:
        """Hand the writing of `last.ckpt` over from the callback under the key `checkpoint` to `LastCheckpoint`."""
        own = self.config_init["fit"]["checkpoint"]
        save_last, own.save_last = own.save_last, None
        settings = self.config["fit"].checkpoint
        # On an error, Lightning would write the state of that moment over best.ckpt.
        own.save_on_exception = False
        if save_last and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            names = ("every_n_epochs", "every_n_train_steps", "train_time_interval", "save_on_exception")
            last = LastCheckpoint(settings.dirpath, **{name: settings[name] for name in names})
            # Behind the others, so that it records the best value that they have seen.
            self.trainer.callbacks.append(last)  # type: ignore[attr-defined]
            return last
        return None


def run_name_of(config: Namespace) -> str:
    """`run_name`, or the name of the first YAML file, or `run`."""
    if config.run_name:
        name = config.run_name
    else:
        files = config.get("config") or []
        name = Path(str(files[0])).stem if files else "run"
    if Path(name).name != name or name in (".", ".."):
        raise ConfigError(f"run_name={name!r} must be a plain folder name, without slashes.")
    return name


def claim_run(checkpoint_dir: Path, log_dir: Path, ckpt_path: str | None, overwrite: bool) -> list[Path]:
    """Refuse to mix a new run with the checkpoints of an old one.

    Returns:
        What has to be deleted before the run starts.

    Raises:
        ConfigError: If there are checkpoints, and the run neither continues from one of them nor may overwrite them.
    """
    existing = sorted(checkpoint_dir.glob("*.ckpt"), key=lambda path: (path.name == LAST, path.name))
    if ckpt_path and Path(ckpt_path).resolve().parent == checkpoint_dir.resolve():
        return []
    if existing and not overwrite:
        raise ConfigError(
            f"{checkpoint_dir} already holds {', '.join(path.name for path in existing)}. Choose one of:\n"
            f"  --resume auto   continue that run (or --ckpt_path {existing[-1]})\n"
            f"  --run_name NAME   keep it, and start a new one next to it\n"
            f"  --overwrite true   delete it (checkpoints and logs) and start again"
        )
    return [*existing, *log_dir.rglob("events.out.tfevents.*"), *log_dir.glob("results.json")] if overwrite else []


def checkpoint_to_resume(config: Namespace) -> str | None:
    """What `--resume auto` continues from; None to start.

    Raises:
        ConfigError: If the other settings contradict it, or all checkpoints of the run are damaged.
    """
    if config.get("ckpt_path"):
        raise ConfigError(
            f"resume=auto finds the checkpoint itself, ckpt_path={config.ckpt_path} names one. Drop one of them."
        )
    if config.overwrite:
        raise ConfigError("resume=auto continues a run, overwrite=true deletes it. Drop one of them.")
    if config.trainer.fast_dev_run:
        return None
    folder = Path(config.checkpoint.dirpath or CHECKPOINT_ROOT / run_name_of(config))
    found = newest_good(folder)
    return None if found is None else str(found)


def check_writable(folder: Path, key: str) -> None:
    """Better now than when the first checkpoint is due. Leaves nothing behind.

    Raises:
        ConfigError: If no file can be made in a folder, or in the one in which it will be made.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to ({error.strerror or error}). Set {key} to another folder."
        ) from error


class _DeleteAtStart(L.Callback):
    """Deletes an overwritten run's files when training starts, after everything that could still refuse the new one."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for path in self.paths:
            path.unlink(missing_ok=True)


def check_resumable(path: str, training: bool = True) -> None:
    """Read a checkpoint that is to be resumed before anything is built; to be scored only, it needs no optimiser state.

    Raises:
        ConfigError: If it is missing, damaged, or not the state of a run.
    """
    try:
        content = read_file(path)
    except (WeightsError, FileNotFoundError) as error:
        raise ConfigError(f"ckpt_path: {error}") from error
    if "loops" not in content or (training and "optimizer_states" not in content):
        raise ConfigError(
            f"ckpt_path={path} holds weights but not the state of a run, so it cannot be resumed. "
            "To start from its weights, use --model.backbone.weights."
        )


def flatten(config: Any, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nested settings as `a.b.c: value`, for TensorBoard."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            for key, child in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), child)
        else:
            flat[prefix] = value if isinstance(value, int | float | str | bool) else str(value)

    for key in keys:
        walk(key, config.get(key))
    return flat


def build_cli(args: list[str] | None = None, run: bool = True) -> VilCLI:
    """The CLI, from `sys.argv` or a list; `run=False` builds the objects without running the subcommand."""
    return VilCLI(
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # every method brings its own parameter groups
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "callbacks": [RunProgressBar(), Throughput(), RunSummary()],
            "enable_model_summary": False,
        },
        # All options would be two pages above the message of an error; --help explains them.
        parser_kwargs={
            name: {"usage": f"main.py {name} [--config FILE] [--KEY VALUE ...] [--help]"}
            for name in ("fit", "validate", "test", "predict")
        },
        args=args,
        run=run,
    )


def silence_known_messages() -> None:
    """Hide what other packages say about things that are meant here, so that what remains is worth reading."""
    for message in (
        r".*torch\.nn\.utils\.weight_norm` is deprecated",  # inside lightly's DINO head
        r".*isinstance\(treespec, LeafSpec\)",  # inside lightning
        r"Found \d+ module\(s\) in eval mode",  # teachers and frozen backbones
        r"You passed in a `val_dataloader` but have no `validation_step`",  # the kNN callback reads it
        r".*configure_optimizers` returned `None`",  # the probe's classifiers do not exist yet
        r".*does not have many workers",  # the built-in data set is in memory
        r".*could not find the monitored key",  # kNN runs every few epochs
        r"LightningCLI's args parameter is intended",  # commands with arguments of their own pass on the rest
    ):
        warnings.filterwarnings("ignore", message=message)
    advertisement = "For seamless cloud logging"
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: advertisement not in record.getMessage())


def main(args: list[str] | None = None) -> None:
    """Run the command line; what a user can repair ends with one message and exit code 2."""
    silence_known_messages()
    if not torch.cuda.is_available():
        keep_freed_memory()
    words = sys.argv[1:] if args is None else args
    if words and words[0] in ("evaluate", "compare", "embed"):  # no subcommands of Lightning's trainer
        return evaluation_command(words[0], words[1:])
    if words and words[0] == "speed":
        return speed_command(words[1:])
    try:
        check_sections(words)
        build_cli(args)
    except (
        SIGTERMException
    ):  # Lightning's own answer to the signal during validation alone; it would look like a success
        sys.exit(128 + signal.SIGTERM)
    except (ValueError, MisconfigurationException) as error:
        repairable = find_repairable(error)
        if repairable is None:
            raise
        print(f"\nerror: {repairable}", file=sys.stderr)
        sys.exit(2)


def find_repairable(error: BaseException) -> BaseException | None:
    """What a user can repair, in the chain of causes: jsonargparse wraps the errors of the classes it builds."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigError | MisconfigurationException):
        cause = cause.__cause__
    return cause
