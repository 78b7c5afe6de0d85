"""`/generate`: the engine's own call over HTTP, whole or as server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..protocol.commands import InputEmbeds
from .bodies import Body, convert
from .calls import ResultStream
from .disconnects import EventStream
from .replies import HttpError, error_body, json_reply, status_of
from .routing import Ask, Route

logger = logging.getLogger(__name__)
TokenIds = list[int]
DONE = b"data: [DONE]\n\n"
FROM_FILE = {"repetition_penalty": 1.2, "temperature": 0.2, "max_new_tokens": 512}
"""What the common dialect samples with where a file comes alone (SGLang, `generate_from_file_request`)."""
_MOST_FIELDS = 64


class GenerateBody(Body):
    """Exactly one of `text`, `input_ids`, `input_embeds`; the other fields are one value for all prompts or a list."""

    model: str | None = None
    """The served model's name, as routers put it here; null: whatever is served."""
    text: str | list[str] | None = None
    input_ids: list[int | TokenIds] | None = None
    input_embeds: InputEmbeds | list[InputEmbeds | list[Any]] | None = None
    """Rows of numbers, one prompt or a list of prompts, or such with their bytes in base64."""
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    token_ids_logprob: list[int | TokenIds | None] | None = None
    return_text_in_logprobs: bool = False
    return_token_times: bool | list[bool] = False
    flat_logprobs: bool = False
    return_token_versions: bool = False
    return_prompt_token_ids: bool = False
    cache_salt: str | list[str] | None = None
    min_weight_version: int | None = None
    add_special_tokens: bool | None = None
    stream: bool = False
    rid: str | list[str] | None = None
    timeout_s: float | None = None


def check_model(ask: Ask, model: str | None) -> str:
    """The name under which a model answers; 404 for one that is not served."""
    served = ask.state.model_name
    path = ask.state.engine.model_path
    known = {name for whole in (served, path) for name in (whole, whole.rpartition("/")[2])}
    if model in (None, "", "default") or model in known:
        return served
    raise HttpError(404, f"model: got {model!r}, expected {served!r}, which is served")


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def generate(ask: Ask) -> Response:
    """Complete prompts; with `stream`, cumulative results as server-sent events."""
    body: GenerateBody = ask.body
    check_model(ask, body.model)
    arguments = {**ask.extras, **msgspec.structs.asdict(body)}
    arguments["prompt"] = arguments.pop("text")
    del arguments["stream"], arguments["model"]
    if not body.stream:
        return json_reply(await ask.state.calls.whole(ask.request, ask.client, arguments))
    return event_stream(ask, await ask.state.calls.stream(ask.request, ask.client, arguments), sse)


def event_stream(
    ask: Ask,
    results: ResultStream,
    render: Callable[[Any], bytes],
    end: Callable[[], bytes] = bytes,
) -> Response:
    """`results` as server-sent events: what `render` makes of each, then `end()`, then DONE."""
    return EventStream(_events(results, render, end), results, ask.state.config.slow_client_s)


async def _events(
    results: ResultStream, render: Callable[[Any], bytes], end: Callable[[], bytes]
) -> AsyncGenerator[bytes, None]:
    """An error in the midst is an event, too."""
    try:
        async for result in results:
            if event := render(result):
                yield event
        yield end() + DONE
    except Exception as error:
        status = status_of(error)
        if status == 500:
            logger.error("a stream failed", exc_info=error)
        yield sse(error_body(error, status)) + DONE


async def generate_from_file(ask: Ask) -> Response:
    """Complete prompts of input embeddings, the JSON of a form's `file`; other fields are JSON, as in `/generate`."""
    fields = await _form(ask.request)
    if "input_embeds" in fields:
        raise HttpError(400, "input_embeds: got a field, expected them in `file` alone")
    fields["input_embeds"] = fields.pop("file")
    body, extras = convert(GenerateBody, fields)
    if body.stream:
        raise HttpError(400, "stream: got true, expected /generate for streams")
    if body.sampling_params is None:
        body.sampling_params = dict(FROM_FILE)
    return await generate(replace(ask, body=body, extras=extras))


async def _form(request: Request) -> dict[str, Any]:
    """The values of a form's fields, each of them JSON, with `file` among them; 400 for anything else."""
    values: dict[str, Any] = {}
    try:
        async with request.form(max_files=1, max_fields=_MOST_FIELDS) as form:
            for name, value in form.multi_items():
                content = value if isinstance(value, str) else await value.read()
                values[name] = msgspec.json.decode(content)
    except HTTPException as error:
        raise HttpError(400, f"the form: {error.detail}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"{name}: got what is no JSON: {error}") from None
    if "file" not in values:
        raise HttpError(
            400, "the form: got no field `file`, expected rows of numbers in it, as JSON"
        )
    return values


ROUTES = (
    Route(
        path="/generate",
        handler=generate,
        methods=("POST", "PUT"),
        body=GenerateBody,
        hands_on=True,
        statuses=(429, 501, 503),
    ),
    Route(
        path="/generate_from_file", handler=generate_from_file, form=True, statuses=(429, 501, 503)
    ),
)
