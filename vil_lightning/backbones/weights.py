"""Weights from files: the published raw checkpoints, checkpoints of this project, plain state dicts, safetensors."""

import argparse
import dataclasses
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vil_lightning.backbones.integrity import find_damage
from vil_lightning.backbones.layers import resize_position_embedding

_logger = logging.getLogger(__name__)

# Where a Lightning checkpoint of this project keeps the backbone that is meant to be used, best first: the teacher of a
# self-distillation run and the moving average of a supervised one are the better networks.
_BACKBONE_PREFIXES = ("teacher.backbone.", "ema.module.", "backbone.", "student.backbone.")

# Published raw name -> name here, first match wins. The raw names count scans one by one, as here. "@" is the branch.
_RAW_NAMES: tuple[tuple[str, str], ...] = (
    (r"patch_embed\.proj\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"pos_embed\.embed", r"pos_embed.embed"),
    (r"cls_tokens\.tokens", r"cls_tokens"),
    (r"xlstm\.blocks\.(\d+)\.xlstm_norm\.(weight|bias)", r"blocks.\1.norm.\2"),
    (r"xlstm\.blocks\.(\d+)\.xlstm\.(proj_up|proj_down)\.(weight|bias)", r"blocks.\1.mixer.\2.\3"),
    (r"xlstm\.blocks\.(\d+)\.xlstm\.layerscale\.gamma", r"blocks.\1.ls.gamma"),
    (r"xlstm\.blocks\.(\d+)\.xlstm\.learnable_skip", r"blocks.\1.mixer.branches.@.skip"),
    (r"xlstm\.blocks\.(\d+)\.xlstm\.([qkv]_proj)\.(weight|bias)", r"blocks.\1.mixer.branches.@.\2.\3"),
    (
        r"xlstm\.blocks\.(\d+)\.xlstm\.conv1d(_k|_v|)\.(?:conv\.)?(weight|bias)",
        r"blocks.\1.mixer.branches.@.conv\2.\3",
    ),
    (
        r"xlstm\.blocks\.(\d+)\.xlstm\.mlstm_cell\.([if]gate)\.(weight|bias)",
        r"blocks.\1.mixer.branches.@.\2.\3",
    ),
    (
        r"xlstm\.blocks\.(\d+)\.xlstm\.mlstm_cell\.outnorm\.(weight|bias)",
        r"blocks.\1.mixer.branches.@.norm.\2",
    ),
    (r"xlstm\.post_blocks_norm\.(weight|bias)", r"norm.\1"),
    (r"head\.0\.(weight|bias)", r"fc_norm.\1"),
    (r"head\.1\.(weight|bias)", r"head.\1"),
)
# Endings of a raw name's part, for the further scans of a block with several: columns are `_du`, columns from the bottom
# right `_ud`.
_RAW_BRANCHES = {"": "0", "_rev": "1", "_du": "2", "_ud": "3"}
# These raw weights are stored minus 1; the models here use plain LayerNorm gains.
_RAW_GAIN_MINUS_ONE = re.compile(r".*\.(xlstm_norm|outnorm|post_blocks_norm)\.weight")


@runtime_checkable
class SupportsResize(Protocol):
    """A model that knows how its `pos_embed` is laid out, e.g. where its class token has its row."""

    def resize_pos_embed(self, table: Tensor) -> Tensor:
        """The table resampled to the model's grid; the very same tensor if there is nothing to do."""


class WeightsError(ValueError):
    """A weights file that cannot be read or does not fit; the message says why."""


@dataclasses.dataclass
class LoadReport:
    """What `load_weights` did, as lists of the model's (`unexpected`: the file's) parameter names."""

    path: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    resized: list[str]

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f"{len(names)}" + (f" ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})" if names else "")

        return (
            f"{self.path}: loaded {len(self.loaded)}, missing {some(self.missing)}, "
            f"unexpected {some(self.unexpected)}, resized {some(self.resized)}"
        )


def load_weights(model: nn.Module, path: str | PathLike[str], allow_missing: Sequence[str] = ()) -> LoadReport:
    """Load a file into a model, completely or not at all.

    Understands the published raw ViL files (`.th`), checkpoints of any method of this project (of a self-distillation
    run the teacher is taken), plain state dicts and `.safetensors`. The position embedding is resampled (bicubic) to
    the model's grid. A classifier in the file is left out, and reported as unexpected, if the model has none.

    Args:
        model: Any model; weights are converted to its parameters' dtype and device.
        path: The file.
        allow_missing: Prefixes of parameter names that keep their initial values if the file lacks them or has them in
            another shape, e.g. `("head.", "fc_norm.")` for a new classifier.

    Returns:
        What was loaded, missing, unexpected and resized.

    Raises:
        WeightsError: (a ValueError) If the file cannot be read safely, or names and shapes do not match. The model is
            unchanged then.
        FileNotFoundError: If there is no such file.
    """
    state_dict = to_model_names(backbone_state_dict(read_file(path), path))
    own = model.state_dict()
    state_dict, resized = _resize_position_embedding(state_dict, model)

    def allowed(name: str) -> bool:
        return any(name.startswith(prefix) for prefix in allow_missing)

    loadable: dict[str, Tensor] = {}
    wrong_shape: dict[str, str] = {}
    for name, value in state_dict.items():
        if name not in own:
            continue
        if value.shape == own[name].shape:
            loadable[name] = value.to(own[name].dtype)
        else:
            wrong_shape[name] = f"{name}: file {tuple(value.shape)}, model {tuple(own[name].shape)}"
    missing = [name for name in own if name not in loadable]
    unexpected = [name for name in state_dict if name not in own]

    has_classifier = bool(getattr(model, "num_classes", 1))
    surplus = [n for n in unexpected if has_classifier or not n.startswith(("head.", "fc_norm."))]
    refused_shapes = [text for name, text in wrong_shape.items() if not allowed(name)]
    absent = [name for name in missing if name not in wrong_shape and not allowed(name)]
    if absent or surplus or refused_shapes:
        parts = [f"{path} does not fit this {type(model).__name__}."]
        for title, names in (
            ("missing in the file", absent),
            ("not in the model", surplus),
            ("shapes", refused_shapes),
        ):
            if names:
                parts.append(f"  {title} ({len(names)}): {'; '.join(names[:6])}{'; …' if len(names) > 6 else ''}")
        parts.append("Build the model with the architecture of the file, or name what may be left at its initial value")
        raise WeightsError("\n".join(parts) + ' in allow_missing, e.g. ("head.",).')

    result = model.load_state_dict(loadable, strict=False)
    assert not result.unexpected_keys
    return LoadReport(str(path), sorted(loadable), missing, unexpected, resized)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Hook for timm: a state dict in any of the layouts of `load_weights`, made ready for `model`."""
    renamed = to_model_names(backbone_state_dict(state_dict, "pretrained weights"))
    own = model.state_dict()
    renamed, _ = _resize_position_embedding(renamed, model)
    # Another pooling than the published one, of another width: its norm and classifier have to be learned anew.
    fresh = [n for n in renamed if n.startswith("fc_norm.") and n in own and own[n].shape != renamed[n].shape]
    if "head.weight" in renamed and "head.weight" in own and fresh:
        fresh += ["head.weight", "head.bias"]
    for name in fresh:
        _logger.warning("%s belongs to another pooling than in the file and keeps its initial value.", name)
        renamed[name] = own[name]
    if not getattr(model, "num_classes", 1):
        renamed = {n: v for n, v in renamed.items() if n in own or not n.startswith(("head.", "fc_norm."))}
    return renamed


def read_file(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint without ever unpickling anything but tensors and plain containers.

    Damaged files are refused as far as they tell, see `vil_lightning.backbones.integrity`.

    An `argparse.Namespace` counts as one: the published Vim files hold the arguments of their run. It has attributes
    and no code that unpickling would run.

    Raises:
        WeightsError: If the file is damaged, holds other objects, or is not a dictionary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No weights file at {path}.")
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"  # of `torch.save`, since version 1.6
    if is_archive and (damage := find_damage(path)):
        raise WeightsError(f"{path} is damaged: {damage}. Copy or download it again.")
    try:
        if Path(path).suffix == ".safetensors":
            content: Any = load_safetensors(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text is long, coloured, and recommends weights_only=False: only the object's name is of use here.
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            raise WeightsError(
                f"{path} holds pickled Python objects besides tensors ({forbidden[1]}) and is not loaded, because "
                "unpickling can run any code. Save it as a plain state dict or .safetensors."
            ) from error
        raise WeightsError(
            f"{path} is damaged (truncated?), or not a checkpoint. Copy or download it again."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
        raise WeightsError(
            f"{path} is damaged (truncated?), or not a checkpoint: {_first_line(error)}. Copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return content


def backbone_state_dict(content: Mapping[str, Any], source: object) -> dict[str, Tensor]:
    """The backbone's tensors in the content of a checkpoint file, without wrapper prefixes."""
    inner = content.get("state_dict", content.get("model", content))
    if not isinstance(inner, Mapping):
        raise WeightsError(f"{source}: its state dict is a {type(inner).__name__}, not a dictionary.")
    # torch.compile and DDP prefix names; very old raw files hold mask buffers.
    state_dict = {
        name.replace("_orig_mod.", "").removeprefix("module."): value
        for name, value in inner.items()
        if isinstance(value, Tensor) and "causal_mask" not in name
    }
    if not state_dict:
        raise WeightsError(f"{source} holds no tensors.")
    for prefix in _BACKBONE_PREFIXES:
        if any(name.startswith(prefix) for name in state_dict):
            return {n.removeprefix(prefix): v for n, v in state_dict.items() if n.startswith(prefix)}
    return state_dict


def to_model_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the published raw names (see `_RAW_NAMES`) and gains; other state dicts pass unchanged."""
    if not any(name.startswith("xlstm.") for name in state_dict):
        return dict(state_dict)
    renamed = {}
    for name, value in state_dict.items():
        if _RAW_GAIN_MINUS_ONE.fullmatch(name):
            value = 1 + value
        ending = re.search(r"(_rev|_du|_ud)(?=\.|$)", name)
        plain = name.replace(ending[0], "", 1) if ending else name
        for pattern, replacement in _RAW_NAMES:
            if re.fullmatch(pattern, plain):
                name = re.sub(pattern, replacement, plain).replace("@", _RAW_BRANCHES[ending[0] if ending else ""])
                break
        renamed[name] = value
    return renamed


def _resize_position_embedding(state_dict: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Resample the file's position embedding to the model's grid; also returns the names of what has changed."""
    if isinstance(model, SupportsResize) and "pos_embed" in state_dict:
        resized = model.resize_pos_embed(state_dict["pos_embed"])
        changed = resized is not state_dict["pos_embed"]
        return {**state_dict, "pos_embed": resized}, ["pos_embed"] if changed else []
    own = model.state_dict()
    for name in ("pos_embed.embed", "pos_embed"):  # ViL's; that of timm's transformers
        old, new = state_dict.get(name), own.get(name)
        if (
            old is None
            or new is None
            or old.shape == new.shape
            or old.ndim != new.ndim
            or old.shape[-1] != new.shape[-1]
        ):
            continue
        if old.ndim == 4:
            return {**state_dict, name: resize_position_embedding(old, (new.shape[1], new.shape[2]))}, [name]
        if old.ndim == 3 and hasattr(model, "patch_embed"):
            grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr,arg-type]
            num_prefix_tokens = new.shape[1] - math.prod(grid)
            return {**state_dict, name: resample_abs_pos_embed(old, grid, num_prefix_tokens=num_prefix_tokens)}, [name]
    return state_dict, []


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
