"""Pausing, aborting, memory, caches, profiles: what trainers do to an engine around an update."""

from __future__ import annotations

import logging
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from ..protocol.commands import MemoryTag, PauseMode
from .bodies import Body
from .replies import HttpError, done, not_implemented
from .routing import Ask, Route


class PauseBody(Body):
    """How to pause."""

    mode: PauseMode = "abort"
    """abort: requests end with what they have; retract: they are computed again later; in_place: they are frozen."""
    lease_s: float | None = None
    """Seconds after which the pause ends by itself; null: the engine's own."""


async def pause_generation(ask: Ask) -> Response:
    """Stop generating until `/continue_generation`, or until the lease ends."""
    num = await ask.state.engine.async_pause_generation(ask.body.mode, ask.body.lease_s)
    return done(f"paused ({ask.body.mode}); {num} requests were touched", num_requests=num)


class ContinueBody(Body):
    """Nothing is needed."""

    torch_empty_cache: bool = False
    """Has no effect: the engine keeps what it has reserved."""


async def continue_generation(ask: Ask) -> Response:
    """End a pause; no error if there is none."""
    await ask.state.engine.async_continue_generation()
    return done("generation goes on")


class AbortBody(Body):
    """Which requests."""

    rid: str | None = None
    """The client's own id of a request."""
    abort_all: bool = False
    """Everybody's requests; admins only."""
    abort_message: str | None = None
    """Has no effect: results say that they were aborted."""


async def abort_request(ask: Ask) -> Response:
    """End requests; their callers get what they have with finish reason "abort"."""
    body: AbortBody = ask.body
    if body.abort_all:
        if not ask.client.is_admin:
            raise HttpError(403, "abort_all: got the key of a client, expected the admin key")
        num = await ask.state.calls.abort_all()
    elif not body.rid:
        raise HttpError(400, "got neither rid nor abort_all, expected one of them")
    else:
        num = await ask.state.calls.abort(ask.client, body.rid)
    return done(f"{num} requests ended", num_requests=num)


class FlushBody(Body):
    """What becomes of requests that run."""

    recompute: bool = False
    """They lose their keys and values, too, and compute them again; false: 400 while there are any."""


async def flush_cache(ask: Ask) -> Response:
    """Drop all cached prefixes; 400 while requests are pending, unless they are to be computed again."""
    await ask.state.engine.async_flush_cache(ask.body.recompute)
    return done("the prefix cache is empty")


class MemoryBody(Body):
    """What to give back or take."""

    tags: list[MemoryTag] | MemoryTag | None = None
    """"weights", "kv_cache", "cuda_graph"; null: all."""


class ReleaseBody(MemoryBody):
    """What to give back."""

    keep_weights: bool = False
    """Bring the weights back as they were when they are resumed."""


async def release_memory_occupation(ask: Ask) -> Response:
    """Give memory back to the system; requests wait until it is resumed."""
    body: ReleaseBody = ask.body
    tags = [body.tags] if isinstance(body.tags, str) else body.tags
    changed = await ask.state.engine.async_release_memory_occupation(tags, body.keep_weights)
    return done("released", tags=changed.tags, num_bytes=changed.num_bytes)


async def resume_memory_occupation(ask: Ask) -> Response:
    """Make released memory usable again."""
    body: MemoryBody = ask.body
    tags = [body.tags] if isinstance(body.tags, str) else body.tags
    changed = await ask.state.engine.async_resume_memory_occupation(tags)
    return done("resumed", tags=changed.tags, num_bytes=changed.num_bytes)


async def freeze_gc(ask: Ask) -> Response:
    """Collect garbage once, and leave what lives now out of later collections."""
    await ask.state.engine.async_freeze_gc()
    return done("frozen")


class ProfileBody(Body):
    """Options of the common dialect's profiler; none of them can be chosen here."""

    output_dir: str | None = None
    start_step: int | None = None
    num_steps: int | None = None
    activities: list[str] | None = None
    profile_by_stage: bool = False
    with_stack: bool | None = None
    record_shapes: bool | None = None


async def start_profile(ask: Ask) -> Response:
    """Record what the engine loops do until `/stop_profile`."""
    given = [name for name, value in msgspec.structs.asdict(ask.body).items() if value]
    if given:
        raise HttpError(400, f"{given[0]}: cannot be chosen; leave it out, and stop by hand")
    await ask.state.engine.async_start_profile()
    return done("profiling")


async def stop_profile(ask: Ask) -> Response:
    """Write the trace; `path` is rank 0's file on the engine's host."""
    path = await ask.state.engine.async_stop_profile()
    return done(f"written to {path}", path=path)


class LoggingBody(Body):
    """What this server logs."""

    log_level: Literal["debug", "info", "warning", "error"] | None = None
    log_requests: bool | None = None
    log_requests_level: int | None = None


async def configure_logging(ask: Ask) -> Response:
    """Set the level at which the server logs; requests are not logged."""
    body: LoggingBody = ask.body
    if body.log_requests:
        raise not_implemented("log_requests: got true, expected nothing")
    if body.log_level is not None:
        logging.getLogger("rollout").setLevel(body.log_level.upper())
    return done("configured")


class SlowBody(Body):
    """How slow."""

    forward_sleep_time: float | None = None
    """Seconds to wait before each step, at most 10; null or 0: none."""


async def slow_down(ask: Ask) -> Response:
    """Make the engine slower, to test what others do then."""
    seconds = ask.body.forward_sleep_time
    await ask.state.engine.async_slow_down(seconds)
    return done(f"waiting {seconds:g} s before each step" if seconds else "as fast as it can")


class StateBody(Body):
    """Options of the engine that are to change."""

    server_args: dict[str, Any]
    """`max_running_requests`, `chunked_prefill_size`: up to what they were at the start."""


async def set_internal_state(ask: Ask) -> Response:
    """Change options of the running engine; `/server_info` tells them."""
    await ask.state.engine.async_set_internal_state(ask.body.server_args)
    return done("changed", updated=True, server_args=ask.body.server_args)


_BOTH = ("GET", "POST")
ROUTES = (
    Route(path="/pause_generation", handler=pause_generation, body=PauseBody, admin=True),
    Route(path="/continue_generation", handler=continue_generation, body=ContinueBody, admin=True),
    Route(path="/abort_request", handler=abort_request, body=AbortBody),
    Route(path="/flush_cache", handler=flush_cache, methods=_BOTH, body=FlushBody, admin=True),
    Route(
        path="/release_memory_occupation",
        handler=release_memory_occupation,
        methods=_BOTH,
        body=ReleaseBody,
        admin=True,
    ),
    Route(
        path="/resume_memory_occupation",
        handler=resume_memory_occupation,
        methods=_BOTH,
        body=MemoryBody,
        admin=True,
    ),
    Route(path="/freeze_gc", handler=freeze_gc, methods=_BOTH, admin=True),
    Route(
        path="/start_profile", handler=start_profile, methods=_BOTH, body=ProfileBody, admin=True
    ),
    Route(path="/stop_profile", handler=stop_profile, methods=_BOTH, admin=True),
    Route(
        path="/configure_logging",
        handler=configure_logging,
        body=LoggingBody,
        admin=True,
        statuses=(501,),
    ),
    Route(
        path="/slow_down",
        handler=slow_down,
        methods=("POST", "PUT"),
        body=SlowBody,
        admin=True,
    ),
    Route(
        path="/set_internal_state",
        handler=set_internal_state,
        methods=("POST", "PUT"),
        body=StateBody,
        admin=True,
    ),
)
