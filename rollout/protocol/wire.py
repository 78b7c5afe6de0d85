"""The engine's wire: its own commands and the weight messages, as one union each way."""

from __future__ import annotations

from typing import Any

import msgspec

from weight_sync.errors import ProtocolError
from weight_sync.wire import messages
from weight_sync.wire.rpc_wire import check_size, check_timeout

from ..errors import InvalidRequestError
from . import commands

_ROOM_BYTES = 4096
"""What whoever passes a request on may add to it: a seed, an id of its own."""

REQUEST_TYPES: Any = commands.Command | messages.WeightRequest
REPLY_TYPES: Any = commands.Answer | messages.WeightReply


def check_sendable(body: Any, timeout_s: float, what: str = "the request") -> None:
    """`InvalidRequestError` for what no message to an engine can hold, before anybody waits for its answer.

    Such as text with half of a surrogate pair, numbers of more than 64 bits, more bytes than a message may hold, or a
    deadline that is none.
    """
    try:
        check_timeout(timeout_s)
        check_size(msgspec.msgpack.encode(body), messages.MAX_MESSAGE_BYTES - _ROOM_BYTES, what)
    except (ValueError, OverflowError, TypeError, ProtocolError) as error:
        raise InvalidRequestError(f"{what} cannot be sent: {error}") from None
