"""A run that does not fit into memory ends with one message that says what does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import vil_lightning.cli
from vil_lightning.cli import main
from vil_lightning.data import MultiCrop
from vil_lightning.methods import BackboneConfig
from vil_lightning.out_of_memory import asked_bytes, describe, is_out_of_memory, remedies

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free. Of the "
    "allocated memory 70.00 GiB is allocated by PyTorch, and 5.00 GiB is reserved by PyTorch but unallocated."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
)


class Fails(L.Callback):
    """Raises, in the hook that is named, what the test wants."""

    error: Any = None
    hook = ""

    def on_before_backward(self, *args: Any) -> None:
        self._fail("on_before_backward")

    def on_validation_start(self, *args: Any) -> None:
        self._fail("on_validation_start")

    def _fail(self, hook: str) -> None:
        if self.hook == hook:
            raise self.error() if callable(self.error) else self.error


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Any, hook: str, *arguments: str) -> None:
    recipe = Path("configs/train_supervised.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Fails, "error", staticmethod(error) if callable(error) else error)
    monkeypatch.setattr(Fails, "hook", hook)
    monkeypatch.setattr(vil_lightning.cli, "Throughput", Fails)  # one of the callbacks that every run has
    small = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", str(recipe), *small, *arguments])


# --- the command line -------------------------------------------------------------------------------------------------


def huge() -> BaseException:
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("an exbibyte was allocated")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA), huge], ids=["injected", "of the allocator"])
def test_fit__one_message_and_exit_code_2(
    error: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path, error, "on_before_backward", "--data.batch_size", "24")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error: out of memory on cpu while training, at step 0.") == 1
    assert ("2.50 GiB" if error is not huge else "1073741824.00 GiB") in message
    assert "24 images per device, x 1 accumulated, x 1 device(s)" in message
    assert "--data.batch_size 12 --trainer.accumulate_grad_batches 2 " in message
    assert "--model.backbone.grad_checkpointing true" in message
    assert "--trainer.precision bf16-mixed" in message
    assert "Traceback" not in message


def test_fit__what_is_in_force_already_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.backbone.grad_checkpointing", "true", "--trainer.precision", "bf16-mixed"]
    arguments += ["--trainer.accumulate_grad_batches", "3", "--data.batch_size", "12"]
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, torch.OutOfMemoryError(CUDA), "on_before_backward", *arguments)
    message = capsys.readouterr().err
    assert "--data.batch_size 6 --trainer.accumulate_grad_batches 6 " in message
    assert "grad_checkpointing" not in message
    assert "bf16-mixed   (" not in message


def test_fit__other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(monkeypatch, tmp_path, RuntimeError("shapes do not fit"), "on_before_backward")


def test_fit__while_scoring_the_batch_of_scoring_shrinks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, torch.OutOfMemoryError(CUDA), "on_validation_start", "--data.eval_batch_size", "40")
    message = capsys.readouterr().err
    assert "while scoring" in message
    assert "--data.eval_batch_size 20 " in message
    assert "accumulate" not in message


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(CUDA), True),
        (RuntimeError(CPU), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CUDA, int(2.5 * 2**30)),
        (CPU, 4096),
        ("Tried to allocate 20.00 MiB.", 20 * 2**20),
        ("out of memory", None),
    ],
)
def test_asked_bytes(text: str, expected: int | None) -> None:
    assert asked_bytes(RuntimeError(text)) == expected


def stub(
    batch_size: int = 8, accumulated: int = 1, mixup: Any = None, precision: str = "32-true", **kwargs: Any
) -> Any:
    """A trainer with what `describe` asks of it."""
    module = torch.nn.Module()
    module.mixup = mixup
    module.backbone_config = BackboneConfig("x", None, {}, kwargs.get("checkpointing", False))
    module.backbone = torch.nn.Linear(2, 2)
    module.backbone.set_grad_checkpointing = lambda enable: None
    module.requires_grad_(kwargs.get("trained", True))
    data = SimpleNamespace(batch_size=batch_size, eval_batch_size=1, train_transform=MultiCrop(32, 16, 6), img_size=64)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    settings = {"accumulate_grad_batches": accumulated, "precision": precision, "world_size": 2, "strategy": strategy}
    return SimpleNamespace(lightning_module=module, datamodule=data, global_step=7, **settings)


@pytest.mark.parametrize(
    ("batch_size", "mixup", "smaller", "accumulated"),
    [
        (8, None, 4, 2),
        (15, None, 5, 3),
        (7, None, 1, 7),
        (6, object(), 2, 3),
        (2, object(), None, None),
        (1, None, None, None),
    ],
)
def test_remedies__keep_the_batch_of_a_step(batch_size: int, mixup: Any, smaller: Any, accumulated: Any) -> None:
    choices = [text for text in remedies(stub(batch_size, mixup=mixup), False) if "batch_size" in text]
    if smaller is None:
        assert choices == []
    else:
        assert smaller * accumulated == batch_size
        assert f"--data.batch_size {smaller} --trainer.accumulate_grad_batches {accumulated} " in choices[0]


def test_remedies__no_second_computation_of_what_is_not_trained() -> None:
    assert any("grad_checkpointing" in text for text in remedies(stub(), False))
    assert not any("grad_checkpointing" in text for text in remedies(stub(trained=False), False))


def test_describe__nothing_left() -> None:
    text = describe(RuntimeError(CPU), stub(1, precision="bf16-mixed", checkpointing=True))
    assert "Nothing is left to halve" in text
    assert "2 views of 32 px, 6 of 16 px" in text
    assert "at step 7" in text
    assert "1 images per device, x 1 accumulated, x 2 device(s)" in text
