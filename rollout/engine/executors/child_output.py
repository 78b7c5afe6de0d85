"""What a child process says on its standard error: passed on as it comes, and the last lines kept for its obituary."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import IO

KEPT_LINES = 12
_MAX_LINE_BYTES = 2000


class ChildOutput:
    """Copies a pipe to this process's standard error on a thread of its own, until the other end is closed."""

    def __init__(self, pipe: IO[bytes], name: str) -> None:
        self._pipe = pipe
        self._lines: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._thread = threading.Thread(target=self._copy, name=f"{name}-stderr", daemon=True)
        self._thread.start()

    def last_words(self, patience_s: float = 1.0) -> str:
        """The last lines, for an error message; call it when the child is gone. Empty if it said nothing."""
        self._thread.join(timeout=patience_s)
        lines = [line.decode(errors="replace").rstrip() for line in tuple(self._lines)]
        lines = [line for line in lines if line]
        return "; it said last:\n  " + "\n  ".join(lines) if lines else "; it said nothing"

    def close(self, patience_s: float = 1.0) -> None:
        """Wait a moment for what is still on its way; the child must be gone. Safe to repeat."""
        self._thread.join(timeout=patience_s)
        if not self._thread.is_alive():
            self._pipe.close()

    def _copy(self) -> None:
        rest = b""
        descriptor = self._pipe.fileno()
        while chunk := os.read(descriptor, 1 << 16):
            with contextlib.suppress(OSError):  # Our own standard error may be closed.
                os.write(2, chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            self._lines.extend(line[:_MAX_LINE_BYTES] for line in lines)
            rest = rest[-_MAX_LINE_BYTES:]
        if rest:
            self._lines.append(rest)
