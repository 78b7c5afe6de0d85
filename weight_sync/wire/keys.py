"""Who may connect to a socket that others can reach: a key in the address, CURVE on the wire.

A server that listens beyond its machine makes two key pairs when it starts, its own and one for its clients. Its
address then has a `key`: the public one of the server and the secret one of the clients. Who has the address can
connect and nobody else can, nobody can pretend to be the server, and nobody can read along. Keys that survive a restart
are in a file that only its owner can read.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import zmq
from zmq.utils import z85

from ..errors import InsecureAddressError

_KEY_BYTES = 32
_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = b"rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientKeys:
    """What a client needs; keys in Z85, as ZeroMQ takes them."""

    server: bytes = field(repr=False)
    """The server's public key."""
    secret: bytes = field(repr=False)
    """The clients' secret one."""

    @classmethod
    def parse(cls, key: str) -> Self:
        """From an address' `key`; `ValueError` for anything else, without showing it."""
        server, secret = _halves(key, "key")
        return cls(server=server, secret=secret)

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Have `socket` prove that it knows them, and talk to nobody but the server."""
        socket.curve_serverkey = self.server
        socket.curve_publickey = zmq.curve_public(self.secret)
        socket.curve_secretkey = self.secret


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKeys:
    """What a server needs; keys in Z85."""

    secret: bytes = field(repr=False)
    """The server's secret key."""
    client_secret: bytes = field(repr=False)
    """The clients'."""

    @classmethod
    def new(cls) -> Self:
        """Two new pairs; `InsecureAddressError` where this ZeroMQ has no CURVE."""
        require_curve()
        return cls(secret=zmq.curve_keypair()[1], client_secret=zmq.curve_keypair()[1])

    @classmethod
    def from_file(cls, path: str, *, make: bool) -> Self:
        """Those in a file of this user's, made if it is not there and may be.

        `InsecureAddressError` where it cannot be read or made, or others can read it.
        """
        try:
            if make and not os.path.exists(path):
                cls.new()._write(path)
            with open(path, "rb", opener=_at_once) as file:
                found = os.fstat(file.fileno())
                text = file.read(1024).decode("ascii", "replace").strip()
        except OSError as error:
            raise InsecureAddressError(
                f"cannot take keys from {path}: got {error}, expected a file of this user with mode 600, or a folder "
                "where it can be made; correct key_file"
            ) from error
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or mode & 0o077:
            raise InsecureAddressError(
                f"cannot take keys from {path}: got a file that others may read or own, or that is no plain one (mode "
                f"{mode:o}), expected one of this user with mode 600; remove it, so that new keys are made"
            )
        secret, client_secret = _halves(text, path)
        return cls(secret=secret, client_secret=client_secret)

    def _write(self, path: str) -> None:
        """All at once, and never over another's: servers that start together then have the same."""
        descriptor, draft = tempfile.mkstemp(prefix=".keys-", dir=os.path.dirname(path) or ".")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(_joined(self.secret, self.client_secret) + "\n")
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
        finally:
            os.unlink(draft)

    @property
    def key(self) -> str:
        """What an address tells a client."""
        return _joined(zmq.curve_public(self.secret), self.client_secret)

    @property
    def for_clients(self) -> ClientKeys:
        """The same, in parts."""
        return ClientKeys(server=zmq.curve_public(self.secret), secret=self.client_secret)


class Gate:
    """Lets those through who have the clients' key. It belongs to the thread of the server's socket."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], guarded: zmq.Socket[bytes], keys: ServerKeys
    ) -> None:
        """Before `guarded`, a socket of `context`, listens: libzmq lets everybody in where nobody answers for it."""
        self._allowed = z85.decode(zmq.curve_public(keys.client_secret))
        self.socket = context.socket(zmq.REP)
        """Readable when `answer` has something to do."""
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ZAP)
        guarded.curve_server = True
        guarded.curve_secretkey = keys.secret
        guarded.zap_domain = _DOMAIN
        guarded.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def answer(self) -> None:
        """Let in, or refuse, those who wait."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # version, id, domain, address, routing id, mechanism, client's public key
            may = len(frames) == 7 and frames[5] == b"CURVE" and frames[6] == self._allowed
            verdict = (b"200", b"OK") if may else (b"400", b"another key")
            self.socket.send_multipart((*frames[:2], *verdict, b"", b""))

    def close(self) -> None:
        """Nobody comes in any more."""
        self.socket.close(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address, apart from its key."""

    endpoint: str
    """As ZeroMQ takes it, and as messages and logs show it."""
    options: Mapping[str, str] = field(repr=False)
    """What stands behind its question mark."""

    @classmethod
    def parse(cls, address: str, known: tuple[str, ...]) -> Self:
        """`ValueError` for options other than the `known` ones, of which it has one at most."""
        if not (isinstance(address, str) and address.isprintable()):
            raise ValueError(
                f"not an address: got {type(address).__name__}, expected a text such as 'tcp://127.0.0.1:5555' or "
                "'ipc:///tmp/folder/socket', all of it printable; use the address as the engine gives it"
            )
        endpoint, mark, query = (
            address.partition("?") if address.startswith("tcp://") else (address, "", "")
        )
        port = endpoint.rpartition(":")[2] if endpoint.startswith("tcp://") else ""
        digits = port.removeprefix("-")
        if digits.isdecimal() and (port != digits or len(digits) > 5 or int(digits) > 65535):
            raise ValueError(  # ZeroMQ takes another one without a word
                f"not an address: got {endpoint[:200]!r}, expected a port from 0 to 65535, as in 'tcp://127.0.0.1:0'; "
                "use the address as the engine gives it"
            )
        name, _, value = query.partition("=")
        if mark and name not in known:
            raise ValueError(
                f"an address has one option at most: got {name[:20]!r} behind {endpoint}?, expected "
                f"{' or '.join(known)}; use the address as the engine gives it"
            )
        return cls(endpoint=endpoint, options={name: value} if mark else {})

    @classmethod
    def of_server(cls, address: str) -> Self:
        """An address to listen at, which may name a `key_file`."""
        return cls.parse(address, ("key_file",))

    @classmethod
    def of_client(cls, address: str) -> Self:
        """An address to connect to, which may have a `key`, or name the server's `key_file`."""
        return cls.parse(address, ("key", "key_file"))

    def client_keys(self) -> ClientKeys | None:
        """None: it has no key. Raises what `ServerKeys.from_file` and `ClientKeys.parse` do."""
        if "key" in self.options:
            return ClientKeys.parse(self.options["key"])
        if "key_file" in self.options:
            return ServerKeys.from_file(self.options["key_file"], make=False).for_clients
        return None

    def server_keys(self, insecure: bool) -> ServerKeys | None:
        """Keys where it names a file with them, or where others can reach it, unless `insecure`; else None."""
        if "key_file" in self.options:
            return ServerKeys.from_file(self.options["key_file"], make=True)
        if insecure or is_on_this_machine(self.endpoint):
            return None
        return ServerKeys.new()


def require_curve() -> None:
    """`InsecureAddressError` where this ZeroMQ can keep nobody out."""
    if not zmq.has("curve"):
        raise InsecureAddressError(
            "no keys for an address that others can reach: got a ZeroMQ without CURVE, expected one with it; install "
            "pyzmq from a wheel, listen at 127.0.0.1, or pass insecure=True"
        )


def shown(address: str) -> str:
    """`address` without its key, for messages and logs."""
    return address if address.startswith("ipc://") else address.partition("?")[0]


def is_on_this_machine(address: str) -> bool:
    """Whether both ends of a connection to `address` are processes of one machine, and cannot vanish silently."""
    scheme, _, rest = shown(address).partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be another machine's, or what ZeroMQ alone understands
        return False


def check_private(address: str) -> None:
    """`InsecureAddressError` where other users could reach a socket file: its folder must be this user's alone."""
    scheme, _, path = address.partition("://")
    folder = os.path.dirname(path)
    if scheme != "ipc" or (path[:1] == "/" and not os.path.isdir(folder)):
        return  # binding says what is wrong with it
    if path[:1] not in ("@", "*"):
        found = os.stat(folder or ".")
        if found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077:
            return
        why = f"the folder {folder or '.'} of mode {stat.S_IMODE(found.st_mode):o}"
    else:
        why = "a socket without a folder"
    raise InsecureAddressError(
        f"cannot listen at {address}: got {why}, which other users may enter, expected one of this user with mode 700; "
        f"mkdir -m 700 a folder for it, leave the address out for a private one, or pass insecure=True"
    )


def _at_once(path: str, flags: int) -> int:
    """What is no file may have nobody at its other end."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _halves(key: str, where: str) -> tuple[bytes, bytes]:
    try:
        raw = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != 2 * _KEY_BYTES:
        raise ValueError(
            f"not a key: got {len(key)} characters in {where}, expected 86 of base64; use the address as the engine "
            "gives it"
        )
    return z85.encode(raw[:_KEY_BYTES]), z85.encode(raw[_KEY_BYTES:])


def _joined(first: bytes, second: bytes) -> str:
    return base64.urlsafe_b64encode(z85.decode(first) + z85.decode(second)).decode().rstrip("=")
