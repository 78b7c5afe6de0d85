"""`RolloutActor`: one engine inside a Ray actor, for programs that are made of actors."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weight_sync.errors import TornWeightsError

from ..distributed import ray_runtime
from ..engine.engine import Engine
from ..engine.executors.ray_rank import device_in_actor
from ..engine.loop.checks import check_start
from ..engine.options import engine_config
from ..errors import typed

logger = logging.getLogger(__name__)

#: Methods of `Engine` that the actor has under the same names; all of them are awaited there, so that calls overlap.
FORWARDED = (
    *("score", "sequence_logprobs", "classify", "encode", "resume"),
    *("pause_generation", "continue_generation", "abort_request", "flush_cache"),
    *("release_memory_occupation", "resume_memory_occupation"),
    *("begin_weight_update", "end_weight_update", "abort_weight_update"),
    *("update_weights_from_tensor", "update_weights_from_disk"),
    *("init_weights_update_group", "update_weights_from_distributed"),
    *("destroy_weights_update_group",),
    *("save_sharded_model", "collective_rpc"),
    *("get_weights_by_name", "weights_fingerprint", "get_weight_version"),
    *("start_expert_distribution_record", "stop_expert_distribution_record"),
    "dump_expert_distribution_record",
    *("start_profile", "stop_profile", "freeze_gc"),
    *("status", "get_server_info", "get_model_info", "shutdown"),
)


class RolloutActor:
    """A Ray actor class around one `Engine`, with the engine's method names.

        actor = RolloutActor.options(num_gpus=1).remote("checkpoints/qwen3-tiny", context_length=4096)
        result = ray.get(actor.generate.remote(input_ids=[5, 9, 2], sampling_params={"n": 4}))
        publisher = WeightPublisher(ray.get(actor.address.remote()))

    Many calls of `generate` run at the same time; `generate_stream` yields what `generate(stream=True)` would. The
    options of `.remote` are those of `Engine`. With one rank the loop runs in the actor's process, with several
    (`tp_size`) in child processes that share the GPUs of the actor. Tensors reach the engine best through `address`,
    without a detour through Ray's arguments.

    An actor that Ray restarts (`max_restarts`) has none of the weights that were pushed before, and a new `address`: it
    raises `TornWeightsError` until a complete update has committed.
    """

    @classmethod
    def options(cls, **ray_options: Any) -> ActorFactory:
        """As `options` of any Ray actor class: `num_cpus`, `num_gpus`, `name`, `scheduling_strategy`, and so on."""
        return ActorFactory(ray_options)

    @classmethod
    def remote(cls, model_path: str | Path, **engine_options: Any) -> Any:
        """Start one; returns Ray's handle at once."""
        return cls.options().remote(model_path, **engine_options)


class ActorFactory:
    """`RolloutActor` with options of Ray."""

    def __init__(self, ray_options: dict[str, Any]) -> None:
        self._ray_options = ray_options

    def remote(self, model_path: str | Path, **engine_options: Any) -> Any:
        """Start one; returns Ray's handle at once.

        Raises `ConfigError` or `CheckpointError` for what can be seen from here. What only the actor can see, each of
        its calls raises, as the same types.
        """
        config = engine_config(model_path, engine_options)
        check_start(dataclasses.replace(config, executor="ray"))  # Its devices are not ours.
        return ray_runtime.start_actor(
            EngineHost, self._ray_options, str(model_path), **engine_options
        )


class EngineHost:
    """What runs in the actor."""

    def __init__(self, model_path: str, **engine_options: Any) -> None:
        self._restarted = ray_runtime.was_restarted()
        self._failed: Exception | None = None
        try:
            self._started = self._start(model_path, dict(engine_options))
        except Exception as error:
            # Raised here, it would reach callers as pages of Ray's; each call says it in one line of its own type.
            logger.exception("the engine did not start")
            known = typed(error, "the start of the engine")
            self._failed = type(known)(f"the engine did not start: {known}")

    @property
    def _engine(self) -> Engine:
        if self._failed is not None:
            raise type(self._failed)(str(self._failed))
        return self._started

    def _start(self, model_path: str, options: dict[str, Any]) -> Engine:
        options.setdefault("executor", "inline" if options.get("tp_size", 1) == 1 else "local")
        place = ray_runtime.this_place()
        if options.get("listen") is None:
            host = "127.0.0.1" if ray_runtime.on_one_machine() else place.ip
            options["listen"] = f"tcp://{host}:0"
        if options["executor"] == "inline":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            configured = str(options.get("device", "auto"))
            options["device"] = device_in_actor(configured, place.gpu_ids, visible)
        if self._restarted:  # What it loads is not what was served here before.
            options["await_first_update"] = True
        return Engine(model_path, **options)

    async def address(self) -> str:
        """Where a `WeightPublisher` connects."""
        return self._engine.address

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `Engine.generate`, without `stream`."""
        if kwargs.get("stream"):
            raise TypeError("generate: got stream=True, expected False; use generate_stream")
        with self._told_of_restart():
            return await self._engine.async_generate(*args, **kwargs)

    async def generate_stream(self, *args: Any, **kwargs: Any) -> AsyncIterator[dict[str, Any]]:
        """The chunks of `Engine.generate(..., stream=True)`, as a Ray generator."""
        kwargs["stream"] = True
        with self._told_of_restart():
            async for chunk in await self._engine.async_generate(*args, **kwargs):
                yield chunk

    @contextmanager
    def _told_of_restart(self) -> Iterator[None]:
        """Say why there are no weights."""
        try:
            yield
        except TornWeightsError as error:
            if not self._restarted:
                raise
            raise TornWeightsError(
                "Ray has restarted this actor, and the weights that were pushed before are gone; publish a complete "
                f"update to its new address: {error}"
            ) from None


def _forward(name: str) -> Callable[..., Any]:
    async def method(self: EngineHost, *args: Any, **kwargs: Any) -> Any:
        with self._told_of_restart():
            return await getattr(self._engine, f"async_{name}")(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"As `Engine.{name}`."
    return method


for _name in FORWARDED:
    setattr(EngineHost, _name, _forward(_name))
