"""Which process is at the other end, whether it still lives, and which process an object of this one belongs to."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import ForkedProcessError
from .messages import ProcessRef

_known: dict[str, str] = {}
"""The host's id, once it could be read: it never changes, but a process may be out of descriptors when it asks."""
_started: dict[int, int] = {}
"""Start of this process, by its id, once it could be read; a forked child has another id."""

_GONE = (errno.ENOENT, errno.ESRCH)
"""What reading about a process fails with when there is none; anything else says nothing about it."""


def host_id() -> str:
    """This machine's boot and process-id namespace; empty where the system does not tell, or not now."""
    if "host" not in _known:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            _known["host"] = f"{boot}/{os.readlink('/proc/self/ns/pid')}"
        except OSError:
            return ""
    return _known["host"]


def current_process() -> ProcessRef:
    """This process. `start_time` is 0 where the system does not tell; nobody takes that for a date."""
    pid = os.getpid()
    if pid not in _started:
        try:
            _started[pid] = _state_and_start(pid)[1]
        except OSError:
            return ProcessRef(host=host_id(), pid=pid, start_time=0)
    return ProcessRef(host=host_id(), pid=pid, start_time=_started[pid])


def why_dead(process: ProcessRef) -> str | None:
    """Why `process` is known to be dead, or None while it lives or cannot be seen from here, or not now.

    A zombie is dead. So is a process whose id now belongs to a later one.
    """
    if not process.host or process.host != host_id():
        return None
    try:
        state, start_time = _state_and_start(process.pid)
    except OSError as error:
        return f"process {process.pid} does not exist" if error.errno in _GONE else None
    if process.start_time and start_time != process.start_time:
        return f"process {process.pid} has ended and its id belongs to another process"
    if state in "ZX":
        return f"process {process.pid} has ended"
    return None


def _state_and_start(pid: int) -> tuple[str, int]:
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    # The second field is the command in parentheses and may itself contain spaces and parentheses.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[19])


class Home:
    """The process that made an object. A forked child has a copy of the object, and neither its threads nor its peers:
    it may not use the copy, and must not close what is not its own."""

    __slots__ = ("_pid", "_what")

    def __init__(self, what: str) -> None:
        self._pid = os.getpid()
        self._what = what

    @property
    def here(self) -> bool:
        """This is the process that made it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """`ForkedProcessError` in a forked child."""
        if not self.here:
            raise self.error()

    def error(self) -> ForkedProcessError:
        """What `check` raises."""
        return ForkedProcessError(
            f"{self._what} belongs to process {self._pid}: got a call from its forked child {os.getpid()}, expected "
            "one from the process that made it; make another one in the child, or start children with 'spawn'"
        )


def close_forgotten(close: Callable[[], object], home: Home) -> None:
    """For `weakref.finalize`: `close` what nobody has closed, without holding up whichever thread found that out.

    In a forked child, nothing: it is the parent's. As the interpreter ends, at once, on the thread that ends it.
    """
    if not home.here:
        return
    if threading.main_thread().is_alive():
        # The garbage collector runs anywhere, also on the threads that are about to be joined.
        threading.Thread(target=close, name="rollout-close-forgotten").start()
    else:  # The interpreter ends, and starts no more threads.
        close()
