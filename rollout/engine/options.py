"""From the keyword arguments of `Engine` to its `EngineConfig`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from ..config import EngineConfig
from ..errors import ConfigError
from ..hints import did_you_mean
from ..settings import choices_of
from .dialect import engine_options

_DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(EngineConfig)
    if field.name != "model_path"
}
OPTIONS = tuple(_DEFAULTS)
"""The options of `Engine` by name, all but the model's path."""


def engine_config(model_path: str | Path, options: Mapping[str, Any]) -> EngineConfig:
    """`EngineConfig` from keyword arguments; an unknown or ill-typed one is a `ConfigError` with the nearest name."""
    given = {name: value for name, value in options.items() if value != _DEFAULTS.get(name, None)}
    values = engine_options(given)
    for name in values:
        if name not in OPTIONS:
            raise ConfigError(
                f"Engine: got an unknown option {name!r}; {did_you_mean(name, OPTIONS)}"
            )
    if "dtype" in values and not isinstance(values["dtype"], str):
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    for key in ("device", "weight_version"):
        if values.get(key) is not None:
            values[key] = str(values[key])
    if values.get("tokenizer_path") is not None:
        values["tokenizer_path"] = _from_anywhere(values["tokenizer_path"])
    try:
        return msgspec.convert({"model_path": _from_anywhere(model_path), **values}, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"Engine: {_said_of(error, values)}") from None


def _said_of(error: msgspec.ValidationError, values: Mapping[str, Any]) -> str:
    """What a validation says, in terms of options: their name, what was got, and the words that there are."""
    text, _, where = str(error).rpartition(" - at `$.")
    name = where.rstrip("`")
    if name not in values:
        return str(error)
    choices = choices_of(get_type_hints(EngineConfig)[name])
    expected = f"expected one of {', '.join(map(repr, choices))}" if choices else text.lower()
    return f"{name}: got {values[name]!r}, {expected}"


def _from_anywhere(path: str | Path) -> str:
    """The path as whoever connects from another folder finds it too; a name that is no path here stays as it is."""
    return os.path.abspath(path) if os.path.exists(path) else str(path)
