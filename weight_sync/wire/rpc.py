"""Typed calls between processes: ids, deadlines, streaming, and errors that keep their type.

`RpcServer` serves a handler, `RpcClient` calls it, `Call` is what the handler gets. Both take the types of their
messages from their owner, so an engine adds its own commands to those of a weight update on one connection.
"""

from .rpc_client import RpcClient
from .rpc_server import RpcServer, ServerCall
from .rpc_wire import Call

__all__ = ["Call", "RpcClient", "RpcServer", "ServerCall"]
