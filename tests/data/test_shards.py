"""Tar files of images, and their index."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vil_lightning.data.shards import Member, index_of, load_index, scan_folder, write_shard
from vil_lightning.errors import ConfigError


def members(count: int, seed: int = 0) -> list[Member]:
    """Files of random bytes and lengths, some of them whole blocks of a tar file."""
    rng = np.random.default_rng(seed)
    lengths = [512, 1024, 1, *rng.integers(1, 3000, max(count - 3, 0)).tolist()][:count]
    suffixes = ("jpg", "png", "webp")
    return [
        Member(f"{i:08d}", suffixes[i % 3], rng.bytes(length), int(rng.integers(1000)))
        for i, length in enumerate(lengths)
    ]


def tar_of(path: Path, files: dict[str, bytes], **settings: int) -> Path:
    """A tar file as anyone else would write it."""
    with tarfile.open(path, "w", **settings) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 5, 7 and 3 images, with an index."""
    shards = [write_shard(tmp_path / f"shard-{i:06d}.tar", members(n, i)) for i, n in enumerate((5, 7, 3))]
    index_of(tmp_path, shards, ["cat", "dog"] * 500, [("x.jpg", "is empty")]).save()
    return tmp_path


# --- tar files --------------------------------------------------------------------------------------------------------


def test_write_shard__tarfile_reads_it(tmp_path: Path) -> None:
    written = members(20)
    shard = write_shard(tmp_path / "a.tar", written)
    expected = {}
    for member in written:
        expected[f"{member.key}.{member.suffix}"] = member.content
        expected[f"{member.key}.cls"] = str(member.label).encode()
    with tarfile.open(tmp_path / "a.tar") as tar:
        read = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        owners = {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in tar}
    assert list(read) == list(expected)
    assert read == expected
    assert owners == {(0, 0, 0, "", "", 0o644)}
    assert (shard.file, shard.num_images, shard.num_bytes) == ("a.tar", 20, (tmp_path / "a.tar").stat().st_size)


def test_write_shard__webdataset_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    written = members(20)
    write_shard(tmp_path / "a.tar", written)
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, nodesplitter=lambda urls: urls))
    assert [sample["__key__"] for sample in samples] == [member.key for member in written]
    assert [sample[member.suffix] for sample, member in zip(samples, written, strict=True)] == [
        member.content for member in written
    ]
    assert [int(sample["cls"]) for sample in samples] == [member.label for member in written]


def test_write_shard__appears_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def watched(interrupted: bool) -> Iterator[Member]:
        for member in members(5):
            assert not path.exists()
            yield member
        if interrupted:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, watched(True))
    assert not path.exists()
    first = write_shard(path, watched(False))  # over what was left
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]
    path.unlink()
    assert write_shard(path, members(5)) == first


# --- index ------------------------------------------------------------------------------------------------------------


def test_index__says_where_every_image_is(folder: Path) -> None:
    index = load_index(folder)
    written = [member for i, n in enumerate((5, 7, 3)) for member in members(n, i)]
    assert len(index.samples) == 15
    assert [shard.num_images for shard in index.shards] == [5, 7, 3]
    assert index.samples["shard"].tolist() == [0] * 5 + [1] * 7 + [2] * 3
    for (shard, offset, length, label), member in zip(index.samples.tolist(), written, strict=True):
        content = (folder / f"shard-{shard:06d}.tar").read_bytes()
        assert content[offset : offset + length] == member.content
        assert label == member.label
    assert index.classes == ["cat", "dog"] * 500
    assert index.left_out == [("x.jpg", "is empty")]


def test_index__scan_finds_the_same(folder: Path) -> None:
    scanned, loaded = scan_folder(folder), load_index(folder)
    assert scanned.samples.tolist() == loaded.samples.tolist()
    assert scanned.shards == [shard._replace(sha256=None) for shard in loaded.shards]
    assert scanned.classes is None


FOREIGN = {
    "n01/a.b.JPEG": b"two suffixes: no image",
    "n01/a.JPG": b"first",
    "n01/a.json": b"{}",
    "n01/a.cls": b"7\n",
    "n02/a.cls": b" 3",
    "n02/a.png": b"second",
    f"{'long' * 50}/a.webp": b"third",
    f"{'long' * 50}/a.cls": b"0",
}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_scan__shards_of_other_programs(tmp_path: Path, tar_format: int) -> None:
    tar_of(tmp_path / "train-0001.tar", {"z.jpeg": b"last", "z.cls": b"12"})
    tar_of(tmp_path / "train-0000.tar", FOREIGN, format=tar_format)
    index = load_index(tmp_path)
    assert [shard.file for shard in index.shards] == ["train-0000.tar", "train-0001.tar"]
    found = []
    for shard, offset, length, label in index.samples.tolist():
        content = (tmp_path / index.shards[shard].file).read_bytes()
        found.append((content[offset : offset + length], label))
    assert found == [(b"first", 7), (b"second", 3), (b"third", 0), (b"last", 12)]


def test_load_index__scans_once(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", FOREIGN)
    first = load_index(tmp_path)
    path.write_bytes(b"\0" * path.stat().st_size)  # a second scan would find no images
    assert load_index(tmp_path).samples.tolist() == first.samples.tolist()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "index.json", "index.npy"]


def test_load_index__in_memory_where_nothing_can_be_written(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", FOREIGN)
    (tmp_path / "index.npy").mkdir()
    assert len(load_index(tmp_path).samples) == 3
    assert not (tmp_path / "index.json").exists()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"x"}, r"a\.tar: 1 sample\(s\) lack an image .*jpg.* or a class \(cls\), the first one is 'a'"),
        ({"a.cls": b"1", "a.jxl": b"x"}, "lack an image"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "more than one image or class for 'a.png'"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, r"a\.cls must hold the number of a class, not b'cat'"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "must hold the number of a class"),
    ],
)
def test_scan__refuses(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    tar_of(tmp_path / "a.tar", files)
    with pytest.raises(ConfigError, match=message):
        load_index(tmp_path)


@pytest.mark.parametrize("content", [b"no tar file" * 100, b""])
def test_scan__no_tar_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.tar is not a complete tar file"):
        load_index(tmp_path)


def test_scan__truncated(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"a.jpg": b"x" * 5000, "a.cls": b"1", "b.cls": b"2", "b.jpg": b"x" * 5000})
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ConfigError, match=r"a\.tar is not a complete tar file"):
        load_index(tmp_path)


def test_scan__no_shards(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are no shards \(\*\.tar\) in .*Expected root/train/"):
        load_index(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: object) -> None:
    fields = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(fields | changes))


def test_load_index__truncated_shard(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=rf"shard-000001\.tar: {size - 1} bytes, expected {size}"):
        load_index(folder)


def test_load_index__missing_shard(folder: Path) -> None:
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(ConfigError, match=r"shard-000002\.tar: No such file"):
        load_index(folder)


def test_load_index__unknown_shard(folder: Path) -> None:
    write_shard(folder / "shard-000003.tar", members(2))
    with pytest.raises(ConfigError, match=r"shard-000003\.tar: not in index\.json"):
        load_index(folder)


def test_load_index__another_version(folder: Path) -> None:
    edit(folder, version=2)
    with pytest.raises(ConfigError, match="has version 2 of the format; this program reads version 1"):
        load_index(folder)


def test_load_index__index_of_another_program(folder: Path) -> None:
    (folder / "index.json").write_text('{"chunks": []}')
    with pytest.raises(ConfigError, match="is no index of shards of this program"):
        load_index(folder)


@pytest.mark.parametrize("name", ["index.json", "index.npy"])
def test_load_index__truncated_index(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"the index in .* cannot be read"):
        load_index(folder)


def test_load_index__missing_array(folder: Path) -> None:
    (folder / "index.npy").unlink()
    with pytest.raises(ConfigError, match=r"the index in .* cannot be read .*index\.npy"):
        load_index(folder)


def test_load_index__loads_no_pickles(folder: Path) -> None:
    np.save(folder / "index.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="allow_pickle"):
        load_index(folder)


@pytest.mark.parametrize("change", ["value", "dtype"])
def test_load_index__files_that_do_not_belong_together(folder: Path, change: str) -> None:
    samples = np.load(folder / "index.npy")
    if change == "value":
        samples["label"][3] += 1
    np.save(folder / "index.npy", samples if change == "value" else samples["label"])
    with pytest.raises(ConfigError, match=r"index\.npy and index\.json do not belong together"):
        load_index(folder)


def test_load_index__counts_that_do_not_add_up(folder: Path) -> None:
    shards = json.loads((folder / "index.json").read_text())["shards"]
    shards[0]["num_images"], shards[1]["num_images"] = 7, 5
    edit(folder, shards=shards)
    with pytest.raises(ConfigError, match="do not belong together"):
        load_index(folder)


def test_verify__intact(folder: Path) -> None:
    seen: list[int] = []
    load_index(folder).verify(seen.append)
    assert seen == [path.stat().st_size for path in sorted(folder.glob("*.tar"))]


def test_verify__one_changed_byte(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    index = load_index(folder)  # takes no notice
    with pytest.raises(ConfigError, match=r"\n  shard-000001\.tar: sha256 \w{64}, expected \w{64}$"):
        index.verify()


def test_verify__scanned_shards_are_scanned_again(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"a.jpg": b"x", "a.cls": b"1"})
    load_index(tmp_path).verify()
    tar_of(path, {"a.jpg": b"x", "a.cls": b"2"})
    with pytest.raises(ConfigError, match=r"a\.tar: other images than before"):
        load_index(tmp_path).verify()


def test_index__same_bytes_every_time(folder: Path) -> None:
    index = load_index(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("index.*")}
    assert len(before) == 2
    for name in before:
        (folder / name).unlink()
    index.save()
    assert {path.name: path.read_bytes() for path in folder.glob("index.*")} == before
