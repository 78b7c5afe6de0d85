"""Taking an address to listen at, and never one that somebody else has."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator

import zmq

from ..errors import AddressInUseError
from .keys import check_private, shown


def listen(server: "zmq.Socket[bytes]", address: str, *, insecure: bool = False) -> str:
    """Bind `server` to `address`; returns one to connect to: with what the system chose, such as a port.

    For all addresses of the machine ("tcp://0.0.0.0:0") that is the one from which it reaches other machines. A socket
    file is this user's alone, and so must its folder be unless `insecure`.

    `AddressInUseError` where another server listens; a socket file that a dead one left behind is replaced.
    `InsecureAddressError` for a folder that others may enter, `ValueError` for what is no address to listen at.
    """
    server.setsockopt(zmq.IPV6, "[" in address)
    if not insecure:
        check_private(address)
    with _alone(address):
        check_free(address)
        try:
            server.bind(address)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(address) from None
            raise ValueError(
                f"cannot listen at {address!r}: {error}; expected an address like 'ipc:///tmp/folder/socket', in a "
                "folder that exists and with at most 107 characters, or 'tcp://127.0.0.1:0'"
            ) from error
    if not insecure and address.startswith("ipc:///"):
        os.chmod(address.removeprefix("ipc://"), 0o600)
    return _reachable(server.getsockopt_string(zmq.LAST_ENDPOINT))


def _reachable(bound: str) -> str:
    host, _, port = bound.removeprefix("tcp://").rpartition(":")
    if host == "0.0.0.0":
        return f"tcp://{_own_address(socket.AF_INET, '192.0.2.1', '127.0.0.1')}:{port}"
    if host == "[::]":
        return f"tcp://[{_own_address(socket.AF_INET6, '2001:db8::1', '::1')}]:{port}"
    return bound


def _own_address(family: socket.AddressFamily, elsewhere: str, loopback: str) -> str:
    """From where this machine would send to `elsewhere`; nothing is sent. Without a network, the loopback's."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((elsewhere, 9))
            address: str = probe.getsockname()[0]
            return address
        except OSError:
            return loopback


def check_free(address: str | None) -> None:
    """`AddressInUseError` when somebody listens at `address` now; None, and a port 0, are always free."""
    address = shown(address or "")
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        _check_file(address, rest)
    elif scheme == "tcp":
        _check_port(address, rest)


def _check_file(address: str, path: str) -> None:
    # ZeroMQ takes a socket file over without asking.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # somebody listens, and has no time
            raise _in_use(address) from None
        except OSError:  # nobody does, or nobody can; binding says which
            return
    raise _in_use(address)


def _check_port(address: str, host_and_port: str) -> None:
    host, _, port = host_and_port.rpartition(":")
    if not port.isdecimal() or port == "0":
        return
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError:
        return  # not a host; binding says so
    family, kind, _, _, place = found[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(address) from None


@contextlib.contextmanager
def _alone(address: str) -> Iterator[None]:
    """One at a time among all who look whether a socket file is free and then take it."""
    scheme, _, path = address.partition("://")
    folder = os.path.dirname(path)
    if scheme != "ipc" or not os.path.isdir(folder):
        yield
        return
    held = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _in_use(address: str) -> AddressInUseError:
    return AddressInUseError(
        f"cannot listen at {address}: got an address at which another server listens, expected a free one; stop the "
        "other one, or choose another address"
    )
