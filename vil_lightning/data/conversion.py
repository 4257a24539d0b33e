"""From a source of images to a folder of shards: what `vil_lightning.data.convert` does for each split."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vil_lightning.data.images import BadImageError, EncodedImage, Picture
from vil_lightning.data.loading import ImageSource
from vil_lightning.data.shards import Member, Shard, index_of, sha256_of, write_file, write_shard
from vil_lightning.errors import ConfigError

SUFFIX_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG of some cameras, with a second image behind the first
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}
CHUNK = 32  # images that a worker hands over at a time
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of objects in some messages; it differs from run to run
LISTED = 20  # names of bad images in a message; index.json has them all


# --- images -----------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """An image on its way into a shard, or, if it is bad, its name and what is wrong."""

    content: bytes
    suffix: str
    label: int
    bad: tuple[str, str] | None = None


def encode(picture: Picture) -> tuple[bytes, str]:
    """The file of an image and the suffix that its format goes by; decoded once to see that this works.

    Raises:
        BadImageError: If it does not.
    """
    if isinstance(picture, Tensor):
        return _png(picture), "png"
    content = picture.encoded()
    pixels = EncodedImage(content, picture.name).decode()
    with Image.open(io.BytesIO(content)) as image:
        suffix = SUFFIX_OF_FORMAT.get(image.format or "")
    return (content, suffix) if suffix else (_png(pixels), "png")  # few programs know other formats


def _png(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


class EncodedImages(Dataset[Encoded]):
    """The images of a source, ready to be written."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Encoded:
        try:
            picture, label = self.source[index]
            return Encoded(*encode(picture), label)
        except BadImageError as error:
            return Encoded(b"", "", -1, (error.name, ADDRESS.sub("", error.reason)))


Packed = tuple[Tensor, list[int], list[Encoded]]


def pack(images: list[Encoded]) -> Packed:
    """The contents in one tensor, which goes from process to process in shared memory: pipes are slow, and get stuck."""
    lengths = [len(image.content) for image in images]
    content = torch.frombuffer(bytearray(b"".join(image.content for image in images) or b"\0"), dtype=torch.uint8)
    return content, lengths, [image._replace(content=b"") for image in images]


def unpack(packed: Packed) -> list[Encoded]:
    content, lengths, images = packed
    parts = content[: sum(lengths)].split(lengths)
    return [image._replace(content=part.numpy().tobytes()) for image, part in zip(images, parts, strict=True)]


# --- shards -----------------------------------------------------------------------------------------------------------


class Conversion:
    """The conversion of one split.

    Shard k takes places k * images_per_shard and following of the order, less the bad images among them, so that what is in a
    shard depends on no other. A finished shard is recorded in a file next to it until all are there.

    Args:
        folder: Of the split.
        source: Its images.
        order: Their indices, as they are to follow one another.
    """

    def __init__(
        self, folder: Path, source: ImageSource, order: list[int], images_per_shard: int, max_bad_fraction: float
    ) -> None:
        self.folder = folder
        self.source = source
        self.order = order
        self.images_per_shard = images_per_shard
        self.max_bad_fraction = max_bad_fraction
        self.num_shards = -(-len(order) // images_per_shard)
        self.shards: dict[int, Shard] = {}
        self.bad: dict[int, list[tuple[str, str]]] = {}  # of each shard

    def run(self, workers: int, progress: Progress) -> None:
        """Write what is missing.

        Raises:
            ConfigError: If too many images are bad.
        """
        self.folder.mkdir(exist_ok=True)
        bar = progress.add_task(self.folder.name, total=len(self.order))
        for number in range(self.num_shards):
            if self._take_over(number):
                progress.advance(bar, len(self._places(number)))
        self._check_bad()
        if missing := [number for number in range(self.num_shards) if number not in self.shards]:
            self._write(missing, workers, lambda: progress.advance(bar))

    def _write(self, missing: list[int], workers: int, advance: Callable[[], None]) -> None:
        chunks = {number: _chunks(self._places(number)) for number in missing}
        loader = DataLoader(
            EncodedImages(self.source),
            batch_sampler=[[self.order[place] for place in chunk] for number in missing for chunk in chunks[number]],
            collate_fn=pack,
            num_workers=workers,
        )
        batches = _answering(loader)
        for number in missing:
            self.bad[number] = []
            members = self._members(number, (next(batches) for _ in chunks[number]), advance)
            self.shards[number] = write_shard(self._path(number), members)
            self._record(number)
            self._check_bad()

    def finish(self, classes: list[str]) -> None:
        """Write the index, when all shards are there."""
        numbers = range(self.num_shards)
        bad = [entry for number in numbers for entry in self.bad[number]]
        index_of(self.folder, [self.shards[number] for number in numbers], classes, bad).save()
        self.clean()

    def clean(self) -> None:
        """Delete the records, and what a killed process left unfinished."""
        for path in [*self.folder.glob("shard-*.json"), *self.folder.glob("*.part")]:
            path.unlink()

    def _members(self, number: int, batches: Iterator[Packed], advance: Callable[[], None]) -> Iterator[Member]:
        place = self._places(number).start
        for batch in batches:
            for image in unpack(batch):
                if image.bad is not None:
                    self.bad[number].append(image.bad)
                else:
                    yield Member(f"{place:08d}", image.suffix, image.content, image.label)
                place += 1
                advance()

    def _places(self, number: int) -> range:
        """In the order, of the images of a shard."""
        start = number * self.images_per_shard
        return range(start, min(start + self.images_per_shard, len(self.order)))

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.tar"

    def _record(self, number: int) -> None:
        record = {"shard": self.shards[number]._asdict(), "left_out": self.bad[number]}
        write_file(self._path(number).with_suffix(".json"), json.dumps(record).encode())

    def _take_over(self, number: int) -> bool:
        """Whether a shard was finished earlier and is still intact."""
        path = self._path(number)
        if not path.with_suffix(".json").is_file() or not path.is_file():
            return False
        record = json.loads(path.with_suffix(".json").read_text())
        shard = Shard(**record["shard"])
        if shard.file != path.name or path.stat().st_size != shard.num_bytes or sha256_of(path) != shard.sha256:
            return False
        self.shards[number] = shard
        self.bad[number] = [(name, reason) for name, reason in record["left_out"]]
        return True

    def _check_bad(self) -> None:
        bad = [entry for number in sorted(self.bad) for entry in self.bad[number]]
        if len(bad) > self.max_bad_fraction * len(self.order):
            raise ConfigError(
                f"{len(bad)} of {len(self.order)} images of {self.folder.name} cannot be read so far, more than "
                f"data.max_bad_fraction={self.max_bad_fraction} allows. Repair or remove them and convert into another folder, "
                f"or raise data.max_bad_fraction and run the same command again:\n  {listed(bad)}"
            )


def _answering(loader: DataLoader[Any]) -> Iterator[Packed]:
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise ConfigError(
            f"A worker died ({str(error).splitlines()[0]}). It may have run out of memory: use fewer --workers. The same "
            "command goes on."
        ) from error


def _chunks(places: range) -> list[range]:
    return [places[start : start + CHUNK] for start in range(0, len(places), CHUNK)]


def listed(bad: list[tuple[str, str]]) -> str:
    """Names and reasons of bad images, one a line, not too many."""
    lines = [f"{name}: {reason}" for name, reason in bad[:LISTED]]
    return "\n  ".join(lines + [f"and {len(bad) - LISTED} more"] * (len(bad) > LISTED))
