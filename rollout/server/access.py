"""Who may come in, and how large a request may be: one ASGI layer before every route.

Keys are compared in constant time. Without keys the server is on loopback (`ServerConfig.check`), and a page in a
browser of this machine must not reach it either: requests that come from another origin, or that were sent to a name
which is none of this machine's, are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ServerConfig
from .replies import HttpError, error_reply

OPEN_PATHS = frozenset({"/health", "/ping", "/dashboard"})
"""What a load balancer asks without a key ("alive", and nothing else), and a page that is the same on every server."""
CLIENT = "rollout.client"
"""Key of the `Client` in a request's scope."""


@dataclass(frozen=True, slots=True)
class Client:
    """Who sent a request."""

    name: str
    """Its namespace of request ids; says nothing of its key."""
    is_admin: bool
    """It may do what concerns everybody."""


class Access:
    """The layer; `admin_paths` and `update_paths` are filled by the routes as they are made."""

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        admin_paths: Iterable[str],
        update_paths: Iterable[str],
    ) -> None:
        self._app = app
        self._config = config
        self._admin_paths = frozenset(admin_paths)
        self._update_paths = frozenset(update_paths)
        own_admin = config.admin_api_key is None
        self._keys = [
            (_digest(key), Client(f"client{i}", own_admin)) for i, key in enumerate(config.api_keys)
        ]
        if config.admin_api_key is not None:
            self._keys.append((_digest(config.admin_api_key), Client("admin", True)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        limit = (
            self._config.max_update_bytes
            if scope["path"] in self._update_paths
            else self._config.max_body_bytes
        )
        try:
            scope[CLIENT] = self._client_of(scope, headers)
            _check_declared(headers, limit)
        except HttpError as error:
            await error_reply(error)(scope, receive, send)
            return
        await self._app(scope, _Limited(receive, limit), send)

    def _client_of(self, scope: Scope, headers: dict[bytes, bytes]) -> Client:
        """The client; `HttpError` 401 or 403 for one that may not do this."""
        path = scope["path"]
        if not self._keys:
            _check_local(headers, is_page=path in OPEN_PATHS)
            return Client("local", True)
        if path in OPEN_PATHS:
            return Client("anonymous", False)
        keys = [name for name, _ in scope["headers"] if name in _KEY_HEADERS]
        client = self._owner_of(_key_in(headers)) if len(keys) == len(set(keys)) else None
        if client is None:
            raise HttpError(
                401,
                "got no valid API key, expected one in the header `Authorization: Bearer KEY`",
                {"www-authenticate": "Bearer"},
            )
        if path in self._admin_paths and not client.is_admin:
            raise HttpError(403, f"{path}: got the key of a client, expected the admin key")
        return client

    def _owner_of(self, key: bytes) -> Client | None:
        digest = hashlib.sha256(key).digest()
        found = None
        for known, client in self._keys:  # All of them, whichever fits: the time tells nothing.
            if hmac.compare_digest(known, digest):
                found = client
        return found


class _Limited:
    """`receive` that refuses a body beyond `limit` bytes."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._taken = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._taken += len(message.get("body", b""))
            if self._taken > self._limit:
                raise _too_large(self._taken, self._limit)
        return message


_KEY_HEADERS = (b"authorization", b"x-api-key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _key_in(headers: dict[bytes, bytes]) -> bytes:
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return key.strip()
    return headers.get(b"x-api-key", b"")


def _check_declared(headers: dict[bytes, bytes], limit: int) -> None:
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)


def _too_large(size: int, limit: int) -> HttpError:
    return HttpError(
        413, f"the body: got {size:,} bytes or more, expected at most {limit:,}; send less at once"
    )


def _check_local(headers: dict[bytes, bytes], *, is_page: bool) -> None:
    """`HttpError` 403 for what a web page from elsewhere may have sent. is_page: others may link to it."""
    host = headers.get(b"host", b"").decode("latin-1")
    if host and not _is_local(host):
        raise HttpError(
            403,
            f"got a request for host {host[:100]!r} at a server without API keys, expected a name of this machine; "
            "start it with --api-key",
        )
    # Images, scripts and links of a page come without its origin, and may be GETs that do something.
    if not is_page and headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        raise HttpError(
            403, "got a request from a page of another site, expected none; start with --api-key"
        )
    origin = headers.get(b"origin", b"").decode("latin-1")
    if origin and origin.partition("://")[2] != host:
        raise HttpError(
            403,
            f"got a request from a page of {origin[:100]!r}, expected none; start with --api-key",
        )


def _is_local(host: str) -> bool:
    name = host.partition("]")[0].removeprefix("[") if host[:1] == "[" else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def client_of(request: Any) -> Client:
    """Who sent this request."""
    client: Client = request.scope[CLIENT]
    return client
