"""Ranges of settings, refused in one way: which key, which value, what is allowed."""

import dataclasses
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import get_loader

from vil_lightning.errors import ConfigError

Number = float | int | None


def check_positive(section: str, **values: Number) -> None:
    """Above 0; None passes, as in all checks here (a setting that must not be null is not typed so).

    Args:
        section: What the keys belong to, `model`.
        values: Settings by name.

    Raises:
        ConfigError: Naming the first that is not.
    """
    _check(section, values, lambda value: value > 0, "must be positive")


def check_not_negative(section: str, **values: Number) -> None:
    """At least 0."""
    _check(section, values, lambda value: value >= 0, "must not be negative")


def check_sizes(section: str, largest: int = 2**20, **values: Number) -> None:
    """From 1 to `largest`: widths and numbers of parts, of which no network can have a thousand million."""
    _check(section, values, lambda value: value >= 1, "must be at least 1")
    _check(section, values, lambda value: value <= largest, f"must be at most {largest}")


def check_image_sizes(section: str, **values: Number) -> None:
    """From 1 to 16,384 px."""
    check_sizes(section, 2**14, **values)


def check_shares(section: str, **values: Number) -> None:
    """From 0 to 1: probabilities."""
    _check(section, values, lambda value: 0 <= value <= 1, "must be in [0, 1]")


def check_betas(betas: Sequence[float]) -> None:
    """Of Adam: two numbers from 0 to 1, 1 excluded."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"model.betas={list(betas)} must be two numbers in [0, 1).")


def _check(section: str, values: Mapping[str, Number], allowed: Callable[[Any], bool], text: str) -> None:
    for name, value in values.items():
        if value is not None and not allowed(value):
            raise ConfigError(f"{section}.{name}={value} {text}.")


# --- a whole configuration --------------------------------------------------------------------------------------------


def check_values(config: Any) -> None:
    """Refuse what no setting can be, wherever it stands: numbers that are not finite, and null where a value is needed.

    Args:
        config: Nested namespaces, mappings and lists; `class_path` and `init_args` name a class and its arguments.

    Raises:
        ConfigError: Naming the key as on the command line.
    """
    for key, value in _settings(config, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} must be a finite number.")
        if value is _NEEDED:
            raise ConfigError(f"{key} is null, but needs a value. Leave the key out for its default.")


_NEEDED = object()
# Later options would take the place of what is no section, without a word.
_SECTIONS = ("trainer", "checkpoint", "predictions", "keep", "faults")


def check_sections(args: Sequence[str]) -> None:
    """Name what stands beside `class_path` in the YAML files of a command line, and what is no section; jsonargparse does not.

    Files that cannot be read are left to the parser.

    Raises:
        ConfigError: Naming file and key.
    """
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, _, attached = option.partition("=")
        if name not in ("--config", "-c"):
            continue
        path = attached or value
        try:
            content = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
        except Exception:  # not there, or no YAML
            continue
        for key in _SECTIONS:
            # The parser takes a string for the name of a file.
            if isinstance(content, dict) and not isinstance(content.get(key), dict | str | None):
                raise ConfigError(f"{path}: {key}={content[key]!r} must be a section of settings, `key: value`.")
        for key, unknown in _beside_class_path(content, ""):
            raise ConfigError(
                f"{path}: {key}{unknown} is not known. Arguments of a class belong into init_args, beside its class_path."
            )


def _beside_class_path(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        if "class_path" in node or "init_args" in node:  # overlays leave the class to the recipe
            yield from ((prefix, str(name)) for name in node if name not in ("class_path", "init_args", "dict_kwargs"))
        for name, value in node.items():
            yield from _beside_class_path(value, prefix if name == "init_args" else f"{prefix}{name}.")
    elif isinstance(node, list):
        for value in node:
            yield from _beside_class_path(value, prefix)


def _settings(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All values with their keys; `_NEEDED` in the place of a null that the argument's type excludes."""
    if hasattr(node, "__dict__") and not dataclasses.is_dataclass(node) and not callable(node):
        node = vars(node)
    if isinstance(node, Mapping):
        arguments = node.get("init_args")
        if isinstance(node.get("class_path"), str) and arguments is not None:
            hints = argument_types(pkgutil.resolve_name(node["class_path"]))
            given = vars(arguments) if hasattr(arguments, "__dict__") else arguments
            for name, value in given.items():
                here = f"{key}.{name}" if key else str(name)
                if dataclasses.is_dataclass(hints.get(name)) and isinstance(value, str | float | int | list):
                    raise ConfigError(f"{here}={value!r} must be a section of settings, `key: value`.")
                if value is None and name in hints and not _takes_none(hints[name]):
                    yield here, _NEEDED
                yield from _settings(value, here)
            return
        for name, value in node.items():
            yield from _settings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _settings(value, key)
    else:
        yield key, node


def argument_types(cls: type) -> dict[str, Any]:
    """Types of a constructor's arguments, also of those that it passes on to the classes above."""
    hints: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            try:
                own = typing.get_type_hints(vars(base)["__init__"])
            except (NameError, TypeError):  # annotations that are not there at run time
                continue
            hints = {**own, **hints}
    return hints


def _takes_none(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_takes_none(part) for part in typing.get_args(hint))
    return hint in (None, type(None), Any, object) or isinstance(hint, typing.TypeVar)
