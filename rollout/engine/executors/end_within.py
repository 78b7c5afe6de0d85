"""A bound on the end of this process that holds whatever its threads wait for."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import signal
import threading
import time

FAILED_S = 3.0
"""How long a rank may still take that cannot go on: nothing is worth waiting for but last answers."""
END_S = 10.0
"""How long one may take that was told to end, and gives back what it has."""
_STDERR = 2
_ALARM_S = 1.0

_lock = threading.Lock()
_ends = math.inf


def end_within(seconds: float) -> None:
    """This process ends `seconds` from now at the latest, with exit code 1; a later end than was asked for is no news.

    Neither of the two clocks needs the interpreter, whose lock may be held by a thread that waits for a GPU: for ever,
    where a kernel waits for a rank that is gone. The first clock says on standard error what all threads do. Should
    nobody read that, the system's own alarm ends the process a second later, also where whoever started it ignores or
    blocks alarms, which a child inherits: the calling thread, as long as it lives, takes it.
    """
    global _ends
    with _lock:
        if (end := time.monotonic() + seconds) < _ends:
            _ends = end
            # Python's own call is for the main thread alone; nothing of ours handles this signal.
            ctypes.CDLL(None).signal(int(signal.SIGALRM), None)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            signal.setitimer(signal.ITIMER_REAL, seconds + _ALARM_S)
            faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
