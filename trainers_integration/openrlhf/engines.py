"""The actors: one `Engine` each, with the method names of OpenRLHF's `LLMRayActor`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rollout import Engine
from rollout.errors import ConfigError, InvalidRequestError
from weight_sync.errors import TransportError, WeightUpdateError

from ..actors import end_actors, start_actor, wait_for
from .outputs import RequestOutput, request_output, response, sampling_call

SEED_STRIDE = 1 << 32
"""Between the seeds of two engines, so that they do not draw the same samples of a prompt."""

_REBUILD = "torch.multiprocessing.reductions.rebuild_cuda_tensor"


def create_engines(
    num_engines: int,
    model_path: str,
    *,
    tensor_parallel_size: int = 1,
    seed: int = 42,
    ray_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ready_timeout_s: float = 600.0,
    **engine_options: Any,
) -> list[Any]:
    """Start `num_engines` actors, and return their handles when all of them serve: what the trainer takes as
    `vllm_engines`.

    ray_options: those of Ray for each actor (`num_gpus`, `scheduling_strategy`, `num_cpus`), one mapping for all or one
    for each. ready_timeout_s: how long Ray's placement and the start may take; then, or when one fails, all are ended.
    engine_options: those of `Engine`.
    """
    if num_engines < 1:
        raise ConfigError(f"num_engines: got {num_engines}, expected at least 1")
    if isinstance(ray_options, Mapping) or ray_options is None:
        ray_options = [ray_options or {}] * num_engines
    if len(ray_options) != num_engines:
        raise InvalidRequestError(
            f"ray_options: got {len(ray_options)} entries, expected one for each of {num_engines} engines"
        )
    engines = [
        start_actor(
            OpenRLHFEngine,
            model_path,
            ray_options={"max_concurrency": 1000, **options},
            tp_size=tensor_parallel_size,
            seed=(seed + SEED_STRIDE * number) % (1 << 62),
            **engine_options,
        )
        for number, options in enumerate(ray_options)
    ]
    try:
        serving = [engine.address.remote() for engine in engines]
        wait_for(serving, f"{num_engines} engines of OpenRLHF", timeout_s=ready_timeout_s)
    except BaseException:
        end_actors(engines)
        raise
    return engines


class OpenRLHFEngine:
    """An actor class. Its methods are awaited in the actor, so that calls overlap.

    Weights come tensor by tensor, each announced by a call. They are one version: the first call opens a session, and
    the one with `empty_cache=True`, which OpenRLHF sends with the last tensor, commits it. Meanwhile the old version
    generates, and a tensor that is refused leaves it as it is.
    """

    def __init__(self, model_path: str, **engine_options: Any) -> None:
        options: dict[str, Any] = {"executor": "local", **engine_options}
        self.engine = Engine(model_path, **options)
        self._group: str | None = None
        self._turn = asyncio.Lock()
        self._in_session = False
        self._asked: deque[asyncio.Task[list[RequestOutput]]] = deque()

    async def address(self) -> str:
        """Where a `WeightPublisher` connects, which sends all tensors in one call."""
        return self.engine.address

    # ---- weights -----------------------------------------------------------------------------------------------------

    async def init_process_group(
        self,
        master_address: str,
        master_port: int | str,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str = "nccl",
        use_ray: bool = False,
    ) -> None:
        """Join the trainer's group of `torch.distributed`, in which the trainer is rank 0."""
        if use_ray:
            raise TransportError(
                "init_process_group: got use_ray=True, expected a group of torch.distributed; leave out "
                "--vllm_sync_with_ray"
            )
        if self._in_session:  # of a trainer that has died in the middle of an update
            self._in_session = False
            await self.engine.async_abort_weight_update()
        await self.engine.async_init_weights_update_group(
            master_address, master_port, rank_offset, world_size, group_name, backend
        )
        self._group = group_name

    async def update_weight(
        self,
        name: str,
        dtype: str | torch.dtype,
        shape: Sequence[int],
        empty_cache: bool = False,
    ) -> None:
        """Receive one tensor that rank 0 of the group broadcasts; with `empty_cache` the version is complete."""
        if self._group is None:
            raise WeightUpdateError(
                "update_weight: got no group, expected one; call init_process_group first"
            )
        group = self._group
        async with self._turn:
            await self._begin()
            await self._staged(
                self.engine.async_update_weights_from_distributed(
                    [name], [dtype], [list(shape)], group_name=group
                ),
                last=empty_cache,
            )

    async def update_weight_cuda_ipc(
        self,
        name: str,
        dtype: str | torch.dtype,
        shape: Sequence[int],
        ipc_handles: Mapping[str, Any],
        empty_cache: bool = False,
    ) -> None:
        """Take one tensor out of the trainer's memory on the GPU that this actor shares with it.

        ipc_handles: for each GPU, by its UUID, what `torch.multiprocessing.reductions.reduce_tensor` gave there.
        """
        tensor = opened(ipc_handles, list(shape))
        async with self._turn:
            await self._begin()
            await self._staged(
                self.engine.async_update_weights_from_tensor([(name, tensor)]), last=empty_cache
            )

    async def _begin(self) -> None:
        if not self._in_session:
            await self.engine.async_begin_weight_update(strict=True)
            self._in_session = True

    async def _staged(self, update: Any, *, last: bool) -> None:
        try:
            await update
            if last:
                self._in_session = False
                await self.engine.async_end_weight_update()
        except BaseException:
            self._in_session = False
            await self.engine.async_abort_weight_update()
            raise

    async def reset_prefix_cache(self) -> None:
        """Nothing is left to do: prefixes of older weights are never read again."""

    # ---- memory and pauses -------------------------------------------------------------------------------------------

    async def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and KV cache back. Level 1 keeps the weights on the host, 2 drops them."""
        await self.engine.async_release_memory_occupation(keep_weights=level == 1)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take it again."""
        chosen: Any = None if tags is None else list(tags)
        await self.engine.async_resume_memory_occupation(chosen)

    async def pause_generation(self) -> None:
        """Freeze all requests as they are; they go on after `resume_generation`, with the weights of then."""
        await self.engine.async_pause_generation("in_place")

    async def resume_generation(self) -> None:
        """End a pause."""
        await self.engine.async_continue_generation()

    # ---- generation --------------------------------------------------------------------------------------------------

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling_params: Any
    ) -> RequestOutput:
        """All samples of one prompt; `sampling_params` as `outputs.sampling_call` takes them."""
        return (await self._generate([prompt_token_ids], sampling_params))[0]

    async def add_requests(
        self, sampling_params: Any, prompt_token_ids: Sequence[Sequence[int]]
    ) -> None:
        """Generate, and keep the results for the next `get_responses`."""
        task = asyncio.ensure_future(self._generate(prompt_token_ids, sampling_params))
        self._asked.append(task)
        try:
            await task
        except BaseException:
            with contextlib.suppress(ValueError):  # `get_responses` waits for it already
                self._asked.remove(task)
            raise

    async def get_responses(self) -> list[RequestOutput]:
        """The results of one `add_requests`, the oldest first."""
        if not self._asked:
            raise InvalidRequestError(
                "get_responses: got a call, but nothing was asked for; call add_requests first"
            )
        return await self._asked.popleft()

    async def generate_responses(
        self,
        prompt: str,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        num_samples: int = 1,
        images: Any = None,
    ) -> list[dict[str, Any]]:
        """Samples of a text as OpenRLHF's sample generator reads them; rewards are the trainer's to add.

        max_length: tokens of prompt and output together, where `sampling_params` has no `max_tokens`. Raises
        `RolloutError` for a sample that was ended from outside: OpenRLHF would train on it as on a whole one.
        """
        if images:
            raise InvalidRequestError(
                "generate_responses: got images, expected text alone; this engine has no multi-modal models"
            )
        ids: list[int] = hf_tokenizer(prompt, add_special_tokens=False)["input_ids"]
        params, wants_logprobs = sampling_call(sampling_params)
        if params.setdefault("max_new_tokens", max_length - len(ids)) < 1:
            raise InvalidRequestError(
                f"generate_responses: got a prompt of {len(ids)} tokens and room for {max_length}, expected room for "
                "an answer; raise max_len, or leave out longer prompts"
            )
        params["n"] = num_samples
        results = await self.engine.async_generate(
            input_ids=ids, sampling_params=params, return_logprob=wants_logprobs
        )
        output = request_output(results if num_samples > 1 else [results], ids)
        return [response(prompt, label, ids, sample) for sample in output.outputs]

    @property
    def _longest(self) -> int:
        """What vLLM's `max_tokens=None` means: until the context is full."""
        return int(self.engine.status().resolved["context_length"] or 0)

    async def get_num_unfinished_requests(self) -> int:
        """Requests that run or wait."""
        status = await self.engine.async_status()
        return status.num_running + status.num_waiting

    async def shutdown(self) -> None:
        """End the engine; safe to call twice."""
        await self.engine.async_shutdown()

    async def _generate(
        self, prompts: Sequence[Sequence[int]], sampling_params: Any
    ) -> list[RequestOutput]:
        params, wants_logprobs = sampling_call(sampling_params)
        params.setdefault("max_new_tokens", self._longest)
        num_samples = int(params.get("n", 1))
        rows = [[int(token) for token in ids] for ids in prompts]
        results = await self.engine.async_generate(
            input_ids=rows, sampling_params=params, return_logprob=wants_logprobs
        )
        return [
            request_output(results[first : first + num_samples], ids)
            for ids, first in zip(rows, range(0, len(results), num_samples), strict=True)
        ]


def opened(ipc_handles: Mapping[str, Any], shape: list[int]) -> torch.Tensor:
    """The tensor behind the handle of this process's GPU; nothing but torch's own rebuilding is called."""
    own = {
        str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())
    }
    found = [(ipc_handles[gpu], i) for gpu, i in own.items() if gpu in ipc_handles]
    found += [
        (ipc_handles[f"GPU-{gpu}"], i) for gpu, i in own.items() if f"GPU-{gpu}" in ipc_handles
    ]
    if not found:
        raise TransportError(
            f"update_weight_cuda_ipc: got handles of {', '.join(sorted(ipc_handles)) or 'no GPU'}, expected one of "
            f"{', '.join(own) or 'none: this process has no GPU'}; place the actor on the trainer's GPU, or use a group"
        )
    (rebuild, arguments), device = found[0]
    if f"{rebuild.__module__}.{rebuild.__name__}" != _REBUILD:
        raise TransportError(
            f"update_weight_cuda_ipc: got a handle that is rebuilt by {rebuild!r}, expected {_REBUILD}; send "
            "what reduce_tensor gives"
        )
    values = list(arguments)
    values[6] = device  # the sender counts its GPUs in its own way
    tensor: torch.Tensor = rebuild(*values)
    if list(tensor.shape) != shape:
        raise TransportError(
            f"update_weight_cuda_ipc: got a tensor of shape {list(tensor.shape)}, expected {shape}"
        )
    return tensor
