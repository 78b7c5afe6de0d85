"""Before gloo ends a process over a message that is too long, the rest of that message is read and thrown away.

A gloo that sends learns of a connection that ended in the middle of a message only by its own deadline, half an hour by
default: without this, a trainer would wait for that long. The other end must read what it sends.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
from collections.abc import Callable

_QUIET_S = 1.0
"""A message is over when nothing has come for this long."""
_AT_ONCE = 1 << 20
_Handler = ctypes.CFUNCTYPE(None)


def read_away_at_the_end() -> Callable[[], None] | None:
    """Have the C++ runtime do so before it ends this process; what it does then, to be kept, or None where it cannot.

    For processes that exist to be ended (see `receiving_process`): it holds for all that they throw.
    """
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        return None  # another runtime: the trainer waits for its deadline
    set_terminate.argtypes, set_terminate.restype = [_Handler], _Handler

    def end() -> None:
        try:
            read_away(_connections())
        finally:
            before()  # says what was thrown, and aborts

    handler = _Handler(end)
    before = set_terminate(handler)
    return handler


def read_away(connections: list[socket.socket]) -> None:
    """Read from all until nothing comes any more."""
    waiting = select.poll()
    for connection in connections:
        connection.setblocking(False)
        waiting.register(connection, select.POLLIN)
    by_descriptor = {connection.fileno(): connection for connection in connections}
    while ready := waiting.poll(1000 * _QUIET_S):
        for descriptor, _ in ready:
            try:
                more = by_descriptor[descriptor].recv(_AT_ONCE)
            except BlockingIOError:
                continue
            except OSError:
                more = b""
            if not more:
                waiting.unregister(descriptor)


def _connections() -> list[socket.socket]:
    """The TCP connections of this process."""
    found = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue  # no socket, or the descriptor that lists them
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            found.append(connection)
    return found
