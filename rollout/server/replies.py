"""Answers: JSON through msgspec, and one shape for every error."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from weight_sync.errors import RemoteError, SyncError

from ..errors import (
    ConnectionLostError,
    DeadlineExceeded,
    EngineClosedError,
    EngineDiedError,
    EngineStepError,
    RequestAbortedError,
    RolloutError,
    TornWeightsError,
    UnexpectedError,
)

logger = logging.getLogger(__name__)

_NAMES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class HttpError(RolloutError):
    """A request that is answered with this status; raised by the server's own checks."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


_STATUSES: tuple[tuple[Any, int], ...] = (
    (HttpError, 0),
    (TornWeightsError | EngineDiedError | EngineClosedError | ConnectionLostError, 503),
    (RequestAbortedError, 503),
    (DeadlineExceeded, 504),
    (UnexpectedError | EngineStepError | RemoteError, 500),
    (RolloutError | SyncError | ValueError | TypeError, 400),
)
"""The first that fits counts."""


def not_implemented(what: str) -> HttpError:
    """501: the route is known, and the engine cannot do it."""
    return HttpError(501, f"{what}; this engine has no such thing yet")


def json_reply(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer; numbers that JSON lacks (NaN, infinities) become null."""
    return Response(
        msgspec.json.encode(body), status, media_type="application/json", headers=headers
    )


def done(message: str, **more: Any) -> Response:
    """How control calls say that they were carried out."""
    return json_reply({"success": True, "message": message, **more})


def status_of(error: BaseException) -> int:
    """HTTP status that stands for an engine's error: its word against what was asked is 400, its own failure 500."""
    for kinds, status in _STATUSES:
        if isinstance(error, kinds):
            return error.status if isinstance(error, HttpError) else status
    return 500


def error_body(error: BaseException, status: int) -> dict[str, Any]:
    """What an error looks like: the OpenAI clients' shape, and the common dialect's `success` and `message`."""
    known = isinstance(error, RolloutError | SyncError | ValueError | TypeError)
    message = str(error) if known else "internal error; look at the server's log"
    return {
        "success": False,
        "message": message,
        "error": {
            "message": message,
            "type": _NAMES.get(status, _NAMES[400] if status < 500 else "internal_server_error"),
            "param": None,
            "code": status,
            "class": type(error).__name__,  # For adapters, which raise what the engine raised.
        },
    }


def error_reply(error: BaseException, *, is_update: bool = False) -> Response:
    """The answer for an exception. is_update: what an engine refuses is 400 and nothing else."""
    status = status_of(error)
    if (
        is_update
        and isinstance(error, SyncError | RolloutError)
        and not isinstance(error, HttpError)
    ):
        status = 400
    if status == 500:
        logger.error("a request failed", exc_info=error)
    headers = error.headers if isinstance(error, HttpError) else None
    return json_reply(error_body(error, status), status, headers)
