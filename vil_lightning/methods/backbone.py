"""A method's backbone is named in its recipe and built here: any timm model, with weights from a file if wanted."""

import dataclasses
import difflib
import hashlib
from typing import Any

import timm
import torch
from lightning.pytorch.utilities import rank_zero_info
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

import vil_lightning  # noqa: F401 - registers the ViL models with timm
from vil_lightning.backbones.weights import (
    WeightsError,
    backbone_state_dict,
    load_weights,
    read_file,
    to_model_names,
)
from vil_lightning.errors import ConfigError
from vil_lightning.methods.resuming import SETTINGS_KEY
from vil_lightning.sharding import full

CHECKPOINT_KEY = "backbone"  # what every method writes into its checkpoints: name and kwargs of its backbone
CLASSES_KEY = "classes"  # what those with a classifier add: the names of its classes
_DEEPEST = 10_000  # more blocks than a machine can build in a minute
_PRETRAINED_KWARGS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)  # where weights come from, not what they do


@dataclasses.dataclass
class BackboneConfig:
    """Which network to build.

    Args:
        name: Any timm model, e.g. `vil2_tiny_patch16_224`. None takes name and kwargs from the checkpoint in `weights`.
        weights: A checkpoint of any method here, a published `.th`, a plain state dict or `.safetensors`. None starts
            from the initialisation.
        kwargs: Arguments of the model, e.g. `{img_size: 96, drop_path_rate: 0.1}`.
        grad_checkpointing: Compute each block again in the backward pass instead of keeping what is inside: less memory for
            more time (see benchmarks/PERFORMANCE.md). It does not change the numbers, and is not recorded in checkpoints.
    """

    name: str | None = None
    weights: str | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        # On the command line, jsonargparse (4.53) turns a null inside `--model.backbone` into this text.
        self.name, self.weights = (None if value == "None" else value for value in (self.name, self.weights))
        self.kwargs = {key: None if value == "None" else value for key, value in self.kwargs.items()}


def resolve_backbone(config: BackboneConfig) -> BackboneConfig:
    """Fill in the name and kwargs that a checkpoint of this project records; `config.kwargs` override them.

    Raises:
        ConfigError: If nothing says which backbone to build, or two sources of weights are named.
    """
    if config.weights is not None and config.kwargs.get("pretrained"):
        raise ConfigError(
            f"model.backbone.weights={config.weights} and model.backbone.kwargs.pretrained name two sources of weights. "
            "Leave one of them out."
        )
    if config.name is not None:
        recorded = _read(config.weights).get(CHECKPOINT_KEY) if config.weights is not None else None
        if isinstance(recorded, dict) and recorded.get("name") == config.name:
            # Some arguments (stride, block_design) change what a network computes but no shape: never drop them.
            return dataclasses.replace(config, kwargs={**recorded["kwargs"], **config.kwargs})
        return config
    if config.weights is None:
        raise ConfigError(
            "model.backbone.name is not set, and there is no model.backbone.weights to take it from. "
            "Set one of them, e.g. --model.backbone.weights checkpoints/pretrain_dino/last.ckpt"
        )
    recorded = _read(config.weights).get(CHECKPOINT_KEY)
    if not isinstance(recorded, dict) or "name" not in recorded:
        raise ConfigError(
            f"model.backbone.weights={config.weights} does not record which backbone it holds. Set model.backbone.name "
            "(and model.backbone.kwargs) to the architecture of that file."
        )
    return dataclasses.replace(config, name=recorded["name"], kwargs={**recorded["kwargs"], **config.kwargs})


def recorded_backbone(config: BackboneConfig) -> dict[str, Any]:
    """What goes into a checkpoint under `CHECKPOINT_KEY`."""
    kwargs = {key: value for key, value in config.kwargs.items() if key not in _PRETRAINED_KWARGS}
    return {"name": config.name, "kwargs": kwargs}


def check_resumed_backbone(checkpoint: dict[str, Any], config: BackboneConfig) -> None:
    """Refuse to resume a run with another backbone than it was started with.

    Raises:
        ConfigError: Naming both. Weights of another run belong to `model.backbone.weights`.
    """
    recorded, own = checkpoint.get(CHECKPOINT_KEY), recorded_backbone(config)
    if recorded != own:
        raise ConfigError(
            f"ckpt_path: the checkpoint's backbone is {recorded}, but model.backbone is {own}. Resume with the recipe of that "
            "run; to start a new one from its weights, use --model.backbone.weights instead of --ckpt_path."
        )


def build_backbone(
    config: BackboneConfig, num_classes: int = 0, new_head: bool = False, quiet: bool = False
) -> nn.Module:
    """The model with its weights.

    Args:
        config: After `resolve_backbone`.
        num_classes: Outputs of the classifier; 0 for a model without one, which returns its pooled vector.
        new_head: Initialise the classifier anew, also if the weights hold one.
        quiet: Do not log where the weights come from: for one more copy of a network.

    Raises:
        ConfigError: For an unknown name, arguments the model refuses, or weights that do not fit.
    """
    name = config.name or ""
    if not timm.is_model(name.split(".")[0]):
        known = timm.list_models()
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.5) or timm.list_models("vil*")[:4]
        raise ConfigError(
            f"model.backbone.name={name!r} is not a known model. Did you mean {', '.join(close)}? "
            "timm.list_models() names all of them; ViL models start with 'vil'."
        )
    kwargs = config.kwargs
    if isinstance(depth := kwargs.get("depth"), int | float) and depth > _DEEPEST:
        raise ConfigError(f"model.backbone.kwargs.depth={depth} must be at most {_DEEPEST}.")
    for key in ("drop_rate", "drop_path_rate"):  # which timm's models take as they come, up to the first batch
        if isinstance(rate := kwargs.get(key), int | float) and not 0 <= rate < 1:
            raise ConfigError(f"model.backbone.kwargs.{key}={rate} must be in [0, 1).")
    if kwargs.get("pretrained") and num_classes and not new_head:
        own = getattr(get_pretrained_cfg(name), "num_classes", num_classes)
        if own != num_classes:
            raise ConfigError(
                f"model.backbone.kwargs.pretrained: the classifier of {name} has {own} classes, {num_classes} are wanted. "
                "Set model.new_head=true for a new one."
            )
    try:
        model = timm.create_model(name, num_classes=num_classes, **kwargs)
    except Exception as error:  # what timm's models raise for arguments out of range is of any kind
        raise ConfigError(f"model.backbone: {name} cannot be built with kwargs={kwargs}: {error}") from error
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:  # timm's models say so by asserting
            raise ConfigError(
                f"model.backbone.grad_checkpointing=true: {name} cannot compute its blocks again. Set it to false."
            ) from error
    if config.weights is not None:
        # The norm before the classifier belongs to a read-out: another read-out needs a new one.
        replaceable = ("fc_norm.", *classifier_names(model)) if new_head or not num_classes else ()
        try:
            report = load_weights(model, config.weights, allow_missing=replaceable)
        except (WeightsError, FileNotFoundError) as error:
            hint = " Set model.new_head=true for a new classifier." if num_classes and not new_head else ""
            raise ConfigError(f"model.backbone.weights: {error}{hint}") from error
        if not quiet:
            rank_zero_info(f"Backbone weights from {report}")
    if new_head and num_classes:
        model.reset_classifier(num_classes)
        rank_zero_info(f"The classifier ({num_classes} classes) is new.")
    return model


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the classifier's parameters, e.g. `("head.",)`."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def recorded_num_classes(config: BackboneConfig) -> int | None:
    """Outputs of the classifier in `config.weights`, or of timm's pretrained weights; None if there is none."""
    cfg = get_pretrained_cfg(config.name or "")
    if config.weights is None:
        return getattr(cfg, "num_classes", None) if config.kwargs.get("pretrained") else None
    try:
        state_dict = to_model_names(backbone_state_dict(_read(config.weights), config.weights))
    except WeightsError as error:
        raise ConfigError(f"model.backbone.weights: {error}") from error
    names = getattr(cfg, "classifier", None) or "head"
    weight = state_dict.get(f"{names if isinstance(names, str) else names[0]}.weight")
    return None if weight is None else int(weight.shape[0])


def recorded_classes(config: BackboneConfig, num_classes: int) -> list[str]:
    """Names of the classes that a checkpoint of this project records in `config.weights`; none if they are not so many."""
    names = _read(config.weights).get(CLASSES_KEY) if config.weights is not None else None
    return [str(name) for name in names] if isinstance(names, list) and len(names) == num_classes else []


def recorded_loss(config: BackboneConfig) -> str | None:
    """Which loss the classifier in `config.weights` was trained with, as far as it is recorded."""
    settings = _read(config.weights).get(SETTINGS_KEY) if config.weights is not None else None
    return settings.get("loss") if isinstance(settings, dict) else None


def check_input_size(backbone: nn.Module, size: int, key: str) -> None:
    """Send one empty image of `size` px through the model; turn its complaint into one that names `key`."""
    parameter = next(backbone.parameters())
    was_training = backbone.training
    image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad():
            backbone.eval().forward(image)  # not through __call__, which would compile the network for this one image
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        hint = "For timm's transformers, model.backbone.kwargs.dynamic_img_size: true accepts other sizes."
        raise ConfigError(f"{key}={size} does not fit the backbone: {error} {hint}") from error
    finally:
        backbone.train(was_training)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(full(value.detach()).cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def feature_dim(backbone: nn.Module) -> int:
    """Width of the vector that `backbone(images)` returns."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


def patch_tokens(backbone: nn.Module, features: Tensor) -> Tensor:
    """Output of `forward_features` as patch tokens (B, S, D), without class tokens; feature maps are flattened."""
    if features.ndim == 4:
        if getattr(backbone, "output_fmt", "NCHW") == "NHWC":  # e.g. Swin
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)  # (B, D, h, w) of a convolutional network
    if hasattr(backbone, "split_tokens"):  # class tokens may stand anywhere
        return backbone.split_tokens(features)[0]  # type: ignore[operator]
    return features[:, int(getattr(backbone, "num_prefix_tokens", 0)) :]


def _read(path: str) -> dict[str, Any]:
    try:
        return read_file(path)
    except (WeightsError, FileNotFoundError) as error:
        raise ConfigError(f"model.backbone.weights: {error}") from error
