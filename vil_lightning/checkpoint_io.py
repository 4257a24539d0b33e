"""Checkpoints that are there completely or not at all, and that are looked at before they are trusted."""

import contextlib
import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from vil_lightning.backbones.integrity import find_damage, seal
from vil_lightning.backbones.weights import WeightsError, read_file
from vil_lightning.errors import ConfigError

log = logging.getLogger(__name__)

LAST = "last.ckpt"


@dataclasses.dataclass
class KeepPolicy:
    """Which states of a run are kept beside `best.ckpt`.

    Args:
        last: How many of the latest states: `last.ckpt`, `last-1.ckpt` (the one before), and so on. With one alone there is
            nothing to fall back to when the disk has damaged it.
        every_hours: Keep one for good about so often, as `step=00012000.ckpt`. None for none.
        asynchronous: Write in the background while training goes on; needs room for a second copy of the state in the memory of
            the device. Pays where writing takes longer than a few steps.
    """

    last: int = 2
    every_hours: float | None = None
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"keep.last={self.last} must be at least 1.")
        if self.every_hours is not None and not self.every_hours > 0:
            raise ConfigError(f"keep.every_hours={self.every_hours} must be positive, or null for none.")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes next to the target, flushes to the disk, then renames; reads only what is undamaged.

    Lightning's own writer moves a temporary file from $TMPDIR, which is a copy where that is another file system: a process
    killed meanwhile would leave half a checkpoint in place of the previous one.

    A full or read-only disk costs no run: a checkpoint that cannot be written is named in the log, the one before stays, and
    training goes on to the next. Too many in a row, or a failure at the end of the run (`check_written`), is an error.

    Args:
        keep: What becomes of the `last.ckpt` that is replaced.
    """

    failures_tolerated = 2  # in a row

    def __init__(self, keep: KeepPolicy | None = None) -> None:
        self.keep = keep or KeepPolicy(last=1)
        self.failures = 0
        self._failure = ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one.

        Raises:
            ConfigError: If it cannot be written, and neither could the ones before.
        """
        if "://" in str(path):  # object storage has its own atomic writes
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            self._write(checkpoint, Path(path))
            self.failures = 0
        except (OSError, RuntimeError) as error:  # torch's writer turns the former into the latter
            self.failures += 1
            self._failure = f"{path} could not be written: {_reason(error)}."
            if self.failures > self.failures_tolerated:
                self.check_written()
            log.error(
                "%s %sTraining goes on; checkpoint.dirpath needs room before the next one is due.",
                self._failure,
                "The one before is still there. " if Path(path).is_file() else "",
            )

    def check_written(self) -> None:
        """Raises ConfigError if the latest checkpoint could not be written: at the end of a run it is what was trained."""
        if self.failures:
            raise ConfigError(
                f"{self._failure} {self.failures} in a row have failed. Make room, or set checkpoint.dirpath to another disk, "
                "and go on from the last good one with --resume auto."
            )

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("w+b") as file:
                torch.save(checkpoint, file)
                seal(file)
                file.flush()
                os.fsync(file.fileno())
            if target.name == LAST:
                self._keep_previous(target)
            partial.replace(target)
            _flush_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    def _keep_previous(self, target: Path) -> None:
        """Give the state that is about to be replaced its further names. `target` itself is never absent meanwhile."""
        if not target.is_file():
            return
        for i in range(self.keep.last - 1, 1, -1):
            if (younger := target.with_name(f"last-{i - 1}.ckpt")).is_file():
                younger.replace(target.with_name(f"last-{i}.ckpt"))
        if self.keep.last > 1:
            _link(target, target.with_name("last-1.ckpt"))
        if self.keep.every_hours is not None:
            kept = [path.stat().st_mtime for path in target.parent.glob("step=*.ckpt")]
            if not kept or time.time() - max(kept) >= 3600 * self.keep.every_hours:
                with contextlib.suppress(WeightsError):  # a damaged one is not worth keeping
                    step = int(read_file(target).get("global_step", 0))
                    _link(target, target.with_name(f"step={step:08d}.ckpt"))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one. Raises ConfigError if it is damaged."""
        if "://" not in str(path) and Path(path).is_file() and (damage := find_damage(path)):
            raise ConfigError(f"ckpt_path: {path} is damaged: {damage}. Take another one, or --resume auto.")
        # Everything here is tensors and plain values; nothing is ever unpickled.
        return super().load_checkpoint(path, map_location, weights_only=True)


def newest_good(folder: Path) -> Path | None:
    """The checkpoint from which a run is continued: the newest state in its folder that can be read completely.

    `last*.ckpt` and `step=*.ckpt` are states made for this; others (`best.ckpt`) are taken if none of these is left. Damaged
    ones are named in a warning.

    Returns:
        Its path; None if there are no checkpoints.

    Raises:
        ConfigError: If there are some, but none of them is the undamaged state of a run.
    """
    found: list[tuple[bool, int, bool, Path]] = []
    damaged: list[str] = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            content = read_file(path)
        except WeightsError as error:
            damaged.append(str(error))
            log.warning("A checkpoint is passed over: %s", error)
            continue
        if "loops" in content and "optimizer_states" in content:
            made_for_it = path.stem.startswith(("last", "step="))
            found.append((made_for_it, int(content.get("global_step", 0)), path.name == LAST, path))
    if damaged and not found:
        raise ConfigError(
            f"resume=auto: no checkpoint in {folder} can be used:\n  " + "\n  ".join(damaged) + "\n"
            "Choose another --run_name, or --overwrite true (with --resume never) to delete them and start again."
        )
    return max(found)[-1] if found else None


def remove_partial(folder: Path) -> None:
    """Delete what processes that were killed while writing have left in a run's folder."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, atomically; it moves where the file system knows no hard links."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
        partial.replace(target)
    except OSError:
        source.replace(target)


def _flush_folder(folder: Path) -> None:
    """Bring a rename to the disk (not everywhere a folder can be opened: then the file system is trusted)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (str(cause or error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
