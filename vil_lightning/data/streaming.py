"""Images from shards: one large file is read where there would be a thousand small ones, as shared file systems prefer."""

import hashlib
import io
import os
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vil_lightning.data.datamodule import ImageDataModule
from vil_lightning.data.images import BadImageError, EncodedImage
from vil_lightning.data.loading import ImageSource
from vil_lightning.data.shards import ShardIndex, load_index, publish
from vil_lightning.errors import ConfigError

BLOCK = tarfile.BLOCKSIZE  # a member of a tar file is a header of this many bytes, then its content


class ShardSource:
    """The images of a folder of shards, each read when it is asked for.

    Args:
        index: Of the folder.
        shuffle_window: How many shards `shuffled` mixes at a time.
        locate: Where to read a shard whose path is given, e.g. in a copy on a local disk.
    """

    max_open = 64  # files, per process

    def __init__(self, index: ShardIndex, shuffle_window: int = 16, locate: Callable[[Path], Path] = Path) -> None:
        self.index = index
        self.shuffle_window = shuffle_window
        self.locate = locate
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()  # the most recently used last

    def __len__(self) -> int:
        return len(self.index.samples)

    @property
    def labels(self) -> list[int]:
        return self.index.samples["label"].tolist()

    def __getitem__(self, index: int) -> tuple[EncodedImage, int]:
        shard, offset, length, label = self.index.samples[index].item()
        return self._read(shard, offset, length), label

    def shuffled(self, generator: torch.Generator) -> list[int]:
        """All images in random order, such that only `shuffle_window` shards are in use at a time.

        The shards are shuffled, and then the images of every `shuffle_window` shards that follow one another. For this to
        mix well, a shard should be a random sample itself, as those of `vil_lightning.data.convert` are.
        """
        ends = np.cumsum([shard.num_images for shard in self.index.shards]).tolist()
        order: list[int] = []
        for window in torch.randperm(len(ends), generator=generator).split(self.shuffle_window):
            shards = [(ends[number], self.index.shards[number].num_images) for number in window.tolist()]
            images = torch.cat([torch.arange(end - num_images, end) for end, num_images in shards])
            order += images[torch.randperm(len(images), generator=generator)].tolist()
        return order

    def _read(self, shard: int, offset: int, length: int) -> EncodedImage:
        file = self.index.shards[shard].file
        place = f"{file}, byte {offset}"
        try:
            content = self._bytes(shard, offset - BLOCK, BLOCK + length)
        except OSError as error:
            raise BadImageError(place, f"cannot be read ({error.strerror or error})") from error
        # The header costs nothing, as it is read with the image; it tells the name, and whether this is still the place.
        try:
            member = tarfile.TarInfo.frombuf(content[:BLOCK], "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise BadImageError(place, f"the shard was damaged since its index was made ({error})") from error
        if member.size != length or len(content) != BLOCK + length:
            raise BadImageError(
                place, f"the shard was changed since its index was made, no image of {length} bytes here"
            )
        return EncodedImage(content[BLOCK:], f"{file}/{member.name}")

    def _bytes(self, shard: int, offset: int, length: int) -> bytes:
        """A part of a shard, read without moving the position of its file, which processes may share."""
        file = self._file(shard)
        content = os.pread(file.fileno(), length, offset)
        while len(content) < length and (more := os.pread(file.fileno(), length - len(content), offset + len(content))):
            content += more
        return content

    def _file(self, shard: int) -> io.FileIO:
        if shard not in self._open:
            if len(self._open) == self.max_open:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = io.FileIO(self.locate(self.index.folder / self.index.shards[shard].file))
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files stay in their process


class LocalCopies:
    """Copies of a folder's shards on a disk of this machine, each made when it is first read.

    Any number of processes of the machine may ask for the same shard: one copies, the others wait.

    Args:
        index: Of the folder.
        cache_dir: The copies get a folder of their own in there.
    """

    def __init__(self, index: ShardIndex, cache_dir: Path) -> None:
        digest = hashlib.sha256(index.text().encode()).hexdigest()[:16]  # other shards of the same names do not mix
        self.folder = cache_dir / f"{index.folder.resolve().parent.name}-{index.folder.name}-{digest}"
        self.sizes = {shard.file: shard.num_bytes for shard in index.shards}

    def prepare(self) -> None:
        """Make the folder, and see that there is room.

        Raises:
            ConfigError: If not.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = sum(file.stat().st_size for file in self.folder.iterdir())
            missing, free = sum(self.sizes.values()) - there, shutil.disk_usage(self.folder).free
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir: {self.folder} cannot be used ({error.strerror}). Set it to a writable folder on a local "
                "disk, or to null."
            ) from error
        if missing > free:
            raise ConfigError(
                f"data.cache_dir: {missing:,} bytes of shards are still to be copied to {self.folder}, but there are "
                f"{free:,} bytes free. Make room, use another disk, or set data.cache_dir to null."
            )

    def __call__(self, path: Path) -> Path:
        """Where the copy of a shard is; it is made if need be.

        Raises:
            OSError: If that fails.
        """
        copy = self.folder / path.name
        if not self._complete(copy):
            with _locked(self.folder / f"{path.name}.lock"):
                if not self._complete(copy):  # nobody else made it in the meantime
                    self._make(path, copy)
        return copy

    def _complete(self, copy: Path) -> bool:
        return copy.is_file() and copy.stat().st_size == self.sizes[copy.name]

    def _make(self, path: Path, copy: Path) -> None:
        part = copy.with_name(f"{copy.name}.part")  # that of a process that was killed is written over
        with open(path, "rb") as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        if part.stat().st_size != self.sizes[copy.name]:
            raise OSError(None, f"the copy of {path} in {self.folder} is not complete")
        publish(part, copy)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in here for this file; a process that dies lets the next one in."""
    import fcntl  # not on Windows, where everything else works

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class StreamingData(ImageDataModule):
    """Shards (`data/shards.py`) in `root/train/` and `root/val/`, made by `python -m vil_lightning.data.convert` or found.

    Order, views, resuming and scores are those of any other data set; only the order of the training images is arranged such
    that few shards are in use at a time (not so with `classes` or `train_fraction`). The names of the classes are in the
    index; classes of shards that come from elsewhere are called by their numbers.

    Args:
        root: The directory that holds `train` and `val`. Other arguments as in `ImageDataModule`.
        cache_dir: Folder on a disk of every machine, to which shards are copied when they are first read, for clusters whose
            shared storage is slow. Each machine comes to hold all shards.
        shuffle_window: How many shards are mixed at a time. More mix better; fewer open fewer files.
    """

    def __init__(self, root: str, cache_dir: str | None = None, shuffle_window: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not Path(root).is_dir():
            raise ConfigError(
                f"data.root={root} is not a directory. Set --data.root to the one that holds train/ and val/ with shards."
            )
        if shuffle_window < 1:
            raise ConfigError(f"data.shuffle_window={shuffle_window} must be at least 1.")
        self.source_arguments = {"root": root, "cache_dir": cache_dir, "shuffle_window": shuffle_window}
        self.root = Path(root)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.shuffle_window = shuffle_window

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val = (load_index(self.root / split) for split in ("train", "val"))
        return self._source(train), self._source(val), class_names(train, val)

    def _source(self, index: ShardIndex) -> ShardSource:
        if self.cache_dir is None:
            return ShardSource(index, self.shuffle_window)
        copies = LocalCopies(index, self.cache_dir)
        copies.prepare()
        return ShardSource(index, self.shuffle_window, copies)


def class_names(train: ShardIndex, val: ShardIndex) -> list[str]:
    """Names of the classes of both folders; their numbers where no index names them. None for images without classes.

    Raises:
        ConfigError: If the two contradict each other, or there are classes without a name.
    """
    names = val.classes if train.classes is None else train.classes
    if val.classes not in (None, names):
        raise ConfigError(
            f"data.root: the classes in {train.folder / 'index.json'} ({', '.join(names or [])[:80]}) are not those in "
            f"{val.folder / 'index.json'} ({', '.join(val.classes or [])[:80]})."
        )
    highest = max(int(index.samples["label"].max(initial=-1)) for index in (train, val))
    if names is not None and highest >= max(len(names), 1):  # images without classes are of class 0
        raise ConfigError(
            f"data.root={train.folder.parent}: there are images of class {highest}, but index.json names {len(names)} classes "
            "(numbered from 0)."
        )
    return [str(number) for number in range(highest + 1)] if names is None else names
