"""The rollout's side in verl's workers: wakes the replica's server and pushes weights into it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from rollout.errors import ConfigError

from ..actors import actor_named, answer
from ..pushing import Pusher, Weights, exhaust, exhausted_on_error
from .options import NAME, refuse_unsupported
from .replica import server_name

_adapters: weakref.WeakSet[ServerAdapter] = weakref.WeakSet()
"""Those of this process: verl makes a checkpoint engine beside an adapter, and tells neither of the other."""


def leading_server() -> str | None:
    """Name of the server whose replica this process leads; None: it leads none."""
    names = [server_name(adapter.replica_rank) for adapter in _adapters if adapter.is_leader_rank]
    return names[0] if names else None


class ServerAdapter:
    """One in each worker of a replica; the first worker speaks to the server, the others only keep step.

    verl makes it, in a process with the environment of a worker (`RANK`). Every rank calls the same methods in the same
    order, and every rank exhausts the tensors it is given.
    """

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1
    ) -> None:
        from verl.utils.config import omega_conf_to_dataclass

        self.config: Any = omega_conf_to_dataclass(config)
        refuse_unsupported(self.config)
        rank, size = int(os.environ["RANK"]), self.config.tensor_model_parallel_size
        self.replica_rank = rank // size if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % size == 0
        self._handle: Any = None
        self._pusher: Pusher | None = None
        _adapters.add(self)

    @property
    def _server(self) -> Any:
        """The server's handle; it is started after the workers, so it is looked up when it is needed."""
        if self._handle is None:
            self._handle = actor_named(server_name(self.replica_rank))
        return self._handle

    async def resume(self, tags: Sequence[str]) -> None:
        """Take the memory of "weights" or "kv_cache" again."""
        if self.is_leader_rank and self.config.free_cache_engine:
            await self._answer(self._server.wake_up.remote(tags=list(tags)))

    async def release(self) -> None:
        """Give the memory of both back."""
        if self.is_leader_rank and self.config.free_cache_engine:
            await self._answer(self._server.sleep.remote())

    async def update_weights(
        self,
        weights: Weights,
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: Any = None,
        base_sync_done: bool = True,
    ) -> None:
        """Make `weights`, an iterator or an asynchronous one, the replica's next version, labelled `global_steps`.

        Raises on the leading rank what the publisher raises, once the iterator is exhausted: the old version serves on.
        With wire format "rollout_sync" the checkpoint engine of that name has done it. `base_sync_done` is about
        adapters, which are refused.
        """
        if wire_format not in ("named_tensors", NAME):
            raise ConfigError(
                f"checkpoint_engine: got one that sends {wire_format!r}, expected 'named_tensors' or {NAME!r}; "
                f"set checkpoint_engine.backend={NAME}"
            )
        if peft_config is not None:
            raise ConfigError(
                "model.lora: got adapters that are to be served beside the base model, expected merged ones; "
                "set actor_rollout_ref.model.lora.merge=True"
            )
        if wire_format == NAME or not self.is_leader_rank:
            await exhaust(weights)
            return
        async with exhausted_on_error(weights) as stream:
            if self._pusher is None:
                self._pusher = await self._connected()
            try:
                await self._pusher.push(stream, global_steps)
            finally:
                if torch.cuda.is_available():  # there the arena is memory that training needs
                    self._pusher.close()
                    self._pusher = None

    async def _connected(self) -> Pusher:
        bucket_bytes = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        address = await self._answer(self._server.address.remote())
        return Pusher([address], bucket_bytes=bucket_bytes)

    async def _answer(self, reference: Any) -> Any:
        return await answer(reference, f"the server of rollout replica {self.replica_rank}")

    def generate_sequences(self, prompts: Any) -> Any:
        """verl generates through the server; refused here."""
        raise NotImplementedError(
            "generate_sequences: got a call of the adapter, expected one of the server: ask "
            "LLMServerManager.get_client()"
        )
