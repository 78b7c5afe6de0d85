"""Serve until told to end: an engine, the socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from ..config import EngineConfig
from ..engine.engine import Engine
from ..errors import ConfigError
from ..hints import did_you_mean
from .app import build_app
from .config import ServerConfig, ServeSettings
from .patience import patient_protocol
from .state import ServerState

logger = logging.getLogger(__name__)
_BACKLOG = 4096


def launch_server(
    model_path: str | Path | None = None,
    *,
    engine: Engine | None = None,
    address: str | None = None,
    num_replicas: int = 1,
    server: ServerConfig | Mapping[str, Any] | None = None,
    on_ready: Callable[[str], None] | None = None,
    **engine_options: Any,
) -> None:
    """Serve over HTTP until SIGTERM or Ctrl-C; then let running requests end, and return.

    One of: `model_path`, for an engine (with `num_replicas` > 1 a pool) of `engine_options`, by default in child
    processes; `address`, of an engine or a pool that another process started; `engine`, one of this process. Only what
    was started here is shut down. `on_ready` gets the URL once requests are answered. Raises `ConfigError` for options
    that cannot be.
    """
    config = server_config(server)
    if sum(given is not None for given in (model_path, engine, address)) != 1:
        raise ConfigError("launch_server: expected exactly one of model_path, engine and address")
    config.check()
    if engine is not None:
        serve(engine, config, on_ready)
        return
    with bind(config) as listener:  # Before a model is loaded for nothing.
        with start_engine(model_path, address, num_replicas, engine_options) as started:
            serve(started, config, on_ready, listener)


def server_config(given: ServerConfig | Mapping[str, Any] | None) -> ServerConfig:
    """`ServerConfig` from itself or a mapping; `ConfigError` for what is not one."""
    if isinstance(given, ServerConfig):
        return given
    values = dict(given or {})
    for name in values:
        if name not in ServerConfig.__slots__:
            raise ConfigError(
                f"server: got an unknown option {name!r}; {did_you_mean(name, ServerConfig.__slots__)}"
            )
    try:
        return msgspec.convert(values, ServerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"server: {error}") from None


def start_engine(
    model_path: str | Path | None,
    address: str | None,
    num_replicas: int,
    options: Mapping[str, Any],
) -> Engine:
    """The engine behind a server: a client of one, a pool, or one in processes of its own."""
    if address is not None:
        return Engine.connect(address, **options)
    assert model_path is not None
    if num_replicas != 1:
        from ..pool.pool import RolloutPool

        return RolloutPool(model_path, num_replicas=num_replicas, **options)
    # In this process the engine's loop and the server would take turns on one interpreter.
    return Engine(model_path, **{"executor": "local", **options})


def serve_settings(settings: ServeSettings, on_ready: Callable[[str], None] | None = None) -> None:
    """`launch_server` for what the command line has read."""
    if settings.address is not None:
        launch_server(address=settings.address, server=settings.server, on_ready=on_ready)
        return
    options = {name: getattr(settings.engine, name) for name in EngineConfig.__slots__}
    if options["executor"] == "inline":
        options["executor"] = "local"
    launch_server(
        options.pop("model_path"),
        num_replicas=settings.num_replicas,
        server=settings.server,
        on_ready=on_ready,
        **options,
    )


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket; connections whose other end neither reads nor answers are ended by the kernel."""
    infos = socket.getaddrinfo(
        config.host.strip("[]"), config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, proto, _, where = infos[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Accepted connections inherit it.
            listener.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.slow_client_s * 1000)
            )
        listener.bind(where)
        listener.listen(_BACKLOG)
        listener.set_inheritable(False)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen at {config.host}:{config.port}: {error.strerror}; choose another port, or 0"
        ) from None
    return listener


def url_of(config: ServerConfig, listener: socket.socket) -> str:
    """Where clients of this machine reach it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if config.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def serve(
    engine: Engine,
    config: ServerConfig,
    on_ready: Callable[[str], None] | None = None,
    listener: socket.socket | None = None,
) -> None:
    """Serve over an engine, which stays the caller's, until told to end."""
    listener = listener or bind(config)
    state = ServerState(engine, config)
    settings = uvicorn.Config(
        build_app(state),
        log_level=config.log_level,
        access_log=config.log_level in ("debug", "info"),
        http=patient_protocol(config.slow_client_s),
        loop="uvloop",
        ws="none",
        lifespan="on",
        server_header=False,
        proxy_headers=False,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        ssl_keyfile_password=config.ssl_keyfile_password,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=2 if config.ssl_ca_certs else 0,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=max(1, round(config.drain_s)),
    )
    server = DrainingServer(settings, state, on_ready, url_of(config, listener))
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which lets running requests end before it closes their connections."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        on_ready: Callable[[str], None] | None,
        url: str,
    ) -> None:
        super().__init__(config)
        self._state = state
        self._on_ready = on_ready
        self._url = url

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal once more at the end, before the engine has been shut down."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once by uvicorn."""
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            self._on_ready(self._url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """New calls are refused, running ones end or are aborted, and then connections are closed."""
        await self._state.calls.drain(self._state.config.drain_s)
        await asyncio.sleep(0)
        await super().shutdown(sockets)
