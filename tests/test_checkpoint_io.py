"""Checkpoints are there completely or not at all; damage is seen; the newest good one is found."""

import os
import resource
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from vil_lightning.backbones.integrity import find_damage
from vil_lightning.backbones.weights import WeightsError, read_file
from vil_lightning.checkpoint_io import AtomicCheckpointIO, KeepPolicy, newest_good, remove_partial
from vil_lightning.errors import ConfigError


def content(step: int, size: int = 50) -> dict[str, Any]:
    """What Lightning writes, in small."""
    weights = torch.randn(size, 7, generator=torch.Generator().manual_seed(step))
    state = {"weight": weights, "half": weights.half(), "count": torch.tensor(step)}
    return {"global_step": step, "loops": {}, "optimizer_states": [{"state": {0: weights + 1}}], "state_dict": state}


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- writing ----------------------------------------------------------------------------------------------------------


def test_save_checkpoint__round_trip_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(3))
    assert names(path.parent) == {"last.ckpt"}


def test_save_checkpoint__a_failure_keeps_the_previous_one_and_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO(KeepPolicy(last=2))
    writer.save_checkpoint({"x": 1}, path)

    def half_written(checkpoint: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", half_written)
        writer.save_checkpoint({"x": 2}, path)
        assert torch.load(path, weights_only=True) == {"x": 1}
        assert names(tmp_path) == {"last.ckpt"}
        assert "No space left" in caplog.text
        assert "checkpoint.dirpath" in caplog.text
        with pytest.raises(ConfigError, match=r"No space left.*checkpoint\.dirpath"):
            writer.check_written()  # as at the end of a run
        writer.save_checkpoint({"x": 3}, path)
        with pytest.raises(ConfigError, match="3 in a row"):
            writer.save_checkpoint({"x": 4}, path)
    writer.save_checkpoint({"x": 5}, path)  # there is room again
    writer.check_written()
    assert torch.load(path, weights_only=True) == {"x": 5}


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit of file sizes on this system")
def test_save_checkpoint__a_real_write_that_ends_half_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel refuses to let a file grow, in the middle of torch's writer."""
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint(content(1), path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        writer.save_checkpoint(content(2, size=100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.failures == 1
    assert "File too large" in caplog.text
    assert step_of(path) == 1
    assert names(tmp_path) == {"last.ckpt"}


def test_remove_partial__deletes_only_what_a_killed_writer_left(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "last.ckpt")
    (tmp_path / ".last.ckpt.123.partial").write_bytes(b"half")
    remove_partial(tmp_path)
    assert names(tmp_path) == {"last.ckpt"}


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_keep__so_many_of_the_latest(tmp_path: Path) -> None:
    writer = AtomicCheckpointIO(KeepPolicy(last=4))
    for step in range(1, 7):
        writer.save_checkpoint(content(step), tmp_path / "last.ckpt")
        writer.save_checkpoint(content(step), tmp_path / "best.ckpt")
    found = {path.name: step_of(path) for path in tmp_path.iterdir()}
    assert found == {"last.ckpt": 6, "last-1.ckpt": 5, "last-2.ckpt": 4, "last-3.ckpt": 3, "best.ckpt": 6}


def test_keep__one_every_few_hours_also_after_a_restart(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"

    def save(step: int, hours_ago: float) -> None:
        AtomicCheckpointIO(KeepPolicy(last=1, every_hours=2)).save_checkpoint(content(step), last)
        then = time.time() - 3600 * hours_ago
        os.utime(last, (then, then))

    save(1, hours_ago=6)
    save(2, hours_ago=5)  # 1 is kept when it is replaced: it is the first
    save(3, hours_ago=1.5)  # 2 is kept, two hours after 1 was written
    assert names(tmp_path) == {"last.ckpt", "step=00000001.ckpt", "step=00000002.ckpt"}
    save(4, hours_ago=1)  # 3 is kept: 2 was written five hours ago
    save(5, hours_ago=0)  # 4 is not: 3 was written an hour and a half ago
    assert names(tmp_path) == {"last.ckpt", *(f"step=0000000{i}.ckpt" for i in (1, 2, 3))}
    assert step_of(tmp_path / "step=00000003.ckpt") == 3


def test_keep__where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    writer = AtomicCheckpointIO(KeepPolicy(last=2))
    for step in (1, 2, 3):
        writer.save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert {path.name: step_of(path) for path in tmp_path.iterdir()} == {"last.ckpt": 3, "last-1.ckpt": 2}


@pytest.mark.parametrize(
    ("settings", "key"), [({"last": 0}, "keep.last=0"), ({"every_hours": 0.0}, "keep.every_hours=0.0")]
)
def test_keep__refuses(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        KeepPolicy(**settings)


# --- damage -----------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def loads(path: Path) -> Any:
    """The content, or None if it is refused."""
    try:
        return read_file(path)
    except WeightsError:
        return None


def test_damage__truncated_at_a_hundred_lengths_is_always_seen(tmp_path: Path) -> None:
    good = tmp_path / "good.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1), good)
    data = good.read_bytes()
    lengths = torch.randperm(len(data))[:100].tolist()
    for length in lengths:
        (cut := tmp_path / "cut.ckpt").write_bytes(data[:length])
        assert loads(cut) is None, length
        assert find_damage(cut) is not None


def flip(data: bytes, place: int, path: Path) -> Path:
    flipped = bytearray(data)
    flipped[place] ^= 1 << (place % 8)
    path.write_bytes(flipped)
    return path


def test_damage__a_flipped_bit_is_always_seen(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "good.ckpt")
    data = (tmp_path / "good.ckpt").read_bytes()
    body = len(data) - 73  # behind it is the hash itself, and how long that is
    for place in [*torch.randperm(body)[:300].tolist(), *range(body - 300, body)]:  # the headers are at the end
        assert loads(flip(data, place, tmp_path / "broken.ckpt")) is None, place
    for place in range(body, len(data)):  # a hash that is damaged itself costs no content
        found = loads(flip(data, place, tmp_path / "broken.ckpt"))
        assert found is None or same(found, content(1))


def test_damage__files_without_a_hash_are_checked_part_by_part(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "published.th")
    data = (tmp_path / "published.th").read_bytes()
    assert torch.equal(read_file(tmp_path / "published.th")["x"], torch.zeros(1000))
    with pytest.raises(WeightsError, match=r"checksum of its part .*data/0"):
        read_file(flip(data, data.index(bytes(2000)) + 100, tmp_path / "broken.th"))
    (tmp_path / "cut.th").write_bytes(data[:-1])
    assert loads(tmp_path / "cut.th") is None


def test_seal__other_readers_see_the_same_archive(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1), path)
    assert same(torch.load(path, weights_only=True), content(1))
    assert same(torch.load(path, weights_only=True, mmap=True), content(1))
    assert zipfile.ZipFile(path).testzip() is None


def test_damage__torch_alone_does_not_see_it(tmp_path: Path) -> None:
    """Should this fail, torch compares the checksums itself by now."""
    path = tmp_path / "broken.ckpt"
    torch.save({"x": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    place = data.index(bytes(2000))
    data[place + 100] = 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["x"].any()


# --- the newest good one ----------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    writer = AtomicCheckpointIO(KeepPolicy(last=3))
    for step in (10, 20, 30):
        writer.save_checkpoint(content(step), tmp_path / "last.ckpt")
    writer.save_checkpoint(content(35), tmp_path / "best.ckpt")  # newer than last.ckpt, but not made for continuing
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_newest_good__is_the_last(run_folder: Path) -> None:
    assert newest_good(run_folder) == run_folder / "last.ckpt"


def test_newest_good__passes_over_damaged_ones_and_says_so(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncate(run_folder / "last.ckpt")
    assert newest_good(run_folder) == run_folder / "last-1.ckpt"
    assert "last.ckpt is damaged" in caplog.text
    truncate(run_folder / "last-1.ckpt")
    assert newest_good(run_folder) == run_folder / "last-2.ckpt"
    truncate(run_folder / "last-2.ckpt")
    assert newest_good(run_folder) == run_folder / "best.ckpt"
    truncate(run_folder / "best.ckpt")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* can be used(.|\n)*last-2\.ckpt"):
        newest_good(run_folder)


def test_newest_good__none_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert newest_good(tmp_path) is None
    assert newest_good(tmp_path / "missing") is None


def test_newest_good__weights_alone_are_no_state(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 99}, tmp_path / "best.ckpt")
    assert newest_good(tmp_path) is None
    AtomicCheckpointIO().save_checkpoint(content(3), tmp_path / "step=00000003.ckpt")
    assert newest_good(tmp_path) == tmp_path / "step=00000003.ckpt"


def test_load_checkpoint__refuses_a_damaged_one(run_folder: Path) -> None:
    truncate(run_folder / "last.ckpt")
    with pytest.raises(ConfigError, match=r"last\.ckpt is damaged"):
        AtomicCheckpointIO().load_checkpoint(run_folder / "last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(run_folder / "last-1.ckpt")["global_step"] == 20
