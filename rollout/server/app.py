"""The ASGI application: the routes of all dialects behind one layer that decides who may come in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from difflib import get_close_matches

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from . import (
    control,
    dashboard,
    generate,
    inference,
    info,
    metrics,
    openai,
    pooling,
    transfers,
    weights,
)
from .access import Access
from .replies import HttpError, error_reply
from .routing import Route, add_routes
from .state import ServerState

ROUTES: tuple[Route, ...] = (
    *generate.ROUTES,
    *info.ROUTES,
    *control.ROUTES,
    *weights.ROUTES,
    *transfers.ROUTES,
    *openai.ROUTES,
    *inference.ROUTES,
    *pooling.ROUTES,
    *metrics.ROUTES,
    *dashboard.ROUTES,
)


def _what_is_there(request: Request, status: int) -> str | None:
    """In place of "Not Found" and "Method Not Allowed": the route that was probably meant, the methods that it has."""
    path = request.url.path
    if status == 404:
        paths = sorted(route.path for route in ROUTES)
        near = get_close_matches(path, paths, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else "docs/server.md and /openapi.json list them"
        return f"no route {path[:200]}; {hint}"
    methods = {method for route in ROUTES if route.path == path for method in route.methods}
    if status == 405 and methods:
        return f"{path}: got {request.method}, expected {' or '.join(sorted(methods))}"
    return None


def build_app(state: ServerState) -> ASGIApp:
    """An application over `state.engine`, which stays the caller's to shut down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield

    state.metrics = metrics.Metrics(state.record)
    app = FastAPI(
        title="rollout",
        description="A rollout engine for RL post-training whose weights change while it runs.",
        lifespan=lifespan,
        docs_url=None,  # They load scripts from another host.
        redoc_url=None,
    )
    add_routes(app, state, ROUTES)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = _what_is_there(request, error.status_code) or str(error.detail)
        return error_reply(HttpError(error.status_code, message, error.headers))

    return Access(
        app,
        state.config,
        admin_paths=[route.path for route in ROUTES if route.admin],
        update_paths=[route.path for route in ROUTES if route.update],
    )
