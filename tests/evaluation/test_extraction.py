"""Read-outs of frozen networks: what they are, and that they do not depend on how they were computed."""

import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, distributed, nn

from vil_lightning.data import Digits
from vil_lightning.data.images import BadImageError
from vil_lightning.data.loading import ImageSource, SubsetSource, TensorSource
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import embeddings, features
from vil_lightning.evaluation.embeddings import write_embeddings
from vil_lightning.evaluation.features import FeatureSet, extract
from vil_lightning.evaluation.readouts import READOUT_NAMES, read_out
from vil_lightning.methods.backbone import BackboneConfig

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from tiny import run_in_two_processes

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 4}
VIL = BackboneConfig("vil2_tiny_patch16_224", None, SMALL)
DIMS = {"bilateral_concat": 64, "bilateral_avg": 32, "avg": 32, "first": 32, "last": 32, "max": 32}


class FewDigits(Digits):
    """37 digits to train on, 20 to look at."""

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        assert isinstance(train, TensorSource)
        assert isinstance(val, TensorSource)
        few = [TensorSource(x.images[:n], torch.tensor(x.labels[:n])) for x, n in ((train, 37), (val, 20))]
        return few[0], few[1], classes


class Damaged:
    """Some images of another source cannot be read."""

    def __init__(self, source: ImageSource, bad: tuple[int, ...]) -> None:
        self.source = source
        self.labels = source.labels
        self.bad = bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self.bad:
            raise BadImageError(f"file{index}", "is damaged")
        return self.source[index]


def digits(bad: tuple[int, ...] = (), **kwargs: Any) -> FewDigits:
    """Of the val images, `bad` cannot be read."""
    data = FewDigits(16, 8, eval_batch_size=8, seed=0, **kwargs)
    data.setup()
    if bad:
        data.val_source = Damaged(data.val_source, bad)
    return data


def get(
    data: FewDigits, cache: Path | None, names: tuple[str, ...] = ("avg",), split: Any = "val", **kwargs: Any
) -> dict[str, FeatureSet]:
    return extract(VIL, data, split, names, cache_dir=cache, progress=False, **kwargs)


def assert_equal(a: dict[str, FeatureSet], b: dict[str, FeatureSet]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].key == b[name].key
        assert a[name].features.dtype == b[name].features.dtype
        for field in ("features", "labels", "indices"):
            assert torch.equal(getattr(a[name], field), getattr(b[name], field)), (name, field)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The names that images are read out for from now on, once per batch (and once for an empty image)."""
    seen: list[tuple[str, ...]] = []

    def recorded(backbone: nn.Module, images: Tensor, names: Any, shown: float) -> dict[str, Tensor]:
        seen.append(tuple(names))
        return read_out(backbone, images, names)

    monkeypatch.setattr(features, "read_out", recorded)
    return seen


# --- read-outs --------------------------------------------------------------------------------------------------------

DIRECT: dict[str, Callable[[np.ndarray], list[float]]] = {  # of the tokens (S, D) of one image
    "bilateral_concat": lambda x: [*x[0], *x[len(x) - 1]],
    "bilateral_avg": lambda x: [(a + b) / 2 for a, b in zip(x[0], x[len(x) - 1], strict=True)],
    "avg": lambda x: [sum(row[d] for row in x) / len(x) for d in range(len(x[0]))],
    "first": lambda x: list(x[0]),
    "last": lambda x: list(x[len(x) - 1]),
    "max": lambda x: [max(row[d] for row in x) for d in range(len(x[0]))],
}


def residual_streams(backbone: Any, images: Tensor) -> list[Tensor]:
    """Tokens after every block, as hooks see them."""
    streams: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, y: streams.append(y)) for block in backbone.blocks]
    backbone.forward_features(images)
    for hook in hooks:
        hook.remove()
    return streams


@pytest.mark.parametrize(
    ("name", "kwargs", "num_class_tokens"),
    [
        ("vil2_tiny_patch16_224", SMALL, 0),
        ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 5}, 1),
        ("vil2_tiny_patch16_224", {**SMALL, "depth": 2}, 0),
    ],
)
def test_read_out__direct_formulas(name: str, kwargs: dict[str, Any], num_class_tokens: int) -> None:
    backbone = timm.create_model(name, num_classes=0, **kwargs).eval()
    nn.init.normal_(backbone.norm.weight)  # it would not be missed otherwise
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        results = read_out(backbone, images, READOUT_NAMES)
        alone = {readout: read_out(backbone, images, [readout])[readout] for readout in ("avg", "max/last4")}
        layers = [backbone.norm(x)[:, num_class_tokens:].numpy() for x in residual_streams(backbone, images)]
    assert list(results) == list(READOUT_NAMES)
    assert layers[0].shape[1] == 4
    for readout, formula in DIRECT.items():
        for i in range(3):
            np.testing.assert_allclose(results[readout][i], formula(layers[-1][i]), rtol=1e-5, atol=1e-6)
            expected = np.concatenate([formula(layer[i]) for layer in layers[-4:]])
            np.testing.assert_allclose(results[f"{readout}/last4"][i], expected, rtol=1e-5, atol=1e-6)
    for readout, rows in alone.items():  # whatever else is asked for
        assert torch.equal(rows, results[readout])


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_read_out__of_feature_maps(name: str) -> None:
    kwargs = {"depths": (1, 1, 1, 1), **({"img_size": 64, "window_size": 2} if name.startswith("swin") else {})}
    backbone = timm.create_model(name, num_classes=0, **kwargs).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        results = read_out(backbone, images, ["max", "avg", "avg/last4", "max/last4"])
        output = backbone.forward_features(images)
        stages = backbone.forward_intermediates(images, intermediates_only=True)
        if name.startswith("swin"):  # channels last, and a norm at the end
            output = output.permute(0, 3, 1, 2)
            stages[-1] = backbone.norm(stages[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(results["avg"], output.mean((2, 3)))
    torch.testing.assert_close(results["max"], output.amax((2, 3)))
    torch.testing.assert_close(results["avg/last4"], torch.cat([x.mean((2, 3)) for x in stages], 1))
    torch.testing.assert_close(results["max/last4"], torch.cat([x.amax((2, 3)) for x in stages], 1))
    with pytest.raises(
        ConfigError, match=r"readouts: first, bilateral_avg/last4 read the first and last .* Use avg, max"
    ):
        read_out(backbone, images, ["avg", "first", "bilateral_avg/last4"])


# --- extraction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_extract__images_of_the_split_in_eval_mode_and_order(split: Any, tmp_path: Path) -> None:
    data = digits()
    torch.manual_seed(123)  # the run's random numbers have no say
    random_state = torch.get_rng_state()
    config = BackboneConfig(VIL.name, None, {**SMALL, "drop_path_rate": 0.9})
    results = extract(config, data, split, list(DIMS), cache_dir=tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.manual_seed(0)  # the seed of the data
    backbone = timm.create_model("vil2_tiny_patch16_224", num_classes=0, **config.kwargs).eval()
    source = data.train_source if split == "train" else data.val_source
    images = torch.stack([data.eval_transform(source[i][0]) for i in range(len(source))])
    images = (images / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    with torch.no_grad():
        expected = read_out(backbone, images, list(DIMS))
    for name, dim in DIMS.items():
        found = results[name]
        assert (found.readout, found.features.dtype, found.features.shape) == (name, torch.float32, (len(source), dim))
        torch.testing.assert_close(found.features, expected[name], rtol=1e-4, atol=1e-5)
        assert found.labels.tolist() == source.labels
        assert found.indices.tolist() == list(range(len(source)))
        assert found.labels.dtype == found.indices.dtype == torch.int64


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_extract__cached_and_fresh_features_are_the_same(precision: Any, tmp_path: Path) -> None:
    names = ("avg", "bilateral_concat/last4")
    stored = get(digits(), tmp_path, names, precision=precision)
    again = get(digits(), tmp_path, names, precision=precision)
    assert_equal(stored, again)
    assert_equal(stored, get(digits(), None, names, precision=precision))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {x.features.dtype for x in again.values()} == {dtype}
    # Whoever writes to what was loaded does not write to the cache.
    again["avg"].features.zero_()
    assert_equal(get(digits(), None, names, precision=precision), get(digits(), tmp_path, names, precision=precision))


def test_extract__bf16_is_computed_under_autocast_and_close_to_32(tmp_path: Path) -> None:
    exact, rounded = (get(digits(), tmp_path, precision=p)["avg"].features.float() for p in ("32", "bf16"))
    assert not torch.equal(exact.bfloat16().float(), rounded)
    assert float((exact - rounded).norm() / exact.norm()) < 0.02


def test_extract__computes_only_read_outs_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get(digits(), tmp_path, ("avg",))
    seen = calls(monkeypatch)
    both = get(digits(), tmp_path, ("max", "avg", "max"))
    assert seen == [("max", "avg"), *[("max",)] * 3]  # one empty image and 20 images
    assert list(both) == ["max", "avg"]
    assert_equal({"avg": both["avg"]}, first)
    seen.clear()
    get(digits(), tmp_path, ("avg", "max"))
    assert seen == [("avg", "max")]
    assert len(list(tmp_path.iterdir())) == 2  # an entry each, and nothing unfinished


def test_extract__unreadable_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = (0, 8, 9, 19)
    kept = [i for i in range(20) if i not in bad]
    whole = get(digits(), tmp_path / "whole")["avg"]
    for cache in (None, tmp_path, tmp_path):  # in memory, on disk, from the disk
        caplog.clear()
        part = get(digits(bad, max_bad_fraction=0.2), cache)["avg"]
        assert part.indices.tolist() == kept
        assert part.labels.tolist() == [whole.labels[i] for i in kept]
        assert torch.equal(part.features, whole.features[kept])
        assert ("4 images could not be read" in caplog.text) == (cache is not None)
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        get(digits(bad, max_bad_fraction=0.1), tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []


def test_extract__changed_weights_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotage(backbone: nn.Module, images: Tensor, names: Any, shown: float) -> dict[str, Tensor]:
        next(backbone.parameters()).data.add_(1)
        return read_out(backbone, images, names)

    monkeypatch.setattr(features, "read_out", sabotage)
    with pytest.raises(RuntimeError, match="changed the frozen backbone"):
        get(digits(), None)


def test_extract__features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    backbone = timm.create_model("vil2_tiny_patch16_224", num_classes=0, **SMALL)
    nn.init.constant_(backbone.norm.bias, float("nan"))
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    config = BackboneConfig(VIL.name, str(tmp_path / "weights.pth"), SMALL)
    with pytest.raises(ConfigError, match=r"images 0 to 7 is not finite\. Check backbone\.weights"):
        extract(config, digits(), "val", ["avg"], cache_dir=tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ("avg", "middle")}, "readouts: 'middle' is not known. Available: bilateral_concat, .*max/last4"),
        ({"names": ()}, "readouts is empty"),
        ({"split": "test"}, "split='test' must be train or val"),
        ({"precision": "16"}, "precision='16' must be 32 or bf16"),
        ({"device": "abacus"}, "device='abacus' cannot be used"),
    ],
)
def test_extract__bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get(digits(), None, **settings)


def test_extract__images_of_a_wrong_size() -> None:
    data = FewDigits(20, 8, seed=0)
    data.setup()
    with pytest.raises(ConfigError, match=r"data\.img_size=20 does not fit"):
        get(data, None)


def test_extract__progress_is_shown_only_if_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    get(digits(), None)
    assert "Features" not in "".join(capfd.readouterr())
    extract(VIL, digits(), "val", ["avg"], cache_dir=None)
    assert "Features of val" in "".join(capfd.readouterr())


# --- several processes ------------------------------------------------------------------------------------------------

NAMES = ("avg", "max/last4")
BAD = (3, 9, 10, 19)  # in the batches of either process


def two_processes(world_size: int, folder: Path) -> None:
    distributed.init_process_group("gloo", world_size=world_size, rank=int(os.environ["RANK"]))
    sets = {
        "train": get(digits(), folder / "cache", NAMES, "train", precision="bf16"),
        "val": get(digits(BAD, max_bad_fraction=0.2), folder / "cache", NAMES),
    }
    few = digits()
    few.val_source = SubsetSource(few.val_source, [5, 6, 7])  # nothing to do for the second
    sets["few"] = get(few, folder / "cache", NAMES)
    errors = []
    for bad, limit in (((9, *range(11, 16)), 0.29), (BAD, 0.15)):  # six of one process, or two of each
        try:
            get(digits(bad, max_bad_fraction=limit), folder / "none", NAMES)
        except (ConfigError, RuntimeError) as error:
            errors.append(str(error))
    with pytest.raises(ConfigError, match="cache_dir is not set, but 2 processes"):
        get(digits(), None, NAMES)
    tensors = {key: {n: (s.features, s.labels, s.indices, s.key) for n, s in x.items()} for key, x in sets.items()}
    torch.save((tensors, errors), folder / f"result{distributed.get_rank()}.pt")
    distributed.destroy_process_group()


def test_extract__two_processes_give_what_one_gives(tmp_path: Path) -> None:
    results = run_in_two_processes(__file__, "two_processes", tmp_path, timeout=400)
    assert [code for code, _ in results] == [0, 0], results
    few = digits()
    few.val_source = SubsetSource(few.val_source, [5, 6, 7])
    expected = {
        "train": get(digits(), tmp_path / "one", NAMES, "train", precision="bf16"),
        "val": get(digits(BAD, max_bad_fraction=0.2), tmp_path / "one", NAMES),
        "few": get(few, tmp_path / "one", NAMES),
    }
    for rank in range(2):
        tensors, errors = torch.load(tmp_path / f"result{rank}.pt", weights_only=True)
        for key, sets in expected.items():
            found = {name: FeatureSet(x, labels, name, k, i) for name, (x, labels, i, k) in tensors[key].items()}
            assert_equal(found, sets)
        assert len(errors) == 2
        assert all("images cannot be read, more than data.max_bad_fraction" in error for error in errors)
    assert list((tmp_path / "none").iterdir()) == []
    files = [sorted((tmp_path / name).rglob("*.bin")) for name in ("one", "cache")]
    assert len(files[0]) == len(files[1]) == 18
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_write_embeddings__ids_labels_and_vectors(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_ROWS", 7)  # several parts
    feature_set = get(digits((0, 4), max_bad_fraction=0.2), tmp_path / "cache", precision="bf16")["avg"]
    names = [f"pictures/{i}ü.png" for i in range(20)]
    path = tmp_path / "new" / f"embeddings{suffix}"
    write_embeddings(feature_set, names, path)
    if suffix == ".npz":
        assert zipfile.ZipFile(path).testzip() is None
        with np.load(path) as archive:
            ids, labels, vectors = (archive[name] for name in ("ids", "labels", "vectors"))
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        ids, labels = (np.array(table[name].to_pylist()) for name in ("id", "label"))
        vectors = np.array(table["vector"].to_pylist(), dtype=np.float32)
        assert table.schema.metadata[b"key"].decode() == feature_set.key
    assert ids.tolist() == [name for i, name in enumerate(names) if i not in (0, 4)]
    assert labels.tolist() == feature_set.labels.tolist()
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, feature_set.features.float().numpy())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_write_embeddings__unknown_kinds_and_missing_names(tmp_path: Path) -> None:
    feature_set = FeatureSet(torch.zeros(2, 3), torch.zeros(2).long(), "avg", "", torch.tensor([0, 2]))
    with pytest.raises(ConfigError, match=r"embeddings=.*\.csv must end in \.npz or \.parquet"):
        write_embeddings(feature_set, ["a", "b", "c"], tmp_path / "x.csv")
    with pytest.raises(ValueError, match="2 names are too few for image 2"):
        write_embeddings(feature_set, ["a", "b"], tmp_path / "x.npz")


def test_extract__meta_tells_where_features_come_from(tmp_path: Path) -> None:
    found = get(digits(), tmp_path)["avg"]
    meta = json.loads((tmp_path / found.key / "meta.json").read_text())
    assert (meta["shape"], meta["dtype"], meta["readout"]) == ([20, 32], "float32", "avg")
    assert meta["parts"]["backbone"]["kwargs"] == SMALL
    assert meta["parts"]["transform"]["img_size"] == 16
    assert meta["versions"]["torch"] == torch.__version__
