"""Where `rollout generate` takes its prompts from: arguments, a JSONL or text file, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import msgspec

from ..errors import ConfigError, InvalidRequestError
from ..sampling_params import SamplingParams
from ..tokenizer import Tokenizer, check_tokenizer_files, encode_prompts

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
    source: str = "the arguments"
    """Where it was read, for errors: file and line."""

    @property
    def given(self) -> dict[str, Any]:
        """What the output repeats of the prompt itself."""
        source = {"prompt": self.prompt, "input_ids": self.input_ids}
        return {key: value for key, value in source.items() if value is not None}


@dataclass(slots=True)
class BadRecords:
    """What is wrong with records, all of it; either the end of the run, or what is left out."""

    problems: list[str] = field(default_factory=list)
    """One line each."""

    def raise_unless(self, skip: bool) -> None:
        """`ConfigError` with the first problems, unless they are to be skipped."""
        if self.problems and not skip:
            shown = "\n  ".join(self.problems[:10])
            more = f"\n  and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
            raise ConfigError(
                f"{len(self.problems)} prompts cannot be used; correct them, or pass --skip-bad:\n  {shown}{more}"
            )


def read_prompts(
    prompts: Sequence[str], path: Path | None, bad: BadRecords | None = None
) -> list[PromptRecord]:
    """The prompts of the arguments, then of the file; of standard input where neither is given ("-" forces it).

    Lines that cannot be read go to `bad`; without it, the first one is an error.
    """
    bad = bad if bad is not None else BadRecords()
    records = [PromptRecord(prompt=prompt) for prompt in prompts]
    if str(path) == "-" or (path is None and not prompts and not sys.stdin.isatty()):
        records += _read_lines(sys.stdin, "standard input", bad)
    elif path is not None:
        try:
            with path.open(encoding="utf-8") as file:
                records += _read_lines(file, str(path), bad)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read prompts from {path}: {error}; expected a JSONL file or one prompt per line"
            ) from error
    if not records and not bad.problems:
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
                source=record.source,
            )
        rendered.append(record)
    return rendered


def _read_lines(lines: TextIO, source: str, bad: BadRecords) -> list[PromptRecord]:
    """One record per line that is not blank: a JSON object, or else the text of a prompt."""
    records = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\n")
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            records.append(
                _record(line, where)
                if line.lstrip().startswith("{")
                else PromptRecord(prompt=line, source=where)
            )
        except ConfigError as error:
            bad.problems.append(str(error))
    return records


def check_records(
    records: Iterable[PromptRecord],
    *,
    sampling: SamplingParams,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    context_length: int,
    bad: BadRecords,
) -> list[PromptRecord]:
    """The records that the engine will take; what is wrong with the others goes to `bad`, with file and line."""
    good = []
    for record in records:
        try:
            params = SamplingParams.from_dict(merged_params(sampling, record), vocab_size)
            ids = record.input_ids
            if ids is None:
                (ids,) = encode_prompts(tokenizer, [record.prompt or ""])
            _check_ids(ids, vocab_size, context_length - (params.max_new_tokens > 0))
        except ValueError as error:
            bad.problems.append(f"{record.source}: {error}")
        else:
            good.append(record)
    return good


def merged_params(sampling: SamplingParams, record: PromptRecord) -> dict[str, Any]:
    """The run's sampling parameters, with the record's own on top."""
    return {**msgspec.structs.asdict(sampling), **record.sampling_params}


def _check_ids(ids: Sequence[Any], vocab_size: int, room: int) -> None:
    if not ids:
        raise InvalidRequestError("got no tokens, expected at least one; prompts must not be empty")
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]
    if wrong:
        raise InvalidRequestError(
            f"input_ids: got {wrong[0]!r}, expected ids within the vocabulary [0, {vocab_size})"
        )
    if len(ids) > room:
        raise InvalidRequestError(
            f"got {len(ids)} tokens, expected at most {room} within the context length; shorten the prompt"
        )


def _record(line: str, source: str) -> PromptRecord:
    try:
        data = json.loads(line)
        json.dumps(data, ensure_ascii=False).encode()  # as it will be written
    except UnicodeEncodeError:
        raise ConfigError(
            f"{source}: got half of a surrogate pair, expected text; write the file with errors='replace'"
        ) from None
    except (ValueError, RecursionError) as error:  # too many digits, or levels, among others
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
    return PromptRecord(
        **{given[0]: data[given[0]]}, sampling_params=params, extra=extra, source=source
    )
