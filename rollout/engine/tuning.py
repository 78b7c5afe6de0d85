"""What may be changed about an engine while it runs, weights aside, with the calls' `async_` twins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import InvalidRequestError
from ..hints import did_you_mean
from ..protocol.commands import SetLimits, SlowDown
from .client import EngineClient
from .twins import Asking, asks, awaitable

MOST_DELAY_S = 10.0


class TuningCalls(EngineClient):
    """The part of `Engine` that makes it slower, or take less at once."""

    @asks
    def slow_down(self, forward_sleep_time: float | None) -> Asking[None]:
        """Wait so many seconds (at most 10) before every step, to test others with an engine that is slow.

        None or 0 ends it. What is generated is the same; commands wait as long as a step does.
        """
        seconds = 0.0 if forward_sleep_time is None else forward_sleep_time
        if not (isinstance(seconds, int | float) and 0 <= seconds <= MOST_DELAY_S):
            raise InvalidRequestError(
                f"forward_sleep_time: got {forward_sleep_time!r}, expected 0 to {MOST_DELAY_S:g} seconds, or None"
            )
        yield SlowDown(seconds=float(seconds))

    async_slow_down = awaitable(slow_down)

    @asks
    def set_internal_state(self, server_args: dict[str, Any]) -> Asking[None]:
        """Change options of the running engine: `max_running_requests`, `chunked_prefill_size`; `status()` tells them.

        They may be lowered, and raised again to what they were at the start. Running requests beyond a new limit are
        queued again, the last first. `InvalidRequestError` for other options, and other values.
        """
        known = SetLimits.__struct_fields__
        if not isinstance(server_args, Mapping):
            raise InvalidRequestError(
                f"set_internal_state: got {type(server_args).__name__}, expected a dict of {', '.join(known)}"
            )
        for name in server_args:
            if name not in known:
                raise InvalidRequestError(
                    f"set_internal_state: got {name!r}, which cannot be changed while the engine runs; "
                    f"{did_you_mean(name, known)}"
                )
        try:
            command = msgspec.convert({"type": "SetLimits", **server_args}, SetLimits)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"set_internal_state: {error}") from None
        yield command

    async_set_internal_state = awaitable(set_internal_state)
