"""The engine's wire: its own commands and the weight messages, as one union each way."""

from __future__ import annotations

from typing import Any

from weight_sync.wire import messages

from . import commands

REQUEST_TYPES: Any = commands.Command | messages.WeightRequest
REPLY_TYPES: Any = commands.Answer | messages.WeightReply
