"""A page that shows what the server does while it does it, and the numbers that it draws.

The page is one file without anything from elsewhere. It asks for what is new every second; its key, where the server
wants one, stands behind the `#` of its address, which browsers send to nobody.
"""

from __future__ import annotations

import time
from importlib import resources
from typing import Any

from starlette.responses import Response

from .bodies import Body
from .record import RequestEntry, SyncEntry
from .replies import json_reply
from .routing import Ask, Route

PATH = "/dashboard"
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def dashboard(ask: Ask) -> Response:
    """The page; it says nothing of this server by itself, and is open to everybody."""
    page = resources.files(__package__).joinpath("dashboard.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


class DataQuery(Body):
    """What is wanted."""

    since: float = 0.0
    """Seconds since the epoch: only requests and updates that ended later; what `now` was last time."""


async def data(ask: Ask) -> Response:
    """Counts as of now, and the samples and updates that ended since."""
    now = time.time()
    status = await ask.state.engine.async_status()
    record = ask.state.record
    return json_reply(
        {
            "now": now,
            "model": ask.state.model_name,
            "weight_version": status.weight_version,
            "version": status.version,
            "torn": status.torn,
            "paused": status.paused,
            "num_running": status.num_running,
            "num_waiting": status.num_waiting,
            "kv_use": 1.0 - status.num_free_blocks / max(1, status.num_blocks),
            "num_decoded_tokens": status.num_decoded_tokens,
            "num_prompt_tokens": status.num_prompt_tokens,
            "requests": [_request(r) for r in record.requests if r.ended > ask.query.since],
            "syncs": [_sync(s) for s in record.syncs if s.at > ask.query.since],
        }
    )


def _request(entry: RequestEntry) -> dict[str, Any]:
    return {
        "rid": entry.rid,
        "began": entry.began,
        "ended": entry.ended,
        "tokens": entry.completion_tokens,
        "reason": entry.finish_reason,
        "versions": entry.weight_versions,
    }


def _sync(entry: SyncEntry) -> dict[str, Any]:
    return {
        "at": entry.at,
        "version": entry.version,
        "label": entry.label,
        "bytes": entry.num_bytes,
        "phases": entry.phases,
    }


ROUTES: tuple[Route, ...] = (
    Route(path=PATH, handler=dashboard, methods=("GET",), tag="dashboard"),
    Route(path=f"{PATH}/data", handler=data, methods=("GET",), query=DataQuery, tag="dashboard"),
)
