"""Puts an engine together: reads the model's configuration, sizes the KV pool, loads the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets

import torch

from ...cache.kv_cache_manager import KVCacheManager
from ...config import (
    EngineConfig,
    ResolvedConfig,
    free_memory_bytes,
)
from ...errors import ConfigError
from ...models.loader_config import LoadConfig
from ...models.model_config import ModelConfig
from ...runner.backend_registry import resolve_backend
from ...runner.capture_progress import capture_progress
from ...runner.model_runner import ModelRunner
from ...scheduling.scheduler import Scheduler, SchedulerConfig
from ...tokenizer import Tokenizer, end_token_ids
from .admission import Admission
from .checks import DTYPES, check_attention, check_config, check_dtype, kv_block
from .core import EngineCore
from .kv_size import DeviceMemory, blocks_that_fit, device_memory, in_memory, measured
from .memory import give_back
from .postprocess import LOGITS_BYTES
from .ranks import RankGroups, RankSpec, check_whole_model, device_of

logger = logging.getLogger(__name__)


def build_core(config: EngineConfig, spec: RankSpec | None = None) -> EngineCore:
    """The engine loop of one rank, ready to run; all ranks call it at about the same time.

    Raises `ConfigError` or `CheckpointError` for what cannot be served.
    """
    check_config(config)
    spec = spec or RankSpec()
    model_config = spec.model or ModelConfig.from_folder(config.model_path)
    resolved = resolve(config, model_config, device_of(spec, config.device))
    ranks = RankGroups.join(
        spec,
        resolved.device,
        config.start_timeout_s,
        small_sums=not config.disable_custom_all_reduce,
    )
    # Free memory differs between ranks, and random seeds do; their block tables and draws must not.
    num_blocks = least(resolved.num_blocks, ranks)
    seed = ranks.order.broadcast_object(resolved.seed, type=int)
    resolved = _with_blocks(dataclasses.replace(resolved, seed=seed), model_config, num_blocks)
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = Tokenizer(config.tokenizer_path or config.model_path)
    with contextlib.ExitStack() as undo:
        runner = _runner(config, resolved, model_config, ranks, undo)
        resolved = _with_blocks(resolved, model_config, runner.kv_pool.memory.shape[1])
        core = _core(config, spec, resolved, runner, tokenizer, ranks)
        undo.pop_all()
    return core


def _core(
    config: EngineConfig,
    spec: RankSpec,
    resolved: ResolvedConfig,
    runner: ModelRunner,
    tokenizer: Tokenizer | None,
    ranks: RankGroups,
) -> EngineCore:
    """The loop around a runner that is ready."""
    scheduler = Scheduler(
        SchedulerConfig(
            max_running_requests=config.max_running_requests,
            chunked_prefill_size=resolved.chunked_prefill_size,
        ),
        KVCacheManager(
            num_blocks=resolved.num_blocks,
            block_size=resolved.block_size,
            enable_prefix_cache=config.enable_prefix_cache,
        ),
    )
    end_ids, outside = end_token_ids(config.model_path, tokenizer, resolved.vocab_size)
    if outside and spec.rank == 0:
        logger.warning(
            "end-of-sequence ids %s of %s are outside the model's vocabulary [0, %d) and are ignored; correct "
            "eos_token_id in config.json or generation_config.json, or the tokenizer",
            *(outside, config.model_path, resolved.vocab_size),
        )
    logger.info("resolved configuration: %s", resolved)
    return EngineCore(
        resolved,
        runner=runner,
        scheduler=scheduler,
        sampler=runner.sampler,
        admission=Admission(resolved, tokenizer, end_ids, runner.model_config.hidden_size),
        ranks=ranks,
    )


def _runner(
    config: EngineConfig,
    resolved: ResolvedConfig,
    model: ModelConfig,
    ranks: RankGroups,
    undo: contextlib.ExitStack,
) -> ModelRunner:
    """The runner with its weights and a pool that fits, and decode steps in one piece where the device has graphs.

    `undo` gives its memory back; that of several ranks goes with their processes, and one may wait for another on the
    device.
    """
    device, memory = resolved.device, device_memory(resolved.device)
    before = memory.free_bytes() if memory is not None else 0
    num_blocks = resolved.num_blocks
    if memory is not None:
        # As many as the largest step fills; the others come when it has been seen.
        num_blocks = min(num_blocks, _blocks_of_a_step(resolved))
    weights = model.num_parameters * DTYPES[resolved.dtype].itemsize // config.tp_size
    with in_memory(
        f"{weights:,} bytes of weights", device, "raise tp_size, or have others give memory back"
    ):
        runner = ModelRunner(
            model,
            dtype=DTYPES[resolved.dtype],
            device=device,
            block_size=resolved.block_size,
            num_blocks=num_blocks,
            tp=ranks.tp,
            ep_size=config.ep_size,
            keep_routes=config.enable_return_routed_experts,
            attention_backend=resolved.attention_backend,
            max_batch=min(config.max_running_requests, resolved.chunked_prefill_size),
            deterministic=config.deterministic,
        )
        if ranks.order.size == 1:
            undo.callback(give_back, runner)
        check_whole_model(runner.weight_map, ranks.order)
        runner.load_model(
            config.model_path,
            LoadConfig(
                load_format=config.load_format,
                seed=config.seed or 0,
                num_threads=min(16, os.cpu_count() or 1),
            ),
        )
    if memory is not None:
        _fit_pool(runner, resolved, ranks, memory, before)
    with in_memory(
        f"graphs of steps of up to {config.max_running_requests} requests",
        device,
        "lower mem_fraction_static, kv_cache_bytes or max_running_requests, or set disable_cuda_graph=True",
    ):
        if not config.disable_cuda_graph:
            with capture_progress() as progress:
                runner.init_device_graphs(resolved.context_length, progress)
    return runner


def _fit_pool(
    runner: ModelRunner,
    resolved: ResolvedConfig,
    ranks: RankGroups,
    memory: DeviceMemory,
    before: int,
) -> None:
    """Watch the largest step, then give the runner a pool of what is left; all ranks do it together."""
    config, device, num_tokens = resolved.user, resolved.device, resolved.chunked_prefill_size
    block_bytes = resolved.kv_cache_bytes // resolved.num_blocks
    num_rows = max(config.max_running_requests, LOGITS_BYTES // (4 * resolved.vocab_size))
    with in_memory(
        f"a step of {num_tokens} tokens",
        device,
        "lower chunked_prefill_size or max_running_requests, or raise tp_size",
    ):
        size = (num_tokens, num_rows, resolved.context_length)
        runner.compile_steps(*size)
        transient = measured(memory, lambda: runner.run_largest_step(*size))
    runner.kv_pool.free()
    free = memory.free_bytes()
    num_blocks = blocks_that_fit(
        config,
        device=device,
        before=before,
        free=free,
        transient=transient,
        block_bytes=block_bytes,
        longest=-(-resolved.context_length // resolved.block_size),
    )
    num_blocks = least(num_blocks, ranks)
    logger.info(
        "memory of %s: %d bytes taken by weights and libraries, %d by the largest step, %d for the KV pool, %d left",
        *(device, before - free, transient, num_blocks * block_bytes),
        free - transient - num_blocks * block_bytes,
    )
    with in_memory(
        f"a KV pool of {num_blocks * block_bytes:,} bytes",
        device,
        "lower kv_cache_bytes or mem_fraction_static",
    ):
        runner.resize_memory_pool(num_blocks)


def _blocks_of_a_step(resolved: ResolvedConfig) -> int:
    """Blocks that the prompts of the largest step fill, each of them at most as long as a context."""
    longest = min(resolved.context_length, resolved.chunked_prefill_size)
    num_prompts = -(-resolved.chunked_prefill_size // longest)
    return max(2, num_prompts * -(-longest // resolved.block_size))


def _with_blocks(resolved: ResolvedConfig, model: ModelConfig, num_blocks: int) -> ResolvedConfig:
    """The same with another number of blocks."""
    _, block_bytes = kv_block(resolved.user, model, DTYPES[resolved.dtype], resolved.device)
    return dataclasses.replace(
        resolved, num_blocks=num_blocks, kv_cache_bytes=num_blocks * block_bytes
    )


def least(value: int, ranks: RankGroups) -> int:
    """The least of all ranks' values; each of them calls it."""
    return int(ranks.order.all_gather(torch.tensor([value]), dim=0).min())


def resolve(
    config: EngineConfig, model: ModelConfig, device: str, gpu_bytes: int | None = None
) -> ResolvedConfig:
    """Settle everything that `config` leaves open, from the model and from this machine.

    gpu_bytes: free memory of a GPU that is to be imagined, for the sizes alone; None: the device as it is.
    """
    dtype = check_dtype(config, model)
    check_attention(config, model, DTYPES[dtype], device)
    context = config.context_length or model.max_position_embeddings
    if context > model.max_position_embeddings:
        raise ConfigError(
            f"context_length: got {context}, expected at most the model's {model.max_position_embeddings} positions"
        )
    on_gpu = device.startswith("cuda")
    block_size, block_bytes = kv_block(config, model, DTYPES[dtype], device)
    weight_bytes = model.num_parameters * DTYPES[dtype].itemsize // config.tp_size
    longest = -(-context // block_size)
    if gpu_bytes is None and on_gpu:
        gpu_bytes = torch.cuda.mem_get_info(device)[0]
    num_blocks = _num_blocks(config, longest, block_bytes, weight_bytes, gpu_bytes)
    return ResolvedConfig(
        user=config,
        dtype=dtype,
        device=device,
        context_length=context,
        num_blocks=num_blocks,
        block_size=block_size,
        chunked_prefill_size=config.chunked_prefill_size or (8192 if on_gpu else 2048),
        attention_backend=resolve_backend(config.attention_backend, device),
        overlap=on_gpu if config.overlap is None else config.overlap,
        kv_cache_bytes=num_blocks * block_bytes,
        vocab_size=model.vocab_size,
        weight_version=config.weight_version if config.weight_version is not None else "0",
        seed=secrets.randbits(63) if config.seed is None else config.seed,
        num_labels=model.num_labels,
    )


def _num_blocks(
    config: EngineConfig, longest: int, block_bytes: int, weight_bytes: int, gpu_bytes: int | None
) -> int:
    """Blocks that fit the budget, and no more than all running requests at full length can use.

    gpu_bytes: what is free on the GPU; None: the model is on a CPU.
    """
    budget = config.kv_cache_bytes
    beside = ""
    if budget is None:
        if gpu_bytes is not None:
            budget = int((config.mem_fraction_static or 0.85) * gpu_bytes) - weight_bytes
            beside = f" beside {weight_bytes:,} of weights, with {gpu_bytes:,} free on the GPU"
        else:
            budget = int((config.mem_fraction_static or 0.25) * free_memory_bytes())
        useful = config.max_running_requests * longest * block_bytes
        budget = min(budget, useful)
    num = budget // block_bytes
    if num < 2:
        raise ConfigError(
            f"KV pool: got {max(0, budget):,} bytes{beside}, expected at least two blocks of {block_bytes:,} bytes; "
            "raise kv_cache_bytes, mem_fraction_static or tp_size"
        )
    return num
