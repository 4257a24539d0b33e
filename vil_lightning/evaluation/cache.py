"""Features on disk: found again by what they were made from, complete or not there, read without loading them.

Every read-out of a network on a set of images is an entry of its own, `cache_dir/<key>/`:

    features.bin    (N, D) in float32 or bfloat16, row by row
    labels.bin      (N,) in int64
    indices.bin     (N,) in int64, places of the images in their source
    meta.json       shape, dtype, what the key was made from, versions of the packages

An entry is written to a folder `unfinished-…` and renamed at the end. So any number of runs may use one cache, and what an
interrupted one leaves behind is never taken for a result.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vil_lightning.data.crops import pixels
from vil_lightning.data.files import FileSource
from vil_lightning.data.images import BadImageError
from vil_lightning.data.loading import ImageSource, NumberedSource, SubsetSource, TensorSource
from vil_lightning.data.shards import publish
from vil_lightning.data.streaming import ShardSource
from vil_lightning.errors import ConfigError

UNFINISHED = "unfinished-"
SAMPLE_SIZE = 256  # images of a source of an unknown kind that go into its fingerprint
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}
log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What is stored under a key. The tensors are memory-mapped: writing to them changes nothing on the disk."""

    features: Tensor  # (N, D)
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64
    meta: dict[str, Any]


class FeatureCache:
    """The entries in a folder.

    Args:
        folder: Made when something is to be stored. Several processes that fill an entry together must all see it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: str) -> Entry | None:
        """An entry, or None if there is none, or none that is whole."""
        folder = self.folder / key
        try:
            meta = json.loads((folder / "meta.json").read_text())
            num_images, dim = meta["shape"]
            return Entry(
                _mapped(folder / "features.bin", (num_images, dim), _DTYPES[meta["dtype"]]),
                _mapped(folder / "labels.bin", (num_images,), torch.int64),
                _mapped(folder / "indices.bin", (num_images,), torch.int64),
                meta,
            )
        except FileNotFoundError:
            if folder.exists():
                log.warning("%s is not complete and is computed again", folder)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s) and is computed again", folder, error)
        return None

    @contextlib.contextmanager
    def unfinished(self, num_bytes: int) -> Iterator[Path]:
        """An empty folder for entries in the making; it is removed in the end, and so are those of runs that died.

        Args:
            num_bytes: That are going to be stored.

        Raises:
            ConfigError: If the folder cannot be used or there is no room for them.
        """
        folder = self.folder / f"{UNFINISHED}{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            free = shutil.disk_usage(self.folder).free
            if num_bytes > free:
                raise ConfigError(
                    f"cache_dir={self.folder}: the features take {num_bytes:,} bytes, but there are {free:,} bytes free. Make "
                    "room, or set cache_dir to a folder on another disk."
                )
            folder.mkdir()
            lock = open(folder / "lock", "a")  # noqa: SIM115 - closed below
        except OSError as error:
            raise ConfigError(
                f"cache_dir={self.folder} cannot be used ({error.strerror}). Set it to a writable folder."
            ) from error
        with lock:
            _try_lock(lock)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_abandoned(self) -> None:
        for folder in self.folder.glob(f"{UNFINISHED}*"):
            # Whoever made it holds its lock, which ends with the process; a young one's maker may be about to take it.
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > 60:
                    with open(folder / "lock", "a") as lock:
                        if _try_lock(lock):
                            shutil.rmtree(folder, ignore_errors=True)

    def store(self, key: str, unfinished: Path, labels: Tensor, indices: Tensor, meta: dict[str, Any]) -> None:
        """Complete an entry and give it its place, unless another run was faster.

        Args:
            key: Of the entry.
            unfinished: Folder whose `<key>/features.bin` holds a row for every image of the source.
            labels: (N,), of the images that could be read.
            indices: (N,), their places in the source, ascending. Rows of other images are dropped.
            meta: The content of meta.json; `shape` and `dtype` are those of the rows to be kept.
        """
        folder, place = unfinished / key, self.folder / key
        row_bytes = meta["shape"][1] * _DTYPES[meta["dtype"]].itemsize
        _keep_rows(folder / "features.bin", row_bytes, indices)
        _write(folder / "labels.bin", labels.numpy().tobytes())
        _write(folder / "indices.bin", indices.numpy().tobytes())
        _write(folder / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())
        try:
            publish(folder, place)
        except OSError:
            if not place.exists():
                raise
            if self.load(key) is None:  # a damaged entry makes room
                os.replace(place, unfinished / "damaged")
                publish(folder, place)


class RowFile:
    """A file of fixed-size rows, which several processes may fill together.

    They write to it, rather than to a memory map, as file systems that are shared over a network keep bytes apart and not pages
    of memory.

    Args:
        path: Of an `allocated` file.
        row_bytes: Length of a row.
    """

    def __init__(self, path: Path, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._file = open(path, "r+b")  # noqa: SIM115 - closed in close()

    def write(self, start: int, rows: Tensor) -> None:
        """Write rows (n, D) from row `start` on."""
        self._file.seek(start * self.row_bytes)
        self._file.write(_bytes(rows))

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def allocate(path: Path, num_bytes: int) -> None:
    """Make a file of this length, and its folder."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(num_bytes)


# --- keys -------------------------------------------------------------------------------------------------------------


def content_key(parts: dict[str, Any]) -> str:
    """SHA-256 of nested dictionaries, lists, texts and numbers, whatever their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def numbers_hash(numbers: list[int]) -> str:
    """SHA-256 of integers."""
    return hashlib.sha256(np.asarray(numbers, dtype=np.int64).tobytes()).hexdigest()


def fingerprint(source: ImageSource) -> str:
    """SHA-256 of what tells the images of a source from others. No image file is opened, but for sources of unknown kinds.

    Files count with their path below the folder that holds all of them, size and time of change; shards with the checksums in
    their index, or like files if they have none; images in memory with all pixels. Of any other source a sample of
    `SAMPLE_SIZE` images is decoded, and if it wraps another one (attribute `source`), that one counts, too.
    """
    digest = hashlib.sha256(type(source).__qualname__.encode())
    # Not isinstance: a derived class may change the images.
    if type(source) is SubsetSource:
        digest.update(f"{fingerprint(source.source)} {numbers_hash(source.indices)}".encode())
    elif type(source) is NumberedSource:
        digest.update(fingerprint(source.source).encode())
    elif type(source) is FileSource:
        ends = [os.path.dirname(f(source.paths, default="")) for f in (min, max)]
        root = os.path.commonpath(ends)  # of all, as the others lie between these two in the order of texts
        for path in source.paths:
            digest.update(f"{path[len(root) :]}\0{_state(path)}\n".encode(errors="surrogateescape"))
    elif type(source) is ShardSource:
        digest.update(source.index.text().encode())
        for shard in source.index.shards:
            if shard.sha256 is None:
                digest.update(_state(source.index.folder / shard.file).encode())
    elif type(source) is TensorSource:
        digest.update(f"{tuple(source.images.shape)} {source.images.dtype}".encode())
        for images in source.images.split(1024):  # expanded channels are copied
            digest.update(_bytes(images.contiguous()))
    else:
        digest.update(f"{len(source)} ".encode())
        for index in dict.fromkeys(np.linspace(0, len(source) - 1, min(SAMPLE_SIZE, len(source))).round().astype(int)):
            try:
                image = pixels(source[int(index)][0])
                digest.update(str(tuple(image.shape)).encode() + _bytes(image.contiguous()))
            except BadImageError as error:
                digest.update(f"{error.reason}".encode())
        if hasattr(source, "source"):
            digest.update(fingerprint(source.source).encode())
    return digest.hexdigest()


def _state(path: str | Path) -> str:
    try:
        state = os.stat(path)
        return f"{state.st_size} {state.st_mtime_ns}"
    except OSError:  # it counts as unreadable
        return "missing"


# --- files ------------------------------------------------------------------------------------------------------------


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    expected, actual = int(np.prod(shape)) * dtype.itemsize, path.stat().st_size
    if expected != actual:
        raise ValueError(f"{path.name} has {actual:,} bytes, expected are {expected:,}")
    return torch.from_file(str(path), shared=False, size=int(np.prod(shape)), dtype=dtype).view(shape)


def _bytes(rows: Tensor) -> bytes:
    return rows.reshape(-1).view(torch.uint8).numpy().tobytes()


def _keep_rows(path: Path, row_bytes: int, kept: Tensor) -> None:
    """Drop all other rows of a file, in place."""
    places = kept.numpy()
    if len(places) * row_bytes == path.stat().st_size:
        return
    rows = np.memmap(path, dtype=np.uint8, mode="r+", shape=(path.stat().st_size // row_bytes, row_bytes))
    for start in range(0, len(places), 1024):
        moved = places[start : start + 1024]
        rows[start : start + len(moved)] = rows[moved]  # rows only move up: none is overwritten early
    rows.flush()
    del rows
    with open(path, "r+b") as file:
        file.truncate(len(places) * row_bytes)
        os.fsync(file.fileno())


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _try_lock(file: IO[str]) -> bool:
    """Lock a file until it is closed or the process dies; False if somebody else has."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # on Windows, or where a file system knows no locks, abandoned folders stay
        return False
    return True
