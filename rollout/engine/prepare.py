"""Turns the arguments of `Engine.generate` into one `Generate` command, and its answers back into dictionaries."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from ..errors import InvalidRequestError
from ..hints import did_you_mean
from ..protocol.commands import Generate, PromptSpec, SampleUpdate, too_many_samples
from ..protocol.embeds import places_of, read_embeds
from ..sampling_params import SamplingParams
from ..tokenizer import Tokenizer
from .dialect import check_generate_argument
from .prompts import prompt_token_ids
from .results import Extras, ResultBuilder
from .sampling_inputs import read_sampling_params


@dataclass(slots=True, eq=False)
class PreparedGenerate:
    """One call of `generate`: what to send, and where the answers are collected."""

    command: Generate
    builders: list[ResultBuilder]
    single: bool
    """One prompt with n = 1: the result is one dictionary and no list."""

    def add(self, update: SampleUpdate) -> None:
        """Take an answer; called from the engine's or the socket's thread, one at a time."""
        self.builders[update.index].add(update)

    def result(self) -> dict[str, Any] | list[dict[str, Any]]:
        """What the caller gets once everything has finished."""
        results = [builder.result() for builder in self.builders]
        return results[0] if self.single else results

    def chunk(self, update: SampleUpdate) -> dict[str, Any]:
        """What a streaming caller gets after `update`: the sample so far, and which one it is."""
        builder = self.builders[update.index]
        builder.add(update)
        result = builder.result()
        return result if self.single else {**result, "index": update.index}

    @property
    def rids(self) -> list[str]:
        """Ids of all prompts, for an abort."""
        return [spec.rid for spec in self.command.prompts]


def prepare(
    tokenizer: Tokenizer | None,
    *,
    prompt: Any,
    input_ids: Any,
    sampling_params: Any,
    stream: bool,
    rid: Any,
    return_text_in_logprobs: bool,
    per_prompt: Mapping[str, Any],
    others: Mapping[str, Any],
    flat_logprobs: bool = False,
    return_token_versions: bool = False,
    return_prompt_token_ids: bool = False,
    min_weight_version: Any = None,
    attention_mask: Any = None,
    add_special_tokens: bool | None = None,
    pad_token_id: int | None = None,
    input_embeds: Any = None,
    pooling: str | None = None,
    call: str = "generate",
) -> PreparedGenerate:
    """Check the arguments as a whole; `per_prompt` holds those that may be one value or one per prompt.

    `others` are arguments that only the common dialect has, see `dialect`. pooling: as `PromptSpec.pooling`.
    call: whose arguments they are.
    """
    _check_others(call, others)
    if input_embeds is not None:
        _check_alone(prompt, input_ids, attention_mask, return_prompt_token_ids)
        embeds, is_list = read_embeds(input_embeds)
        ids = [places_of(rows) for rows in embeds]
    else:
        pads: dict[str, Any] = {"attention_mask": attention_mask, "pad_token_id": pad_token_id}
        ids, is_list = prompt_token_ids(
            tokenizer, prompt, input_ids, add_special_tokens=add_special_tokens, **pads
        )
        embeds = []
    num = len(ids)
    read = [
        _params(value, i, len(ids[i]))
        for i, value in enumerate(_spread(sampling_params, num, "sampling_params"))
    ]
    rids = [uuid.uuid4().hex for _ in ids] if rid is None else _spread(rid, num, "rid")
    _check_rids(rids)
    columns = {name: _spread(value, num, name) for name, value in per_prompt.items()}
    # One set of parameters for all prompts is one request: its samples draw from one seed, each its own numbers.
    shared = not isinstance(sampling_params, (list, tuple))
    specs = [
        _spec(
            i,
            rid=rids[i],
            input_ids=ids[i],
            params=read[i][0],
            num_logprobs=read[i][1],
            first_sample=i * read[i][0].n if shared else 0,
            flat_logprobs=flat_logprobs,
            pooling=pooling,
            input_embeds=embeds[i] if embeds else None,
            **{k: v[i] for k, v in columns.items()},
        )
        for i in range(num)
    ]
    if (problem := too_many_samples(specs)) is not None:
        raise InvalidRequestError(problem)
    extras = Extras(
        text_in_logprobs=return_text_in_logprobs,
        flat_logprobs=flat_logprobs,
        token_versions=return_token_versions,
        prompt_token_ids=return_prompt_token_ids,
    )
    builders = [
        ResultBuilder(spec, tokenizer, extras) for spec in specs for _ in range(spec.params.n)
    ]
    command = Generate(
        prompts=specs, stream=stream, min_weight_version=_min_version(min_weight_version)
    )
    return PreparedGenerate(command, builders, not is_list and len(builders) == 1)


def _check_rids(rids: list[Any]) -> None:
    wrong = next((rid for rid in rids if not isinstance(rid, str)), None)
    if wrong is not None:
        raise InvalidRequestError(
            f"rid: got {type(wrong).__name__}, expected a text, or a list with one for each prompt"
        )
    if len(set(rids)) != len(rids):
        raise InvalidRequestError(
            f"rid: got {str(rids)[:200]}, expected a different id for each prompt"
        )


def _check_alone(prompt: Any, input_ids: Any, attention_mask: Any, wants_ids: bool) -> None:
    """`InvalidRequestError` for what only prompts of tokens have, beside `input_embeds`."""
    given = {"prompt": prompt, "input_ids": input_ids, "attention_mask": attention_mask}
    beside = [name for name, value in given.items() if value is not None]
    if beside:
        raise InvalidRequestError(
            f"input_embeds: got {' and '.join(beside)} beside it, expected one kind of prompt; leave out the others"
        )
    if wants_ids:
        raise InvalidRequestError(
            "return_prompt_token_ids: got True with input_embeds, expected False: such a prompt has no tokens"
        )


def _min_version(value: Any) -> int:
    if value is None:
        return 0
    number = -1 if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if not 0 <= number < 1 << 62:
        raise InvalidRequestError(
            f"min_weight_version: got {value!r}, expected the number of a version, as in a report's `version`; labels "
            "have no order"
        )
    return number


def _spec(i: int, num_logprobs: int | None, flat_logprobs: bool, **fields: Any) -> PromptSpec:
    """Structs check their types when they are decoded; a caller in this process gets the same check."""
    import msgspec

    fields = {
        name: _DEFAULTS[name] if value is None and name in _DEFAULTS else value
        for name, value in fields.items()
    }
    try:
        if flat_logprobs:
            fields["return_logprob"] = True
        if num_logprobs is not None:
            fields["return_logprob"] = True
            fields["top_logprobs_num"] = max(fields["top_logprobs_num"], num_logprobs)
        if fields["token_ids_logprob"] is not None and not fields["return_logprob"]:
            fields["return_logprob"] = True
        if fields["top_logprobs_num"] and not fields["return_logprob"]:
            fields["return_logprob"] = True
        spec = msgspec.convert(fields, PromptSpec)
        msgspec.msgpack.encode(spec)
        return spec
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,  # of a tensor where a number is expected
    ) as error:  # What has the right type may still be no message.
        raise InvalidRequestError(
            f"prompt {i}: {error}; see Engine.generate for the types"
        ) from None


def _params(value: Any, i: int, num_prompt_tokens: int) -> tuple[SamplingParams, int | None]:
    try:
        return read_sampling_params(value, num_prompt_tokens)
    except ValueError as error:
        raise InvalidRequestError(f"sampling_params of prompt {i}: {error}") from None


def _spread(value: Any, num: int, name: str) -> list[Any]:
    """One entry per prompt: a list of that length as it is, anything else repeated."""
    is_nested = name == "token_ids_logprob"
    is_list = isinstance(value, (list, tuple))
    if is_list and (not is_nested or (value and isinstance(value[0], (list, tuple)))):
        if len(value) != num:
            raise InvalidRequestError(
                f"{name}: got {len(value)} entries, expected one for each of {num} prompts"
            )
        return list(value)
    return [value] * num


def _check_others(call: str, arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if not check_generate_argument(name, value, call):
            hint = did_you_mean(name, _KNOWN_BY_ENCODE if call == "encode" else _KNOWN)
            if call == "generate" and name in SamplingParams.__struct_fields__:
                hint = f"it is a sampling parameter: pass sampling_params={{{name!r}: {value!r}}}"
            raise InvalidRequestError(f"{call}: got an unknown argument {name}={value!r}; {hint}")


#: What None stands for, where callers of the common dialect pass it.
_DEFAULTS = {
    "return_logprob": False,
    "logprob_start_len": -1,
    "top_logprobs_num": 0,
    "return_token_times": False,
    "return_routed_experts": False,
    "routed_experts_start_len": 0,
    "cache_salt": "",
}
_KNOWN = (
    "prompt",
    "sampling_params",
    "input_ids",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "return_text_in_logprobs",
    "return_token_times",
    "return_routed_experts",
    "routed_experts_start_len",
    "cache_salt",
    "flat_logprobs",
    "return_token_versions",
    "return_prompt_token_ids",
    "min_weight_version",
    "attention_mask",
    "add_special_tokens",
    "input_embeds",
    "stream",
    "rid",
    "timeout_s",
)
_KNOWN_BY_ENCODE = (
    *("prompt", "input_ids", "rid", "attention_mask", "add_special_tokens"),
    *("min_weight_version", "timeout_s"),
)
