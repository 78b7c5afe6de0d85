"""The server actor of one replica: an `Engine` with the methods that verl's managers and clients call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from rollout import Engine
from rollout.errors import RolloutError

from .options import engine_options
from .requests import Limits, generate_call, refuse_media, token_output

logger = logging.getLogger(__name__)


class RolloutServer:
    """A Ray actor; all its methods are awaited there, so that calls overlap.

    Made by `ReplicaServers.launch_servers`, then `launch_server()` once. `keep_weights`: sleeping keeps the weights in
    the host's memory, for replicas that no trainer updates.
    """

    def __init__(
        self, config: Any, model_config: Any, *, mode: str, replica_rank: int, listen: str
    ) -> None:
        from verl.utils.config import omega_conf_to_dataclass
        from verl.workers.config import HFModelConfig

        self.config: Any = omega_conf_to_dataclass(config)
        model: Any = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self._model_path = str(model.local_path)
        self._mode = mode
        self._replica_rank = replica_rank
        self._listen = listen
        self._rejecting = False
        self._maybe_engine: Engine | None = None
        self._limits = Limits(
            prompt_length=self.config.prompt_length,
            response_length=self.config.response_length,
            ignore_eos=self.config.ignore_eos,
            seed=self.config.seed if self.config.full_determinism else None,
        )

    @property
    def engine(self) -> Engine:
        """The engine; an error before `launch_server`."""
        if self._maybe_engine is None:
            raise RolloutError(
                "this replica has no engine, expected one; await launch_server() first"
            )
        return self._maybe_engine

    async def launch_server(self) -> None:
        """Start the engine; returns when it can be asked."""
        import torch

        options = engine_options(
            self.config, self._model_path, self._replica_rank, on_gpu=torch.cuda.is_available()
        )
        options.setdefault("listen", self._listen)
        path = options.pop("model_path")
        self._maybe_engine = await asyncio.to_thread(lambda: Engine(path, **options))

    async def address(self) -> str:
        """Where a publisher connects."""
        return self.engine.address

    # ---- generation ------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Sequence[Any] | None = None,
        video_data: Sequence[Any] | None = None,
        audio_data: Sequence[Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        priority: int = 0,
    ) -> Any:
        """verl's `TokenOutput` for one prompt. While generation is aborted, requests wait for `resume_generation`.

        priority changes nothing: requests run in the order of their arrival.
        """
        from verl.workers.rollout.replica import TokenOutput

        refuse_media(image_data=image_data, video_data=video_data, audio_data=audio_data)
        call = generate_call(prompt_ids, sampling_params, request_id, self._limits)
        if self._rejecting:  # whoever asks is to ask another replica
            return TokenOutput(token_ids=[], stop_reason="aborted")
        result = await self.engine.async_generate(**call)
        return TokenOutput(**token_output(result, call))

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, int]:
        """End all requests with what they have; later ones wait, or with `reject_request` end at once, as aborted."""
        self._rejecting = reject_request
        num = await self.engine.async_pause_generation("abort")
        return {"aborted_count": num}

    async def resume_generation(self) -> None:
        """Let requests run again."""
        self._rejecting = False
        await self.engine.async_continue_generation()

    # ---- memory ----------------------------------------------------------------------------------------------------

    async def clear_kv_cache(self) -> None:
        """Forget cached prefixes. Those of older weights are never read anyway, so pending requests do no harm."""
        try:
            await self.engine.async_flush_cache()
        except RolloutError as error:
            logger.info("the cache of replica %d was not cleared: %s", self._replica_rank, error)

    async def release_kv_cache(self) -> None:
        """Give the memory of the KV cache back until `resume_kv_cache`."""
        if self.config.free_cache_engine:
            await self.engine.async_release_memory_occupation(["kv_cache"])

    async def resume_kv_cache(self) -> None:
        """Take the memory of the KV cache again."""
        if self.config.free_cache_engine:
            await self.engine.async_resume_memory_occupation(["kv_cache"])

    async def sleep(self) -> None:
        """Give memory back: of the KV cache, and of the weights where the trainer shares the device.

        The weights of a hybrid replica are gone until the next complete update; those of a colocated one, which no
        trainer updates, wait in the host's memory.
        """
        if not self.config.free_cache_engine:
            return
        if self._mode == "standalone":
            await self.release_kv_cache()
            return
        keep = self._mode == "colocated"
        await self.engine.async_release_memory_occupation(
            ["weights", "kv_cache"], keep_weights=keep
        )

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take memory again: "weights", "kv_cache", or with None both."""
        if self.config.free_cache_engine:
            chosen: Any = None if tags is None else list(tags)
            await self.engine.async_resume_memory_occupation(chosen)

    # ---- the rest --------------------------------------------------------------------------------------------------

    async def start_profile(self, **_: Any) -> None:
        """Record what the engine does until `stop_profile`."""
        await self.engine.async_start_profile()

    async def stop_profile(self) -> str:
        """Write the trace; its path on this node."""
        return await self.engine.async_stop_profile()

    async def shutdown(self) -> None:
        """End the engine; safe to call twice."""
        engine, self._maybe_engine = self._maybe_engine, None
        if engine is not None:
            await engine.async_shutdown()
