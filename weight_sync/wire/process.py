"""Which process is at the other end, and whether it still lives."""

import os
from functools import cache
from pathlib import Path

from .messages import ProcessRef


@cache
def host_id() -> str:
    """This machine's boot and process-id namespace; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def current_process() -> ProcessRef:
    """This process; not cached, because a fork changes the answer."""
    pid = os.getpid()
    state_and_start = _state_and_start(pid)
    return ProcessRef(
        host=host_id(), pid=pid, start_time=state_and_start[1] if state_and_start else 0
    )


def why_dead(process: ProcessRef) -> str | None:
    """Why `process` is known to be dead, or None while it lives or cannot be seen from here.

    A zombie is dead. So is a process whose id now belongs to a later one.
    """
    if not process.host or process.host != host_id():
        return None
    found = _state_and_start(process.pid)
    if found is None:
        return f"process {process.pid} does not exist"
    state, start_time = found
    if start_time != process.start_time:
        return f"process {process.pid} has ended and its id belongs to another process"
    if state in "ZX":
        return f"process {process.pid} has ended"
    return None


def _state_and_start(pid: int) -> tuple[str, int] | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field is the command in parentheses and may itself contain spaces and parentheses.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return fields[0].decode(), int(fields[19])
