"""Turn any data set of this package into shards for `StreamingData`:

    python -m vil_lightning.data.convert --data ImageFolder --data.root DIR --out SHARDS
    python -m vil_lightning.data.convert --out SHARDS --verify

Files of images are taken over byte by byte; images in memory become PNG, which loses nothing. Every image is decoded once, to
find those that cannot be: they are left out and listed. Training images come in an order shuffled by `--seed`, because folders
are sorted by class and a shard should hold a bit of everything; validation images keep theirs, so that scores and predictions
can be compared one by one.

The shards depend on the images, `--seed` and `--images_per_shard` alone. If the conversion is interrupted in whatever way, the
same command goes on with the first shard that is not there, and the result is the same to the byte.
"""

import fcntl
import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vil_lightning.data.conversion import Conversion, listed
from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.shards import load_index, write_file
from vil_lightning.errors import ConfigError

log = logging.getLogger(__name__)
SPLITS = ("train", "val")
JOB = "conversion.json"  # what the shards were made from


def convert(data: ImageDataModule, out: Path, job: dict[str, Any], workers: int, console: Console) -> None:
    """Convert both splits of a data module, or go on doing so.

    Args:
        data: Any of the package.
        out: Folder of the shards.
        job: Everything that the shards depend on: `describe`.
        workers: Processes that read and encode; 0 leaves that to this one.
        console: Shows the progress.

    Raises:
        ConfigError: If `out` holds something else, or too many images are bad.
    """
    data.prepare_data()
    data.setup("fit")
    sources = {"train": data.train_source, "val": data.val_source}
    for split, source in sources.items():
        if not len(source):
            raise ConfigError(f"data: there are no images for {split}/.")
        labels = hashlib.sha256(json.dumps(source.labels).encode()).hexdigest()
        job = job | {f"{split}.num_images": len(source), f"{split}.labels_sha256": labels}
    with _claimed(out, job), _progress(console) as progress:
        for split, source in sources.items():
            generator = torch.Generator().manual_seed(job["seed"])
            shuffled = torch.randperm(len(source), generator=generator).tolist()
            order = shuffled if split == "train" else list(range(len(source)))
            conversion = Conversion(out / split, source, order, job["images_per_shard"], data.max_bad_fraction)
            if (out / split / "index.json").is_file():
                conversion.clean()  # it was killed between the last two steps
                continue
            conversion.run(workers, progress)
            conversion.finish(data.classes)
        for path in out.glob("*.part"):
            path.unlink()


def describe(config: Namespace, data: ImageDataModule) -> dict[str, Any]:
    """What the shards depend on: arguments of the conversion and of the data set, less those about views and batches."""
    ignored = inspect.signature(ImageDataModule).parameters.keys() - {"train_fraction", "classes"}
    own = {key: value for key, value in config.data.init_args.items() if key not in ignored}
    job = {"seed": config.seed, "images_per_shard": config.images_per_shard, "data": config.data.class_path}
    job |= {f"data.{key}": value for key, value in sorted(own.items())}
    return job | ({"data.seed": data.seed} if data.train_fraction < 1 else {})


@contextmanager
def _claimed(out: Path, job: dict[str, Any]) -> Iterator[None]:
    """Make the folder of a conversion, or make sure that it is this conversion's and nobody else is at it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}).") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers, which may outlive this process
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(f"--out {out}: another process is converting into this folder. One is enough.") from error
        except OSError as error:
            log.warning(
                "two conversions into %s at once would not be noticed: no locks there (%s)", out, error.strerror
            )
        try:
            _check_job(out, json.loads(json.dumps(job, default=str)))
            yield
        finally:
            (out / ".lock").unlink()


def _check_job(out: Path, job: dict[str, Any]) -> None:
    if not (out / JOB).exists():
        if others := sorted(path.name for path in out.iterdir() if not path.name.startswith((".lock", JOB))):
            raise ConfigError(f"--out {out} must be an empty or a new folder, but holds {', '.join(others[:5])}.")
        write_file(out / JOB, (json.dumps(job, indent=1) + "\n").encode())
    before = json.loads((out / JOB).read_text())
    if before != job:
        differences = [
            f"{key}: was {before.get(key)!r}, now {job.get(key)!r}"
            for key in sorted(before.keys() | job.keys())
            if before.get(key) != job.get(key)
        ]
        raise ConfigError(
            f"--out {out} holds a conversion with other arguments. Use the same, or another --out, or delete that folder:\n  "
            + "\n  ".join(differences)
        )


def verify(out: Path, console: Console) -> None:
    """Check counts, sizes and checksums, and say what is there.

    Raises:
        ConfigError: If something is not as it was written.
    """
    unfinished = [split for split in SPLITS if not (out / split / "index.json").is_file()]
    if unfinished:
        raise ConfigError(f"--out {out}: there is no finished conversion: {unfinished[0]}/index.json is missing.")
    for split in SPLITS:
        index = load_index(out / split)
        num_bytes = sum(shard.num_bytes for shard in index.shards)
        with _progress(console, DownloadColumn()) as progress:
            bar = progress.add_task(f"checking {split}", total=num_bytes)
            index.verify(lambda size, bar=bar, progress=progress: progress.advance(bar, size))  # type: ignore[misc]
        console.print(
            f"{split}: {len(index.samples):,} images, {len(index.shards):,} shards, {num_bytes:,} bytes, intact"
        )
        if index.left_out:
            console.print(
                f"{split}: {len(index.left_out)} left out, unreadable:\n  {listed(index.left_out)}", markup=False
            )


def _progress(console: Console, *columns: Any) -> Progress:
    count = columns or (MofNCompleteColumn(),)
    return Progress(TextColumn("{task.description}"), BarColumn(), *count, TimeRemainingColumn(), console=console)


# --- command line -----------------------------------------------------------------------------------------------------


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m vil_lightning.data.convert",
        description="Turn a data set into shards for StreamingData.",
        exit_on_error=False,
    )
    parser.add_subclass_arguments(ImageDataModule, "data", required=False, help="The data set to be converted.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the shards, or of an interrupted conversion.")
    parser.add_argument("--images_per_shard", type=int, default=1000, help="1,000 photographs are about 100 MB.")
    parser.add_argument("--seed", type=int, default=0, help="Of the order of the training images.")
    parser.add_argument("--workers", type=int, default=4, help="Processes that read images. The shards are the same.")
    parser.add_argument("--verify", action="store_true", help="Without --data: check an existing folder.")
    return parser


def run(args: list[str] | None) -> None:
    """What `main` does, with exceptions."""
    parser = build_parser()
    config = parser.parse_args(args)
    if config.images_per_shard < 1 or config.workers < 0 or config.seed < 0:
        raise ConfigError(
            f"--images_per_shard {config.images_per_shard} must be at least 1, --workers {config.workers} and --seed "
            f"{config.seed} must not be negative."
        )
    if config.data is None and not config.verify:
        raise ConfigError(
            "--data is not set. Set it to the data set to be converted, or --verify to check what is in --out."
        )
    console = Console()
    out = Path(config.out)
    if config.data is not None:
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
        data = instantiate(config).data
        try:
            convert(data, out, describe(config, data), config.workers, console)
        except OSError as error:
            raise ConfigError(
                f"{error.filename or out}: {error.strerror or error}. The same command goes on."
            ) from error
    verify(out, console)
    if config.data is not None:
        console.print(f"Train on it with --data StreamingData --data.root {out}", markup=False, soft_wrap=True)


def main(args: list[str] | None = None) -> None:
    """Run the command line; what a user can repair ends with one message and exit code 2."""
    try:
        run(args)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except (ArgumentError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError | ArgumentError):
            cause = cause.__cause__
        if cause is None:
            raise
        print(f"\nerror: {cause}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
