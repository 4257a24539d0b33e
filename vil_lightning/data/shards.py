"""Images in tar files (shards), with an index of where each of them is.

The format is WebDataset's, which many programs read: plain tar files in which `<key>.<suffix>` is an image file and
`<key>.cls` the number of its class as text. A folder of shards is

    shard-000000.tar, …
    index.json    version of the format, names of the classes; of every shard its name, number of images, bytes and sha256
    index.npy     of every image its shard, its place in there, its length and its class

With the index any image is one read away, so order and augmentation are those of every other data set, and a run can go on
in mid-epoch. A folder of shards without an index, of whatever origin, is scanned once.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vil_lightning.errors import ConfigError

FORMAT = "vil_lightning shards"
VERSION = 1
SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")  # of images
SAMPLE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("label", "<i4")])  # a row of index.npy
log = logging.getLogger(__name__)


# --- tar files --------------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """What the index says about a tar file."""

    file: str
    num_images: int
    num_bytes: int
    sha256: str | None  # None if the file was found, not written here


class Member(NamedTuple):
    """An image file to be written."""

    key: str
    suffix: str
    content: bytes
    label: int


def write_shard(path: Path, members: Iterable[Member]) -> Shard:
    """Write a tar file whose bytes depend on nothing but the members; it appears under its name when it is complete."""
    part = path.with_name(f"{path.name}.part")
    num_images = 0
    with open(part, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for member in members:
                _add(tar, f"{member.key}.{member.suffix}", member.content)
                _add(tar, f"{member.key}.cls", str(member.label).encode())
                num_images += 1
        file.flush()
        os.fsync(file.fileno())
    publish(part, path)
    return Shard(path.name, num_images, path.stat().st_size, sha256_of(path))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # its time, owner and group are 0
    info.mode = 0o644
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def scan_shard(path: Path) -> list[tuple[int, int, int]]:
    """Place, length and class of every image, in their order.

    Raises:
        ConfigError: If this is no complete tar file of image files and classes.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                key, suffix = f"{folder}/{key}", suffix.lower()
                if not member.isfile() or (suffix not in SUFFIXES and suffix != "cls"):
                    continue
                if key in (labels if suffix == "cls" else images):
                    raise ConfigError(f"data.root: {path} holds more than one image or class for {member.name!r}.")
                if suffix != "cls":
                    images[key] = member.offset_data, member.size
                    continue
                text = tar.extractfile(member).read()  # type: ignore[union-attr]
                if not text.strip().isdigit():
                    raise ConfigError(
                        f"data.root: {path}: {member.name} must hold the number of a class, not {text!r}."
                    )
                labels[key] = int(text)
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"data.root: {path} is not a complete tar file ({error}).") from error
    if unpaired := sorted(images.keys() ^ labels.keys()):
        raise ConfigError(
            f"data.root: {path}: {len(unpaired)} sample(s) lack an image ({', '.join(SUFFIXES)}) or a class (cls), the first "
            f"one is {unpaired[0].strip('/')!r}."
        )
    return [(*place, labels[key]) for key, place in images.items()]


# --- index ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a folder and the images in them.

    Args:
        folder: Where the shards are.
        shards: In the order of their names.
        samples: `SAMPLE` of every image, sorted by shard.
        classes: Names of the classes; None if they are not known.
        left_out: Name of every image that could not be read when the shards were made, and the reason.
    """

    folder: Path
    shards: list[Shard]
    samples: np.ndarray
    classes: list[str] | None
    left_out: list[tuple[str, str]]

    def text(self) -> str:
        """The content of index.json."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "num_images": len(self.samples),
            "samples_sha256": _sha256(self.samples),
            "classes": self.classes,
            "left_out": self.left_out,
            "shards": [shard._asdict() for shard in self.shards],
        }
        return json.dumps(fields, indent=1) + "\n"

    def save(self) -> None:
        """Write both files, index.json last."""
        buffer = io.BytesIO()
        np.save(buffer, self.samples, allow_pickle=False)
        write_file(self.folder / "index.npy", buffer.getvalue())
        write_file(self.folder / "index.json", self.text().encode())

    def check_sizes(self) -> None:
        """See that all shards are there, whole, and no others.

        Raises:
            ConfigError: If not.
        """
        problems = []
        for shard in self.shards:
            try:
                found = (self.folder / shard.file).stat().st_size
            except OSError as error:
                problems.append(f"{shard.file}: {error.strerror}")
                continue
            if found != shard.num_bytes:
                problems.append(f"{shard.file}: {found} bytes, expected {shard.num_bytes}")
        listed = {shard.file for shard in self.shards}
        problems += [f"{path.name}: not in index.json" for path in _tar_files(self.folder) if path.name not in listed]
        self._refuse(problems)

    def verify(self, progress: Callable[[int], Any] = lambda num_bytes: None) -> None:
        """Read all shards and compare them with the index: checksums, or, where there are none, what is in them.

        Args:
            progress: Called with the number of bytes of every shard read.

        Raises:
            ConfigError: If a shard is not what it was.
        """
        self.check_sizes()
        problems = []
        for number, shard in enumerate(self.shards):
            if shard.sha256 is None:
                rows = self.samples[self.samples["shard"] == number]
                if _rows(number, scan_shard(self.folder / shard.file)).tolist() != rows.tolist():
                    problems.append(f"{shard.file}: other images than before")
            elif (found := sha256_of(self.folder / shard.file)) != shard.sha256:
                problems.append(f"{shard.file}: sha256 {found}, expected {shard.sha256}")
            progress(shard.num_bytes)
        self._refuse(problems)

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            listed = "\n  ".join(problems[:10] + [f"and {len(problems) - 10} more"] * (len(problems) > 10))
            raise ConfigError(
                f"data.root: the shards in {self.folder} are not those of its index.json. Copy or convert them again (or "
                f"delete index.json, if they were changed on purpose, to have them scanned):\n  {listed}"
            )


def load_index(folder: Path) -> ShardIndex:
    """The index of a folder; if it has none, the shards are scanned, and it is written if possible.

    Raises:
        ConfigError: If the index is damaged or of another version, or the shards are not those it lists.
    """
    if (folder / "index.json").is_file():
        index = _read_index(folder)
        index.check_sizes()
        return index
    index = scan_folder(folder)
    try:
        index.save()
    except OSError as error:
        log.info("the index of %s is kept in memory: it cannot be written there (%s)", folder, error.strerror)
    return index


def scan_folder(folder: Path) -> ShardIndex:
    """An index made from the tar files alone; the names of the classes are not known."""
    paths = _tar_files(folder)
    if not paths:
        raise ConfigError(f"data.root: there are no shards (*.tar) in {folder}. Expected root/train/ and root/val/.")
    log.info("scanning %d shards in %s, once", len(paths), folder)
    return index_of(folder, [Shard(path.name, 0, path.stat().st_size, None) for path in paths])


def index_of(
    folder: Path, shards: list[Shard], classes: list[str] | None = None, left_out: Iterable[tuple[str, str]] = ()
) -> ShardIndex:
    """The index of these shards; how many images are in them is counted."""
    rows = [_rows(number, scan_shard(folder / shard.file)) for number, shard in enumerate(shards)]
    counted = [shard._replace(num_images=len(part)) for shard, part in zip(shards, rows, strict=True)]
    return ShardIndex(folder, counted, np.concatenate(rows), classes, list(left_out))


def _rows(number: int, images: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array([(number, *image) for image in images], dtype=SAMPLE)


def _sha256(samples: np.ndarray) -> str:
    return hashlib.sha256(samples.tobytes()).hexdigest()


def _tar_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _read_index(folder: Path) -> ShardIndex:
    path = folder / "index.json"
    again = "Convert the images again, or delete index.json to have the shards scanned."
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ConfigError(f"data.root: {path} is no index of shards of this program. {again}")
        if fields["version"] != VERSION:
            raise ConfigError(
                f"data.root: {path} has version {fields['version']} of the format; this program reads version {VERSION}. "
                f"{again}"
            )
        shards = [Shard(**shard) for shard in fields["shards"]]
        if outside := [shard.file for shard in shards if not is_plain_name(shard.file)]:
            raise ConfigError(f"data.root: {path} names {outside[0]!r}, which is no file of this folder. {again}")
        samples = np.load(folder / "index.npy", allow_pickle=False)
        index = ShardIndex(folder, shards, samples, fields["classes"], [(n, r) for n, r in fields["left_out"]])
        intact = samples.dtype == SAMPLE and (_sha256(samples), len(samples)) == (
            fields["samples_sha256"],
            fields["num_images"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data.root: the index in {folder} cannot be read ({error}). {again}") from error
    counts = np.bincount(samples["shard"], minlength=len(shards)).tolist() if intact else []
    if not intact or counts != [shard.num_images for shard in shards]:
        raise ConfigError(f"data.root: {folder / 'index.npy'} and {path.name} do not belong together. {again}")
    return index


def is_plain_name(name: Any) -> bool:
    """Whether a name is that of a file in a folder itself: an index may come from anywhere, and must not lead out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


# --- files ------------------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file such that no one ever sees half of it; several processes may write the same one at once."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)


def publish(part: Path, path: Path) -> None:
    """Give a complete file its name, for good: not even a power failure may undo it."""
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
