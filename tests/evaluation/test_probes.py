"""Probes against plain PyTorch, one head at a time, and LARS against its formula."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil_lightning.errors import ConfigError
from vil_lightning.evaluation.heads import Heads
from vil_lightning.evaluation.inputs import channel_statistics, few_labels, split_held_out
from vil_lightning.evaluation.probes import PROTOCOLS, Protocol, probe


def data(count: int, seed: int = 0, width: int = 6) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    centres = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    x = centres[labels] + torch.randn(count, width, generator=generator)
    return {"avg": x, "last": torch.cat([x[:, 2:], 2 * x[:, :1]], dim=1)}, labels


def alone(
    protocol: Protocol, x: Tensor, labels: Tensor, lr: float, weight_decay: float, seed: int = 0
) -> nn.Sequential:
    """One head by nn.Linear and torch.optim.SGD (or LARS by its formula), in float64: the published recipes written out."""
    batch = min(protocol.batch_size, len(x))
    steps_per_epoch = len(x) // batch if protocol.drop_last else math.ceil(len(x) / batch)
    total = protocol.iterations or protocol.epochs * steps_per_epoch  # type: ignore[operator]
    linear = nn.Linear(x.shape[1], 3).double()
    nn.init.zeros_(linear.bias)
    linear.weight.data = 0.01 * torch.randn(3, x.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    norm: nn.Module = nn.Identity()
    if protocol.scaling == "batch_norm":
        norm = nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6).double()
    head = nn.Sequential(norm, linear).train()
    groups = [{"params": [linear.weight], "weight_decay": weight_decay}, {"params": [linear.bias]}]
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    while step < total:
        order = torch.randperm(len(x), generator=generator)
        for i in range(steps_per_epoch):
            if step == total:
                break
            rows = order[i * batch : (i + 1) * batch]
            sgd.zero_grad()
            F.cross_entropy(head(x[rows].double()), labels[rows]).backward()
            if protocol.optimizer == "lars":
                grad, weight = linear.weight.grad, linear.weight.detach()
                assert grad is not None
                grad.mul_(0.001 * weight.norm() / grad.norm())
            epoch = step / steps_per_epoch if protocol.cosine_per == "step" else step // steps_per_epoch
            epochs = total / steps_per_epoch
            warmup = protocol.warmup_epochs
            for group in sgd.param_groups:
                rate = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
                group["lr"] = lr * batch / 256 * (epoch / warmup if epoch < warmup else rate)
            sgd.step()
            step += 1
    return head.eval()


SHORT = {
    "dino": replace(PROTOCOLS["dino"], epochs=3, batch_size=32, base_lrs=(0.8,)),
    "ibot": replace(PROTOCOLS["ibot"], epochs=3, batch_size=32, base_lrs=(0.8, 0.08)),
    "mae": replace(PROTOCOLS["mae"], epochs=30, warmup_epochs=5, batch_size=32, base_lrs=(40.0,)),
    "dinov2": replace(PROTOCOLS["dinov2"], iterations=8, batch_size=32, base_lrs=(0.8, 0.08)),
    "sweep": replace(PROTOCOLS["sweep"], epochs=3, batch_size=32, base_lrs=(0.8, 0.08), weight_decays=(0.0, 0.3)),
}


@pytest.mark.parametrize("name", SHORT)
def test_probe__each_head_as_if_trained_alone(name: str) -> None:
    protocol = SHORT[name]
    (train, labels), (val, val_labels) = data(110), data(400, seed=7)
    result = probe(protocol, train, labels, val, val_labels, held_out=0.2, seed=4)
    kept, held = split_held_out(labels, 0.2, 4)
    assert len(result.heads) == 2 * len(protocol.base_lrs) * len(protocol.weight_decays)
    ranking = {}
    for head in result.heads:
        x, v = train[head.readout], val[head.readout]
        if protocol.scaling == "standardise":
            mean, std = channel_statistics(x, kept)
            x, v = (x - mean) / std, (v - mean) / std
        oracle = alone(protocol, x[kept], labels[kept], head.base_lr, head.weight_decay, seed=4)
        with torch.no_grad():
            held_scores, scores = oracle(x[held].double()), oracle(v.double())
        assert head.val == pytest.approx(100 * float((scores.argmax(1) == val_labels).double().mean()))
        assert head.held_out == pytest.approx(100 * float((held_scores.argmax(1) == labels[held]).double().mean()))
        ranking[head.name] = head.held_out, -float(F.cross_entropy(held_scores, labels[held]))
    assert len({head.val for head in result.heads}) > 1
    assert result.winner.name == max(ranking, key=lambda key: ranking[key])
    assert result.score.value == result.winner.val
    assert len({head.name for head in result.heads}) == len(result.heads)


@pytest.mark.parametrize("name", ["sweep", "mae", "dino"])
def test_heads__weights_against_plain_pytorch(name: str) -> None:
    protocol = SHORT[name]
    train, labels = data(64)
    x = train["avg"]
    heads = Heads(
        6,
        3,
        lrs=[lr * 32 / 256 for lr in protocol.base_lrs],
        weight_decays=[protocol.weight_decays[-1]] * len(protocol.base_lrs),
        optimizer=protocol.optimizer,
        batch_norm=protocol.scaling == "batch_norm",
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for rows in torch.randperm(64, generator=generator).split(32):
            heads.step(x[rows], labels[rows], factor=1.0)
    constant = replace(protocol, epochs=2, iterations=None, warmup_epochs=0)
    for i, lr in enumerate(protocol.base_lrs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(math, "cos", lambda _: 1.0)  # a constant learning rate
            oracle = alone(constant, x, labels, lr, protocol.weight_decays[-1])
        linear = oracle[1]
        torch.testing.assert_close(heads.weight[i].double(), linear.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.bias[i].double(), linear.bias, atol=1e-5, rtol=1e-4)
    assert heads.bias.abs().max() > 1e-3
    if protocol.scaling == "batch_norm":
        torch.testing.assert_close(heads.norm.running_var.double(), oracle[0].running_var)  # type: ignore[union-attr, operator]


def test_protocols__as_published() -> None:
    peak = {name: [lr * p.batch_size / 256 for lr in p.base_lrs] for name, p in PROTOCOLS.items()}
    assert peak["dino"] == pytest.approx([0.004])
    assert peak["mae"] == pytest.approx([6.4])
    assert (len(peak["ibot"]), min(peak["ibot"]), max(peak["ibot"])) == (45, pytest.approx(4e-4), pytest.approx(36.0))
    assert (len(peak["dinov2"]), min(peak["dinov2"]), max(peak["dinov2"])) == (
        13,
        pytest.approx(4e-5),
        pytest.approx(0.4),
    )
    assert [PROTOCOLS[name].epochs for name in ("dino", "ibot", "mae")] == [100, 100, 90]
    assert (PROTOCOLS["dinov2"].iterations, PROTOCOLS["mae"].warmup_epochs) == (12_500, 10)
    assert all(p.deviations and "cached" not in p.name for name, p in PROTOCOLS.items() if name != "sweep")


def test_probe__one_head_trains_on_all_and_holds_nothing_out() -> None:
    (train, labels), (val, val_labels) = data(110), data(80, seed=7)
    one = {"avg": train["avg"]}, {"avg": val["avg"]}
    result = probe(SHORT["dino"], one[0], labels, one[1], val_labels)
    assert (result.num_train, result.num_held_out, result.winner.held_out) == (110, 0, None)
    assert result.score.protocol == "probe/dino/cached/base_lrs=0.8/batch_size=32/epochs=3"
    assert not any("held-out" in text for text in result.deviations)
    both = probe(SHORT["dino"], train, labels, val, val_labels)
    assert any("held-out" in text for text in both.deviations)


def test_probe__batch_is_cut_to_the_images_and_named() -> None:
    (train, labels), (val, val_labels) = data(110), data(80, seed=7)
    result = probe("mae", {"avg": train["avg"]}, labels, {"avg": val["avg"]}, val_labels)
    assert (result.batch_size, result.num_steps) == (110, 90)
    assert result.score.protocol == "probe/mae/cached/batch_size=110"


def test_probe__vals_labels_take_no_part() -> None:
    (train, labels), (val, val_labels) = data(110), data(80, seed=7)
    first = probe(SHORT["sweep"], train, labels, val, val_labels)
    second = probe(SHORT["sweep"], train, labels, val, (val_labels + 1) % 3)
    assert first.winner.name == second.winner.name
    assert first.score.value > second.score.value


def test_probe__same_with_other_heads_beside_and_bfloat16() -> None:
    (train, labels), (val, val_labels) = data(110), data(80, seed=7)
    train, val = ({name: x.bfloat16() for name, x in split.items()} for split in (train, val))
    many = {head.name: head for head in probe(SHORT["sweep"], train, labels, val, val_labels).heads}
    few = replace(SHORT["sweep"], base_lrs=(0.08,))
    for head in probe(few, {"last": train["last"]}, labels, {"last": val["last"]}, val_labels).heads:
        assert head == many[head.name]


def test_probe__few_labels() -> None:
    (train, labels), (val, val_labels) = data(300), data(80, seed=7)
    rows = few_labels(labels, per_class=5)
    result = probe(SHORT["sweep"], train, labels, val, val_labels, rows=rows, held_out=0.2)
    assert (result.num_train, result.num_held_out) == (12, 3)
    subset = {name: x[rows] for name, x in train.items()}
    same = probe(SHORT["sweep"], subset, labels[rows], val, val_labels, held_out=0.2)
    assert result.num_train == same.num_train
    others = torch.tensor([i for i in range(300) if i not in rows.tolist()])
    apart = probe(SHORT["sweep"], train, labels, val, val_labels, rows=rows, held_out=others)
    assert (apart.num_train, apart.num_held_out) == (15, 285)
    assert apart.score.protocol.endswith("batch_size=15/epochs=3/weight_decays=0,0.3/held-out=285")
    changed = {name: x.clone().index_fill_(0, others, 0.0) for name, x in train.items()}
    blind = probe(SHORT["sweep"], changed, labels, val, val_labels, rows=rows, held_out=others)
    assert [head.val for head in blind.heads] == [head.val for head in apart.heads]  # trained on the few alone


def test_probe__a_head_that_diverges_neither_wins_nor_harms() -> None:
    (train, labels), (val, val_labels) = data(110), data(80, seed=7)
    wild = replace(SHORT["dino"], base_lrs=(1e38, 0.8), epochs=10)
    result = probe(wild, train, labels, val, val_labels)
    assert result.winner.base_lr == 0.8
    assert result.winner.val > 60


def test_heads__cross_entropy_of_one_that_diverged_is_infinite() -> None:
    train, labels = data(20)
    heads = Heads(6, 3, lrs=[1.0, 1.0], weight_decays=[0.0, 0.0])
    heads.weight.detach()[0] = float("nan")
    _, losses, _ = heads.evaluate(train["avg"], labels, None)
    assert losses[0] == math.inf
    assert losses[1] == pytest.approx(math.log(3), abs=0.1)


def test_probe__progress() -> None:
    (train, labels), (val, val_labels) = data(64), data(20, seed=7)
    seen: list[tuple[int, int]] = []
    probe(SHORT["dinov2"], train, labels, val, val_labels, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"protocol": "simclr"}, "Available: dino"),
        ({"val_labels": torch.tensor([0, 1, 3])}, "val: image 2 has label 3"),
        ({"val": {"avg": torch.zeros(3, 6)}}, "read-outs"),
        ({"val": {"avg": torch.zeros(3, 6), "last": torch.zeros(3, 4)}}, "width"),
        ({"rows": torch.tensor([0, 0])}, "rows"),
        ({"rows": torch.tensor([110])}, "rows"),
        ({"held_out": torch.tensor([-1])}, "held_out"),
        ({"held_out": torch.arange(110)}, "held out"),
        ({"held_out": 1.0}, "held_out=1.0"),
    ],
)
def test_probe__wrong(changes: dict, message: str) -> None:  # type: ignore[type-arg]
    train, labels = data(110)
    val, _ = data(3)
    arguments = {"protocol": "sweep", "train": train, "train_labels": labels, "val": val, "val_labels": torch.arange(3)}
    with pytest.raises(ConfigError, match=message):
        probe(**arguments | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base_lrs": ()}, "base_lrs"),
        ({"base_lrs": (0.1, 0.1)}, "different"),
        ({"base_lrs": (0.0,)}, "base_lrs"),
        ({"weight_decays": (-1.0,)}, "weight_decays"),
        ({"epochs": None}, "one of them"),
        ({"iterations": 5}, "one of them"),
        ({"batch_size": 0}, "batch_size"),
        ({"warmup_epochs": 90}, "warmup_epochs"),
        ({"base_lrs": (0.1, 0.2)}, "LARS"),
    ],
)
def test_protocol__wrong(changes: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match=message):
        replace(PROTOCOLS["mae"], **changes)
