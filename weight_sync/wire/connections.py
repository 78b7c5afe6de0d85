"""How many clients may be connected to a server, so that it never runs out of file descriptors.

ZeroMQ ends the whole process when it can accept nothing at a socket file for want of a descriptor (at a port it waits).
So the file is hidden while the descriptors that are left grow few: those who are connected go on, those who come
meanwhile find nobody and try again.
"""

import contextlib
import logging
import os
import resource

import zmq
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

BACKLOG = 32
"""Connections that the system may hold ready; they come even after the file was hidden."""
_SHARE = 2
"""One in so many of the descriptors that are free at first may become connections: what goes on meanwhile needs some,
and connections come faster than they are counted."""
_LOOK_AGAIN_MS = 500


class ConnectionLimit:
    """Counts the connections of one listening socket; used on the socket's thread."""

    def __init__(self, socket: "zmq.Socket[bytes]", address: str) -> None:
        self._socket = socket
        scheme, _, path = address.partition("://")
        self._path = path if scheme == "ipc" and os.path.exists(path) else None
        self._open: set[int] = set()
        self._hidden = False
        self._most = max(8, _free_descriptors() // _SHARE)
        self.monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        """Readable when `look` has something to do."""

    @property
    def patience_ms(self) -> int | None:
        """How long the socket's thread may wait before it calls `look` again; None: for ever."""
        return _LOOK_AGAIN_MS if self._hidden else None

    def look(self) -> None:
        """Count what has come and gone; hide the socket file, or show it again."""
        while True:
            try:
                event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            except zmq.Again:
                break
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._open.add(event["value"])
                if len(self._open) >= self._most and not self._hidden:
                    self._hide()
            else:
                self._open.discard(event["value"])
        if self._hidden and len(self._open) < self._most * 3 // 4:
            self._show()

    def close(self) -> None:
        """Stop counting, and leave no hidden file behind."""
        self._socket.disable_monitor()
        self.monitor.close(0)
        if self._hidden and self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(_aside(self._path))

    def _hide(self) -> None:
        if self._path is None:
            return
        logger.error(
            "%d clients are connected to %s: no others are let in until some have gone; raise the limit of open files",
            len(self._open),
            self._path,
        )
        with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
            os.rename(self._path, _aside(self._path))
        self._hidden = True

    def _show(self) -> None:
        assert self._path is not None
        try:
            os.link(_aside(self._path), self._path)  # unlike `rename`, it takes nobody's place
            os.unlink(_aside(self._path))
        except OSError as error:
            logger.error("clients cannot reach %s any more: %s", self._path, error)
        self._hidden = False


def _aside(path: str) -> str:
    return f"{path}.full"


def _free_descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1 << 20
    try:
        return soft - len(os.listdir("/proc/self/fd"))
    except OSError:
        return soft // 2
