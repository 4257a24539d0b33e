"""The published implementations' outputs and gradients, in float64, through every way of loading weights.

`golden/*.npz` holds what the published code computed for ViL-T of both versions: `output`, `grad_input_norm`, and for
every tensor of the raw checkpoint its name, shape and gradient norm. Weights, input and the differentiated scalar
follow from the rules in this file.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from vil_lightning import load_weights
from vil_lightning.backbones import VisionLSTM
from vil_lightning.backbones.weights import to_model_names

MODELS = {"vil_tiny": "vil_tiny_patch16_224", "vil2_tiny": "vil2_tiny_patch16_224"}
BACKENDS = ["parallel", "chunkwise", "recurrent"]


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def fill(raw_name: str, shape: tuple[int, ...]) -> Tensor:
    x = normal(zlib.crc32(raw_name.encode()), shape)
    if len(shape) == 1:
        offset = torch.linspace(3, 6, shape[0], dtype=x.dtype) if raw_name.endswith("fgate.bias") else 0
        return 0.1 * x + offset
    if raw_name == "pos_embed.embed":
        return 0.5 * x
    fan_in = shape[-1] if raw_name.endswith("_proj.weight") else np.prod(shape[1:])
    return x / fan_in**0.5


def read_golden(name: str) -> dict[str, Any]:
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as content:
        golden: dict[str, Any] = dict(content)
    golden["shapes"] = {
        str(key): tuple(int(n) for n in shape.split(","))
        for key, shape in zip(golden["raw_keys"], golden["raw_shapes"].tolist(), strict=True)
    }
    return golden


@pytest.fixture(scope="module")
def raw_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file per model, laid out as published: raw names, next to other entries."""
    folder = tmp_path_factory.mktemp("raw")
    files = {}
    for name in MODELS:
        state_dict = {key: fill(key, shape) for key, shape in read_golden(name)["shapes"].items()}
        files[name] = folder / f"{name}.th"
        content = {"state_dict": state_dict, "ctor_kwargs": {"kind": "x", "drop_path_rate": 0.0}, "epoch": 800}
        torch.save(content, files[name])
    return files


def raw_to_model_name(raw_name: str) -> str:
    # Raw names are recognised by the ones that start with `xlstm.`, so one of those goes along.
    return next(iter(to_model_names({raw_name: torch.zeros(1), "xlstm.": torch.zeros(1)})))


def assert_is_golden(model: VisionLSTM, golden: dict[str, Any]) -> None:
    expected = torch.from_numpy(golden["output"])
    images = normal(0, (expected.shape[0], 3, 224, 224)).requires_grad_()
    output = model(images)
    assert (output - expected).norm() <= 1e-9 * expected.norm()

    (output * normal(1, tuple(expected.shape))).sum().backward()
    assert images.grad is not None
    assert images.grad.norm().item() == pytest.approx(golden["grad_input_norm"].item(), rel=1e-6)
    params = dict(model.named_parameters())
    names = [raw_to_model_name(str(key)) for key in golden["raw_keys"]]
    assert sorted(names) == sorted(params)
    for name, norm in zip(names, golden["grad_norm"].tolist(), strict=True):
        assert params[name].grad.norm().item() == pytest.approx(norm, rel=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_published_numbers__load_weights(name: str, backend: str, raw_files: dict[str, Path]) -> None:
    model = timm.create_model(MODELS[name], mlstm_backend=backend).double()
    model.set_grad_checkpointing(backend == "recurrent")  # keeps one matrix per token and head: 10 GB otherwise
    report = load_weights(model, raw_files[name])
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    assert_is_golden(model, read_golden(name))


@pytest.mark.parametrize("backend", ["parallel", "chunkwise"])
@pytest.mark.parametrize("name", MODELS)
def test_published_numbers__timm_pretrained(name: str, backend: str, raw_files: dict[str, Path]) -> None:
    # timm builds and loads in one step, so the model has to be float64 from the start.
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        overlay = {"file": str(raw_files[name])}
        model = timm.create_model(MODELS[name], True, pretrained_cfg_overlay=overlay, mlstm_backend=backend)
    finally:
        torch.set_default_dtype(dtype)
    assert_is_golden(model, read_golden(name))
