"""Parameter groups, learning-rate scaling, clipping."""

import pytest
import timm
import torch
from torch import nn

import vil_lightning  # noqa: F401 - registers the ViL models with timm
from vil_lightning.optim import clip_grad_per_tensor, layer_lr_scales, scale_lr, weight_decay_groups


def names_of(module: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


def test_weight_decay_groups__vil2_tiny() -> None:
    model = timm.create_model("vil2_tiny_patch16_224", img_size=192)
    decay, no_decay = weight_decay_groups(model, 0.05)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.05)
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert (len(decay["params"]), len(no_decay["params"])) == (194, 319)
    assert len({id(p) for group in (decay, no_decay) for p in group["params"]}) == len(list(model.parameters()))


def test_weight_decay_groups__rule_by_name_and_shape() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Linear(3, 4)
            self.norm = nn.LayerNorm(4)
            self.gain = nn.Parameter(torch.ones(()))
            self.wide = nn.Module()
            self.wide.bias = nn.Parameter(torch.ones(2, 2))
            self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    model = Model()
    decay, no_decay = weight_decay_groups(model, 0.1)
    assert names_of(model, decay["params"]) == {"matrix.weight"}
    assert names_of(model, no_decay["params"]) == {"matrix.bias", "norm.weight", "norm.bias", "gain", "wide.bias"}


@pytest.mark.parametrize("nesting", [0, 1, 2])
def test_weight_decay_groups__position_embedding_at_any_depth(nesting: int) -> None:
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1}
    model: nn.Module = timm.create_model("vil2_tiny_patch16_224", **kwargs)
    for _ in range(nesting):
        model = nn.ModuleDict({"backbone": model})
    names = dict(model.named_parameters())
    position = [name for name in names if "pos_embed" in name]
    assert position
    assert all(names[name].ndim > 1 for name in position)  # the shape alone would have it decayed
    decay, no_decay = weight_decay_groups(model, 0.1)
    assert set(position) <= names_of(model, no_decay["params"])
    assert not set(position) & names_of(model, decay["params"])
    assert decay["params"]


def test_weight_decay_groups__frozen_parameters_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    decay, no_decay = weight_decay_groups(model, 0.1)
    assert names_of(model, decay["params"]) == {"1.weight"}
    assert names_of(model, no_decay["params"]) == {"1.bias"}


@pytest.mark.parametrize(("batch", "expected"), [(256, 5e-4), (1024, 2e-3), (32, 6.25e-5)])
def test_scale_lr__linear_in_the_batch(batch: int, expected: float) -> None:
    assert scale_lr(5e-4, batch) == pytest.approx(expected)


def gradients() -> list[torch.Tensor]:
    parameters = [torch.zeros(shape, requires_grad=True) for shape in ((4, 5), (7,), (2, 2, 2), (3,))]
    for parameter, size in zip(parameters[:-1], (10.0, 0.1, 1.0), strict=True):
        parameter.grad = torch.randn(parameter.shape) * size
    return parameters  # the last one has none


@pytest.mark.parametrize("max_norm", [0.05, 1.0, 3.0, 1e6])
def test_clip_grad_per_tensor__against_a_loop(max_norm: float) -> None:
    parameters = gradients()
    expected, squares = [], 0.0
    for parameter in parameters[:-1]:
        assert parameter.grad is not None
        norm = float(parameter.grad.double().pow(2).sum().sqrt())
        squares += norm**2
        factor = max_norm / (norm + 1e-6)
        expected.append(parameter.grad * factor if factor < 1 else parameter.grad.clone())
    total = clip_grad_per_tensor(parameters, max_norm)
    assert float(total) == pytest.approx(squares**0.5, rel=1e-6)
    assert parameters[-1].grad is None
    for parameter, gradient in zip(parameters[:-1], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=0)
    assert all(float(p.grad.norm()) <= max_norm * (1 + 1e-6) for p in parameters[:-1])


def test_clip_grad_per_tensor__none_only_measures() -> None:
    parameters = gradients()
    before = [parameter.grad.clone() for parameter in parameters[:-1]]
    total = clip_grad_per_tensor(parameters, None)
    assert float(total) == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()), rel=1e-6)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters[:-1], before, strict=True))


def test_clip_grad_per_tensor__no_gradients() -> None:
    assert float(clip_grad_per_tensor([torch.zeros(2, requires_grad=True)], 1.0)) == 0.0


def vil2_tiny_layer(name: str) -> int:
    """0 is the stem, 1 to 12 are the pairs of scans, 13 is the norm after the blocks and the head."""
    if name.startswith(("patch_embed.", "pos_embed.")):
        return 0
    return int(name.split(".")[1]) // 2 + 1 if name.startswith("blocks.") else 13


def test_layer_lr_scales__vil2_tiny() -> None:
    model = timm.create_model("vil2_tiny_patch16_224", img_size=192)
    scales = layer_lr_scales(model, 0.65)
    assert scales.keys() == dict(model.named_parameters()).keys()
    for name, scale in scales.items():
        assert scale == pytest.approx(0.65 ** (13 - vil2_tiny_layer(name)), rel=1e-12), name
    assert scales["patch_embed.proj.weight"] == pytest.approx(0.65**13)
    assert scales["blocks.0.norm.weight"] == scales["blocks.1.norm.weight"] == pytest.approx(0.65**12)
    assert scales["blocks.23.mixer.proj_up.weight"] == pytest.approx(0.65)
    assert scales["norm.weight"] == scales["fc_norm.weight"] == scales["head.weight"] == 1.0


@pytest.mark.parametrize(
    ("name", "layers"), [("vil_tiny_patch16_224", 14), ("deit3_small_patch16_224", 14), ("resnet18", 10)]
)
def test_layer_lr_scales__of_any_model(name: str, layers: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    scales = layer_lr_scales(model, 0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert sorted(set(scales.values())) == [0.5 ** (layers - 1 - layer) for layer in range(layers)]
    classifier = model.get_classifier()
    assert {scales[n] for n, p in model.named_parameters() if any(p is q for q in classifier.parameters())} == {1.0}


def test_weight_decay_groups__with_layer_decay() -> None:
    model = timm.create_model("vil2_tiny_patch16_224", img_size=192)
    groups = weight_decay_groups(model, 0.05, layer_lr_scales(model, 0.65))
    assert len(groups) == len({group["name"] for group in groups}) == 2 * 14
    assert sum(len(group["params"]) for group in groups if group["weight_decay"] == 0.05) == 194
    assert sum(len(group["params"]) for group in groups if group["weight_decay"] == 0.0) == 319
    for group in groups:
        layers = {vil2_tiny_layer(name) for name in names_of(model, group["params"])}
        assert len(layers) == 1
        assert group["lr_scale"] == pytest.approx(0.65 ** (13 - layers.pop()), rel=1e-12)


def test_weight_decay_groups__scale_is_one_without_layer_decay() -> None:
    assert [group["lr_scale"] for group in weight_decay_groups(nn.Linear(2, 2), 0.1)] == [1.0, 1.0]


@pytest.mark.parametrize(("base", "batch", "expected"), [(1e-3, 2048, 2e-3), (1e-3, 1024, 1e-3), (1e-5, 1024, 1e-5)])
def test_scale_lr__of_the_published_recipes(base: float, batch: int, expected: float) -> None:
    assert scale_lr(base, batch, 1024) == pytest.approx(expected)
