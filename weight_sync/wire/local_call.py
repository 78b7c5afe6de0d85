"""A request whose caller is in the server's own process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .futures import answer, fail

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class LocalCall:
    """`rpc.Call` without a connection: the answer is a future's."""

    body: Any
    """The request."""
    deadline: float
    """`time.monotonic()` after which nobody waits for the answer."""
    on_chunk: Callable[[Any], None] | None = None
    """Sees what comes before the answer, on the server's thread; None: nobody does."""
    future: Future[Any] = field(default_factory=Future)
    """The answer, or the error."""
    peer: str = "local"
    """All callers of this process are one."""

    def reply(self, body: Any) -> None:
        answer(self.future, body)

    def stream(self, body: Any) -> None:
        if self.on_chunk is None:
            return
        try:
            self.on_chunk(body)
        except RuntimeError:  # the caller's event loop is closed; the server's must not care
            logger.debug("a caller is gone", exc_info=True)

    def fail(self, error: BaseException) -> None:
        fail(self.future, error)
