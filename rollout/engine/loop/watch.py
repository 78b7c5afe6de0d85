"""Whether an engine gets on: calls without a deadline end when it does not."""

from __future__ import annotations

import threading
import time

from weight_sync.wire.rpc import Call

from ...errors import NoProgressError
from .inbox import in_time
from .postprocess import Postprocessor


class Watch:
    """The loop tells it when a step begins and ends; a thread of rank 0 looks whether one takes too long.

    While no step is being computed the loop itself ends what has waited for too long, at `stalls_at`. A step that
    hangs leaves it no chance to: then the thread fails all calls of `generate`, and those that come meanwhile.
    """

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        """Seconds without a step that are too many."""
        self._moved = time.monotonic()
        self._began: float | None = None  # While a step is being computed.
        self._asked: dict[int, Call] = {}  # Calls that the loop has not taken yet.
        self._closed = threading.Event()

    @property
    def stalls_at(self) -> float:
        """When the patience with the loop is over, unless it moves."""
        return self._moved + self.patience_s

    def asked(self, call: Call) -> None:
        """A call of `generate` arrived; any thread."""
        self._asked[id(call)] = call

    def taken(self, call: Call) -> None:
        """The loop has taken it."""
        self._asked.pop(id(call), None)

    def in_time(self, call: Call) -> bool:
        """As `inbox.in_time`; one that is refused is nobody's any more."""
        wanted = in_time(call)
        if not wanted:
            self.taken(call)
        return wanted

    def begins(self) -> None:
        """A step is being computed from now on."""
        self._began = time.monotonic()

    def idles(self) -> None:
        """There was nothing to compute."""
        self._began = None

    def moved(self) -> None:
        """A step is done, or there is a new reason to wait for one."""
        self._began = None
        self._moved = time.monotonic()

    def start(self, post: Postprocessor) -> None:
        """Watch over the calls of `post`, until `close`."""
        threading.Thread(target=self._run, args=(post,), name="rollout-watch", daemon=True).start()

    def close(self) -> None:
        """The loop has ended."""
        self._closed.set()

    def _run(self, post: Postprocessor) -> None:
        while not self._closed.wait(min(5.0, self.patience_s / 4)):
            began = self._began
            if began is None or time.monotonic() - began < self.patience_s:
                continue
            error = NoProgressError(
                f"generate: the engine has computed one step for more than {self.patience_s:.3g} s and hangs, "
                "expected it to end; start a new engine, or raise progress_timeout_s"
            )
            for call in list(self._asked.values()):
                call.fail(error)
            for group in list(post.groups.values()):
                group.channel.fail(error)
