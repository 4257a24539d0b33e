"""Linear probes on augmented images."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path += [str(Path(__file__).parent)]
from small import subject

from vil_lightning.data.loading import TransformedDataset
from vil_lightning.errors import ConfigError
from vil_lightning.evaluation import LinearProbe, augmented, tasks
from vil_lightning.evaluation.augmented import augmented_views, crop_transform
from vil_lightning.evaluation.probes import PROTOCOLS, Protocol, probe

SHORT = Protocol("short", base_lrs=(0.1, 1.0), batch_size=32, epochs=3)
READOUTS = ["avg", "first/last4"]


def collected(case: Any, transform: Any, batches: list[Tensor]) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
    return list(augmented_views(case, transform, READOUTS, torch.arange(10, 172))(iter(batches)))


def test_views__without_randomness_are_the_cached_features() -> None:
    case = subject()
    still = crop_transform(16, (1.0, 1.0), 0.0)
    still.ratio = (1.0, 1.0)
    batches = [torch.tensor([3, 0, 7]), torch.tensor([5, 3])]
    cached = case.features("train", READOUTS)
    for (rows, found), batch in zip(collected(case, still, batches), batches, strict=True):
        assert torch.equal(rows, batch)
        for name in READOUTS:  # row 3 is image 13
            torch.testing.assert_close(found[name], cached[name].features[batch + 10], atol=1e-5, rtol=1e-5)


def test_views__are_new_in_every_step_and_equal_in_every_run_with_any_workers() -> None:
    batches = [torch.tensor([3, 0, 7]), torch.tensor([3, 0, 7])]
    transform = crop_transform(16, (0.3, 0.9), 0.5)
    first, second = (collected(subject(num_workers=n), transform, batches) for n in (0, 2))
    for (_, a), (_, b) in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in READOUTS)
    assert not torch.allclose(first[0][1]["avg"], first[1][1]["avg"])


def test_views__flips_come_as_often_as_they_should() -> None:
    case = subject()
    cached = case.features("train", READOUTS)["avg"].features[10:74]
    shares = []
    for probability in (0.0, 0.5, 1.0):
        still = crop_transform(16, (1.0, 1.0), probability)
        still.ratio = (1.0, 1.0)
        ((_, found),) = collected(case, still, [torch.arange(64)])
        same = ((found["avg"] - cached).abs().amax(1) < 1e-5).double().mean().item()
        shares.append(same)
    assert shares[0] == 1.0
    assert 0.25 < shares[1] < 0.75
    assert shares[2] < 0.1


def test_views__half_precision_is_rounded_as_in_the_cache() -> None:
    case = subject()
    case.precision = "bf16"
    ((_, found),) = collected(case, crop_transform(16, (0.5, 1.0), 0.0), [torch.arange(4)])
    assert {x.dtype for x in found.values()} == {torch.bfloat16}


def test_views__changed_weights_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = augmented.read_out

    def sabotage(network: torch.nn.Module, *args: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            next(network.parameters()).add_(1)
        return original(network, *args)

    monkeypatch.setattr(augmented, "read_out", sabotage)
    with pytest.raises(RuntimeError, match="changed the frozen backbone"):
        collected(subject(), crop_transform(16, (0.5, 1.0), 0.0), [torch.arange(4)])


def test_probe__on_views_equals_plain_torch() -> None:
    """Two heads, one after the other, with `torch.optim.SGD`."""
    generator = torch.Generator().manual_seed(0)
    train, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    seen: list[tuple[Tensor, Tensor]] = []

    def views(batches: Iterator[Tensor]) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        for rows in batches:
            features = train[rows] + torch.randn(len(rows), 5, generator=generator)
            seen.append((rows, features))
            yield rows, {"x": features}

    result = probe(SHORT, {"x": train}, labels, {"x": train[:20]}, labels[:20], views=views, held_out=0.2)
    trained_on = torch.cat([rows for rows, _ in seen]).unique()
    assert len(trained_on) == result.num_train == 48
    assert len(seen) == result.num_steps == 3 * 2
    start = 0.01 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for head in result.heads:
        layer = torch.nn.Linear(5, 3)
        with torch.no_grad():
            layer.weight.copy_(start)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
        for step, (rows, features) in enumerate(seen):
            for group in optimizer.param_groups:
                group["lr"] = head.base_lr * 32 / 256 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item())
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(features), labels[rows]).backward()
            optimizer.step()
        expected = 100 * (layer(train[:20]).argmax(1) == labels[:20]).double().mean().item()
        assert head.val == pytest.approx(expected)


def test_linear_probe__augmented_names_itself_and_trains_on_the_kept_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "dino", Protocol("dino", base_lrs=(0.1, 1.0, 3.0), batch_size=64, epochs=2))
    seen: list[set[int]] = []
    original = TransformedDataset.__getitem__

    def watched(self: TransformedDataset, key: Any) -> Any:
        if isinstance(key, tuple) and not isinstance(self.transform, type(case.data.eval_transform)):
            seen.append({key[1]})
        return original(self, key)

    case = subject()
    monkeypatch.setattr(TransformedDataset, "__getitem__", watched)
    (score,) = LinearProbe("dino", ["auto", "avg/last4"], images="augmented", crop_scale=(0.5, 1.0)).run(case)
    assert score.name == "linear probe, dino, augmented"
    assert score.protocol == "probe/dino/augmented/held-out=0.1/crops=0.5-1/flips=0.5/own-readout+avg/last4"
    held_out = len(case.data.train_source) - len(set.union(*seen))
    assert 10 <= held_out <= 24
    assert any(note.startswith(f"chosen on {held_out} held-out images: ") for note in score.notes)


def test_notes__deviations_and_winners_at_the_edge() -> None:
    labels = torch.arange(60) % 3
    features = torch.eye(5)[labels] + 0.1 * torch.randn(60, 5)
    images = ({"x": features}, labels, {"x": features}, labels)
    edge = probe(Protocol("edge", base_lrs=(1e-9, 1e-8, 1.0), batch_size=30, epochs=20), *images)
    assert edge.winner.base_lr == 1.0
    assert "the chosen learning rate 1 is at the end of those tried" in edge.notes
    two = probe(Protocol("two", base_lrs=(1e-9, 1.0), batch_size=30, epochs=20), *images)
    assert not any("at the end" in note for note in two.notes)
    cached, augmented = (
        probe("mae", *images, views=views).notes
        for views in (None, lambda batches: ((rows, {"x": features[rows]}) for rows in batches))
    )
    assert any("features of the eval transform" in note for note in cached)
    assert not any("features of the eval transform" in note for note in augmented)
    assert [note for note in cached if note not in augmented] == [note for note in cached if "eval transform" in note]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": "other"}, "images='other' must be cached or augmented"),
        ({"crop_scale": (0.5, 1.0)}, "crop_scale and hflip_prob change nothing with images=cached"),
        ({"images": "augmented", "crop_scale": (0.5, 2.0)}, r"scale=\(0.5, 2.0\) must satisfy"),
    ],
)
def test_linear_probe__wrong_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearProbe(**kwargs)


def test_linear_probe__augmented_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "processes", lambda: (0, 2))
    with pytest.raises(ConfigError, match="images=augmented runs on one process"):
        LinearProbe(images="augmented").check(subject())
