"""What a server says about itself."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ..errors import DeadlineExceeded
from ..protocol.commands import Status
from .bodies import Body
from .replies import HttpError, json_reply
from .routing import Ask, Route

_HEALTH_PATIENCE_S = 20.0


async def health(ask: Ask) -> Response:
    """200 while the engine answers."""
    if ask.state.calls.ending is not None:
        raise HttpError(503, ask.state.calls.ending)
    await _status(ask)
    return json_reply({"status": "ok"})


async def health_generate(ask: Ask) -> Response:
    """200 once the engine has generated a token (or scored one, a classifier); 503 where it cannot, in a pause too."""
    ask_for = {"input_ids": [0], "timeout_s": _HEALTH_PATIENCE_S}
    calls = ask.state.calls
    status = await _status(ask)
    if status.resolved["num_labels"] is None:
        ask_for["sampling_params"] = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        result = await calls.whole(ask.request, ask.client, ask_for)
    else:
        ask_for["return_meta_info"] = True
        result = await calls.whole(ask.request, ask.client, ask_for, "async_classify")
    reason = result["meta_info"]["finish_reason"]
    if reason["type"] == "abort":
        raise HttpError(503, f"no token came: {reason['message']}")
    return json_reply({"status": "ok", "weight_version": result["meta_info"]["weight_version"]})


async def ping(ask: Ask) -> Response:
    """200 while the server runs; asks nobody."""
    return json_reply({"status": "ok"})


async def model_info(ask: Ask) -> Response:
    """Which model serves, and the version of its weights."""
    return json_reply(await ask.state.engine.async_get_model_info())


async def server_info(ask: Ask) -> Response:
    """The resolved configuration, sizes and counts."""
    found = await ask.state.engine.async_get_server_info()
    found["served_model_name"] = ask.state.model_name
    found["enable_memory_saver"] = ask.state.config.enable_memory_saver
    found["version"] = _package_version()
    found["internal_states"] = [{"weight_version": found["weight_version"]}]
    return json_reply(found)


async def get_load(ask: Ask) -> Response:
    """Requests that run and wait, one entry for the engine or the pool."""
    status = await _status(ask)
    return json_reply([{"dp_rank": 0, **_load(status)}])


class LoadsQuery(Body):
    """Which parts are wanted."""

    include: list[str] | None = None
    """"core" is all that there is."""


async def loads(ask: Ask) -> Response:
    """As `/get_load`, in the newer form."""
    status = await _status(ask)
    load = {"dp_rank": 0, **_load(status), "num_running_reqs": status.num_running}
    return json_reply({"loads": [load], "version": _package_version()})


async def _status(ask: Ask) -> Status:
    try:
        return await ask.state.engine.async_status()
    except DeadlineExceeded as error:
        raise HttpError(503, str(error)) from None


def _load(status: Status) -> dict[str, Any]:
    block_size = int(status.resolved.get("block_size") or 0)
    used = status.num_blocks - status.num_free_blocks
    return {
        "num_reqs": status.num_running + status.num_waiting,
        "num_waiting_reqs": status.num_waiting,
        "num_tokens": used * block_size,
        "token_usage": used / status.num_blocks if status.num_blocks else 0.0,
    }


def _package_version() -> str:
    from .. import __version__

    return __version__


_GET = ("GET",)
ROUTES = (
    Route(path="/health", handler=health, methods=_GET, statuses=(503,)),
    Route(path="/health_generate", handler=health_generate, methods=_GET, statuses=(503,)),
    Route(path="/ping", handler=ping, methods=_GET),
    Route(path="/get_model_info", handler=model_info, methods=_GET),
    Route(path="/model_info", handler=model_info, methods=_GET),
    Route(path="/get_server_info", handler=server_info, methods=_GET),
    Route(path="/server_info", handler=server_info, methods=_GET),
    Route(path="/get_load", handler=get_load, methods=_GET),
    Route(path="/v1/loads", handler=loads, methods=_GET, query=LoadsQuery),
)
