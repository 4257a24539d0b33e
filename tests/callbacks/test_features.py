"""Which images callbacks look at, and where they find the network."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
from small_runs import SMALL, VIL, digits_of_one_view, fit
from torch import nn

from vil_lightning.callbacks import EmbeddingProjector, FeatureHealth, OnlineKNN, OnlineProbe
from vil_lightning.callbacks.backbone_of import backbone_of
from vil_lightning.callbacks.features import check_pooled, pooled_features, spread
from vil_lightning.errors import ConfigError
from vil_lightning.methods import MAE, BackboneConfig


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(10, 3, [0, 4, 9]), (3, 10, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (7, 1, [0]), (1, 4, [0])],
)
def test_spread__reaches_both_ends_and_takes_nothing_twice(total: int, count: int, expected: list[int]) -> None:
    assert spread(total, count) == expected


@pytest.mark.parametrize(("total", "count"), [(1_281_167, 50_000), (50_000, 2048), (40_000_001, 5000)])
def test_spread__over_large_sets(total: int, count: int) -> None:
    places = spread(total, count)
    assert len(set(places)) == count
    assert (places[0], places[-1]) == (0, total - 1)
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert max(gaps) - min(gaps) <= 1


def module(**parts: nn.Module) -> Any:
    result = L.LightningModule()
    for name, part in parts.items():
        setattr(result, name, part)
    return result


def test_backbone_of__takes_the_network_that_checkpoints_are_used_for() -> None:
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    of_teacher, of_student = nn.ModuleDict({"backbone": first}), nn.ModuleDict({"backbone": second})
    averaged = nn.ModuleDict({"module": first})
    assert backbone_of(module(teacher=of_teacher, student=of_student)) is first
    assert backbone_of(module(student=of_student, teacher=of_teacher, backbone=second)) is first
    assert backbone_of(module(backbone=first, student=of_student)) is first
    assert backbone_of(module(student=of_student)) is second
    assert backbone_of(module(ema=averaged, backbone=second)) is first
    without = module(backbone=first)
    without.ema = None
    assert backbone_of(without) is first


def test_backbone_of__a_module_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"LightningModule has no backbone.*teacher\.backbone, ema\.module"):
        backbone_of(module(teacher=nn.ModuleDict({"head": nn.Linear(1, 1)}), head=nn.Linear(1, 1)))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vil2_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1}),
        ("resnet10t", {}),
    ],
)
def test_pooled_features__are_those_of_the_network_without_classifier(name: str, kwargs: dict[str, Any]) -> None:
    classifier = timm.create_model(name, num_classes=7, **kwargs).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = pooled_features(classifier, images)
        classifier.reset_classifier(0)
        assert torch.equal(features, classifier(images))
    assert features.shape[1] > 7


def test_pooled_features__of_any_other_network_are_its_output() -> None:
    assert torch.equal(pooled_features(nn.Flatten(), torch.ones(2, 3, 1, 1)), torch.ones(2, 3))


@pytest.mark.parametrize("callback", [EmbeddingProjector, FeatureHealth, OnlineKNN, OnlineProbe])
def test_callbacks__a_network_that_makes_no_vector_is_refused_before_the_first_step(
    callback: Any, tmp_path: Path
) -> None:
    class Never(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            raise AssertionError("training began")

    def run(**kwargs: Any) -> None:
        backbone = BackboneConfig(VIL, None, {**SMALL, **kwargs})
        model = MAE(backbone, decoder_dim=32, decoder_depth=1, lr_warmup=0)
        fit(tmp_path, [Never(), callback()], model, data)

    data = digits_of_one_view()
    with pytest.raises(ConfigError, match=rf"{callback.__name__} reads one vector.*\(16, 32\).*global_pool"):
        run(global_pool="")
    data.img_size = 12
    with pytest.raises(ConfigError, match=rf"{callback.__name__} shows images of data\.img_size=12 px.*multiple of 8"):
        run(patch_size=8)


def check(function: Any) -> None:
    """`check_pooled` outside a run."""
    plugin = SimpleNamespace(forward_context=nullcontext)
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(img_size=16), precision_plugin=plugin)
    check_pooled(OnlineKNN(), trainer, L.LightningModule(), function)


def test_check_pooled__compiles_nothing_for_one_image() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("compiled")

    torch._dynamo.reset()
    check(torch.compile(lambda images: images.mean((2, 3)), backend=never))


def test_check_pooled__too_little_memory_is_not_a_wrong_image() -> None:
    def fail(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes.")

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        check(fail)
    with pytest.raises(ConfigError, match=r"data\.img_size=16.*Kernel size"):
        check(lambda images: torch.conv2d(images, torch.zeros(1, 3, 20, 20)))
