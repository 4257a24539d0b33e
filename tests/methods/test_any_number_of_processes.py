"""One, two and four processes that share a batch train alike: the same loss curve and the same networks, to rounding.

Random numbers inside the network (drop path, MixUp, erasing, masks) are drawn by each process for its own images and so differ;
they are off here, or made from the images. `test_supervised_resume.py` has two
processes against one that draws twice. LinearProbe is refused on more than one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import test_distillation
import test_ibot
import test_lejepa
import test_mae
import test_segmentation
import torch
from tiny import digits, dino, pictures, run_in_processes, supervised, trainer

from vil_lightning.data.loading import ImageSource
from vil_lightning.data.segmentation import Masked, ShapesSegmentation
from vil_lightning.dense import IGNORED
from vil_lightning.errors import ConfigError
from vil_lightning.methods import DINO, IBOT, BackboneConfig
from vil_lightning.methods.batch_norm import BatchNormSync

STEPS, GLOBAL_BATCH = 4, 8


class UnevenlyLabelled(ShapesSegmentation):
    """Images of which more or less is labelled, and some not at all."""

    def build_sources(self) -> tuple[ImageSource, ImageSource, list[str]]:
        train, val, classes = super().build_sources()
        for number, pair in enumerate(train.pairs):  # type: ignore[attr-defined]
            mask = pair.mask.clone()
            mask[: 8 * (number % 5)] = IGNORED
            train.pairs[number] = Masked(pair.image, mask)  # type: ignore[attr-defined]
        return train, val, classes


def shapes(batch_size: int) -> ShapesSegmentation:
    return UnevenlyLabelled(img_size=32, batch_size=batch_size, num_train=32, num_val=2, seed=0)


def with_sgd(model: Any) -> Any:
    """Gradients that are zero but for rounding (of biases before a batch norm) would become full steps of AdamW."""
    of_method = model.configure_optimizers
    model.configure_optimizers = lambda: torch.optim.SGD(of_method().param_groups)
    return model


def dino_of_resnet() -> DINO:
    torch.manual_seed(1)
    sizes = {"num_prototypes": 24, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "freeze_last_layer": 0}
    return DINO(BackboneConfig("resnet10t", None, {}), base_lr=0.02, lr_warmup=0, teacher_momentum=0.9, **sizes)


class ContentIBOT(IBOT):
    draw_mask = test_ibot.ContentDINOv2.draw_mask


def sinkhorn_and_koleo() -> Any:
    return test_ibot.make(test_ibot.ContentDINOv2, targets="sinkhorn", koleo_weight=0.5, koleo_group=2)


# What no other test runs in two processes.
FEW: dict[str, tuple[Callable[[], Any], Callable[[int], Any]]] = {
    "dinov2, sinkhorn, koleo": (sinkhorn_and_koleo, digits),
    "lejepa": (lambda: with_sgd(test_lejepa.lejepa(lr_warmup=0, base_lr=1.0)), digits),
    "supervised": (lambda: supervised(mix_prob=0.0, lr_warmup=0), pictures),
    "segmentation, linear": (lambda: with_sgd(test_segmentation.model("linear", base_lr=0.2)), shapes),
    "segmentation, upernet": (lambda: with_sgd(test_segmentation.model("upernet", base_lr=0.2)), shapes),
    "dino of a resnet": (lambda: with_sgd(dino_of_resnet()), digits),
}


def everything(folder: Path) -> dict[str, tuple[Callable[[], Any], Callable[[int], Any]]]:
    teacher = test_distillation.write_teacher(folder, "vit")
    masked: dict[str, Any] = {
        name: (lambda n=name: test_mae.contestants()[n], pictures) for name in test_mae.contestants()
    }
    return {
        **FEW,
        **masked,
        "dino": (lambda: dino(lr_warmup=0), digits),
        "ibot": (lambda: test_ibot.make(ContentIBOT), digits),
        "dinov2, centering": (lambda: test_ibot.make(test_ibot.ContentDINOv2, koleo_weight=0.0), digits),
        "distillation": (lambda: test_distillation.distillation(teacher, lr_warmup=0), pictures),
    }


class Curve(L.Callback):
    """The loss as it is logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def train(world_size: int, out: Path, every: bool = False) -> None:
    torch.set_num_threads(1)
    for name, (model, data) in (everything(out) if every else FEW).items():
        parallel: dict[str, Any] = {"plugins": [BatchNormSync(on_cpu=True)], "devices": world_size, "strategy": "ddp"}
        torch.manual_seed(1)
        module, curve = model(), Curve()
        torch.manual_seed(1)  # some networks are built when the run starts
        fit = trainer(out, max_steps=STEPS, max_epochs=1, callbacks=[curve], **(parallel if world_size > 1 else {}))
        fit.fit(module, datamodule=data(GLOBAL_BATCH // world_size))
        assert fit.global_step == STEPS
        content = {"losses": curve.losses, "state": module.state_dict()}
        torch.save(content, out / f"{name}_world{world_size}_rank{fit.global_rank}.pt")


def compare(out: Path, world_size: int, every: bool) -> None:
    for name in everything(out) if every else FEW:
        one = torch.load(out / f"{name}_world1_rank0.pt", weights_only=True)
        others = [
            torch.load(out / f"{name}_world{world_size}_rank{r}.pt", weights_only=True) for r in range(world_size)
        ]
        assert len(set(one["losses"])) == STEPS, name
        for rank, other in enumerate(others):
            assert other["losses"] == pytest.approx(one["losses"], rel=2e-5), f"{name}, process {rank}"
            assert other["state"].keys() == one["state"].keys()
            for key, value in other["state"].items():
                assert torch.equal(value, others[0]["state"][key]), f"{name}: {key} differs between the processes"
                torch.testing.assert_close(value, one["state"][key], rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("world_size", "every"), [(2, False), pytest.param(4, True, marks=pytest.mark.slow)], ids=["2", "4, every method"]
)
@pytest.mark.timeout(600)
def test_processes__loss_curve_and_networks_of_one(world_size: int, every: bool, tmp_path: Path) -> None:
    train(1, tmp_path, every)
    results = run_in_processes(world_size, __file__, "train", tmp_path, 500, every)
    assert [code for code, _ in results] == [0] * world_size, "\n".join(error for _, error in results)
    compare(tmp_path, world_size, every)


def test_koleo_group__has_to_divide_the_images_of_a_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.koleo_group=3 does not divide the 8 images of a device"):
        trainer(tmp_path, max_steps=1).fit(test_ibot.make(koleo_weight=0.1, koleo_group=3), datamodule=digits())
    with pytest.raises(ConfigError, match=r"model\.koleo_group=1 must be at least 2"):
        test_ibot.make(koleo_group=1)
