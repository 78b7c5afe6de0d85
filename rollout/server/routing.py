"""Routes as data: a path, the structs of its query and its body, who may call it, and the function that answers.

FastAPI does the routing and the OpenAPI description; bodies are decoded by msgspec, whose structs are the schema, so
that an invalid one is answered with 400, and with the words in which the engine speaks.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import Response

from .access import Client, client_of
from .bodies import Body, convert, parse_object, read_bytes, refuse_unknown
from .replies import HttpError, error_reply
from .state import ServerState

logger = logging.getLogger(__name__)
_MSGPACK = ("application/msgpack", "application/x-msgpack")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, read and checked."""

    state: ServerState
    request: Request
    client: Client
    body: Any
    """An instance of the route's `body`; None: it has none."""
    query: Any
    """An instance of the route's `query`; None: it has none."""
    extras: dict[str, Any]
    """What the body has besides, where the route hands it on."""


Handler = Callable[[Ask], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One path; the first line of the handler's docstring describes it."""

    path: str
    handler: Handler
    methods: tuple[str, ...] = ("POST",)
    body: type[Body] | None = None
    query: type[Body] | None = None
    hands_on: bool = False
    """Fields that `body` lacks go to the handler, which knows what may be there."""
    form: bool = False
    """Its body is a form with files, which the handler reads."""
    admin: bool = False
    """It concerns everybody: only an admin may."""
    update: bool = False
    """It changes weights: what the engine refuses is 400, and its body may be large."""
    tag: str = "native"
    statuses: tuple[int, ...] = field(default=(400,))
    """Errors that it answers besides those of access."""


def add_routes(app: FastAPI, state: ServerState, routes: Iterable[Route]) -> None:
    """Serve `routes`."""
    for route in routes:
        for method in route.methods:
            app.add_api_route(
                route.path,
                _endpoint(route, state),
                methods=[method],
                operation_id=f"{route.handler.__name__}_{method.lower()}_{_slug(route.path)}",
                summary=(inspect.getdoc(route.handler) or "").partition("\n")[0],
                tags=[route.tag],
                response_class=Response,
                response_model=None,
                responses=_responses(route),
                openapi_extra=_description(route, method),
            )
    app.openapi = lambda: _openapi(app, routes)


def _endpoint(route: Route, state: ServerState) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            ask = await _asked(route, state, request)
            if route.update:
                await state.end_stale_session()
            answer = await route.handler(ask)
            if route.update:  # What was refused may be another trainer's.
                state.session_heard = time.monotonic()
            return answer
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if route.update:
                state.record.sync_failed()
            return error_reply(error, is_update=route.update)

    return endpoint


async def _asked(route: Route, state: ServerState, request: Request) -> Ask:
    body: Any = None
    extras: dict[str, Any] = {}
    query = None if route.query is None else _query(route.query, request)
    content = await read_bytes(request, state.config.slow_client_s)
    if route.form:
        return Ask(state, request, client_of(request), None, None, {})
    if route.body is None and content:
        query = _query_in_body(route.query, parse_object(content), query)
    elif route.body is not None and request.method == "GET" and not content:
        body = _query(route.body, request)
    elif route.body is not None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_msgpack = kind in _MSGPACK
        values = parse_object(content, is_msgpack=is_msgpack)
        body, extras = convert(route.body, values, is_msgpack=is_msgpack)
        if extras and not route.hands_on:
            refuse_unknown(route.body, extras)
    return Ask(state, request, client_of(request), body, query, extras)


def _query_in_body(cls: type[Body] | None, values: dict[str, Any], query: Any) -> Any:
    """A query with what a JSON object adds to it: some clients send there what belongs in the address."""
    if cls is None:
        refuse_unknown(Body, values)
        return query
    found, rest = convert(cls, {**_given(query), **values})
    refuse_unknown(cls, rest)
    return found


def _given(query: Any) -> dict[str, Any]:
    return {name: getattr(query, name) for name in query.__struct_fields__}


def _query(cls: type[Body], request: Request) -> Any:
    values: dict[str, Any] = {}
    for info in msgspec.structs.fields(cls):
        given = request.query_params.getlist(info.encode_name)
        if given:
            values[info.encode_name] = given if _is_list(info.type) else given[-1]
    try:
        return msgspec.convert(values, cls, strict=False)
    except msgspec.ValidationError as error:
        raise HttpError(400, f"query: {error}") from None


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list or any(get_origin(arg) is list for arg in get_args(kind))


# ---- the OpenAPI description ---------------------------------------------------------------------------------------

_REF = "#/components/schemas/{name}"
_STATUS_WORDS = {
    400: "what was asked is wrong; `message` says what",
    401: "no valid key",
    403: "not with this key",
    404: "there is no such thing",
    408: "the body came too slowly",
    413: "more than one request may ask for",
    429: "too much is under way",
    501: "the engine does not have this yet",
    503: "the engine cannot serve now",
}


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    found = (*route.statuses, 400, 401, 403, 408, 413)
    return {status: {"description": _STATUS_WORDS[status]} for status in dict.fromkeys(found)}


def _description(route: Route, method: str) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if route.form:
        file = {"type": "string", "format": "binary"}
        schema = {"type": "object", "properties": {"file": file}, "required": ["file"]}
        content = {"multipart/form-data": {"schema": schema}}
        extra["requestBody"] = {"required": True, "content": content}
    if route.body is not None and method != "GET":
        schema = {"$ref": _REF.format(name=route.body.__name__)}
        required = any(info.required for info in msgspec.structs.fields(route.body))
        extra["requestBody"] = {
            "required": required,
            "content": {"application/json": {"schema": schema}},
        }
    if route.query is not None:
        _, components = msgspec.json.schema_components([route.query], ref_template=_REF)
        properties = components[route.query.__name__]["properties"]
        extra["parameters"] = [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in properties.items()
        ]
    return extra


def _openapi(app: FastAPI, routes: Iterable[Route]) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        bodies = list(dict.fromkeys(route.body for route in routes if route.body is not None))
        _, components = msgspec.json.schema_components(bodies, ref_template=_REF)
        found.setdefault("components", {}).setdefault("schemas", {}).update(components)
        app.openapi_schema = found
    return app.openapi_schema


def _slug(path: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in path.strip("/"))
