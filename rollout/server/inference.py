"""The generation and control half of the other RL dialect: token ids in and out, pause and resume, sleep and wake."""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import Any, Literal

from starlette.responses import Response

from ..errors import RolloutError
from ..protocol.commands import MemoryTag, PauseMode
from .bodies import Body
from .disconnects import unless_gone
from .generate import check_model
from .openai import render
from .openai_results import Shape, chat_logprobs, prompt_logprobs, reasons
from .replies import HttpError, done, json_reply, not_implemented
from .routing import Ask, Route

_MODES: dict[str, PauseMode] = {"abort": "abort", "keep": "in_place"}
#: What the dialect calls a parameter -> what the engine does.
_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
#: Details of what this route does not return, and is not asked for by them.
_OF_ABSENT = ("routed_experts_prompt_start",)
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "detokenize": (True, False),
    "output_kind": (0, 1, 2),
    "truncate_prompt_tokens": (),
    "extra_args": ({},),
    "bad_words": ([],),
    "skip_clone": (True, False),
}


class TokensBody(Body):
    """`/inference/v1/generate`."""

    token_ids: list[int]
    sampling_params: dict[str, Any]
    request_id: str | None = None
    model: str | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int = 0
    kv_transfer_params: dict[str, Any] | None = None
    min_weight_version: int | None = None


async def generate_tokens(ask: Ask) -> Response:
    """Token ids in, token ids out."""
    body: TokensBody = ask.body
    if body.stream:
        raise not_implemented("stream: got true, expected /generate for streams")
    for name in ("features", "kv_transfer_params"):
        if getattr(body, name):
            raise not_implemented(f"{name}: got a value, expected none")
    params, num_logprobs, num_prompt = _sampling(body.sampling_params)
    shape = Shape.new(
        is_chat=True,
        model=check_model(ask, body.model),
        tokenizer=ask.state.tokenizer,
        num_logprobs=num_logprobs,
        prompt_logprobs=num_prompt,
        tokens_as_ids=True,
    )
    counts = [count for count in (num_logprobs, num_prompt) if count is not None]
    found = await ask.state.calls.whole(
        ask.request,
        ask.client,
        {
            "input_ids": body.token_ids,
            "sampling_params": params,
            "return_logprob": bool(counts),
            "logprob_start_len": -1 if num_prompt is None else 0,
            "top_logprobs_num": max(counts, default=0),
            "rid": body.request_id,
            "min_weight_version": body.min_weight_version,
            "cache_salt": body.cache_salt,
        },
    )
    results = found if isinstance(found, list) else [found]
    choices = [
        {
            "index": i,
            "token_ids": result["output_ids"],
            "logprobs": chat_logprobs(shape, result["meta_info"], 0),
            **reasons(result["meta_info"]["finish_reason"]),
            "weight_versions": result["meta_info"]["weight_versions"],
        }
        for i, result in enumerate(results)
    ]
    answer: dict[str, Any] = {
        "request_id": body.request_id or uuid.uuid4().hex,
        "model": shape.model,
        "choices": choices,
        "prompt_logprobs": None,
        "kv_transfer_params": None,
        "metadata": {"weight_version": results[-1]["meta_info"]["weight_version"]},
    }
    if num_prompt is not None:
        answer["prompt_logprobs"] = prompt_logprobs(shape, results[0])
    return json_reply(answer)


def _sampling(given: dict[str, Any]) -> tuple[dict[str, Any], int | None, int | None]:
    """Sampling parameters under the engine's names, and how many log-probabilities of output and prompt."""
    params: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or name in ("logprobs", "prompt_logprobs", *_OF_ABSENT):
            continue
        if name in _HARMLESS:
            if value not in _HARMLESS[name]:
                raise not_implemented(f"sampling_params.{name}: got {str(value)[:60]!r}")
        elif name == "include_stop_str_in_output":
            params["no_stop_trim"] = value
        else:
            params[_NAMES.get(name, name)] = value
    params.setdefault("max_new_tokens", 16)
    return params, _count(given, "logprobs"), _count(given, "prompt_logprobs")


def _count(given: dict[str, Any], name: str) -> int | None:
    value = given.get(name)
    if value is not None and (type(value) is not int or not 0 <= value <= 1024):
        raise HttpError(400, f"{name}: got {str(value)[:60]!r}, expected 0 to 1024")
    return value


class TokenizeBody(Body):
    """Text, or a conversation."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool = False


async def tokenize(ask: Ask) -> Response:
    """Token ids of a text or of a rendered conversation."""
    body: TokenizeBody = ask.body
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(400, "expected exactly one of prompt and messages")
    encode = partial(ask.state.calls.token_ids, any_length=True)
    if body.prompt is not None:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        ids = (await encode([body.prompt], special))[0] if body.prompt else []
    else:
        text = await asyncio.to_thread(render, ask, body)
        ids = (await encode([text], bool(body.add_special_tokens)))[0]
    words = None
    if body.return_token_strs and ask.state.tokenizer is not None:
        words = ask.state.tokenizer.inner.convert_ids_to_tokens(ids)
    return json_reply(
        {
            "count": len(ids),
            "max_model_len": await ask.state.calls.context_length(),
            "tokens": ids,
            "token_strs": words,
        }
    )


async def tokenizer_info(ask: Ask) -> Response:
    """Special tokens and chat template: what a client needs that has no tokenizer of its own."""
    tokenizer, template = ask.state.tokenizer, ask.state.chat_template
    if tokenizer is None:
        raise HttpError(400, "the server has no tokenizer; start it with one")
    inner = tokenizer.inner
    return json_reply(
        {
            "tokenizer_class": type(inner).__name__,
            **{
                f"{name}_token": getattr(inner, f"{name}_token")
                for name in ("bos", "eos", "pad", "unk")
            },
            "vocab_size": len(inner),
            "chat_template": template or getattr(inner, "chat_template", None),
        }
    )


class DetokenizeBody(Body):
    """Token ids."""

    tokens: list[int]
    model: str | None = None


async def detokenize(ask: Ask) -> Response:
    """Text of token ids."""
    tokenizer = ask.state.tokenizer
    if tokenizer is None:
        raise HttpError(400, "the server has no tokenizer; start it with one")
    known, size = len(tokenizer.inner), await ask.state.calls.vocab_size()
    if any(not 0 <= token < max(known, size) for token in ask.body.tokens):
        raise HttpError(400, f"tokens: expected ids below {max(known, size)}")
    # Many models have more rows than tokens, and may draw one of those: it has no text.
    ids = [token for token in ask.body.tokens if token < known]
    text = await asyncio.to_thread(tokenizer.inner.decode, ids) if ids else ""
    return json_reply({"prompt": text, "text": text})


class PauseQuery(Body):
    """How to pause."""

    mode: Literal["abort", "wait", "keep"] = "abort"
    """abort: requests end with what they have; wait: they finish first; keep: they are frozen."""
    clear_cache: bool | None = None
    """Drop cached prefixes too; null: as if true, where nothing runs any more."""
    wait_for_inflight_requests: bool | None = None
    """An older name of mode "wait"."""


async def pause(ask: Ask) -> Response:
    """Stop generating until `/resume`."""
    query: PauseQuery = ask.query
    mode = "wait" if query.wait_for_inflight_requests else query.mode
    engine = ask.state.engine
    if mode == "wait":
        await unless_gone(ask.request, _pause_when_idle(ask))
    else:
        await engine.async_pause_generation(_MODES[mode])
    if query.clear_cache or (query.clear_cache is None and mode != "keep"):
        try:
            await engine.async_flush_cache()
        except RolloutError as error:
            if query.clear_cache:  # It was asked for by name.
                raise HttpError(400, f"generation is paused, but {error}") from None
    return json_reply({"status": "paused", "mode": mode})


async def _pause_when_idle(ask: Ask) -> None:
    """From the pause on the engine itself holds what comes, until its lease ends."""
    engine = ask.state.engine
    async with ask.state.calls.held_back(engine.config.request_timeout_s):
        await engine.async_pause_generation("in_place")


async def resume(ask: Ask) -> Response:
    """End a pause, one that still waits for requests to finish too."""
    ask.state.calls.let_go()
    await ask.state.engine.async_continue_generation()
    return json_reply({"status": "resumed"})


async def is_paused(ask: Ask) -> Response:
    """Whether generation is paused."""
    status = await ask.state.engine.async_status()
    return json_reply({"is_paused": status.paused is not None or ask.state.calls.held})


class ResetQuery(Body):
    """What to reset."""

    reset_running_requests: bool = False
    """Running requests, frozen ones too, lose their keys and values and compute them again."""
    reset_external: bool = False


async def reset_prefix_cache(ask: Ask) -> Response:
    """Drop all cached prefixes; 400 while requests are pending, unless they are reset too."""
    await ask.state.engine.async_flush_cache(ask.query.reset_running_requests)
    return done("the prefix cache is empty")


async def get_world_size(ask: Ask) -> Response:
    """How many ranks a trainer's group must have room for."""
    info = await ask.state.engine.async_get_server_info()
    return json_reply({"world_size": info["tp_size"] * info["dp_size"]})


class SleepQuery(Body):
    """How deep."""

    level: Literal[1, 2] = 1
    """1: the weights wait in memory of the host; 2: they are gone, and must be sent again."""
    tags: list[MemoryTag] | None = None
    mode: Literal["abort", "keep"] = "keep"


async def sleep(ask: Ask) -> Response:
    """Give memory of weights and KV cache back to the system; requests wait."""
    query: SleepQuery = ask.query
    if query.mode == "abort":
        await ask.state.calls.abort_all()
    await ask.state.engine.async_release_memory_occupation(
        query.tags, keep_weights=query.level == 1
    )
    return json_reply({"status": "sleeping", "level": query.level})


class WakeQuery(Body):
    """What to take again."""

    tags: list[MemoryTag] | None = None


async def wake_up(ask: Ask) -> Response:
    """Make released memory usable again."""
    await ask.state.engine.async_resume_memory_occupation(ask.query.tags)
    return json_reply({"status": "awake"})


async def is_sleeping(ask: Ask) -> Response:
    """Whether memory is given back at present."""
    status = await ask.state.engine.async_status()
    return json_reply({"is_sleeping": bool(status.released)})


_GET = ("GET",)
_TAG = "inference"
ROUTES = (
    Route(
        path="/inference/v1/generate",
        handler=generate_tokens,
        body=TokensBody,
        tag=_TAG,
        statuses=(404, 429, 501, 503),
    ),
    Route(path="/tokenize", handler=tokenize, body=TokenizeBody, tag=_TAG),
    Route(path="/detokenize", handler=detokenize, body=DetokenizeBody, tag=_TAG),
    Route(path="/tokenizer_info", handler=tokenizer_info, methods=_GET, tag=_TAG),
    Route(path="/pause", handler=pause, query=PauseQuery, admin=True, tag=_TAG),
    Route(path="/resume", handler=resume, admin=True, tag=_TAG),
    Route(path="/is_paused", handler=is_paused, methods=_GET, tag=_TAG),
    Route(
        path="/reset_prefix_cache",
        handler=reset_prefix_cache,
        query=ResetQuery,
        admin=True,
        tag=_TAG,
        statuses=(501,),
    ),
    Route(path="/get_world_size", handler=get_world_size, methods=_GET, tag=_TAG),
    Route(path="/sleep", handler=sleep, query=SleepQuery, admin=True, tag=_TAG),
    Route(path="/wake_up", handler=wake_up, query=WakeQuery, admin=True, tag=_TAG),
    Route(path="/is_sleeping", handler=is_sleeping, methods=_GET, tag=_TAG),
)
