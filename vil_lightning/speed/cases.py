"""What is timed: networks, resolutions, and the work of a step.

Letters: `B` images, `V` views, `K` prototypes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import timm
import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from lightly.models.utils import update_momentum
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

import vil_lightning.backbones  # noqa: F401 - registers the models with timm
from vil_lightning.errors import ConfigError
from vil_lightning.optim import weight_decay_groups
from vil_lightning.speed.published import as_published

PATCH_SIZE = 16
NUM_CLASSES = 1000
WORK = ("forward", "train", "dino")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A network to be timed.

    Args:
        label: Its name in tables.
        name: timm model.
        kwargs: Of the model.
        published: Compute as the published ViL code does.
        fused_attn: Whether attention runs in torch's fused kernel.
    """

    label: str
    name: str
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    published: bool = False
    fused_attn: bool = True

    def build(self, resolution: "Resolution", any_size: bool = False) -> nn.Module:
        """The network for a resolution, with 1,000 classes; if `any_size`, it also takes images of other sizes."""
        vil = self.name.startswith("vil")
        kwargs = {**self.kwargs, **(resolution.of_vil if vil else resolution.of_others)}
        if self.name.startswith("convnext"):
            kwargs.pop("img_size")  # takes any
        if any_size and self.name.startswith(("deit", "vit")):
            kwargs["dynamic_img_size"] = True  # the others do it without being asked
        before = bool(use_fused_attn())
        set_fused_attn(self.fused_attn)
        try:
            model = timm.create_model(self.name, num_classes=NUM_CLASSES, **kwargs)
        finally:
            set_fused_attn(before)
        return as_published(model) if self.published else model


def entries(size: str, backends: list[str]) -> list[Entry]:
    """The networks of one size, `tiny`, `small` or `base`; ViL once for each backend, and as published."""
    vil = f"vil2_{size}_patch16_224"
    result = [Entry(f"ViL, {backend}", vil, {"mlstm_backend": backend}) for backend in backends]
    result += [
        Entry("ViL as published", vil, published=True),
        Entry("DeiT, fused attention", f"deit_{size}_patch16_224"),
        Entry("ViT, attention not fused", f"vit_{size}_patch16_224", fused_attn=False),
        Entry("Vim", f"vim_{size}_patch16_224"),
    ]
    if size != "tiny":  # there is none
        result.append(Entry("ConvNeXt (isotropic)", f"convnext_isotropic_{size}_patch16_224"))
    return result


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Square images, and the distance of neighbouring patches of 16 px, `224` or `224/8`.

    ViL takes overlapping patches; other networks get as many tokens from larger images without overlap.
    """

    size: int
    stride: int = PATCH_SIZE

    @classmethod
    def parse(cls, text: str) -> "Resolution":
        """Raises ConfigError for what is no resolution."""
        size, _, stride = text.partition("/")
        if not size.isdecimal() or (stride and not stride.isdecimal()):
            raise ConfigError(f"--sizes {text!r} is neither a size in px (224) nor size/stride (224/8).")
        result = cls(int(size), int(stride or PATCH_SIZE))
        if result.size < PATCH_SIZE or result.size % PATCH_SIZE or not 1 <= result.stride <= PATCH_SIZE:
            raise ConfigError(
                f"--sizes {text!r}: the size must be a multiple of {PATCH_SIZE} px, the stride from 1 to {PATCH_SIZE}."
            )
        return result

    def __str__(self) -> str:
        return str(self.size) if self.stride == PATCH_SIZE else f"{self.size}/{self.stride}"

    @property
    def side(self) -> int:
        """Tokens along a side."""
        return (self.size - PATCH_SIZE) // self.stride + 1

    @property
    def num_tokens(self) -> int:
        return self.side**2

    @property
    def of_vil(self) -> dict[str, Any]:
        stride = {} if self.stride == PATCH_SIZE else {"stride": self.stride}
        return {"img_size": self.size, **stride}

    @property
    def of_others(self) -> dict[str, Any]:
        return {"img_size": self.side * PATCH_SIZE}

    @property
    def local(self) -> "Resolution":
        """Of DINO's local views: 3/7 of the side, as 96 of 224 px."""
        return Resolution(max(1, round(self.size * 3 / 7 / PATCH_SIZE)) * PATCH_SIZE, self.stride)

    def image_size(self, entry: Entry) -> int:
        return self.size if entry.name.startswith("vil") else self.side * PATCH_SIZE


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a step runs.

    Args:
        dtype: float32, or what autocast computes in.
        num_prototypes: K of the DINO step.
        checkpointing: Recompute blocks in the backward pass.
        compile_mode: Of torch.compile; None for eager.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    num_prototypes: int = 4096
    checkpointing: bool = False
    compile_mode: str | None = None


Step = Callable[[], object]


def make_step(entry: Entry, resolution: Resolution, work: str, batch: int, settings: Settings) -> Step:
    """One step of `work` on random images, ready to be called again and again."""
    build = {"forward": _forward, "train": _train, "dino": _dino}[work]
    return build(entry, resolution, batch, settings)


def _network(entry: Entry, resolution: Resolution, settings: Settings, any_size: bool = False) -> nn.Module:
    model = entry.build(resolution, any_size).to(settings.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings.checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model


def _compile(model: nn.Module, settings: Settings) -> None:
    if settings.compile_mode is not None:
        model.compile(mode=settings.compile_mode)


def _images(batch: int, size: int, settings: Settings) -> Tensor:
    images = torch.randn(batch, 3, size, size, device=settings.device)
    return images.to(memory_format=torch.channels_last) if settings.channels_last else images


def _autocast(settings: Settings) -> torch.autocast:
    enabled = settings.dtype != torch.float32
    return torch.autocast(settings.device.type, dtype=settings.dtype if enabled else None, enabled=enabled)


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    groups = weight_decay_groups(module, 0.05)
    return torch.optim.AdamW(groups, lr=1e-4, fused=True)


def _forward(entry: Entry, resolution: Resolution, batch: int, settings: Settings) -> Step:
    model = _network(entry, resolution, settings).eval()
    _compile(model, settings)
    images = _images(batch, resolution.image_size(entry), settings)

    def step() -> Tensor:
        with torch.no_grad(), _autocast(settings):
            return model(images)

    return step


def _train(entry: Entry, resolution: Resolution, batch: int, settings: Settings) -> Step:
    model = _network(entry, resolution, settings).train()
    optimizer = _optimizer(model)
    _compile(model, settings)
    images = _images(batch, resolution.image_size(entry), settings)
    labels = torch.randint(NUM_CLASSES, (batch,), device=settings.device)

    def step() -> None:
        with _autocast(settings):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _dino(entry: Entry, resolution: Resolution, batch: int, settings: Settings) -> Step:
    """Two global and eight local views of an image; the student runs once for each size of views."""
    student, teacher = (_network(entry, resolution, settings, any_size=True) for _ in range(2))
    for model in (student, teacher):
        model.reset_classifier(0)  # type: ignore[operator]
    width = student.head_hidden_size
    heads = [DINOProjectionHead(width, 2048, 256, settings.num_prototypes).to(settings.device) for _ in range(2)]
    trained = nn.ModuleList([student, heads[0]]).train()
    averaged = nn.ModuleList([teacher, heads[1]]).eval().requires_grad_(False)
    loss_fn = DINOLoss(settings.num_prototypes).to(settings.device)
    optimizer = _optimizer(trained)
    for model in (student, teacher):
        _compile(model, settings)
    global_views = _images(2 * batch, resolution.image_size(entry), settings)
    local_views = _images(8 * batch, resolution.local.image_size(entry), settings)

    def step() -> None:
        with _autocast(settings):
            with torch.no_grad():
                targets = heads[1](teacher(global_views))
            features = torch.cat([student(global_views), student(local_views)])
            logits = heads[0](features)
        loss = loss_fn(list(targets.float().chunk(2)), list(logits.float().chunk(10)), teacher_temp=0.04)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_momentum(trained, averaged, 0.996)

    return step
