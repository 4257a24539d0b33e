"""No step of training waits for the device: on a GPU that would stop the queue of work, once for every value that is read.

There is no GPU here. Instead all operators of one step are recorded, and those that return to Python what the device has
computed, or whose result's size depends on it, are named with the place in this package that called them.
"""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from every_method import METHODS, build
from tiny import SMALL, VIL, digits, trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vil_lightning
from vil_lightning.data.datamodule import planned
from vil_lightning.losses.prototypes import patch_loss
from vil_lightning.masking import hidden_mask, uneven_block_mask
from vil_lightning.methods import IBOT, BackboneConfig

PACKAGE = Path(vil_lightning.__file__).parent
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "argwhere", "allclose")
WAITING += ("unique", "unique_consecutive", "_unique", "_unique2", "unique_dim", "repeat_interleave.Tensor")

# (place, operator): why it is as it is.
LAMB = ("methods/supervised.py", "_local_scalar_dense")
ALLOWED = {
    ("methods/divergence.py", "_local_scalar_dense"): "the value of the step before, which is computed by then",
    ("masking.py", "_local_scalar_dense"): "drawn on the CPU: see test_masks__nothing_is_read_from_the_device",
    ("masking.py", "nonzero"): "drawn on the CPU",
    ("masking.py", "tolist"): "drawn on the CPU",
    (
        "losses/prototypes.py",
        "index with a mask",
    ): "iBOT's mask is on the CPU: see test_ibot__reads_no_mask_on_the_device",
    LAMB: "timm's LAMB counts its steps on the CPU",
}


class Operators(TorchDispatchMode):
    """Records what waits, with its place."""

    def __init__(self, found: dict[tuple[str, str], str]) -> None:
        super().__init__()
        self.found = found
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.seen.add(name)
        full = f"{name}.{func._overloadname}"
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        masks = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in WAITING or full in WAITING or masks:
            note(self.found, f"{name} with a mask" if masks else name)
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Records what copies between the CPU and a device and waits for it."""

    def __init__(self, found: dict[tuple[str, str], str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if not isinstance(args[0] if args else kwargs["data"], Tensor):
                note(self.found, f"{name} of numbers on a device")
        elif name == "to" and not kwargs.get("non_blocking"):
            places = [kwargs.get("device"), *args[1:2]]
            # Lightning and torch move what is there already; without waiting, where it is not.
            ours = (
                str(PACKAGE) in sys._getframe(1).f_code.co_filename or __file__ == sys._getframe(1).f_code.co_filename
            )
            if ours and any(isinstance(place, str | torch.device) for place in places):
                note(self.found, "to a device")
        elif name in ("cpu", "numpy", "tolist"):
            note(self.found, name)
        return func(*args, **kwargs)


def note(found: dict[tuple[str, str], str], what: str) -> None:
    frames = traceback.extract_stack()[:-2]
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    inner = [frame for frame in frames if "/torch/" not in frame.filename and "tests/methods" not in frame.filename]
    place = str(Path(own[-1].filename).relative_to(PACKAGE)) if own else "outside"
    story = [
        f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno} {f.name}" for f in (*own[-1:], *inner[-2:])
    ]
    found.setdefault((place, what), " > ".join(story))


@contextmanager
def recording() -> Iterator[dict[tuple[str, str], str]]:
    found: dict[tuple[str, str], str] = {}
    with Operators(found) as operators, Calls(found):
        yield found
    assert len(operators.seen) > 5  # something was recorded at all


class OneStep(L.Callback):
    """Records one warm step: from before the hooks of the batch to after its optimiser step. Logging steps come later."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._open = recording()
            self.found = self._open.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._open.__exit__(None, None, None)


def unexplained(found: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    return {key: story for key, story in found.items() if key not in ALLOWED}


# --- the recorder itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 9,), torch.zeros(())),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.arange(4)),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.to("cpu"),
        lambda x: x.to(x.device),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
    ],
)
def test_recording__finds(operation: Callable[[Tensor], Any]) -> None:
    found: dict[tuple[str, str], str] = {}
    with Operators(found), Calls(found):
        operation(torch.ones(4))
    assert found


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x[torch.arange(2)],
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: torch.tensor([1.0]).to(x.device, non_blocking=True),
        lambda x: x.to(torch.float64),
        lambda x: x.repeat_interleave(2),
    ],
)
def test_recording__passes(operation: Callable[[Tensor], Any]) -> None:
    found: dict[tuple[str, str], str] = {}
    with Operators(found), Calls(found):
        operation(torch.ones(4))
    assert not found


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_step__of_a_method_waits_for_nothing(name: str, tmp_path: Path) -> None:
    module, data = build(name, tmp_path)
    watch = OneStep()
    clip = {} if name == "linear_probe" else {"gradient_clip_val": 1.0}
    fit = trainer(tmp_path, max_steps=3, max_epochs=2, callbacks=[watch], log_every_n_steps=1000, **clip)
    fit.fit(module, datamodule=data)
    assert watch.found is not None
    assert unexplained(watch.found) == {}


def test_step__allowances_are_needed(tmp_path: Path) -> None:
    """An entry that nothing needs any more would hide the next one."""
    seen: set[tuple[str, str]] = set()
    for name in ("ibot", "supervised_binary"):
        module, data = build(name, tmp_path)
        watch = OneStep()
        trainer(tmp_path, max_steps=3, max_epochs=2, callbacks=[watch], log_every_n_steps=1000).fit(
            module, datamodule=data
        )
        seen |= set(watch.found or ())
    assert seen | {LAMB} == set(ALLOWED)  # that of timm 1.0.22 counts without a tensor


@pytest.mark.parametrize("drop_path_rate", [0.5, 0.3])  # the first leaves out images, the second draws for each
@pytest.mark.parametrize(
    ("name", "own"),
    [
        *((name, {"mlstm_backend": b}) for name in (VIL, "vil_tiny_patch16_224") for b in ("parallel", "chunkwise")),
        ("vim_tiny_patch16_224", {}),
    ],
)
def test_step__of_a_backbone_waits_for_nothing(name: str, own: dict[str, str], drop_path_rate: float) -> None:
    kwargs = {**SMALL, "patch_size": 4, "drop_path_rate": drop_path_rate, "num_classes": 3, **own}
    model, x = timm.create_model(name, **kwargs).train(), torch.randn(8, 3, 16, 16)
    model(x).sum().backward()  # warm
    with recording() as found:
        model(x).square().sum().backward()
    assert found == {}


# --- data -------------------------------------------------------------------------------------------------------------


def test_photometry__on_the_device_waits_for_nothing() -> None:
    data = digits()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    planned_batch = data.on_before_batch_transfer(batch, 0)  # on the CPU: what it decides, it decides there
    assert len(planned(batch[0])) == 2
    with recording() as found:
        views, _ = data.on_after_batch_transfer(planned_batch, 0)
    assert len(views) == 4
    assert found == {}


@pytest.mark.parametrize("kind", ["random", "row", "block", "uneven"])
def test_masks__nothing_is_read_from_the_device(kind: str) -> None:
    """Tensors on the device `meta` have no values: to read one is an error."""
    if kind == "uneven":
        mask = uneven_block_mask(8, (4, 4), 0.5, (0.1, 0.5), "meta")
    else:
        mask = hidden_mask(kind, 8, (4, 4), 0.5, "meta")
    assert mask.device.type == "meta"
    assert mask.shape == (8, 16)


def test_ibot__reads_no_mask_on_the_device() -> None:
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    model = IBOT(BackboneConfig("vit_tiny_patch16_224", None, kwargs), num_prototypes=24, head_hidden_dim=16)
    views = [torch.zeros(8, 3, size, size, device="meta") for size in (16, 16, 8)]
    hidden = model.draw_mask(torch.cat(views[:2]))
    assert hidden.device.type == "cpu"
    model = model.to("meta").train()
    targets = model.teacher_scores(torch.cat(views[:2]), hidden)[1]
    student = model.student_scores(views, hidden)[1]
    assert targets.shape == student.shape == (int(hidden.sum()), 24)
    patch_loss(student, targets, hidden, 0.1).backward()
