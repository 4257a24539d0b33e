"""Batch norm over the images of all processes. That two and four equal one: `test_any_number_of_processes.py`."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_any_number_of_processes import dino_of_resnet
from test_lejepa import lejepa
from timm.layers import BatchNormAct2d
from tiny import digits, run_in_processes, trainer
from torch import nn

from vil_lightning.callbacks import RunSummary
from vil_lightning.methods.batch_norm import BatchNormSync, GlobalBatchNorm


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(3)
    x = torch.randn(8, 4, 5, 5) * 3 + 1
    return {
        "2d": (nn.Sequential(nn.BatchNorm2d(4)), x),
        "1d": (nn.Sequential(nn.BatchNorm1d(4)), x[..., 0, 0]),
        "of a sequence": (nn.Sequential(nn.BatchNorm1d(4)), x[..., 0]),
        "with activation": (nn.Sequential(BatchNormAct2d(4, act_layer=nn.SiLU)), x),
        "not affine": (nn.Sequential(nn.BatchNorm2d(4, affine=False)), x),
        "not tracked": (nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), x),
        "cumulative": (nn.Sequential(nn.BatchNorm2d(4, momentum=None)), x),
    }


def step(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three training steps' outputs and gradients, and what evaluation gives then."""
    x = x.clone().requires_grad_()
    results = {}
    for number in range(3):
        y = network(x * (number + 1))
        (y * y.detach().cos()).sum().backward()
        results[f"output {number}"] = y.detach()
    gradients = {"x": x.grad, **{name: p.grad for name, p in network.named_parameters()}}
    network.eval()
    return {**results, **gradients, "eval": network(x).detach(), **network.state_dict()}  # type: ignore[dict-item]


def share(world_size: int, out: Path) -> None:
    """Each process has every second image. (One process: torch's own layers.)"""
    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank() if world_size > 1 else 0
    results = {}
    for name, (network, x) in networks().items():
        if world_size > 1:
            BatchNormSync(on_cpu=True).apply(network)
            assert isinstance(network[0], GlobalBatchNorm)  # type: ignore[index]
        results[name] = step(network, x[rank::world_size])
    torch.save(results, out / f"world{world_size}_rank{rank}.pt")


@pytest.mark.timeout(150)
def test_global_batch_norm__two_processes_equal_torch_in_one(tmp_path: Path) -> None:
    share(1, tmp_path)
    results = run_in_processes(2, __file__, "share", tmp_path)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    one = torch.load(tmp_path / "world1_rank0.pt")
    two = [torch.load(tmp_path / f"world2_rank{rank}.pt") for rank in range(2)]
    for name, expected in one.items():
        assert expected.keys() == two[0][name].keys()
        for key, value in expected.items():
            parts = [rank[name][key] for rank in two]
            if key == "x" or key.startswith("output") or key == "eval":
                got = torch.stack(parts, dim=1).flatten(0, 1)
            elif key.endswith(("weight", "bias")) and key in dict(networks()[name][0].named_parameters()):
                got = parts[0]  # the parameter itself, which no optimiser has moved
            else:
                got = parts[0]
                assert torch.equal(parts[0], parts[1]), f"{name} {key}"
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize("on_cpu", [True, False])
def test_batch_norm_sync__is_undone_and_keeps_tensors_and_activations(on_cpu: bool) -> None:
    network = nn.Sequential(*(network for network, _ in networks().values()))
    before = {name: (value, value.clone()) for name, value in network.state_dict(keep_vars=True).items()}
    kinds = [type(module) for module in network.modules()]
    sync = BatchNormSync(on_cpu)
    sync.apply(network)
    expected = GlobalBatchNorm if on_cpu else nn.SyncBatchNorm
    assert all(isinstance(part[0], expected) for part in network)  # type: ignore[index]
    assert isinstance(network[3][0].act, nn.SiLU)  # type: ignore[index]
    after = network.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is value for name, (value, _) in before.items())  # the optimiser's, too
    network[0][0].running_mean.add_(1)  # type: ignore[index]
    network.eval()
    sync.revert(network)
    assert [type(module) for module in network.modules()] == kinds
    assert not any(module.training for module in network.modules())
    assert torch.equal(network.state_dict()["0.0.running_mean"], before["0.0.running_mean"][1] + 1)


def warned(world_size: int, out: Path) -> None:
    torch.set_num_threads(1)
    for name, model, plugins in (
        ("alone", lejepa(lr_warmup=0), []),
        ("synchronised", lejepa(lr_warmup=0), [BatchNormSync(on_cpu=True)]),
        ("resnet", dino_of_resnet(), []),
    ):
        print(f"== {name}", file=sys.stderr)
        settings: dict[str, Any] = {
            "devices": 2,
            "strategy": "ddp",
            "plugins": plugins,
            "max_steps": 1,
            "max_epochs": 1,
        }
        trainer(out, callbacks=[RunSummary()], **settings).fit(model, datamodule=digits(4))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_summary__warns_of_batch_norms_that_see_one_device(tmp_path: Path) -> None:
    results = run_in_processes(2, __file__, "warned", tmp_path, 280)
    assert [code for code, _ in results] == [0, 0], "\n".join(error for _, error in results)
    _, alone, synchronised, resnet = results[0][1].split("== ")
    wanted = "see the images of their own device only"
    assert f"2 batch norms (head.layers.1, ...) {wanted}" in alone
    assert wanted not in synchronised
    assert re.search(rf"\d+ batch norms \(student\.backbone\.[\w.]+, \.\.\.\) {wanted}", resnet)
    assert "trainer.sync_batchnorm=true" in alone
