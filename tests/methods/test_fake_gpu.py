"""Training steps with tensors that say they are on a GPU: whoever mixes them with others of the CPU is told, without a GPU.

torch's fake tensors have a device, a dtype and a shape, but no numbers, and operators check them as real ones. Gradients cannot
be computed (autograd asks for the driver); backward passes that are written out are called by themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from every_method import METHODS, build
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from vil_lightning.methods import ibot, mae
from vil_lightning.methods.divergence import FiniteCheck
from vil_lightning.ops import chunkwise
from vil_lightning.ops.selective_scan import _ChunkedScan

GPU = torch.device("cuda", 0)
# Numbers of hidden patches that are not known leave DINOv2's Sinkhorn without shapes; iBOT shares the rest of its step.
FAKEABLE = [name for name in METHODS if name != "dinov2"]


def fake(value: Any) -> Any:
    """The same on the GPU, if it is a tensor."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)


@contextmanager
def on_gpu(module: nn.Module) -> Iterator[None]:
    """All parameters and buffers, shared ones shared, are fake inside."""
    fakes: dict[int, Tensor] = {}
    before = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                before.append((tensors, name, tensor))
                if id(tensor) not in fakes:
                    value = fake(tensor.detach())
                    parameter = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if parameter else value
                tensors[name] = fakes[id(tensor)]
    try:
        yield
    finally:
        for tensors, name, tensor in before:
            tensors[name] = tensor


def on_cpu(draw: Callable[..., Tensor], result: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Masks are drawn with real numbers, on the CPU as on a real run."""

    def drawn(*args: Any, **kwargs: Any) -> Tensor:
        args = tuple(torch.device("cpu") if isinstance(arg, torch.device) else arg for arg in args)
        with unset_fake_temporarily():
            mask = draw(*args, **kwargs)
        return result(mask)

    return drawn


class OneStep(L.Callback):
    """Takes the second step with everything on the GPU, and ends the run."""

    loss: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            return
        quiet = {"log": mock.DEFAULT, "log_dict": mock.DEFAULT}
        with (
            FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()),
            on_gpu(pl_module),
            mock.patch.multiple(pl_module, **quiet),
            mock.patch.object(pl_module, "_device", GPU),
            mock.patch.object(SingleDeviceStrategy, "root_device", GPU),
            mock.patch.object(FiniteCheck, "raise_if_not_finite"),
            mock.patch.object(ibot, "uneven_block_mask", on_cpu(ibot.uneven_block_mask, lambda mask: mask)),
            mock.patch.object(mae, "hidden_mask", on_cpu(mae.hidden_mask, fake)),
        ):
            self.loss = pl_module.training_step(tree_map(fake, batch), batch_idx)
        raise KeyboardInterrupt


def step(module: Any, data: Any, folder: Path) -> Any:
    watch = OneStep()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(folder, max_steps=3, max_epochs=2, callbacks=[watch], log_every_n_steps=1000).fit(
            module, datamodule=data
        )
    return watch.loss["loss"] if isinstance(watch.loss, dict) else watch.loss


@pytest.mark.parametrize("name", FAKEABLE)
def test_step__stays_on_the_device(name: str, tmp_path: Path) -> None:
    loss = step(*build(name, tmp_path), tmp_path)
    assert loss.device == GPU
    assert loss.ndim == 0


def test_step__a_tensor_of_the_cpu_is_found(tmp_path: Path) -> None:
    module, data = build("supervised", tmp_path)
    with (
        mock.patch.object(module, "mix", lambda images, labels: (images, torch.zeros(len(images), 10))),
        pytest.raises(RuntimeError, match=r"two (different )?devices"),
    ):
        trainer(tmp_path, max_steps=3, max_epochs=2, callbacks=[OneStep()]).fit(module, datamodule=data)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunkwise_backward__stays_on_the_device(reverse: bool) -> None:
    with FakeTensorMode():
        q, k, v, grad = (torch.randn(3, 4, 5, 8, device=GPU) for _ in range(4))
        numbers = [torch.randn(3, 4, 5, dtype=torch.float64, device=GPU) for _ in range(3)]
        hidden, read_sum = chunkwise._forward(q, k, v, *numbers, reverse, 1e-6)
        grads = chunkwise._backward(grad, q, k, v, *numbers, hidden, read_sum, reverse, 1e-6)
    assert all(x.device == GPU for x in (hidden, read_sum, *grads))


@pytest.mark.parametrize("reverse", [False, True])
def test_selective_scan_backward__stays_on_the_device(reverse: bool) -> None:
    context = mock.Mock(save_for_backward=lambda *tensors: setattr(context, "saved_tensors", tensors))
    with FakeTensorMode():
        x, delta = (torch.randn(2, 9, 6, device=GPU) for _ in range(2))
        B, C = (torch.randn(2, 9, 4, device=GPU) for _ in range(2))
        y = _ChunkedScan.forward(context, x, delta, torch.randn(6, 4, device=GPU), B, C, reverse, 4)
        *grads, _, _ = _ChunkedScan.backward.__wrapped__(context, y)
    assert all(g is not None and g.device == GPU for g in grads)
