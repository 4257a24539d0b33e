"""The published formulation gives the numbers of this project's ViL, from the same parameters."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vil_lightning  # noqa: F401 - registers the models
from vil_lightning.ops import mlstm
from vil_lightning.speed.published import as_published, published_mlstm

SMALL: dict[str, Any] = {"img_size": (48, 80), "embed_dim": 32, "depth": 3, "num_classes": 5}


@pytest.mark.parametrize("name", ["vil_tiny_patch16_224", "vil2_tiny_patch16_224"])
def test_as_published__same_output_and_gradients(name: str) -> None:
    model = timm.create_model(name, **SMALL).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    published = as_published(copy.deepcopy(model))
    images = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    out, expected = published(images), model(images)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(published.parameters()), weight)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()), weight)
    assert len(grads) == len(expected_grads)
    # The published form differentiates through its stabiliser, which cancels but for rounding and the tiny eps.
    named = dict(published.named_parameters())
    ours = dict(zip((n for n, _ in model.named_parameters()), expected_grads, strict=True))
    for name_, grad in zip(named, grads, strict=True):
        torch.testing.assert_close(
            grad, ours[name_.replace("mixer.branch.", "mixer.branches.0.")], rtol=1e-5, atol=1e-7
        )


def test_published_mlstm__against_the_recurrence() -> None:
    q, k, v = (torch.randn(2, 2, 13, 6, dtype=torch.float64) for _ in range(3))
    igate, fgate = (3 * torch.randn(2, 2, 13, dtype=torch.float64) for _ in range(2))
    expected = mlstm(q, k, v, igate, fgate, backend="recurrent")
    torch.testing.assert_close(published_mlstm(q, k, v, igate, fgate), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kwargs", [{"block_design": "bidirectional"}, {"global_pool": "middle_cls"}, {"block_design": "alternating_quad"}]
)
def test_as_published__refuses_what_was_not_published(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only block_design='alternating' without class tokens"):
        as_published(timm.create_model("vil2_tiny_patch16_224", **{**SMALL, **kwargs}))
