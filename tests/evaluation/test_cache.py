"""Features on disk: what they are found again by, and what an interruption leaves."""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from vil_lightning.data import Digits, ImageFolder
from vil_lightning.data.files import FileSource
from vil_lightning.data.loading import ImageSource, NumberedSource, SubsetSource, TensorSource
from vil_lightning.data.shards import Member, index_of, load_index, write_shard
from vil_lightning.data.streaming import ShardSource
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import features
from vil_lightning.evaluation.cache import UNFINISHED, FeatureCache, content_key, fingerprint
from vil_lightning.evaluation.features import FeatureSet, extract
from vil_lightning.evaluation.readouts import read_out
from vil_lightning.methods.backbone import BackboneConfig

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 4}


class FewDigits(Digits):
    """20 digits of each split."""

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        few = [TensorSource(x.images[:20].clone(), torch.tensor(x.labels[:20])) for x in (train, val)]  # type: ignore[attr-defined]
        return few[0], few[1], classes


def digits(img_size: int = 16, **kwargs: Any) -> FewDigits:
    data = FewDigits(img_size, 8, seed=0, **kwargs)
    data.setup()
    return data


def config(path: Path, **kwargs: Any) -> BackboneConfig:
    return BackboneConfig("vil2_tiny_patch16_224", str(path), {**SMALL, **kwargs})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    model = timm.create_model("vil2_tiny_patch16_224", num_classes=0, **SMALL)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def get(weights: Path, cache: Path, data: Any = None, precision: Any = "32", **kwargs: Any) -> FeatureSet:
    data = data or digits()
    sets = extract(
        config(weights, **kwargs), data, "val", ["avg"], cache_dir=cache, precision=precision, progress=False
    )
    return sets["avg"]


# --- the key ----------------------------------------------------------------------------------------------------------


def test_key__only_what_matters_matters(weights: Path, tmp_path: Path) -> None:
    key = get(weights, tmp_path / "a").key
    copy = tmp_path / "elsewhere.pth"
    copy.write_bytes(weights.read_bytes())
    assert get(copy, tmp_path / "b", digits(eval_batch_size=4)).key == key


def _other_weights(weights: Path, data: Any) -> None:
    state = torch.load(weights, weights_only=True)
    state["norm.weight"][3] += 1e-6
    torch.save(state, weights)


def _other_pixel(weights: Path, data: Any) -> None:
    data.val_source.images[19, 2, 7, 7] ^= 1


def _other_label(weights: Path, data: Any) -> None:
    data.val_source.labels[19] = (data.val_source.labels[19] + 1) % 10


def _other_order(weights: Path, data: Any) -> None:
    data.val_source = SubsetSource(data.val_source, [1, 0, *range(2, 20)])


def _other_split(weights: Path, data: Any) -> None:
    data.val_source = data.train_source


@pytest.mark.parametrize("change", [_other_weights, _other_pixel, _other_label, _other_order, _other_split])
def test_key__of_other_content(change: Callable[[Path, Any], None], weights: Path, tmp_path: Path) -> None:
    before, data = get(weights, tmp_path / "cache"), digits()
    change(weights, data)
    after = get(weights, tmp_path / "cache", data)
    assert after.key != before.key
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"mean": (0.305, 0.305, 0.306)}},
        {"data": {"std": (0.376, 0.376, 0.377)}},
        {"data": {"crop_pct": 0.9}},
        {"data": {"img_size": 24}},
        {"precision": "bf16"},
        {"block_design": "unidirectional"},  # changes no weight
    ],
)
def test_key__of_other_settings(settings: dict[str, Any], weights: Path, tmp_path: Path) -> None:
    before = get(weights, tmp_path / "cache")
    after = get(weights, tmp_path / "cache", **{**settings, "data": digits(**settings.get("data", {}))})
    assert after.key != before.key


def test_key__of_another_version_or_read_out(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {get(weights, tmp_path).key}
    sets = extract(config(weights), digits(), "val", ["avg", "max"], cache_dir=tmp_path, progress=False)
    keys |= {found.key for found in sets.values()}
    assert len(keys) == 2
    monkeypatch.setattr(features, "VERSION", 2)
    assert get(weights, tmp_path).key not in keys


def test_content_key__does_not_depend_on_the_order_of_a_dictionary() -> None:
    assert content_key({"a": 1, "b": {"c": 2, "d": 3}}) == content_key({"b": {"d": 3, "c": 2}, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of four images each, twice."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "anteater", "bee"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                image = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
                image.save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def files(folder: Path) -> ImageSource:
    data = ImageFolder(str(folder), num_workers=0)
    data.setup("fit")
    return data.val_source


def test_fingerprint__files(folder: Path, tmp_path: Path) -> None:
    source = files(folder)
    assert type(source) is FileSource
    known = {fingerprint(source)}
    assert fingerprint(files(folder)) in known
    folder.rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    assert fingerprint(files(folder)) in known

    image = folder / "val" / "anteater" / "2.png"
    content, state = image.read_bytes(), image.stat()
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # changed, but as long as before
    known.add(fingerprint(files(folder)))
    image.write_bytes(content + b"\0")
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    known.add(fingerprint(files(folder)))
    image.write_bytes(content)
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(known) == 3
    assert fingerprint(files(folder)) in known
    image.rename(image.with_name("2b.png"))
    known.add(fingerprint(files(folder)))
    source = files(folder)
    image.with_name("2b.png").unlink()
    known.add(fingerprint(source))
    assert len(known) == 5


def test_fingerprint__shards(tmp_path: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).mkdir()
        shard = write_shard(tmp_path / name / "a.tar", [Member("0", "png", content, 0), Member("1", "png", b"1", 1)])
        index_of(tmp_path / name, [shard], ["cat", "dog"], []).save()
        return tmp_path / name

    folders = [written("a", b"0"), written("same", b"0"), written("other", b"2")]
    one, same, other = (fingerprint(ShardSource(load_index(folder))) for folder in folders)
    assert one == same != other
    shards = ShardSource(load_index(folders[0]))
    index = shards.index
    found = dataclasses.replace(index, shards=[shard._replace(sha256=None) for shard in index.shards])
    scanned = fingerprint(ShardSource(found))
    os.utime(folders[0] / "a.tar", ns=(0, 1))
    assert fingerprint(shards) == one
    assert len({fingerprint(ShardSource(found)), scanned, one}) == 3


class Darkened:
    """A kind of source that nobody knows."""

    def __init__(self, source: ImageSource, by: int) -> None:
        self.source = source
        self.labels = source.labels
        self.by = by

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.source[index]
        return image // self.by, label


class Shifted(TensorSource):
    """Images of a known kind with a change."""

    by = 0

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index] + self.by, self.labels[index]


def test_fingerprint__wrapped_and_unknown_sources() -> None:
    images, labels = torch.randint(0, 255, (600, 3, 4, 4), dtype=torch.uint8), torch.arange(600)
    plain = TensorSource(images, labels)
    changed = images.clone()
    changed[1] += 1  # not among a sample
    shifted = Shifted(images, labels)
    shifted.by = 1
    sources = [
        plain,
        TensorSource(changed, labels),
        TensorSource(images.view(600, 3, 2, 8), labels),
        shifted,
        Shifted(images, labels),
        SubsetSource(plain, [1, 2]),
        SubsetSource(plain, [2, 1]),
        SubsetSource(TensorSource(changed, labels), [1, 2]),
        NumberedSource(plain),
        NumberedSource(SubsetSource(plain, [1, 2])),
        Darkened(plain, 2),
        Darkened(plain, 3),
        Darkened(TensorSource(changed, labels), 2),
    ]
    assert len({fingerprint(source) for source in sources}) == len(sources)
    expanded = images[:, :1].expand(-1, 3, -1, -1)
    assert fingerprint(TensorSource(expanded, labels)) == fingerprint(TensorSource(expanded.contiguous(), labels))


# --- entries ----------------------------------------------------------------------------------------------------------


def test_load__what_is_not_whole_is_computed_again(weights: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = get(weights, cache)
    expected = whole.features.clone()
    entry = cache / whole.key

    def short() -> None:
        os.truncate(entry / "features.bin", 100)

    def without_labels() -> None:
        (entry / "labels.bin").unlink()

    def without_meta() -> None:
        (entry / "meta.json").unlink()

    def half_meta() -> None:
        (entry / "meta.json").write_text((entry / "meta.json").read_text()[:50])

    for damage in (short, without_labels, without_meta, half_meta):
        damage()
        assert FeatureCache(cache).load(whole.key) is None
        again = get(weights, cache)
        assert torch.equal(again.features, expected)
        assert FeatureCache(cache).load(whole.key) is not None
        assert [path.name for path in cache.iterdir()] == [whole.key]


def test_extract__an_interruption_leaves_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = 0

    def interrupted(backbone: nn.Module, images: Tensor, names: Any, shown: float) -> dict[str, Tensor]:
        nonlocal batches
        batches += 1
        if batches == 3:  # of one empty image and three batches
            raise KeyboardInterrupt
        return read_out(backbone, images, names)

    with monkeypatch.context() as patch:
        patch.setattr(features, "read_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get(weights, tmp_path / "cache", digits(eval_batch_size=8))
    assert list((tmp_path / "cache").iterdir()) == []


def _work_and_die(cache: Path) -> None:
    with FeatureCache(cache).unfinished(0) as folder:
        (folder / "key").mkdir()
        (folder / "key" / "features.bin").write_bytes(b"half")
        os._exit(1)  # no cleaning up


def test_unfinished__of_the_dead_is_removed_and_of_the_living_is_not(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=_work_and_die, args=(tmp_path,))
    process.start()
    process.join()
    (dead,) = tmp_path.iterdir()
    assert dead.name.startswith(UNFINISHED)
    with cache.unfinished(0) as young:  # the dead one is too young to tell
        assert dead.exists()
        for folder in (dead, young):
            os.utime(folder, (time.time() - 100, time.time() - 100))
        with cache.unfinished(0) as other:
            assert not dead.exists()
            assert young.exists()
            assert {path.name for path in tmp_path.iterdir()} == {young.name, other.name}
    assert list(tmp_path.iterdir()) == []


def test_extract__who_comes_second_takes_what_the_first_has_stored(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[FeatureSet] = []

    def overtaken(backbone: nn.Module, images: Tensor, names: Any, shown: float) -> dict[str, Tensor]:
        if not first and len(images) > 1:  # after the other one has looked into the cache
            with monkeypatch.context() as patch:
                patch.setattr(features, "read_out", read_out)
                first.append(get(weights, tmp_path / "cache"))
            first_meta.append((tmp_path / "cache" / first[0].key / "meta.json").stat().st_ino)
        return read_out(backbone, images, names)

    first_meta: list[int] = []
    monkeypatch.setattr(features, "read_out", overtaken)
    second = get(weights, tmp_path / "cache")
    assert (second.key, len(first)) == (first[0].key, 1)
    assert torch.equal(second.features, first[0].features)
    assert (tmp_path / "cache" / second.key / "meta.json").stat().st_ino == first_meta[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [second.key]


def test_unfinished__a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"cache_dir=.*file cannot be used \(.*\)\. Set it to a writable folder"),
        FeatureCache(tmp_path / "file").unfinished(0),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="the features take 1,000,000,000,000,000,000 bytes, but there are"),
        FeatureCache(tmp_path).unfinished(10**18),
    ):
        pass
