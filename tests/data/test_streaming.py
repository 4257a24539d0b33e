"""Reading images from shards."""

import io
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vil_lightning.data.images import BadImageError
from vil_lightning.data.shards import Member, ShardIndex, index_of, load_index, write_shard
from vil_lightning.data.streaming import LocalCopies, ShardSource, StreamingData
from vil_lightning.data.transforms import MultiCrop
from vil_lightning.errors import ConfigError

SIZES = (5, 7, 0, 3, 6)


def png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make(folder: Path, sizes: tuple[int, ...], seed: int = 0, classes: list[str] | None = None) -> list[Member]:
    """Shards of these sizes, with an index; returns what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    written, shards = [], []
    for number, size in enumerate(sizes):
        members = [Member(f"{len(written) + i:08d}", "png", png(rng), int(rng.integers(3))) for i in range(size)]
        shards.append(write_shard(folder / f"shard-{number:06d}.tar", members))
        written += members
    index_of(folder, shards, classes).save()
    return written


@pytest.fixture
def written(tmp_path: Path) -> list[Member]:
    return make(tmp_path / "train", SIZES)


@pytest.fixture
def index(tmp_path: Path, written: list[Member]) -> ShardIndex:
    return load_index(tmp_path / "train")


def contents(source: ShardSource) -> list[tuple[bytes, int]]:
    return [(picture.encoded(), label) for picture, label in (source[i] for i in range(len(source)))]


def expected(written: list[Member]) -> list[tuple[bytes, int]]:
    return [(member.content, member.label) for member in written]


# --- source -----------------------------------------------------------------------------------------------------------


def test_shard_source__untouched_bytes_labels_and_names(index: ShardIndex, written: list[Member]) -> None:
    source = ShardSource(index)
    assert contents(source) == expected(written)
    assert source.labels == [member.label for member in written]
    assert [source[i][0].name for i in (0, 5, 12)] == [
        "shard-000000.tar/00000000.png",
        "shard-000001.tar/00000005.png",
        "shard-000003.tar/00000012.png",
    ]
    pixels = source[4][0].decode()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(written[4].content))))


def test_shard_source__keeps_few_files_open(index: ShardIndex, written: list[Member]) -> None:
    source = ShardSource(index)
    source.max_open = 2
    assert contents(source) == expected(written)
    descriptors = Path("/proc/self/fd")
    open_files = [os.readlink(path) for path in descriptors.iterdir() if path.exists()]
    assert len([name for name in open_files if name.startswith(str(index.folder))]) == 2
    assert contents(source) == expected(written)  # closed files are opened again


def test_shard_source__pickles_with_files_open(index: ShardIndex, written: list[Member]) -> None:
    source = ShardSource(index)
    contents(source)
    assert contents(pickle.loads(pickle.dumps(source))) == expected(written)


class Numbers(torch.utils.data.Dataset[tuple[int, bytes]]):
    """The files of a source with their index."""

    def __init__(self, source: ShardSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return index, self.source[index][0].encoded()


def test_shard_source__workers_share_open_files(index: ShardIndex, written: list[Member]) -> None:
    source = ShardSource(index)
    contents(source)  # opens all files before the workers are forked
    sampler = torch.randint(len(source), (400,)).tolist()
    loader = DataLoader(Numbers(source), None, sampler=sampler, num_workers=2, multiprocessing_context="fork")
    read = list(loader)
    assert [number for number, _ in read] == sampler
    assert all(content == written[number].content for number, content in read)


@pytest.mark.parametrize("damage", ["zeros", "moved", "truncated", "missing"])
def test_shard_source__changed_after_the_start(index: ShardIndex, written: list[Member], damage: str) -> None:
    path = index.folder / "shard-000001.tar"
    content = path.read_bytes()
    if damage == "zeros":
        path.write_bytes(b"\0" * len(content))
    elif damage == "moved":
        path.write_bytes(content[1024:] + content[:1024])
    elif damage == "truncated":
        path.write_bytes(content[:700])
    else:
        path.unlink()
    source = ShardSource(index)
    assert source[4][0].encoded() == written[4].content
    message = {"zeros": "damaged", "moved": "changed|damaged", "truncated": "changed", "missing": "No such file"}[
        damage
    ]
    with pytest.raises(BadImageError, match=rf"shard-000001\.tar, byte 512: .*({message})"):
        source[5]


# --- order ------------------------------------------------------------------------------------------------------------


def shuffled(index: ShardIndex, window: int, seed: int) -> list[int]:
    return ShardSource(index, window).shuffled(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [1, 2, 3, 5, 100])
def test_shuffled__every_image_once(index: ShardIndex, window: int) -> None:
    assert sorted(shuffled(index, window, 0)) == list(range(21))


def test_shuffled__depends_on_the_generator_alone(index: ShardIndex) -> None:
    first = shuffled(index, 2, 3)
    torch.rand(5)
    assert shuffled(index, 2, 3) == first
    assert shuffled(index, 2, 4) != first


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """40 shards of 10 to 14 images."""
    folder = tmp_path_factory.mktemp("many")
    shards = [
        write_shard(folder / f"{n:02d}.tar", [Member(f"{n:02d}{i}", "jpg", b"x", 0) for i in range(10 + n % 5)])
        for n in range(40)
    ]
    return index_of(folder, shards)


@pytest.mark.parametrize("window", [1, 4, 16])
def test_shuffled__few_shards_at_a_time(many: ShardIndex, window: int) -> None:
    shards = many.samples["shard"][shuffled(many, window, 0)].tolist()
    first = {shard: shards.index(shard) for shard in range(40)}
    last = {shard: len(shards) - 1 - shards[::-1].index(shard) for shard in range(40)}
    in_use = [sum(first[shard] <= place <= last[shard] for shard in range(40)) for place in range(len(shards))]
    assert max(in_use) == window


def test_shuffled__mixes_shards_and_what_is_in_them(many: ShardIndex) -> None:
    first_images, companions = set(), set()
    for seed in range(30):
        order = shuffled(many, 4, seed)
        first_images.add(order[0])
        companions.add(frozenset(many.samples["shard"][order[:20]].tolist()))
        shards = many.samples["shard"][order[:40]]
        assert (np.diff(shards.astype(int)) == 0).mean() < 0.7  # 1/4 on average; in a row it would be 0.9
    assert len(first_images) > 20
    assert len(companions) > 25


# --- local copies -----------------------------------------------------------------------------------------------------


def cached(index: ShardIndex, cache_dir: Path) -> tuple[ShardSource, LocalCopies]:
    copies = LocalCopies(index, cache_dir)
    copies.prepare()
    return ShardSource(index, 16, copies), copies


def test_local_copies__are_made_once_and_read(tmp_path: Path, index: ShardIndex, written: list[Member]) -> None:
    source, copies = cached(index, tmp_path / "cache")
    assert not list(copies.folder.iterdir())
    source[0]
    assert [path.name for path in copies.folder.glob("*.tar")] == ["shard-000000.tar"]  # those that are read
    assert contents(source) == expected(written)
    shutil.rmtree(index.folder)
    assert contents(cached(index, tmp_path / "cache")[0]) == expected(written)
    assert not list(copies.folder.glob("*.part"))


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000000.tar.part"])
def test_local_copies__half_a_copy_is_made_again(
    tmp_path: Path, index: ShardIndex, written: list[Member], name: str
) -> None:
    source, copies = cached(index, tmp_path / "cache")
    (copies.folder / name).write_bytes(b"half")
    assert contents(source) == expected(written)
    original, copy = index.folder / "shard-000000.tar", copies.folder / "shard-000000.tar"
    assert copy.read_bytes() == original.read_bytes()


def test_local_copies__of_a_shard_that_shrank(tmp_path: Path, index: ShardIndex) -> None:
    source, copies = cached(index, tmp_path / "cache")
    (index.folder / "shard-000000.tar").write_bytes(b"half")
    with pytest.raises(BadImageError, match="is not complete"):
        source[0]
    assert not list(copies.folder.glob("*.tar"))


def test_local_copies__other_shards_of_the_same_names(tmp_path: Path, index: ShardIndex, written: list[Member]) -> None:
    folder = tmp_path / "other" / tmp_path.name / "train"
    others = make(folder, SIZES, seed=1)
    other = load_index(folder)
    assert [shard.num_bytes for shard in other.shards] == [shard.num_bytes for shard in index.shards]
    assert contents(cached(index, tmp_path / "cache")[0]) == expected(written)
    assert contents(cached(other, tmp_path / "cache")[0]) == expected(others)


def _read_all(index: ShardIndex, cache_dir: Path, barrier: Any, answers: Any) -> None:
    source, copies = cached(index, cache_dir)
    barrier.wait()
    read = contents(source)
    answers.put((read, [(copies.folder / shard.file).stat().st_ino for shard in index.shards if shard.num_images]))


def test_local_copies__processes_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shards = [
        write_shard(tmp_path / f"{n}.tar", [Member(f"{n}{i}", "jpg", rng.bytes(1 << 20), 0) for i in range(8)])
        for n in range(3)
    ]
    index = index_of(tmp_path, shards)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_read_all, args=(index, tmp_path / "cache", barrier, answers)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert all(read == contents(ShardSource(index)) for read, _ in results)
    assert len({tuple(inodes) for _, inodes in results}) == 1  # every copy was made by one process and then kept


def test_local_copies__not_enough_room(tmp_path: Path, index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(shard.num_bytes for shard in index.shards)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=total - 1))
    with pytest.raises(ConfigError, match=rf"data\.cache_dir: {total:,} bytes .* there are {total - 1:,} bytes free"):
        cached(index, tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=total))
    source, _ = cached(index, tmp_path / "cache")
    source[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=total - index.shards[0].num_bytes))
    cached(index, tmp_path / "cache")  # what is there already needs no room


def test_local_copies__no_folder(tmp_path: Path, index: ShardIndex) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*file/.* cannot be used \(Not a directory\)"):
        cached(index, tmp_path / "file")


# --- data module ------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make(tmp_path / "train", SIZES, 0, ["a", "b", "c"])
    make(tmp_path / "val", (4, 4), 1, ["a", "b", "c"])
    return tmp_path


def ready(root: Path, **settings: Any) -> StreamingData:
    data = StreamingData(str(root), img_size=8, batch_size=4, num_workers=0, **settings)
    data.setup("fit")
    return data


def dealt(data: StreamingData) -> Iterator[int]:
    return (index for _, index in data.train_dataloader().sampler)


def test_streaming_data__classes_and_sizes(root: Path) -> None:
    data = ready(root)
    assert data.classes == ["a", "b", "c"]
    assert (len(data.train_source), len(data.val_source)) == (21, 8)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert labels.tolist() == data.val_source.labels[:4]


def test_streaming_data__trains_in_the_order_of_the_shards(root: Path) -> None:
    order = list(dealt(ready(root, shuffle_window=1, seed=3)))
    assert order == ShardSource(load_index(root / "train"), 1).shuffled(torch.Generator().manual_seed(3))[:21]
    shards = load_index(root / "train").samples["shard"][order]
    assert int((np.diff(shards.astype(int)) != 0).sum()) == 3  # one shard after the other; one of five is empty


def test_streaming_data__goes_on_in_mid_epoch(root: Path) -> None:
    def batches(data: StreamingData) -> list[Any]:
        return [(view.image, view.parameters) for views, _ in data.train_dataloader() for view in views]

    settings = {"train_transform": MultiCrop(8, 4, 1), "shuffle_window": 2, "seed": 5}
    whole = batches(ready(root, **settings))
    interrupted = ready(root, **settings)
    iterator = iter(interrupted.train_dataloader())
    for _ in range(3):
        next(iterator)
    resumed = ready(root, **settings)
    resumed.load_state_dict(interrupted.state_dict())
    rest = batches(resumed)
    assert len(whole) == 5 * 3
    assert len(rest) == 2 * 3
    for one, other in zip(rest, whole[9:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_streaming_data__cache_dir(root: Path, tmp_path: Path) -> None:
    data = ready(root, cache_dir=str(tmp_path / "cache"))
    without = ready(root)
    assert contents(data.train_source) == contents(without.train_source)  # type: ignore[arg-type]
    assert contents(data.val_source) == contents(without.val_source)  # type: ignore[arg-type]
    copies = {path.relative_to(tmp_path / "cache").parts[0] for path in (tmp_path / "cache").rglob("*.tar")}
    assert len(copies) == 2
    assert all(root.name in name for name in copies)


def test_streaming_data__some_classes_and_a_fraction(root: Path) -> None:
    data = ready(root, classes="a,c", train_fraction=0.5)
    assert data.classes == ["a", "c"]
    assert set(data.train_source.labels) <= {0, 1}
    assert 0 < len(data.train_source) < 21
    assert sorted(dealt(data)) == list(range(len(data.train_source)))


def test_streaming_data__classes_without_names(tmp_path: Path) -> None:
    make(tmp_path / "train", (20,))
    make(tmp_path / "val", (2,), 1)
    assert ready(tmp_path).classes == ["0", "1", "2"]


def test_streaming_data__refuses(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root=.*nowhere is not a directory"):
        StreamingData(str(root / "nowhere"))
    with pytest.raises(ConfigError, match=r"data\.shuffle_window=0 must be at least 1"):
        StreamingData(str(root), shuffle_window=0)
    make(root / "val", (4, 4), 1, ["a", "b", "x"])
    with pytest.raises(
        ConfigError, match=r"the classes in .*train/index\.json \(a, b, c\) are not those .*\(a, b, x\)"
    ):
        ready(root)
    make(root / "train", SIZES, 0, ["a", "b"])
    make(root / "val", (4, 4), 1, ["a", "b"])
    with pytest.raises(ConfigError, match=r"images of class 2, but index\.json names 2 classes"):
        ready(root)
    shutil.rmtree(root / "val")
    with pytest.raises(ConfigError, match=r"there are no shards \(\*\.tar\) in .*val"):
        ready(root)
