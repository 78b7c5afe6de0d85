"""Options that stand for fields of a settings class: defaults and help texts come from the class itself."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..settings import default_of, keys_of, section_type

#: The two options by which every command takes any of its settings.
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file with settings.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One setting, as section.key=value; repeatable."
    ),
]


def setting_option(cls: type, key: str, *names: str, text: str | None = None) -> Any:
    """A typer option for `cls.key`; `text` replaces the field's own sentence where that speaks of code.

    It is None when it was not given, so that files and `--set` keep their word.
    """
    default = default_of(cls, key)
    text = (text or field_docs(cls).get(key, "")).rstrip(".")
    shown = "none" if default is None or default == () else str(default)
    return typer.Option(
        *(names or (f"--{key.replace('_', '-')}",)),
        help=f"{text} [dim](default: {shown})[/dim]",
    )


def check_model_given(model: str | None, config: Path | None, overrides: list[str] | None) -> None:
    """`ConfigError` in the words of the command line where nothing names a model."""
    said = any(override.strip().startswith("engine.model_path") for override in overrides or ())
    if model is None and config is None and not said:
        raise ConfigError(
            "--model: got none, expected the folder of a checkpoint; pass --model FOLDER (`rollout tiny FOLDER` makes "
            "one to try with)"
        )


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Overrides for the options that were given: those that are neither None nor empty.

    JSON's strings, numbers, booleans and lists are TOML values, so the overrides of options and of `--set`
    take the same way and produce the same errors.
    """
    return [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
        if value is not None and value != []
    ]


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The sentence under each field of a dataclass or struct and of its bases; {} where there is no source."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def as_toml(settings: Any, *, section: str = "") -> str:
    """A settings object as a TOML file with the fields' sentences as comments; `load_settings` reads it back.

    Secrets (fields that no `repr` shows, addresses with a key) are not in it: a comment says that there is one.
    """
    cls: type = type(settings)
    docs = field_docs(cls)
    lines: list[str] = []
    sections: list[str] = []
    for key, hint in keys_of(cls).items():
        value = getattr(settings, key)
        if section_type(hint) is not None and value is not None:
            sections.append(as_toml(value, section=f"{section}{key}."))
            continue
        if key in docs:
            lines.append(f"# {docs[key]}")
        if value and _is_secret(cls, key, value):
            lines.append(f"# {key} = ... (given, not shown)")
            continue
        lines.append(f"# {key} =" if value is None else f"{key} = {_toml_value(value)}")
    header = [f"[{section.rstrip('.')}]"] if section else []
    return "\n\n".join(["\n".join(header + lines), *sections])


def _is_secret(cls: type, key: str, value: Any) -> bool:
    """Whether a value must stay off screens and out of files that are made of it."""
    if isinstance(value, str) and re.search(r"[?&]key=", value):
        return True
    return dataclasses.is_dataclass(cls) and any(
        item.name == key and not item.repr for item in dataclasses.fields(cls)
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(str(key))} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False)
