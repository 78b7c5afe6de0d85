"""Settings from TOML files and `key=value` overrides into frozen dataclasses (or msgspec structs).

A class is the schema: its fields are the keys, a field that is itself a dataclass is a section, and its
defaults hold wherever neither the file nor an override says otherwise. Every problem of a file and its
overrides is one `ConfigError`; an unknown key is answered with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .errors import ConfigError
from .hints import best_match

T = TypeVar("T")

_MISSING: Any = object()
#: A value that starts like this was meant as TOML; anything else may be a bare word.
_TOML_OPENERS = ("'", '"', "[", "{")


@dataclass(frozen=True, slots=True)
class _Sourced:
    """A value and where it was said, for the error message."""

    value: Any
    source: str


def load_settings(cls: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """An instance of `cls` from its defaults, then the file at `path`, then `overrides` in order.

    An override is `key=value` or `section.key=value`, its value in TOML's syntax; a bare word that is not
    TOML is a string, so that `device=cuda` needs no quotes. Raises `ConfigError` listing every problem.
    """
    tree: dict[str, Any] = {}
    problems: list[str] = []
    if path is not None:
        _merge(tree, _read(path), str(path))
    for override in overrides:
        try:
            _put(tree, *_parse_override(override))
        except ConfigError as error:
            problems.append(str(error))
    settings: T = _build(cls, cls, tree, _MISSING, "", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


def keys_of(cls: type) -> dict[str, Any]:
    """The settings of a class by name, with their types resolved (`Optional` and all)."""
    hints = _hints(cls)
    if dataclasses.is_dataclass(cls):
        return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    if issubclass(cls, msgspec.Struct):
        return {name: hints[name] for name in cls.__struct_fields__}
    raise TypeError(f"settings live in dataclasses and msgspec structs, got {cls!r}")


def default_of(cls: type, key: str) -> Any:
    """The default of one setting, for the help text of the option that stands for it."""
    default = _default(cls, key)
    if default is _MISSING:
        raise KeyError(f"{cls.__name__}.{key} has no default")
    return default


def nearest(key: str, known: Sequence[str]) -> str:
    """The end of an error message: the known key that `key` was probably meant to be, or all of them."""
    match = best_match(key, known, cutoff=0.5)
    return f"did you mean {match!r}?" if match else f"known keys: {', '.join(known)}"


def _nearest_in_tree(root: type, siblings: Sequence[str], key: str) -> str:
    """As `nearest`: first among the keys of the same section, then by last name anywhere below `root`."""
    section, dot, last = key.rpartition(".")  # `siblings` begin alike
    own = best_match(last, [sibling.rpartition(".")[2] for sibling in siblings])
    match = None if own is None else f"{section}{dot}{own}"
    if match is None:
        by_name: dict[str, str] = {}
        for dotted in _dotted_keys(root):
            by_name.setdefault(dotted.rpartition(".")[2], dotted)
        found = best_match(key.rpartition(".")[2], list(by_name))
        match = by_name[found] if found else None
    return f"did you mean {match!r}?" if match else nearest(key, siblings)


def _dotted_keys(cls: type, prefix: str = "") -> list[str]:
    """Every key below `cls`; those of a level come before those of its sections."""
    own, below = [], []
    for key, hint in keys_of(cls).items():
        own.append(prefix + key)
        section = section_type(hint)
        if section is not None:
            below.extend(_dotted_keys(section, f"{prefix}{key}."))
    return own + below


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror or error}; name a TOML file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _parse_override(override: str) -> tuple[list[str], _Sourced]:
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected key=value or section.key=value")
    text = text.strip()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if not text or text.startswith(_TOML_OPENERS) or "\n" in text:
            raise ConfigError(
                f"override {override!r}: {text!r} is not a TOML value ({error})"
            ) from error
        value = text
    return parts, _Sourced(value, f"override {override!r}")


def _merge(tree: dict[str, Any], table: Mapping[str, Any], source: str) -> None:
    """Lay a TOML table over the tree, leaf by leaf; tables inside arrays are leaves."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            _merge(_section(tree, key), value, source)
        else:
            tree[key] = _Sourced(value, source)


def _put(tree: dict[str, Any], parts: Sequence[str], leaf: _Sourced) -> None:
    for part in parts[:-1]:
        tree = _section(tree, part)
    if isinstance(leaf.value, Mapping):
        _merge(_section(tree, parts[-1]), leaf.value, leaf.source)
    else:
        tree[parts[-1]] = leaf


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    section = tree.get(key)
    if not isinstance(section, dict):
        section = tree[key] = {}
    return section


def _build(
    root: type, cls: type, tree: Mapping[str, Any], base: Any, prefix: str, problems: list[str]
) -> Any:
    """An instance of `cls`, a section of `root`, from `tree` over `base` (an instance, or missing)."""
    types_by_key = keys_of(cls)
    values: dict[str, Any] = {}
    for key, node in tree.items():
        if key not in types_by_key:
            siblings = [prefix + name for name in types_by_key]
            hint = _nearest_in_tree(root, siblings, prefix + key)
            problems.append(f"{_source(node)}: unknown key {prefix + key!r}; {hint}")
            continue
        default = getattr(base, key) if base is not _MISSING else _default(cls, key)
        values[key] = _value(root, types_by_key[key], node, default, prefix + key, problems)
    for key, key_type in types_by_key.items():
        if key not in values:
            values[key] = getattr(base, key) if base is not _MISSING else _default(cls, key)
            required = section_type(key_type)
            if values[key] is _MISSING and required is not None:
                values[key] = _build(root, required, {}, _MISSING, f"{prefix}{key}.", problems)
            elif values[key] is _MISSING:
                problems.append(
                    f"{prefix + key!r} of {cls.__name__} is not set; set it in the file or with {prefix + key}=..."
                )
    if _MISSING in values.values():
        return _MISSING
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        problems.append(f"{prefix.rstrip('.') or cls.__name__}: {error}")
        return _MISSING


def _value(root: type, hint: Any, node: Any, default: Any, key: str, problems: list[str]) -> Any:
    """The value of one key: a section is built over its default, a leaf is checked against its type."""
    section = section_type(hint)
    if isinstance(node, dict):
        if section is not None:
            base = default if isinstance(default, section) else _MISSING
            return _build(root, section, node, base, f"{key}.", problems)
        node = _Sourced(_plain(node), _source(node))
    if section is not None and node.value is not None:
        problems.append(
            f"{node.source}: {key!r} is a section, got {node.value!r}; set {key}.NAME, "
            f"with NAME one of {', '.join(keys_of(section))}"
        )
        return _MISSING
    try:
        # TOML's keys are always strings; `str_keys` lets a table become a `dict[int, ...]`.
        return msgspec.convert(node.value, hint, str_keys=True, dec_hook=_decode_other)
    except (msgspec.ValidationError, NotImplementedError) as error:
        choices = choices_of(hint)
        expected = f"expected one of {', '.join(map(repr, choices))}" if choices else str(error)
        problems.append(f"{node.source}: {key!r} is {node.value!r}: {expected}")
        return _MISSING


def _decode_other(hint: type, value: Any) -> Any:
    if issubclass(hint, Path) and isinstance(value, str):
        return hint(value)
    raise NotImplementedError(f"expected `{hint.__name__}`, got `{type(value).__name__}`")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal` type, alone or in a union."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(choice for arg in typing.get_args(hint) for choice in choices_of(arg))
    return ()


def _plain(node: Any) -> Any:
    return {k: _plain(v) for k, v in node.items()} if isinstance(node, dict) else node.value


def _source(node: Any) -> str:
    while isinstance(node, dict):
        if not node:
            return "configuration"
        node = next(iter(node.values()))
    source: str = node.source
    return source


def section_type(hint: Any) -> type | None:
    """The dataclass or struct behind `hint`, which may be optional; None: the key is a leaf."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = [section_type(arg) for arg in typing.get_args(hint) if arg is not type(None)]
        return found[0] if len(found) == 1 else None
    if isinstance(hint, type) and (
        dataclasses.is_dataclass(hint) or issubclass(hint, msgspec.Struct)
    ):
        return hint
    return None


def _default(cls: type, key: str) -> Any:
    if dataclasses.is_dataclass(cls):
        field = next(field for field in dataclasses.fields(cls) if field.name == key)
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return _MISSING if field.default is dataclasses.MISSING else field.default
    info = next(field for field in msgspec.structs.fields(cls) if field.name == key)
    if info.default_factory is not msgspec.NODEFAULT:
        return info.default_factory()
    return _MISSING if info.default is msgspec.NODEFAULT else info.default


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
