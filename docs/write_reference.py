"""Writes `docs/reference.md` from the code: signatures, defaults, fields with their sentences, error classes.

    python docs/write_reference.py            rewrite it
    python docs/write_reference.py --check    exit with 1 if it is not what the code says

What no code tells in one sentence (arguments of `generate`, keys of results) is written here; a name that is missing or
too many is an error.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rollout.errors
from rollout import Engine, RolloutPool
from rollout.config import EngineConfig
from rollout.engine.generation import _FOREIGN
from rollout.errors import RolloutError
from rollout.pool.config import PoolConfig
from rollout.protocol.commands import Status
from rollout.sampling_params import SamplingParams
from weight_sync import WeightPublisher
from weight_sync.errors import SyncError
from weight_sync.report import SyncReport

FILE = Path(__file__).with_name("reference.md")

HEAD = """# Reference

Every public name with its default and its meaning. `python docs/write_reference.py` writes this page from the code, and
a test holds both together. What the calls are for is in [../README.md](../README.md),
[pushing_weights.md](pushing_weights.md) and [running.md](running.md); names of other engines are in
[coming_from.md](coming_from.md).
"""

GENERATE = {
    "prompt": "text, or a list of texts",
    "sampling_params": (
        "a dictionary, `SamplingParams`, or a `GenerationConfig` of transformers; one, or a list with one for each "
        "prompt"
    ),
    "input_ids": (
        "token ids in place of text: one prompt or a list; lists, arrays, tensors, or what a transformers tokenizer "
        "returns"
    ),
    "return_logprob": "log-probabilities of output tokens",
    "logprob_start_len": "first prompt position whose log-probability is wanted; -1: none",
    "top_logprobs_num": "how many of the most likely tokens to list for each position",
    "token_ids_logprob": "tokens whose log-probability is wanted at each position",
    "stream": "an iterator of cumulative results in place of the results",
    "rid": "the request's id, for `abort_request`; one for each prompt",
    "return_text_in_logprobs": "the text of each token in log-probability entries, in place of None",
    "return_token_times": "the wall-clock time of each token",
    "return_routed_experts": "which experts each token went to; needs `enable_return_routed_experts`",
    "routed_experts_start_len": "the first position whose experts are wanted",
    "timeout_s": "deadline, after which everything comes back as it is; None: none",
    "attention_mask": "where the tokens are in padded `input_ids`",
    "input_embeds": "rows in place of tokens, (tokens, hidden size) numbers: one prompt or a list",
    "add_special_tokens": (
        "None: the tokenizer's, without a second begin token; True: exactly the tokenizer's; False: none"
    ),
    "flat_logprobs": "`output_logprobs`, numbers alone, beside `output_token_logprobs`",
    "return_token_versions": "`token_versions`",
    "return_prompt_token_ids": "`prompt_token_ids`",
    "min_weight_version": (
        "compute nothing before a version of this number, or a later one, serves; until then the call waits"
    ),
    "cache_salt": "share cached prefixes only with prompts of the same salt; one, or one for each prompt",
}
"""Arguments of `generate`, without those that only the common dialect has."""

ALWAYS = "always"
RESULT = {
    "text": (
        ALWAYS,
        "the output as text, without the stop string or token that ended it (`no_stop_trim` keeps it)",
    ),
    "output_ids": (ALWAYS, "the output's token ids, a stop token included"),
    "prompt_token_ids": ("`return_prompt_token_ids`", "the prompt's token ids"),
    "meta_info": (ALWAYS, "what the following table lists"),
    "index": (
        "`stream`, where there are several samples",
        "which sample: prompt number x n + sample number",
    ),
}
"""Keys of a result: when it is there, and what it is."""

META = {
    "id": (ALWAYS, "the request's id; with n > 1 followed by `-0`, `-1`, and so on"),
    "prompt_tokens": (ALWAYS, "tokens of the prompt"),
    "completion_tokens": (ALWAYS, "tokens of the output"),
    "cached_tokens": (ALWAYS, "prompt tokens that were found in the prefix cache"),
    "finish_reason": (
        ALWAYS,
        '`{"type": "stop", "matched": id or string}`, `{"type": "length", "length": n}`, '
        '`{"type": "abort", "message": why}`; None while it streams',
    ),
    "context_exhausted": (ALWAYS, "the context ended the output before `max_new_tokens` did"),
    "engine_id": (ALWAYS, "which life of an engine computed it"),
    "weight_version": (ALWAYS, "label of the version that served at the end"),
    "weight_version_number": (ALWAYS, "its number"),
    "weight_versions": (
        ALWAYS,
        "spans of output tokens: `version` (label), `number`, `start`, `end` (half open)",
    ),
    "e2e_latency": (ALWAYS, "seconds in the engine"),
    "num_retractions": (ALWAYS, "how often its KV was dropped and computed again"),
    "num_reruns": (ALWAYS, "how often it began anew because its replica died (pools)"),
    "num_resumes": ("`resume`", "how often it was ended early and went on"),
    "output_token_logprobs": (
        "`return_logprob`",
        "(log-probability, token id, text or None) for each output token",
    ),
    "input_token_logprobs": (
        "`return_logprob`",
        "the same of the prompt, from `logprob_start_len`; position 0 has None",
    ),
    "output_logprobs": (
        "`flat_logprobs`",
        "log-probabilities of the output alone, a list of numbers",
    ),
    "output_top_logprobs": (
        "`top_logprobs_num`",
        "for each output position, the most likely tokens as such entries",
    ),
    "input_top_logprobs": ("`top_logprobs_num`", "the same of the prompt"),
    "output_token_ids_logprobs": (
        "`token_ids_logprob`",
        "for each output position, the entries of the tokens asked for",
    ),
    "input_token_ids_logprobs": ("`token_ids_logprob`", "the same of the prompt"),
    "routed_experts": (
        "`return_routed_experts`",
        "int32 array (tokens - 1 - start, layers, experts of a token), -1 in layers without experts",
    ),
    "token_times": ("`return_token_times`", "seconds since the epoch of each output token"),
    "token_versions": (
        "`return_token_versions`",
        "number of the version that sampled each output token",
    ),
}
"""Keys of `meta_info`, likewise."""

PUBLISHER = {
    "timeout_s": "limit of every call as a whole",
    "bucket_bytes": "how much is packed before the engine may start checking it",
    "transport": (
        '"local", "shared_memory", "cuda_ipc", "process_group"; "auto": one of the first three, see pushing_weights.md'
    ),
    "group_host": "where ranks of engines reach this machine, for a group",
    "group_backend": '"gloo" or "nccl"; "auto": NCCL for engines on CUDA',
    "arena_bytes": "over CUDA IPC, what may be taken of the trainer's GPU; None: as much as the model",
    "staging": 'where bytes wait that leave the arena: "extra" memory, "kv_cache", "none"; see pushing_weights.md',
}
"""Options of `WeightPublisher`."""

NOT_PUBLIC = frozenset(("weight_channel",))
"""Methods without an underscore that are for other parts of this package."""


def reference() -> str:
    """The page."""
    parts = [
        HEAD,
        "## `rollout.Engine(model_path, *, ...)`\n",
        "A context manager, or call `shutdown()`. Any thread may call any method. Names that only the common dialect\n"
        "has are translated, ignored with one warning, or refused with the reason.\n",
        fields_table(EngineConfig, ("option", "default", "meaning")),
        "## `rollout.RolloutPool(model_path, *, ...)`\n",
        "The methods of `Engine`, by many of them. Its options are those of `Engine` for each replica (`executor` is\n"
        '"local" or "ray"), and:\n',
        fields_table(PoolConfig, ("option", "default", "meaning")),
        "## `generate(...)`\n",
        "Returns one dictionary for one prompt with n = 1, else a list, prompt-major; `[]` for `[]`. Arguments about\n"
        "a prompt are one value for all or a list with one for each. Pass those after `token_ids_logprob` by name:\n"
        "between them stand those of the common dialect, in its order.\n",
        table(("argument", "default", "meaning"), generate_rows()),
        "## Sampling parameters\n",
        "`max_tokens`, `min_tokens`, `seed` and `logprobs` mean `max_new_tokens`, `min_new_tokens`, `sampling_seed`,\n"
        "and `return_logprob` with so many top tokens.\n",
        fields_table(SamplingParams, ("name", "default", "meaning")),
        "## Results\n",
        table(("key", "there", "what"), [(f"`{k}`", *row) for k, row in RESULT.items()]),
        table(
            ("key of `meta_info`", "with", "what"), [(f"`{k}`", *row) for k, row in META.items()]
        ),
        "## Other calls of an engine\n",
        twins(Engine),
        calls_table(Engine, without=("generate",)),
        "Attributes: " + ", ".join(attributes(Engine)) + ".\n",
        "Of a pool besides:\n",
        calls_table(RolloutPool, without=public_calls(Engine)),
        "`status()` has:\n",
        fields_table(Status, ("field", "", "meaning")),
        "## `weight_sync.WeightPublisher(engine_or_address, *, ...)`\n",
        "`engine_or_address`: an engine or a pool, the address of one, or a list of these.\n",
        table(("option", "default", ""), option_rows(WeightPublisher, PUBLISHER)),
        twins(WeightPublisher),
        calls_table(WeightPublisher),
        "An update returns a `SyncReport`, which also unpacks as `(True, message)`:\n",
        fields_table(SyncReport, ("field", "", "meaning")),
        "## Errors\n",
        "All of them can be imported from `rollout.errors`, are the same types wherever the engine runs, and can be\n"
        "pickled.\n",
        table(("error", "is a", "means"), error_rows()),
    ]
    return "\n".join(parts)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def fields_table(cls: type, columns: tuple[str, str, str]) -> str:
    """Name, default and sentence of every field; without the defaults where the second column has no title."""
    rows = [(f"`{name}`", default, text) for name, default, text in fields(cls)]
    if not columns[1]:
        return table((columns[0], columns[2]), [(name, text) for name, _, text in rows])
    return table(columns, rows)


def fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """Every field of a class with its default as it is written and the sentence below it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    for field, text in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            if not (isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
                raise SystemExit(f"{cls.__name__}.{field.target.id}: has no sentence")
            default = "required" if field.value is None else f"`{ast.unparse(field.value)}`"
            yield field.target.id, default, " ".join(str(text.value.value).split())


def option_rows(cls: type, meanings: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Options of a constructor, after its first argument."""
    parameters = list(inspect.signature(cls).parameters.items())[1:]
    check_same(cls.__name__, meanings, [name for name, _ in parameters])
    return [(f"`{name}`", f"`{one.default!r}`", meanings[name]) for name, one in parameters]


def generate_rows() -> list[tuple[str, str, str]]:
    """Arguments of `generate` with their defaults."""
    parameters = inspect.signature(Engine.generate).parameters
    named = [name for name in parameters if name not in ("self", "others", *_FOREIGN)]
    check_same("GENERATE", GENERATE, named)
    return [(f"`{name}`", f"`{parameters[name].default!r}`", GENERATE[name]) for name in named]


def check_same(what: str, written: Mapping[str, Any], real: Sequence[str]) -> None:
    """End with an error that names what is missing, and what is too much."""
    missing, old = [n for n in real if n not in written], [n for n in written if n not in real]
    if missing or old:
        raise SystemExit(f"{__file__}: {what} lacks {missing}, and has {old} too much")


def public_calls(cls: type) -> list[str]:
    """Public methods that are not the `async_` twin of another one, in alphabetical order."""
    names = [
        name
        for name in dir(cls)
        if not name.startswith(("_", "async_"))
        and name not in NOT_PUBLIC
        and callable(getattr(cls, name))
    ]
    return sorted(names)


def calls_table(cls: type, without: Sequence[str] = ()) -> str:
    """Signature and first sentence of every public method."""
    rows = []
    for name in public_calls(cls):
        if name not in without:
            call = getattr(cls, name)
            rows.append((f"`{name}{shown(call)}`", first_sentence(call)))
    return table(("call", ""), rows)


def shown(call: Any) -> str:
    """A signature without types, which editors show."""
    parts, star = [], False
    for name, parameter in list(inspect.signature(call).parameters.items()):
        if name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            parts.append("*")
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(
            parameter.kind, ""
        )
        star |= parameter.kind is parameter.VAR_POSITIONAL
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        parts.append(f"{prefix}{name}{default}")
    return f"({', '.join(parts)})"


def first_sentence(thing: Any) -> str:
    """Of its docstring."""
    text = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    if not text:
        raise SystemExit(f"{thing!r} has no docstring")
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", text)[0]


def twins(cls: type) -> str:
    """Which calls have no awaitable twin."""
    alone = [name for name in public_calls(cls) if not hasattr(cls, f"async_{name}")]
    words = ", ".join(f"`{name}`" for name in alone)
    return f"Every call but {words} has an `async_` twin.\n"


def attributes(cls: type) -> list[str]:
    """Public properties, with the first sentence of what they are."""
    found = []
    for name in sorted(dir(cls)):
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property) and not name.startswith("_"):
            found.append(f"`{name}` ({first_sentence(value.fget).rstrip('.')})")
    return found


def error_rows() -> list[tuple[str, str, str]]:
    """Every error class: its parents, and its first sentence."""
    rows = []
    for name in sorted(rollout.errors.__all__):
        error = getattr(rollout.errors, name)
        if isinstance(error, type) and issubclass(error, (RolloutError, SyncError)):
            parents = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
            rows.append((f"`{name}`", parents, first_sentence(error)))
    return rows


def main(arguments: Sequence[str]) -> int:
    """Write or check the page; returns the exit code."""
    new = reference()
    if "--check" in arguments:
        same = FILE.exists() and FILE.read_text(encoding="utf-8") == new
        if not same:
            raise SystemExit(
                "docs/reference.md is not what the code says: run python docs/write_reference.py"
            )
        return 0
    FILE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
