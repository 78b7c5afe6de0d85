"""The HTTP front door: what trainers, agents and routers of other engines already speak.

`launch_server` serves in this process until it is told to end, `launch_server_process` in a child; and
`HttpServerEngineAdapter` is an engine's surface on the other side of the wire. Names are loaded when they are first
used: fastapi and uvicorn come with the extra `server`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import HttpServerEngineAdapter
    from .config import ServerConfig
    from .launch import launch_server
    from .process import ServerProcess, launch_server_process

_HOMES = {
    "HttpServerEngineAdapter": ".adapter",
    "ServerConfig": ".config",
    "ServerProcess": ".process",
    "launch_server": ".launch",
    "launch_server_process": ".process",
}

__all__ = [
    "HttpServerEngineAdapter",
    "ServerConfig",
    "ServerProcess",
    "launch_server",
    "launch_server_process",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
