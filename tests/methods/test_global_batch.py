"""The images of an optimiser step stay the same, however many devices share them."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny import Steps, pictures, state, supervised, trainer

from vil_lightning.callbacks import RunSummary
from vil_lightning.errors import ConfigError
from vil_lightning.methods.run_length import divide_batch, split_batch


@pytest.mark.parametrize(
    ("images", "largest", "devices", "even", "expected"),
    [
        (2048, 128, 16, False, (128, 1)),
        (2048, 128, 8, False, (128, 2)),
        (2048, 128, 1, False, (128, 16)),
        (2048, 512, 32, False, (64, 1)),  # fewer than fit
        (1024, 300, 1, False, (256, 4)),  # 1024 / 300 is 3.4, but 4 micro batches are equally large
        (1000, 300, 1, False, (250, 4)),
        (96, 40, 2, False, (24, 2)),
        (90, 20, 1, False, (18, 5)),
        (90, 15, 1, False, (15, 6)),
        (90, 15, 1, True, (10, 9)),  # pairs
        (7, 3, 1, False, (1, 7)),
    ],
)
def test_split_batch__as_few_micro_batches_as_fit(
    images: int, largest: int, devices: int, even: bool, expected: tuple[int, int]
) -> None:
    per_device, accumulated = split_batch(images, largest, devices, even)
    assert (per_device, accumulated) == expected
    assert per_device * accumulated * devices == images


@pytest.mark.parametrize("largest", [1, 2, 5, 64, 1000])
@pytest.mark.parametrize("even", [False, True])
def test_split_batch__is_the_first_that_fits(largest: int, even: bool) -> None:
    for images in (12, 60, 128, 210, 252):
        fitting = [n for n in range(1, images + 1) if images % n == 0 and images // n <= largest]
        fitting = [n for n in fitting if not even or images // n % 2 == 0]
        if fitting:
            assert split_batch(images, largest, 1, even) == (images // fitting[0], fitting[0])
        else:
            with pytest.raises(ConfigError, match="global_batch_size"):
                split_batch(images, largest, 1, even)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 8, 3), r"global_batch_size=100 cannot be divided among 3 devices .* global_batch_size=99 or 102"),
        ((2, 8, 3), r"global_batch_size=2 cannot be divided among 3 devices .* global_batch_size=3\."),
        ((0, 8, 1), r"global_batch_size=0 must be at least 1"),
        ((9, 8, 1, True), r"global_batch_size=9 gives each of 1 devices 9 images.*data\.batch_size=8"),
        ((8, 1, 1, True), r"even batches of at most data\.batch_size=1"),
    ],
)
def test_split_batch__says_what_to_change(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_batch(*arguments)


def test_divide_batch__another_accumulation_is_refused() -> None:
    for wanted, accepted in ((1, True), (2, True), (4, False)):
        fit, data = trainer(accumulate_grad_batches=wanted), pictures(8)
        if accepted:
            divide_batch(fit, supervised(mix_prob=0.0), data, 16)
            assert (data.batch_size, fit.accumulate_grad_batches) == (8, 2)
            assert data.eval_batch_size == 8
        else:
            with pytest.raises(ConfigError, match=r"trainer\.accumulate_grad_batches=4, but global_batch_size=16"):
                divide_batch(fit, supervised(mix_prob=0.0), data, 16)


def test_divide_batch__mixup_gets_pairs() -> None:
    for mix_prob, expected in ((0.0, (3, 2)), (1.0, (2, 3))):
        fit, data = trainer(), pictures(5)
        divide_batch(fit, supervised(mix_prob=mix_prob), data, 6)
        assert (data.batch_size, fit.accumulate_grad_batches) == expected


def test_divide_batch__needs_data_of_this_project() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size needs .* not a LightningDataModule"):
        divide_batch(trainer(), supervised(), L.LightningDataModule(), 8)


def run(largest: int, images: int, folder: Path) -> tuple[L.Trainer, Any, Steps]:
    kept, fit_settings = Steps(), {"max_epochs": 2}
    model, data = supervised(mix_prob=0.0, lr_warmup=0, base_lr=0.1), pictures(largest)
    fit = trainer(folder, callbacks=[kept], **fit_settings)
    divide_batch(fit, model, data, images)
    fit.fit(model, datamodule=data)
    return fit, model, kept


def test_run__accumulation_changes_nothing(tmp_path: Path) -> None:
    """32 images in steps of 12: the 8 that are left make no step of their own, in whatever pieces."""
    whole, expected, batches = run(12, 12, tmp_path)
    assert whole.global_step == 4
    for largest, accumulated in ((6, 2), (4, 3), (5, 3), (1, 12)):
        pieces, model, kept = run(largest, 12, tmp_path)
        assert pieces.accumulate_grad_batches == accumulated
        assert pieces.global_step == whole.global_step == pieces.estimated_stepping_batches
        images = [torch.cat([batch for batch, _ in kept.batches[i : i + accumulated]]) for i in (0, accumulated)]
        assert torch.equal(images[0], batches.batches[0][0])
        assert torch.equal(images[1], batches.batches[1][0])
        for name, value in state(expected).items():
            torch.testing.assert_close(state(model)[name], value, rtol=1e-4, atol=1e-5)


def test_run__more_than_all_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=64, but the training set has 32 images"):
        run(8, 64, tmp_path)


def test_summary__says_what_accumulation_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mix_prob, said in ((0.0, False), (1.0, True)):
        summary = RunSummary()
        summary.console.width = 250
        fit, data, model = (
            trainer(tmp_path, max_epochs=1, callbacks=[summary]),
            pictures(4),
            supervised(mix_prob=mix_prob),
        )
        divide_batch(fit, model, data, 16)
        fit.fit(model, datamodule=data)
        out = capsys.readouterr().out
        assert "16 = 4 x 1 device(s) x 4 accumulated" in out
        assert ("not as in one batch of 16: MixUp and CutMix draw once per accumulated batch" in out) == said
