"""`model.backbone.grad_checkpointing`: less memory, the same numbers, nothing else."""

import dataclasses
from typing import Any

import pytest
import torch

from vil_lightning.errors import ConfigError
from vil_lightning.methods.backbone import (
    BackboneConfig,
    build_backbone,
    check_resumed_backbone,
    recorded_backbone,
    resolve_backbone,
)

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 2}
CONFIG = BackboneConfig("vil2_tiny_patch16_224", kwargs=SMALL)
CHECKPOINTED = dataclasses.replace(CONFIG, grad_checkpointing=True)


def test_grad_checkpointing__computes_blocks_twice_and_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    plain = build_backbone(CONFIG).double()
    again = build_backbone(CHECKPOINTED).double()
    again.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    counts = []
    for model in (plain, again):
        calls: list[None] = []
        model.blocks[1].mixer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))  # type: ignore[union-attr,index]
        model.train()(images).square().sum().backward()
        counts.append(len(calls))
    assert counts == [1, 2]
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_grad_checkpointing__is_not_part_of_what_a_checkpoint_records() -> None:
    assert recorded_backbone(CHECKPOINTED) == recorded_backbone(CONFIG)
    check_resumed_backbone({"backbone": recorded_backbone(CONFIG)}, CHECKPOINTED)
    assert resolve_backbone(CHECKPOINTED).grad_checkpointing


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_grad_checkpointing__of_other_networks(name: str) -> None:
    config = BackboneConfig(name, kwargs={"img_size": 32, "depth": 1}, grad_checkpointing=True)
    assert build_backbone(config).grad_checkpointing is True


def test_grad_checkpointing__of_a_network_that_cannot_is_refused() -> None:
    config = BackboneConfig("selecsls42", grad_checkpointing=True)
    with pytest.raises(ConfigError, match=r"model\.backbone\.grad_checkpointing=true: selecsls42 cannot"):
        build_backbone(config)
