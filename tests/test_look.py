"""The contact sheet shows what a run feeds its network."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torchvision.io import read_image

from vil_lightning import look
from vil_lightning.data import Digits, MultiCrop, TrainTransform

ROOT = Path(__file__).parents[1]


class Recorder(L.LightningModule):
    """Keeps the first batch that a run feeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batch: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batch = self.batch or batch
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def first_batch(data: Digits) -> list[Tensor]:
    """In [0, 1], from a run of its own."""
    recorder = Recorder()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    L.Trainer(accelerator="cpu", max_steps=1, **quiet).fit(recorder, datamodule=data)
    images = recorder.batch[0]
    return [data.denormalize(view) for view in (images if isinstance(images, list) else [images])]


def ready(**settings: Any) -> Digits:
    data = Digits(16, 32, seed=4, **settings)
    data.setup("fit")
    return data


def test_batches_of__multi_crop_is_what_a_run_is_fed() -> None:
    transform = MultiCrop(16, 8, 2)
    views, names, originals = look.batches_of(ready(train_transform=transform), 5)
    assert names == ["global 1", "global 2", "local 1", "local 2"]
    fed = first_batch(ready(train_transform=transform))
    for view, expected in zip(views, fed, strict=True):
        torch.testing.assert_close(view, expected[:5], rtol=0, atol=1e-6)
    assert (originals.shape, originals.dtype) == ((5, 3, 16, 16), torch.uint8)


def test_batches_of__views_of_one_size_keep_their_names() -> None:
    _, names, _ = look.batches_of(ready(train_transform=MultiCrop(16, 16, 1)), 1)
    assert names == ["global 1", "global 2", "local 1"]


def test_batches_of__single_views_of_several_epochs() -> None:
    views, names, _ = look.batches_of(ready(train_transform=TrainTransform(16)), 3)
    assert names == [f"epoch {i}" for i in range(6)]
    torch.testing.assert_close(
        views[0], first_batch(ready(train_transform=TrainTransform(16)))[0][:3], rtol=0, atol=1e-6
    )
    assert len({view.numpy().tobytes() for view in views}) == 6


def test_batches_of__without_a_training_transform() -> None:
    views, _, originals = look.batches_of(ready(), 3)
    torch.testing.assert_close(views[5], originals.float() / 255, rtol=0, atol=1e-6)


def test_command__writes_a_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vil_lightning.look", "--config", "configs/pretrain_mae.yaml"]
    command += ["--out", str(tmp_path / "new" / "sheet.png"), "--images", "3", "--size", "40", "--data.img_size", "16"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("sheet.png")
    _, height, width = read_image(str(tmp_path / "new" / "sheet.png")).shape
    assert height > 3 * 40
    assert width > 7 * 40  # the image and six epochs


def test_command__one_error_for_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = ["--config", str(ROOT / "configs/pretrain_mae.yaml"), "--out", str(tmp_path / "sheet.png")]
    for args, message in (
        (["--images", "0"], "--images=0 must be at least 1"),
        (["--data.batch_size", "5000"], "data.batch_size=5000"),
        (["--data.train_transform.scale", "[0, 1]"], "data.train_transform.scale"),
    ):
        with pytest.raises(SystemExit) as info:
            look.main([*config, *args])
        assert info.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()
