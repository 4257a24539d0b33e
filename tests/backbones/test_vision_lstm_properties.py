"""Any read-out on any grid, and layer-wise learning rates of any depth."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vil_lightning
from vil_lightning.backbones.vision_lstm import BLOCK_DESIGNS
from vil_lightning.optim import layer_lr_scales, weight_decay_groups

PATCH, WIDTH = 2, 8
POOLINGS = (
    *("bilateral_concat", "bilateral_avg", "avg", "middle_patch", "first", "last"),
    *("middle_cls", "first_cls", "last_cls", "bilateral_cls_concat", "bilateral_cls_avg", ""),
)


@dataclasses.dataclass
class Network:
    """Arguments of a tiny ViL; the grid is `img_size / PATCH`."""

    name: str
    kwargs: dict[str, Any]

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(self.name, **self.kwargs).eval()


@st.composite
def networks(draw: st.DrawFn) -> Network:
    # Wide enough for a quadratic number of scans, no even grid preferred.
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    kwargs = {
        "img_size": (rows * PATCH, columns * PATCH),
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": draw(st.integers(1, 6)),
        "num_classes": 3,
        "global_pool": draw(st.sampled_from(POOLINGS[:-1])),
        "block_design": draw(st.sampled_from(sorted(BLOCK_DESIGNS))),
    }
    return Network(draw(st.sampled_from(["vil_tiny_patch16_224", "vil2_tiny_patch16_224"])), kwargs)


def oracle(pooling: str, tokens: Tensor, cls: Tensor) -> Tensor:
    """The read-out in words, from patch tokens (B, S, D) in the order of the image and class tokens (B, N, D)."""
    match pooling:
        case "avg":
            return tokens.mean(dim=1)
        case "first":
            return tokens[:, 0]
        case "last":
            return tokens[:, -1]
        case "middle_patch":
            return tokens[:, tokens.shape[1] // 2]
        case "bilateral_avg":
            return (tokens[:, 0] + tokens[:, -1]) / 2
        case "bilateral_concat":
            return torch.cat([tokens[:, 0], tokens[:, -1]], dim=1)
        case "bilateral_cls_avg":
            return (cls[:, 0] + cls[:, 1]) / 2
        case "bilateral_cls_concat":
            return torch.cat([cls[:, 0], cls[:, 1]], dim=1)
        case _:  # one class token, wherever it stands
            assert cls.shape[1] == 1
            return cls[:, 0]


@settings(max_examples=40)
@given(networks())
def test_pooling__any_grid_reads_what_its_name_says(network: Network) -> None:
    model: Any = network.build()
    pooling = network.kwargs["global_pool"]
    rows, columns = (side // PATCH for side in network.kwargs["img_size"])
    images = torch.randn(2, 3, *network.kwargs["img_size"])
    with torch.no_grad():
        features = model.forward_features(images)
        patches, cls = model.split_tokens(features)
        pooled = model.pool(features)
        assert patches.shape == (2, rows * columns, WIDTH)
        assert cls.shape[1] == {"bilateral_cls_concat": 2, "bilateral_cls_avg": 2}.get(pooling, int("cls" in pooling))
        torch.testing.assert_close(pooled, oracle(pooling, patches, cls))
        assert pooled.shape == (2, WIDTH * (2 if "concat" in pooling else 1))
        logits = model(images)
        assert logits.shape == (2, 3)
        assert bool(logits.isfinite().all())
        torch.testing.assert_close(logits, model.forward_head(features))


@settings(max_examples=15)
@given(networks())
def test_no_pooling__gives_all_tokens(network: Network) -> None:
    model = Network(network.name, {**network.kwargs, "global_pool": "", "num_classes": 0}).build()
    rows, columns = (side // PATCH for side in network.kwargs["img_size"])
    with torch.no_grad():
        assert model(torch.randn(1, 3, rows * PATCH, columns * PATCH)).shape == (1, rows * columns, WIDTH)


@settings(max_examples=40)
@given(networks(), st.floats(0.3, 1.0))
def test_layer_decay__every_parameter_once_and_scales_rise_towards_the_head(network: Network, decay: float) -> None:
    model = network.build()
    scales = layer_lr_scales(model, decay)
    parameters = dict(model.named_parameters())
    assert scales.keys() == parameters.keys()
    pairs = (network.kwargs["depth"] + 1) // 2
    of_block = {
        number: {scales[name] for name in parameters if name.startswith(f"blocks.{number}.")}
        for number in range(network.kwargs["depth"])
    }
    assert all(len(values) == 1 for values in of_block.values())
    blocks = [values.pop() for values in of_block.values()]
    assert blocks == pytest.approx([decay ** (pairs - number // 2) for number in range(len(blocks))])
    stem = {s for name, s in scales.items() if name.startswith(("patch_embed", "pos_embed", "cls_tokens"))}
    assert sorted(stem) == pytest.approx([decay ** (pairs + 1)])
    assert {s for name, s in scales.items() if name.startswith(("norm", "fc_norm", "head"))} == {1.0}

    groups = weight_decay_groups(model, 0.05, scales)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in parameters.values())
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in groups:
        assert {scales[names[id(parameter)]] for parameter in group["params"]} == {group["lr_scale"]}
        assert group["weight_decay"] == (0.05 if group["name"].startswith("decay") else 0.0)
        if group["weight_decay"]:
            assert all(parameter.ndim > 1 for parameter in group["params"])


@settings(max_examples=10)
@given(networks())
def test_load_weights__round_trip_of_any_network(tmp_path_factory: pytest.TempPathFactory, network: Network) -> None:
    model = network.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("weights") / "weights.ckpt"
    torch.save({"state_dict": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, path)
    other = network.build()
    report = vil_lightning.load_weights(other, path)
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
