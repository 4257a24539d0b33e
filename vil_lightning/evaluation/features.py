"""Features of a frozen network: every image passes through it once, and what is read out is kept on disk.

Nothing here grows with the number of images but the files. Processes of a distributed run share the work: whole batches are
dealt to them in turn, so that each image is computed in the same company whatever their number, and the result is the same to
the last bit.
"""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from rich.progress import track
from torch import Tensor, nn

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.loading import ImageSource, ResumableLoader, TransformedDataset, collate
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.cache import (
    Entry,
    FeatureCache,
    RowFile,
    allocate,
    content_key,
    fingerprint,
    log,
    numbers_hash,
)
from vil_lightning.evaluation.processes import gather, on_first, portable, processes
from vil_lightning.evaluation.readouts import READOUT_NAMES, read_out
from vil_lightning.methods.backbone import (
    BackboneConfig,
    build_backbone,
    check_input_size,
    resolve_backbone,
    weights_hash,
)

VERSION = 1  # of the read-outs: raise it when one of them changes, so that old features are not used
Precision = Literal["32", "bf16"]


@dataclass
class FeatureSet:
    """A read-out of all readable images of a split.

    Args:
        features: (N, D), float32 or bfloat16, on the CPU; memory-mapped if they are cached. Writing to them does not change
            the cache.
        labels: (N,) int64.
        readout: Its name, one of `READOUT_NAMES`.
        key: SHA-256 of all that the features were made from.
        indices: (N,) int64, places of the images in the source, ascending. Unreadable images are left out.
    """

    features: Tensor
    labels: Tensor
    readout: str
    key: str
    indices: Tensor


def extract(
    backbone_config: BackboneConfig,
    data: ImageDataModule,
    split: Literal["train", "val"],
    readouts: Sequence[str],
    *,
    cache_dir: Path | None,
    precision: Precision = "32",
    device: str = "auto",
    progress: bool = True,
    shown: float = 1.0,
) -> dict[str, FeatureSet]:
    """Read-outs of a network on a split, by name, in one pass over the images or from the cache.

    With `torch.distributed` initialised, all processes must call this, and all get the result.

    Args:
        backbone_config: The network. Without weights it is initialised from `data.seed`, so it is the same at every call.
        data: After `setup`. The evaluation transform is used.
        split: Of `data`.
        readouts: Some of `READOUT_NAMES`. Each is a cache entry of its own: only those that are missing are computed.
        cache_dir: Where features are kept; several processes need one that all of them see. None keeps them in memory.
        precision: "bf16" computes under autocast and keeps features in bfloat16.
        device: "auto" takes the process's CUDA device if there is one.
        progress: Show a bar on the first process.
        shown: Share of the rows of patches that the network is shown, from the top; see `read_out`.

    Raises:
        ConfigError: Before the first image, for a read-out that is not known or not possible with this network, a size that the
            network does not take, or a cache that cannot be used; during the pass, for too many unreadable images or features
            that are not finite.
    """
    readouts = list(dict.fromkeys(readouts))
    _check_arguments(split, readouts, precision)
    rank, world_size = processes()
    if world_size > 1 and cache_dir is None:
        raise ConfigError(f"cache_dir is not set, but {world_size} processes share features through it. Set cache_dir.")
    source = data.train_source if split == "train" else data.val_source
    if len(source) == 0:
        raise ConfigError(f"data: the {split} set holds no images.")
    place = _device(device)
    config = resolve_backbone(backbone_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        backbone = build_backbone(config, quiet=True)
    backbone.eval().requires_grad_(False).to(place)
    check_input_size(backbone, data.img_size, "data.img_size")
    run = _Pass(
        backbone, data, source, precision, place, f"Features of {split}" if progress and rank == 0 else None, shown
    )
    dims = run.dims(readouts)

    weights = weights_hash(backbone)
    if len(set(gather(weights))) > 1:
        raise ConfigError(f"backbone.weights={config.weights}: the processes hold different weights. Is it one file?")
    parts = on_first(lambda: key_parts(config, weights, data, source, precision))
    if shown < 1:
        parts["shown"] = shown
    keys = {name: content_key({**parts, "readout": name}) for name in readouts}
    meta = {"parts": parts, "dtype": run.dtype_name, "num_source": len(source), **run.circumstances()}
    if cache_dir is None:
        entries = _compute_in_memory(run, dims, meta)
    else:
        cache = FeatureCache(cache_dir)
        missing = on_first(lambda: [name for name in readouts if cache.load(keys[name]) is None])
        if missing:
            _compute_on_disk(run, cache, {name: dims[name] for name in missing}, keys, meta)
        entries = {name: _loaded(cache, keys[name]) for name in readouts}
    if weights_hash(backbone) != weights:
        raise RuntimeError("feature extraction changed the frozen backbone")
    _check_same_images(entries, keys, cache_dir)
    return {
        name: FeatureSet(entry.features, entry.labels, name, keys[name], entry.indices)
        for name, entry in entries.items()
    }


def key_parts(
    config: BackboneConfig, weights: str, data: ImageDataModule, source: ImageSource, precision: str
) -> dict[str, Any]:
    """All that features depend on, but for the read-out.

    Args:
        config: After `resolve_backbone`.
        weights: `weights_hash` of the network.
    """
    transform = data.eval_transform
    return {
        "version": VERSION,
        "backbone": {"name": config.name, "kwargs": config.kwargs, "sha256": weights},
        "images": fingerprint(source),
        "labels": numbers_hash(source.labels),
        "transform": {
            "name": type(transform).__qualname__,
            "img_size": transform.img_size,
            "crop_pct": transform.crop_pct,
            "mean": list(data.mean),
            "std": list(data.std),
            **(
                {**transform.options, "seed": data.seed} if transform.options else {}
            ),  # what is random is drawn from it
        },
        "precision": precision,
    }


# --- a pass over the images -------------------------------------------------------------------------------------------


class _Pass:
    """A network, the images of a split, and how the one is applied to the other.

    Args:
        title: Of the progress bar; None for none.
        shown: Share of the rows of patches.
    """

    def __init__(
        self,
        backbone: nn.Module,
        data: ImageDataModule,
        source: ImageSource,
        precision: str,
        device: torch.device,
        title: str | None,
        shown: float = 1.0,
    ) -> None:
        self.backbone = backbone
        self.data = data
        self.source = source
        self.device = device
        self.title = title
        self.shown = shown
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.dtype_name = str(self.dtype).removeprefix("torch.")

    def dims(self, names: Sequence[str]) -> dict[str, int]:
        """Widths of the read-outs, from one empty image."""
        image = torch.zeros(1, 3, self.data.img_size, self.data.img_size, dtype=torch.uint8)
        return {name: rows.shape[1] for name, rows in self._features(image, names).items()}

    def circumstances(self) -> dict[str, Any]:
        """What may change the last digits only, or nothing: not part of a key."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "batch_size": self.data.eval_batch_size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        }

    def run(self, names: Sequence[str], write: Callable[[str, int, Tensor], None]) -> Tensor:
        """Hand read-outs to `write(name, start, rows)`, where `start` is the place of the first row in the source.

        Returns:
            Places (N,) of the images that could be read, by whatever process.
        """
        error, unreadable, num_rows = None, [], 0
        try:
            for start, images, bad in self._batches():
                for name, rows in self._features(images, names).items():
                    if not rows.isfinite().all():
                        raise ConfigError(
                            f"backbone: read-out {name} of images {start} to {start + len(rows) - 1} is not finite. Check "
                            "backbone.weights."
                        )
                    write(name, start, rows)
                num_rows += len(images)
                unreadable = bad
        except Exception as caught:
            error = caught
        # Nobody may be left waiting for a process that failed.
        outcomes = gather((portable(error), unreadable, num_rows))
        if error is not None:
            raise error
        for other, _, _ in outcomes:
            if other is not None:
                raise other
        assert sum(count for _, _, count in outcomes) == len(self.source)
        readable = torch.ones(len(self.source), dtype=torch.bool)
        for _, places, _ in outcomes:
            readable[places] = False
        num_bad, limit = int((~readable).sum()), self.data.max_bad_fraction
        if num_bad > limit * len(readable):  # of all processes, each of which knows its own
            raise ConfigError(
                f"{num_bad} of {len(readable)} images cannot be read, more than data.max_bad_fraction={limit} allows. Repair "
                "or remove them (the log names them), or raise data.max_bad_fraction."
            )
        return readable.nonzero().squeeze(1)

    def _batches(self) -> Iterator[tuple[int, Tensor, list[int]]]:
        """This process's batches: place of the first image, images, and places of all unreadable ones so far."""
        data, (rank, world_size) = self.data, processes()
        dataset = TransformedDataset(self.source, data.eval_transform, data.seed, data.max_bad_fraction, data.known_bad)
        size = data.eval_batch_size
        starts = range(rank * size, len(dataset), world_size * size)
        loader = ResumableLoader(
            dataset,
            batch_size=size,
            sampler=[i for start in starts for i in range(start, min(start + size, len(dataset)))],
            num_workers=data.num_workers,
            collate_fn=collate,
            timeout=data.worker_timeout if data.num_workers else 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws a seed from the run's random numbers
        )
        batches = track(loader, self.title or "", len(starts), disable=self.title is None)
        for start, (images, _) in zip(starts, batches, strict=True):
            yield start, images, list(dataset.unreadable)

    @torch.no_grad()
    def _features(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        images = self.data.normalize(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            results = read_out(self.backbone, images.float(), names, self.shown)
        return {name: rows.to(self.dtype).cpu() for name, rows in results.items()}


def _compute_in_memory(run: _Pass, dims: dict[str, int], meta: dict[str, Any]) -> dict[str, Entry]:
    features = {name: torch.empty(len(run.source), dim, dtype=run.dtype) for name, dim in dims.items()}

    def write(name: str, start: int, rows: Tensor) -> None:
        features[name][start : start + len(rows)] = rows

    indices = run.run(list(dims), write)
    labels = torch.tensor(run.source.labels, dtype=torch.int64)[indices]
    whole = len(indices) == len(run.source)
    return {name: Entry(x if whole else x[indices], labels, indices, meta) for name, x in features.items()}


def _compute_on_disk(
    run: _Pass, cache: FeatureCache, dims: dict[str, int], keys: dict[str, str], meta: dict[str, Any]
) -> None:
    row_bytes = {name: dim * run.dtype.itemsize for name, dim in dims.items()}
    num_images = len(run.source)
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            folder = stack.enter_context(cache.unfinished(num_images * sum(row_bytes.values())))
            for name in dims:
                allocate(folder / keys[name] / "features.bin", num_images * row_bytes[name])
            return folder

        def finish() -> None:
            labels = torch.tensor(run.source.labels, dtype=torch.int64)[indices]
            for name, dim in dims.items():
                own = {"key": keys[name], "readout": name, "shape": [len(indices), dim]}
                cache.store(keys[name], folder, labels, indices, {**own, **meta})

        folder = on_first(begin)
        files = {name: RowFile(folder / keys[name] / "features.bin", row_bytes[name]) for name in dims}
        try:
            indices = run.run(list(dims), lambda name, start, rows: files[name].write(start, rows))
        finally:
            for file in files.values():
                file.close()
        gather(None)  # all rows are on the disk
        on_first(finish)


def _loaded(cache: FeatureCache, key: str) -> Entry:
    entry = cache.load(key)
    if entry is None:
        raise ConfigError(
            f"cache_dir={cache.folder}: features that were just stored are not there. Do all processes see the same "
            "folder, and does nobody else remove its content?"
        )
    left_out = entry.meta["num_source"] - len(entry.indices)
    if left_out:
        log.warning("%d images could not be read when %s was computed; they are left out", left_out, cache.folder / key)
    return entry


def _check_same_images(entries: dict[str, Entry], keys: dict[str, str], cache_dir: Path | None) -> None:
    """An image that can be read one day and not the other would tear read-outs apart."""
    first, *others = entries
    for name in others:
        if not torch.equal(entries[first].indices, entries[name].indices):
            raise ConfigError(
                f"cache_dir={cache_dir}: {first} and {name} were computed when different images could be read. Remove "
                f"{keys[first]} and {keys[name]} from there to have them computed again."
            )


# --- arguments and processes ------------------------------------------------------------------------------------------


def _check_arguments(split: str, readouts: Sequence[str], precision: str) -> None:
    if split not in ("train", "val"):
        raise ConfigError(f"split={split!r} must be train or val.")
    if precision not in ("32", "bf16"):
        raise ConfigError(f"precision={precision!r} must be 32 or bf16.")
    if not readouts:
        raise ConfigError(f"readouts is empty. Available: {', '.join(READOUT_NAMES)}.")
    for name in readouts:
        if name not in READOUT_NAMES:
            raise ConfigError(f"readouts: {name!r} is not known. Available: {', '.join(READOUT_NAMES)}.")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} cannot be used ({error}). Set it to auto, cpu or cuda.") from error
    if device.type == "cuda" and processes()[1] > 1:
        torch.cuda.set_device(device)  # where objects are sent from
    return device
