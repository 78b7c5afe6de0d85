"""What a server is told: where it listens, who may come in, and how much anybody may ask for."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from ..config import EngineConfig
from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Options of `rollout serve` that are no engine's."""

    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs an API key."""
    port: int = 30000
    """Port to listen at; 0: one that the system chooses."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys that let a client in; each is a client of its own, whose request ids are its own. None: whoever reaches the
    port is let in."""
    admin_api_key: str | None = field(default=None, repr=False)
    """Key for routes that concern everybody: weights, memory, pause, profile, aborting all. None: the API key."""
    served_model_name: str | None = None
    """Name of the model in the OpenAI routes; None: its path."""
    enable_memory_saver: bool = False
    """What `/server_info` says of it, where a trainer compares it with its own option (slime: `--offload-rollout`);
    memory can be given back in any case."""
    chat_template: str | None = None
    """File with a Jinja chat template; None: the tokenizer's own."""
    max_body_bytes: int = 16 << 20
    """Largest body of a request, except of weight updates."""
    max_update_bytes: int = 2 << 30
    """Largest body of a weight update."""
    max_prompts: int = 4096
    """Prompts of one request at most."""
    max_call_tokens: int = 1 << 24
    """Tokens of one request at most: its prompts, and all that it may generate."""
    max_running_samples: int = 16384
    """Samples that all clients may have in the server at once, queued ones included."""
    slow_client_s: float = 60.0
    """Seconds for which a client may leave what it is sent unread, or its own request unfinished."""
    drain_s: float = 10.0
    """Seconds for which running requests may go on after the server was told to end; then they are aborted."""
    ssl_certfile: str | None = None
    """Certificate chain for TLS; None: no TLS."""
    ssl_keyfile: str | None = None
    """Private key of the certificate; None: it is in the same file."""
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    """Password of the private key."""
    ssl_ca_certs: str | None = None
    """Certificates of those who may sign clients' certificates; given, clients must have one."""
    log_level: str = "warning"
    """What the server logs: "debug", "info", "warning" or "error"."""

    @property
    def on_loopback(self) -> bool:
        """Only processes of this machine reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """`ConfigError` for what would leave the door open, or could not be served."""
        if not self.on_loopback and not self.api_keys:
            raise ConfigError(
                f"host: got {self.host!r} without an API key, expected one wherever other machines reach the server; "
                "pass --api-key (or set ROLLOUT_API_KEY), or listen at 127.0.0.1"
            )
        keys = [*self.api_keys, *([] if self.admin_api_key is None else [self.admin_api_key])]
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ConfigError(
                "api_keys: got one that no HTTP header can hold, expected printable ASCII without spaces"
            )
        if len(set(keys)) != len(keys):
            raise ConfigError("api_keys: got the same key twice, expected different ones")
        if self.admin_api_key is not None and not self.api_keys:
            raise ConfigError(
                "admin_api_key: got one without an API key, expected both; pass --api-key as well"
            )
        if len(self.api_keys) > 1 and self.admin_api_key is None:
            raise ConfigError(
                "api_keys: got several clients and no admin key, expected one: nobody could update weights; pass "
                "--admin-api-key"
            )
        for name in ("max_body_bytes", "max_update_bytes", "max_prompts", "max_call_tokens"):
            self._check_positive(name)
        for name in ("max_running_samples", "slow_client_s"):
            self._check_positive(name)
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port: got {self.port}, expected 0 to 65535")
        if not self.drain_s >= 0:
            raise ConfigError(f"drain_s: got {self.drain_s}, expected at least 0")
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "chat_template"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name}: got {path!r}, expected a file")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("ssl_certfile: got none, expected one beside the other TLS options")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not value > 0:
            raise ConfigError(f"{name}: got {value}, expected more than 0")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What `rollout serve` reads from `--config` and `--set`."""

    engine: EngineConfig
    """The engine, as in `rollout.Engine(...)`."""
    server: ServerConfig = ServerConfig()
    """The server before it."""
    address: str | None = None
    """Serve over this engine or pool of another process, and start none."""
    num_replicas: int = 1
    """Engines behind the server; more than one are a `RolloutPool`."""
