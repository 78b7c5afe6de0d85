"""What all routes of one server share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..engine.engine import Engine
from ..tokenizer import Tokenizer
from .calls import Calls
from .config import ServerConfig
from .record import Record


class ServerState:
    """The engine behind the server, the calls that run, and what has happened."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine = engine
        self.config = config
        self.record = Record()
        self.tokenizer = None if engine.tokenizer is None else Tokenizer.around(engine.tokenizer)
        self.calls = Calls(engine, config, self.tokenizer, self.record)
        self.weights_snapshot: dict[str, int] | None = None
        """Fingerprints by tensor that `/weights_checker` was told to remember."""
        self.groups: set[str] = set()
        """Names of the trainers' process groups that the engine was told to join, and not to leave."""
        self._path_at_start = engine.model_path  # Updates from disk give the engine another one.
        self.session_heard = 0.0
        """When a call about weights was last carried out, on the monotonic clock."""
        self.started = int(time.time())
        """Seconds since the epoch."""
        self.metrics: Any = None
        """`metrics.Metrics`, which stands above the routes."""
        template = config.chat_template
        self.chat_template = None if template is None else Path(template).read_text()

    async def end_stale_session(self) -> None:
        """A trainer that has begun a session here and says nothing for as long as the engine waits may be dead."""
        silent_s = time.monotonic() - self.session_heard
        if self.engine.in_weight_update and silent_s > self.engine.config.request_timeout_s:
            await self.engine.async_abort_weight_update()

    @property
    def model_name(self) -> str:
        """What the model is called in the OpenAI routes."""
        return self.config.served_model_name or self._path_at_start
