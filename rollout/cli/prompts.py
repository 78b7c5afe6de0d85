"""Where `rollout generate` takes its prompts from: arguments, a JSONL or text file, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConfigError
from ..tokenizer import check_tokenizer_files

#: The keys of a record that say what to generate; every other key is copied to the output.
SOURCE_KEYS = ("prompt", "input_ids", "messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """One prompt as it was given, and what the output repeats of it."""

    prompt: str | None = None
    """Text to complete, or None."""
    input_ids: list[int] | None = None
    """Token ids to complete, or None."""
    messages: list[dict[str, Any]] | None = None
    """A chat that the tokenizer's template turns into token ids, or None."""
    sampling_params: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters of this prompt alone."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the record, such as the expected answer; they pass through."""


def read_prompts(prompts: Sequence[str], path: Path | None) -> list[PromptRecord]:
    """The prompts of the arguments, then of the file; of standard input where neither is given ("-" forces it)."""
    records = [PromptRecord(prompt=prompt) for prompt in prompts]
    if str(path) == "-" or (path is None and not prompts and not sys.stdin.isatty()):
        records += _read_lines(sys.stdin, "standard input")
    elif path is not None:
        try:
            with path.open(encoding="utf-8") as file:
                records += _read_lines(file, str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read prompts from {path}: {error}; expected a JSONL file or one prompt per line"
            ) from error
    if not records:
        raise ConfigError(
            "no prompts: got no argument, no --input and nothing on standard input; "
            'expected for example: rollout generate --model PATH "Once upon a time"'
        )
    return records


def apply_chat_template(
    records: Iterable[PromptRecord], tokenizer_path: str, *, wrap: bool
) -> list[PromptRecord]:
    """Records with `messages` as token ids; with `wrap`, a text prompt is a chat of one user message."""
    chats = list(records)
    if not any(record.messages is not None or (wrap and record.prompt) for record in chats):
        return chats
    from transformers import AutoTokenizer

    check_tokenizer_files(tokenizer_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_path)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"cannot render chats: got a tokenizer without a chat template in {tokenizer_path}, expected "
            "chat_template.jinja or one in tokenizer_config.json; send plain prompts, or pass "
            "--set engine.tokenizer_path=FOLDER"
        )
    rendered = []
    for record in chats:
        messages = record.messages
        if messages is None and wrap and record.prompt is not None:
            messages = [{"role": "user", "content": record.prompt}]
        if messages is not None:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            record = PromptRecord(
                input_ids=list(ids),
                sampling_params=record.sampling_params,
                extra={**record.extra, "messages": messages},
            )
        rendered.append(record)
    return rendered


def _read_lines(lines: TextIO, source: str) -> list[PromptRecord]:
    """One record per line that is not blank: a JSON object, or else the text of a prompt."""
    records = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\n")
        if not line.strip():
            continue
        records.append(
            _record(line, f"{source}, line {number}")
            if line.lstrip().startswith("{")
            else PromptRecord(prompt=line)
        )
    return records


def _record(line: str, source: str) -> PromptRecord:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}: not valid JSON ({error})") from error
    given = [key for key in SOURCE_KEYS if data.get(key) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{source}: got {' and '.join(given) or f'the keys {sorted(data)}'}, expected exactly one of "
            f"{', '.join(SOURCE_KEYS)}"
        )
    params = data.get("sampling_params") or {}
    expected_type = {"prompt": str, "input_ids": list, "messages": list}[given[0]]
    if not isinstance(data[given[0]], expected_type) or not isinstance(params, dict):
        raise ConfigError(
            f"{source}: expected {given[0]!r} as {expected_type.__name__} and sampling_params as an object, "
            f"got {type(data[given[0]]).__name__} and {type(params).__name__}"
        )
    extra = {
        key: value
        for key, value in data.items()
        if key not in SOURCE_KEYS and key != "sampling_params"
    }
    return PromptRecord(**{given[0]: data[given[0]]}, sampling_params=params, extra=extra)
