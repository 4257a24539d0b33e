"""load_weights: what it reads, what it refuses, and that it loads all or nothing."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from vil_lightning import load_weights
from vil_lightning.backbones import VisionLSTM
from vil_lightning.backbones.layers import resize_position_embedding

StateDict = dict[str, Tensor]


def build(name: str = "vil_tiny_patch16_224", **kwargs: Any) -> VisionLSTM:
    return timm.create_model(name, **{"img_size": 64, "depth": 2, "num_classes": 10, **kwargs})


def copy_of(model: VisionLSTM) -> StateDict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(actual: StateDict, expected: StateDict) -> None:
    assert list(actual) == list(expected)
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


@pytest.fixture
def saved() -> StateDict:
    return copy_of(build())


def prefixed(state_dict: StateDict, prefix: str, factor: float = 1.0) -> StateDict:
    return {prefix + name: factor * value for name, value in state_dict.items()}


# --- what is understood -----------------------------------------------------------------------------------------------


LAYOUTS: dict[str, Callable[[StateDict], Any]] = {
    "plain": lambda sd: sd,
    "state_dict": lambda sd: {"state_dict": sd, "epoch": 3},
    "model": lambda sd: {"model": sd, "args": {"lr": 0.1}},
    "ddp": lambda sd: prefixed(sd, "module."),
    "compiled": lambda sd: prefixed(sd, "_orig_mod."),
    "supervised": lambda sd: {"state_dict": {**prefixed(sd, "backbone."), "criterion.weight": torch.ones(3)}},
    "teacher_and_student": lambda sd: {
        "state_dict": {
            **prefixed(sd, "student.backbone.", 2.0),
            "student.head.0.weight": torch.ones(3),
            **prefixed(sd, "teacher.backbone."),
            "teacher.head.0.weight": torch.ones(3),
        },
        "hyper_parameters": {"lr": 0.1},
    },
    "student_only": lambda sd: {"state_dict": prefixed(sd, "student.backbone.")},
    "mask_buffers": lambda sd: {**sd, "blocks.0.mixer.causal_mask": torch.ones(4, 4)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout__is_understood(layout: str, saved: StateDict, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](saved), tmp_path / "file.ckpt")
    model = build()
    report = load_weights(model, tmp_path / "file.ckpt")
    assert_equal(model.state_dict(), saved)
    assert report.loaded == sorted(saved)
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    assert f"file.ckpt: loaded {len(saved)}, missing 0, unexpected 0, resized 0" in str(report)


def test_safetensors__is_understood(saved: StateDict, tmp_path: Path) -> None:
    save_file(saved, tmp_path / "file.safetensors")
    model = build()
    load_weights(model, str(tmp_path / "file.safetensors"))
    assert_equal(model.state_dict(), saved)


def raw_state_dict(version: int) -> StateDict:
    """The published names and shapes of one scan of width 64 on a 2 x 2 grid, filled at random."""
    dim, inner = 64, 128
    conv = {"conv1d.conv.weight": (inner, 1, 4), "conv1d.conv.bias": (inner,)}
    if version == 2:
        conv = {"conv1d.weight": (inner, 1, 3, 3), "conv1d.bias": (inner,)}
    layer: dict[str, tuple[int, ...]] = {
        "learnable_skip": (inner,),
        "proj_up.weight": (2 * inner, dim),
        **{f"{x}_proj.weight": (inner // 4, 4, 4) for x in "qkv"},
        **conv,
        **{f"mlstm_cell.{x}gate.weight": (4, 3 * inner) for x in "if"},
        **{f"mlstm_cell.{x}gate.bias": (4,) for x in "if"},
        "mlstm_cell.outnorm.weight": (inner,),
        "proj_down.weight": (dim, inner),
    }
    width = dim * version
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "pos_embed.embed": (1, 2, 2, dim),
        "xlstm.blocks.0.xlstm_norm.weight": (dim,),
        **{f"xlstm.blocks.0.xlstm.{name}": shape for name, shape in layer.items()},
        "xlstm.post_blocks_norm.weight": (dim,),
        "head.0.weight": (width,),
        "head.0.bias": (width,),
        "head.1.weight": (10, width),
        "head.1.bias": (10,),
    }
    if version == 2:
        shapes |= {"xlstm.blocks.0.xlstm_norm.bias": (dim,), "xlstm.post_blocks_norm.bias": (dim,)}
        widths = {"proj_up": 2 * inner, "proj_down": dim, "mlstm_cell.outnorm": inner}
        widths |= {f"{x}_proj": inner for x in "qkv"}
        shapes |= {f"xlstm.blocks.0.xlstm.{name}.bias": (n,) for name, n in widths.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("version", [1, 2])
def test_raw_names__are_translated_and_gains_get_their_one_back(version: int, tmp_path: Path) -> None:
    raw = raw_state_dict(version)
    torch.save({"state_dict": raw, "epoch": 400}, tmp_path / "raw.th")
    name = {1: "vil_tiny_patch16_224", 2: "vil2_tiny_patch16_224"}[version]
    model = build(name, embed_dim=64, depth=1, img_size=32)
    report = load_weights(model, tmp_path / "raw.th")
    assert (report.missing, report.unexpected) == ([], [])
    assert len(report.loaded) == len(raw)
    own, block = model.state_dict(), "xlstm.blocks.0."
    torch.testing.assert_close(own["blocks.0.norm.weight"], 1 + raw[block + "xlstm_norm.weight"])
    torch.testing.assert_close(own["norm.weight"], 1 + raw["xlstm.post_blocks_norm.weight"])
    branch = "blocks.0.mixer.branches.0."
    torch.testing.assert_close(own[branch + "norm.weight"], 1 + raw[block + "xlstm.mlstm_cell.outnorm.weight"])
    assert torch.equal(own["fc_norm.weight"], raw["head.0.weight"])  # a plain LayerNorm, stored as it is
    assert torch.equal(own["head.weight"], raw["head.1.weight"])
    assert torch.equal(own[branch + "skip"], raw[block + "xlstm.learnable_skip"])
    assert torch.equal(own[branch + "igate.bias"], raw[block + "xlstm.mlstm_cell.igate.bias"])
    assert torch.equal(own[branch + "fgate.weight"], raw[block + "xlstm.mlstm_cell.fgate.weight"])
    conv = "conv1d.conv.weight" if version == 1 else "conv1d.weight"
    assert torch.equal(own[branch + "conv.weight"], raw[block + "xlstm." + conv])


def test_float64_model__gets_float64_weights_unrounded(tmp_path: Path) -> None:
    saved = {name: torch.rand_like(value, dtype=torch.float64) for name, value in build().state_dict().items()}
    torch.save(saved, tmp_path / "file.pt")
    model = build().double()
    load_weights(model, tmp_path / "file.pt")
    assert_equal(model.state_dict(), saved)


def test_half_precision_file__is_converted_to_the_models_dtype(saved: StateDict, tmp_path: Path) -> None:
    torch.save({name: value.bfloat16() for name, value in saved.items()}, tmp_path / "file.pt")
    model = build()
    load_weights(model, tmp_path / "file.pt")
    assert_equal(model.state_dict(), {name: value.bfloat16().float() for name, value in saved.items()})


# --- adapting ---------------------------------------------------------------------------------------------------------


def test_position_embedding__is_resized_and_reported(saved: StateDict, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "file.pt")
    model = build(img_size=(96, 128))
    report = load_weights(model, tmp_path / "file.pt")
    assert report.resized == ["pos_embed.embed"]
    expected = resize_position_embedding(saved["pos_embed.embed"], (6, 8))
    assert torch.equal(model.pos_embed.embed, expected)


def test_classifier__is_left_out_and_reported_if_the_model_has_none(saved: StateDict, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "file.pt")
    model = build(num_classes=0, global_pool="")
    report = load_weights(model, tmp_path / "file.pt")
    assert sorted(report.unexpected) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert report.missing == []
    assert torch.equal(model.norm.weight, saved["norm.weight"])
    assert "unexpected 4 (" in str(report)


@pytest.mark.parametrize("file_has_head", [True, False], ids=["other_width", "absent"])
def test_allow_missing__keeps_initial_values(file_has_head: bool, saved: StateDict, tmp_path: Path) -> None:
    if not file_has_head:
        saved = {name: value for name, value in saved.items() if not name.startswith("head.")}
    torch.save(saved, tmp_path / "file.pt")
    model = build(num_classes=7)
    before = copy_of(model)
    with pytest.raises(ValueError, match=r"(?s)head\.weight.*allow_missing"):
        load_weights(model, tmp_path / "file.pt")
    assert_equal(model.state_dict(), before)

    report = load_weights(model, tmp_path / "file.pt", allow_missing=("head.",))
    assert report.missing == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.norm.weight, saved["norm.weight"])


# --- refusing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"depth": 3}, r"does not fit this VisionLSTM.*missing in the file \(\d+\): blocks\.2\.norm\.weight"),
        ({"depth": 1}, r"not in the model \(\d+\): blocks\.1\.norm\.weight"),
        ({"embed_dim": 96}, r"shapes \(\d+\): .*file \(192,.*model \(96,"),
        ({"name": "vil2_tiny_patch16_224"}, r"missing in the file \(\d+\): blocks\.0\.norm\.bias"),
    ],
    ids=["deeper", "shallower", "narrower", "version_2"],
)
def test_other_architecture__is_refused_and_nothing_loaded(
    kwargs: dict[str, Any], match: str, saved: StateDict, tmp_path: Path
) -> None:
    torch.save(saved, tmp_path / "file.pt")
    model = build(**kwargs)
    before = copy_of(model)
    with pytest.raises(ValueError, match=f"(?s){match}"):
        load_weights(model, tmp_path / "file.pt")
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999], ids=["empty", "half", "nearly_all"])
def test_truncated_file__is_called_damaged(suffix: str, kept: float, saved: StateDict, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    if suffix == ".pt":
        torch.save(saved, path)
    else:
        save_file(saved, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    model = build()
    before = copy_of(model)
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(model, path)
    assert_equal(model.state_dict(), before)


class Unsafe:
    """Leaves a trace when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("legacy", [False, True], ids=["torch_save", "bare_pickle"])
def test_pickled_objects__are_never_run(legacy: bool, saved: StateDict, tmp_path: Path) -> None:
    path, trace = tmp_path / "file.pt", tmp_path / "trace"
    content = {"state_dict": saved, "extra": Unsafe(trace)}
    if legacy:
        path.write_bytes(pickle.dumps({"extra": Unsafe(trace)}, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"holds pickled Python objects .*Save it as a plain state dict"):
        load_weights(build(), path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content, match",
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"state_dict": 3}, "its state dict is a int, not a dictionary"),
    ],
    ids=["list", "no_tensors", "number"],
)
def test_other_content__is_refused(content: Any, match: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=match):
        load_weights(build(), tmp_path / "file.pt")


def test_missing_file__is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No weights file at .*nowhere\.pt"):
        load_weights(build(), tmp_path / "nowhere.pt")


@pytest.mark.parametrize("prefix", ["class token", "none"])
def test_load_weights__resamples_the_position_table_of_timms_transformers(prefix: str, tmp_path: Path) -> None:
    name = {"class token": "vit_tiny_patch16_224", "none": "deit3_small_patch16_224"}[prefix]  # deit3: no row for it
    kwargs = {"embed_dim": 48, "depth": 1, "num_classes": 0, "num_heads": 3}
    small = timm.create_model(name, img_size=64, **kwargs)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    model = timm.create_model(name, img_size=96, **kwargs)
    report = load_weights(model, tmp_path / "small.pt")
    assert (report.resized, report.missing, report.unexpected) == (["pos_embed"], [], [])
    rows = 1 if prefix == "class token" else 0
    assert torch.equal(model.pos_embed[:, :rows], small.pos_embed[:, :rows])
    table = small.pos_embed[:, rows:].detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(table, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(model.pos_embed[:, rows:].detach(), expected.permute(0, 2, 3, 1).flatten(1, 2))
