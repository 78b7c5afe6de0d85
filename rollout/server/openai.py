"""The OpenAI routes: models, completions, chats, scores."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response

from ..errors import InvalidRequestError
from .bodies import AnyBody, Body, convert, refuse_unknown
from .generate import GenerateBody, check_model, event_stream, generate, sse
from .openai_bodies import ChatBody, CompletionBody, SamplingBody, ScoreBody, TokensChatBody
from .openai_results import Deltas, Shape, whole
from .replies import HttpError, json_reply, not_implemented
from .routing import Ask, Route

_RENAMED = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}
_SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
    *("repetition_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos"),
    *("skip_special_tokens", "spaces_between_special_tokens"),
)
_MOST_LOGPROBS = 1024


def _sampling(body: SamplingBody, max_new_tokens: int) -> dict[str, Any]:
    params = {name: getattr(body, name) for name in _SAME}
    params |= {ours: getattr(body, theirs) for theirs, ours in _RENAMED.items()}
    params["no_stop_trim"] = body.no_stop_trim or body.include_stop_str_in_output
    params["max_new_tokens"] = max_new_tokens
    return {name: value for name, value in params.items() if value is not None}


def _arguments(body: SamplingBody, shape: Shape, max_new_tokens: int) -> dict[str, Any]:
    if body.return_hidden_states:
        raise not_implemented("return_hidden_states: got true")
    counts = [c for c in (shape.num_logprobs, shape.prompt_logprobs) if c is not None]
    if any(not 0 <= count <= _MOST_LOGPROBS for count in counts):
        raise HttpError(400, f"logprobs: got {max(counts)}, expected 0 to {_MOST_LOGPROBS}")
    with_prompt = shape.prompt_logprobs is not None or (shape.echo and bool(counts))
    return {
        "sampling_params": _sampling(body, max_new_tokens),
        "return_logprob": bool(counts),
        "logprob_start_len": 0 if with_prompt else -1,
        "top_logprobs_num": max(counts, default=0),
        "return_prompt_token_ids": True,
        "rid": body.rid or body.request_id,
        "min_weight_version": body.min_weight_version,
        "cache_salt": body.cache_salt,
    }


def _shape(ask: Ask, body: SamplingBody, **fields: Any) -> Shape:
    return Shape.new(
        model=check_model(ask, body.model),
        tokenizer=ask.state.tokenizer,
        prompt_logprobs=body.prompt_logprobs,
        token_ids=body.return_token_ids,
        tokens_as_ids=body.return_tokens_as_token_ids,
        num_samples=body.n,
        **fields,
    )


async def completions(ask: Ask) -> Response:
    """Continue prompts: text or token ids, one or several."""
    body: CompletionBody = ask.body
    if body.suffix:
        raise not_implemented("suffix: text before a given end")
    if body.best_of not in (None, body.n):
        raise HttpError(400, f"best_of: got {body.best_of}, expected n ({body.n}); leave it out")
    shape = _shape(ask, body, is_chat=False, num_logprobs=body.logprobs, echo=body.echo)
    arguments = _arguments(body, shape, body.max_tokens)
    arguments |= await prompt_ids(
        ask, "prompt", body.prompt, body.add_special_tokens, arguments["rid"]
    )
    return await _answer(ask, body, shape, arguments)


async def prompt_ids(
    ask: Ask, name: str, given: Any, add_special_tokens: bool | None, rid: str | None
) -> dict[str, Any]:
    """`input_ids`, and the `rid` of each of several prompts, for text or token ids, one prompt or several.

    name: of the field, for errors.
    """
    rows: list[Any] = given if isinstance(given, list) else [given]
    if given is None or not rows:
        raise HttpError(400, f"{name}: got none, expected text or token ids")
    kinds = {type(row) for row in rows}
    if kinds == {int}:
        return {"input_ids": rows, "rid": rid}
    if kinds == {str}:
        rows = await ask.state.calls.token_ids(rows, add_special_tokens)
    elif kinds != {list}:
        raise HttpError(
            400, f"{name}: got a mixture, expected texts, or token ids, or lists of ids"
        )
    several = rid is not None and len(rows) > 1
    rids = [f"{rid}.{i}" for i in range(len(rows))] if several else [rid]
    return {"input_ids": rows, "rid": None if rid is None else rids}


async def chat_completions_tokens(ask: Ask) -> Response:
    """Answer a conversation that the client has rendered to token ids."""
    body: TokensChatBody = ask.body
    return await _chat(ask, body, body.tokens)


async def chat_completions(ask: Ask) -> Response:
    """Answer a conversation, rendered by the tokenizer's chat template."""
    body: ChatBody = ask.body
    if (body.messages is None) == (body.input_ids is None):
        raise HttpError(400, "expected exactly one of messages and input_ids")
    return await _chat(ask, body, body.input_ids)


async def _chat(ask: Ask, body: ChatBody, ids: list[int] | None) -> Response:
    """ids: the prompt; None: what the template makes of the messages."""
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise not_implemented(f"response_format: got {kind!r}, expected 'text'")
    if body.tool_choice not in (None, "none", "auto"):
        raise not_implemented(f"tool_choice: got {str(body.tool_choice)[:60]!r}, expected 'auto'")
    wanted = body.logprobs or body.top_logprobs
    shape = _shape(
        ask, body, is_chat=True, num_logprobs=(body.top_logprobs or 0) if wanted else None
    )
    if ids is None:
        text = await asyncio.to_thread(render, ask, body)
        ids = (await ask.state.calls.token_ids([text], False))[0]
    room = await ask.state.calls.room_for(len(ids))
    limit = (
        body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    )
    arguments = _arguments(body, shape, room if limit is None else limit)
    return await _answer(ask, body, shape, {**arguments, "input_ids": ids})


def render(ask: Ask, body: Any) -> str:
    """Text of a conversation; `InvalidRequestError` where there is no template, or it refuses the messages."""
    tokenizer, template = ask.state.tokenizer, ask.state.chat_template
    if tokenizer is None or not (template or getattr(tokenizer.inner, "chat_template", None)):
        raise InvalidRequestError(
            "messages: got a conversation, but the tokenizer has no chat template; start the server with "
            "--chat-template, or send text to /v1/completions"
        )
    options = dict(body.chat_template_kwargs or {})
    for name in ("chat_template", "tokenize", "return_tensors", "return_dict", "conversation"):
        if name in options:
            raise InvalidRequestError(f"chat_template_kwargs: {name} cannot be chosen here")
    try:
        text: str = tokenizer.inner.apply_chat_template(
            [_plain(message) for message in body.messages],
            **{
                "tools": body.tools,
                "add_generation_prompt": body.add_generation_prompt
                and not body.continue_final_message,
                "continue_final_message": body.continue_final_message,
                **options,
            },
            chat_template=template,
            tokenize=False,
        )
    except InvalidRequestError:
        raise
    except Exception as error:  # Templates raise what they like.
        raise InvalidRequestError(f"messages: the chat template refuses them: {error}") from None
    return text


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is text: parts of type "text" are joined, other parts refused."""
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError("messages: got one without a role, expected a text")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidRequestError("messages: got a part that is no text, expected text alone")
        texts.append(str(part.get("text", "")))
    return {**message, "content": "".join(texts)}


async def _answer(
    ask: Ask, body: SamplingBody, shape: Shape, arguments: dict[str, Any]
) -> Response:
    calls = ask.state.calls
    if not body.stream:
        found = await calls.whole(ask.request, ask.client, arguments)
        return json_reply(whole(shape, found if isinstance(found, list) else [found]))
    options = body.stream_options
    deltas = Deltas(shape, options is not None and options.include_usage)
    results = await calls.stream(ask.request, ask.client, arguments)

    def end() -> bytes:
        last = deltas.end()
        return b"" if last is None else sse(last)

    return event_stream(
        ask, results, lambda result: b"".join(sse(chunk) for chunk in deltas.chunks(result)), end
    )


async def models(ask: Ask) -> Response:
    """The served model."""
    return json_reply({"object": "list", "data": [await _model(ask)]})


async def model(ask: Ask) -> Response:
    """The served model by its name."""
    check_model(ask, ask.request.path_params["model_id"])
    return json_reply(await _model(ask))


async def _model(ask: Ask) -> dict[str, Any]:
    return {
        "id": ask.state.model_name,
        "object": "model",
        "created": ask.state.started,
        "owned_by": "rollout",
        "root": ask.state.engine.model_path,
        "parent": None,
        "max_model_len": await ask.state.calls.context_length(),
    }


async def score(ask: Ask) -> Response:
    """Probability of label tokens after query and item, a row for each item."""
    body: ScoreBody = ask.body
    name = check_model(ask, body.model)
    items = [body.items] if isinstance(body.items, str) else body.items
    if len(items) > ask.state.config.max_prompts:
        raise HttpError(
            413, f"got {len(items):,} items, expected at most {ask.state.config.max_prompts:,}"
        )
    query, rows = await _score_rows(ask, body.query, items, body.item_first)
    scores = await ask.state.calls.other(
        ask.request,
        len(items),
        ask.state.engine.async_score(
            query, rows, body.label_token_ids, body.apply_softmax, body.item_first
        ),
    )
    return json_reply({"object": "scoring", "model": name, "scores": scores})


async def _score_rows(
    ask: Ask, query: str | list[int], items: list[Any], item_first: bool
) -> tuple[str | list[int], list[Any]]:
    """Query and items; text as the token ids of both together, and no query.

    413 where the pairs, written out, are more than one request may have: the query counts once for each item.
    """
    is_text = isinstance(query, str)
    limit = ask.state.config.max_body_bytes if is_text else ask.state.config.max_call_tokens
    size = len(query) * len(items) + sum(len(item) for item in items)
    if size > limit:
        what = "characters" if is_text else "tokens"
        raise HttpError(
            413,
            f"got {size:,} {what} in all pairs of query and item, expected at most {limit:,}; send several requests",
        )
    if not isinstance(query, str) or not all(isinstance(item, str) for item in items):
        return query, items
    texts = [item + query if item_first else query + item for item in items]
    return [], await ask.state.calls.token_ids(texts, None)


async def invocations(ask: Ask) -> Response:
    """Whatever the fields say: a chat (`messages`), a completion (`prompt`), a score (`query`), or `/generate`."""
    values = ask.extras
    kinds: tuple[tuple[str, type[Body], Any], ...] = (
        ("messages", ChatBody, chat_completions),
        ("prompt", CompletionBody, completions),
        ("query", ScoreBody, score),
    )
    for key, cls, handler in kinds:
        if key in values:
            body, rest = convert(cls, values)
            if rest:
                refuse_unknown(cls, rest)
            return await handler(_with(ask, body, {}))
    return await generate(_with(ask, *convert(GenerateBody, values)))


def _with(ask: Ask, body: Body, extras: dict[str, Any]) -> Ask:
    return Ask(ask.state, ask.request, ask.client, body, ask.query, extras)


_GET = ("GET",)
ROUTES = (
    Route(path="/v1/models", handler=models, methods=_GET, tag="openai"),
    Route(
        path="/v1/models/{model_id:path}",
        handler=model,
        methods=_GET,
        tag="openai",
        statuses=(404,),
    ),
    Route(
        path="/v1/completions",
        handler=completions,
        body=CompletionBody,
        tag="openai",
        statuses=(404, 429, 501, 503),
    ),
    Route(
        path="/v1/chat/completions",
        handler=chat_completions,
        body=ChatBody,
        tag="openai",
        statuses=(404, 429, 501, 503),
    ),
    Route(
        path="/v1/chat/completions/tokens",
        handler=chat_completions_tokens,
        body=TokensChatBody,
        tag="openai",
        statuses=(404, 429, 501, 503),
    ),
    Route(path="/v1/score", handler=score, body=ScoreBody, tag="openai", statuses=(404, 503)),
    Route(
        path="/invocations",
        handler=invocations,
        body=AnyBody,
        hands_on=True,
        tag="openai",
        statuses=(404, 429, 501, 503),
    ),
)
