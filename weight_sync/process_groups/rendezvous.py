"""Where members of a group meet: a `TCPStore` of the group's own, and polling that ends when it should.

The stores' own blocking calls are avoided where a member may be late: they cannot be interrupted, and write stack
traces to the log when they time out. A member asks again and again instead, a few times in a millisecond at first.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

from ..errors import DeadlineExceeded, TransportError
from ..time_left import left, left_s

T = TypeVar("T")

_FIRST_POLL_S = 0.0002
_LAST_POLL_S = 0.02


class StoreServer:
    """A store that this process serves for any number of groups; it ends with `close`, or with its last group."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, timeout_s: float = 60.0) -> None:
        host = host.strip("[]")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise TransportError(
                f"cannot serve a rendezvous at {host}:{port}: got {error}, expected an address of this machine and a "
                "free port; pass port 0 to let the system choose"
            ) from error
        self.host = host
        """Address that was asked for, without brackets; members connect to it."""
        self.port: int = listener.getsockname()[1]
        """Port, the system's choice where 0 was asked for."""
        self._store: TCPStore | None = TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )

    @property
    def store(self) -> TCPStore:
        """This process's own connection to it."""
        if self._store is None:
            raise TransportError(f"the rendezvous at {self.host}:{self.port} was closed; serve one")
        return self._store

    def close(self) -> None:
        """Let go of the store. Safe to repeat."""
        self._store = None


class Lifeline:
    """A silent connection to the process that serves a store, which ends when that process or its store does.

    The store's own connection cannot be watched: asking it blocks when the process was stopped.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setblocking(False)
        self._connection = connection
        self.address: str = connection.getsockname()[0]
        """Where this machine is on the way there."""
        self.peer = "{}:{}".format(*connection.getpeername()[:2])
        """Where the store is."""

    def lost(self) -> str | None:
        """Why the other end is known to be gone, or None; does not block."""
        try:
            if self._connection.recv(1, socket.MSG_PEEK):
                return None
        except BlockingIOError:
            return None
        except OSError:
            pass
        return f"the rendezvous at {self.peer} is gone, and with it the member that served it"

    def close(self) -> None:
        """Safe to repeat."""
        self._connection.close()


def poll(
    ask: Callable[[], T | None],
    *,
    end: float,
    abandoned: Callable[[], bool],
    late: Callable[[], str],
) -> T:
    """The first answer of `ask` that is not None.

    `DeadlineExceeded` with the message `late()` when `end` (monotonic) has passed, `TransportError` as soon as
    `abandoned()`.
    """
    pause_s = _FIRST_POLL_S
    while (answer := ask()) is None:
        if time.monotonic() >= end:
            raise DeadlineExceeded(late())
        if abandoned():
            raise TransportError("the group was closed while a member waited for the others")
        time.sleep(max(0.0, min(pause_s, end - time.monotonic())))
        pause_s = min(2 * pause_s, _LAST_POLL_S)
    return answer


def connect_store(
    host: str,
    port: int,
    *,
    world_size: int,
    end: float,
    abandoned: Callable[[], bool] = lambda: False,
) -> tuple[TCPStore, Lifeline]:
    """Connect to the store at `host:port`, which may start later. IPv6 addresses come with or without brackets."""
    host = host.strip("[]")

    def knock() -> Lifeline | None:
        try:
            timeout_s = min(left_s(end), 1.0)
            return Lifeline(socket.create_connection((host, port), timeout=timeout_s))
        except (socket.gaierror, UnicodeError) as error:  # no name of a host can be such a text
            raise TransportError(
                f"cannot find the rendezvous host {host!r}: got {error}, expected an address or a resolvable name; "
                "check master_address"
            ) from error
        except OSError:
            return None

    lifeline = poll(
        knock,
        end=end,
        abandoned=abandoned,
        late=lambda: (
            f"no rendezvous at {host}:{port}: got no connection by the deadline, expected rank 0 to serve it; check "
            "that it lives and that address and port are its own"
        ),
    )
    try:
        # A trainer that follows torch's own rendezvous waits until `world_size` members have counted themselves.
        store = TCPStore(
            host,
            port,
            world_size,
            is_master=False,
            timeout=left(end),
            wait_for_workers=True,
        )
    except RuntimeError as error:
        lifeline.close()
        raise store_error(f"cannot join the rendezvous at {host}:{port}", error) from error
    return store, lifeline


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise store_error("the rendezvous is gone", error) from error


def has(store: Store, *keys: str) -> bool:
    """Whether all `keys` are set. This and its kin raise `TransportError` when the store's server is gone."""
    with _reached():
        return store.check(list(keys))


def put(store: Store, key: str, value: str | bytes) -> None:
    """Set `key`."""
    with _reached():
        store.set(key, value)  # type: ignore[arg-type]  # the stub knows of str alone


def take(store: Store, key: str) -> bytes:
    """The value of a key that is set."""
    with _reached():
        return store.get(key)


def count(store: Store, key: str, more: int = 1) -> int:
    """Add to a counter; its new value."""
    with _reached():
        return store.add(key, more)


def drop(store: Store, key: str) -> None:
    """Forget `key`."""
    with _reached():
        store.delete_key(key)


def under(store: Store, prefix: str) -> PrefixStore:
    """`store` with every key preceded by `prefix` and a slash."""
    return PrefixStore(prefix, store)


def store_error(what: str, error: BaseException) -> TransportError | DeadlineExceeded:
    """torch's error as one of ours, cut to what a reader can use."""
    text = first_line(error)
    if "timeout" in text.lower() or "timed out" in text.lower():
        return DeadlineExceeded(
            f"{what}: got {text!r}; look for a member that is late, stopped or dead, or raise the timeout"
        )
    return TransportError(
        f"{what}: got {text!r}, expected every member to live; look at the member that serves it"
    )


def first_line(error: BaseException) -> str:
    """torch's message without stack trace, source position and advice; NCCL's own last words, where it has any."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Last error:" in lines[:-1]:
        return f"NCCL: {lines[lines.index('Last error:') + 1].strip()}"[:300]
    text = re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", lines[0])
    return text.split(" This is typically")[0][:300]
