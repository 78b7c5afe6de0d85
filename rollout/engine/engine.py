"""`Engine`: what a trainer's author imports."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from weight_sync.publisher.publisher import WeightPublisher
from weight_sync.wire.cancellation import threaded
from weight_sync.wire.keys import check_private
from weight_sync.wire.listening import check_free
from weight_sync.wire.process import Home, close_forgotten

from ..config import ExecutorKind, KvPolicy, LoadFormat
from ..errors import InvalidRequestError
from ..protocol.commands import (
    MEMORY_TAGS,
    AbortRequests,
    ContinueGeneration,
    Done,
    FlushCache,
    FreezeGc,
    GetStatus,
    MemoryChanged,
    MemoryTag,
    PauseGeneration,
    PauseMode,
    ProfileWritten,
    ReleaseMemory,
    ResumeMemory,
    StartProfile,
    Status,
    StopProfile,
)
from ..tokenizer import Tokenizer
from .executors.choice import make_executor
from .executors.executor import Executor
from .executors.remote import RemoteExecutor
from .experts import ExpertCalls
from .group_weights import GroupWeightCalls
from .loop.checks import check_start
from .many import ManyCalls
from .model_folder import remove_model_folder, write_model_folder
from .options import OPTIONS, engine_config
from .pooling import PoolingCalls
from .tuning import TuningCalls
from .twins import Asking, asks, awaitable

logger = logging.getLogger(__name__)


COLLECTIVE_CALLS = (
    "save_sharded_model",
    "flush_cache",
    "freeze_gc",
    "start_profile",
    "stop_profile",
    "start_expert_distribution_record",
    "stop_expert_distribution_record",
    "dump_expert_distribution_record",
    "release_memory_occupation",
    "resume_memory_occupation",
)


class Engine(PoolingCalls, ManyCalls, GroupWeightCalls, ExpertCalls, TuningCalls):
    """Generates rollouts from a model whose weights a trainer replaces while it runs.

    Its options are the fields of `rollout.config.EngineConfig`, which says what they mean; names that only the common
    dialect has are translated, ignored with a warning, or refused with the reason (`dialect.py`). `executor="inline"`
    runs the loop on a thread of this process, `"local"` in a child process. Every method may be called from any
    thread; each has an `async_` twin. Use it as a context manager, or call `shutdown()`.

        with Engine("checkpoints/qwen3-tiny", executor="local") as engine:
            engine.generate("2 + 2 =", {"max_new_tokens": 8, "temperature": 0})
            WeightPublisher(engine).publish(model)
    """

    _remove_folder: Callable[[], object] | None = None
    """Removes the folder that was written for this engine alone; None: it has none."""

    def __init__(
        self,
        model_path: str | Path,
        *,
        tokenizer_path: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        load_format: LoadFormat = "auto",
        await_first_update: bool | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        tp_size: int = 1,
        ep_size: int = 1,
        seed: int | None = None,
        context_length: int | None = None,
        max_running_requests: int = 256,
        kv_cache_bytes: int | None = None,
        mem_fraction_static: float | None = None,
        block_size: int | None = None,
        chunked_prefill_size: int | None = None,
        attention_backend: str = "auto",
        overlap: bool | None = None,
        disable_cuda_graph: bool = False,
        disable_custom_all_reduce: bool = False,
        deterministic: bool = False,
        enable_return_routed_experts: bool = False,
        enable_prefix_cache: bool = True,
        executor: ExecutorKind = "inline",
        weight_version: str | int | None = None,
        kv_policy: KvPolicy = "keep",
        keep_previous_weights: bool = False,
        pause_lease_s: float = 300.0,
        listen: str | None = None,
        insecure: bool = False,
        num_threads: int | None = None,
        log_level: str | None = None,
        log_interval_s: float | None = None,
        start_timeout_s: float = 120.0,
        request_timeout_s: float = 600.0,
        progress_timeout_s: float = 600.0,
        ray_num_cpus: float = 1.0,
        ray_num_gpus: float | None = None,
        ray_node_id: str | None = None,
        ray_placement_group: str | None = None,
        ray_first_bundle: int = 0,
        **others: Any,
    ) -> None:
        given = locals()
        options = {name: given[name] for name in OPTIONS}
        self.config = engine_config(model_path, {**options, **others})
        self._begin()

    def _begin(self) -> None:
        self.model_path = self.config.model_path
        self._home = Home("the engine")
        self._maybe_executor = None
        self._tokenizer = None
        check_start(self.config)
        if not self.config.skip_tokenizer_init:
            self._tokenizer = Tokenizer(self.config.tokenizer_path or self.config.model_path)
        if self.config.executor != "ray":  # an actor listens on its own node
            check_free(self.config.listen)
            if self.config.listen is not None and not self.config.insecure:
                check_private(self.config.listen)
        self._own(self._start())
        logger.info("engine ready: %s", self.status().resolved)

    @classmethod
    def from_model(cls, model: torch.nn.Module, tokenizer: Any = None, **options: Any) -> Self:
        """An engine for a transformers model in this process; returns when it serves the model's present parameters.

        No weights are written to disk: the engine gets the configuration and the tokenizer in a private folder, which
        goes with it, and the parameters as any later update. `dtype` is the parameters' unless `options`, which are
        those of the constructor, say otherwise. Without a `tokenizer` it works on token ids.
        """
        folder = write_model_folder(model, tokenizer)
        remove = functools.partial(remove_model_folder, folder, os.getpid())
        label = options.get("weight_version")
        options.setdefault("dtype", next(model.parameters()).dtype)
        if tokenizer is None:
            options.setdefault("skip_tokenizer_init", True)
        try:
            engine = cls(folder, **{**options, "load_format": "dummy"})
        except BaseException:
            remove()
            raise
        engine._remove_folder = weakref.finalize(engine, remove)
        try:  # A publisher of its own: one that stays open holds the engine, which may be dropped.
            with WeightPublisher(engine, timeout_s=engine.config.request_timeout_s) as publisher:
                publisher.publish(model, label=None if label is None else str(label))
        except BaseException:
            engine.shutdown()
            raise
        return engine

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        tokenizer_path: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        timeout_s: float = 30.0,
    ) -> Engine:
        """A client of an engine or a pool that another process started, with every method that it has there.

        address: its `address`. tokenizer_path: a folder of this machine; None: the engine's own. `shutdown()`, and the
        end of a `with` block, close the connection, and the engine goes on. `EngineDiedError` when nobody answers
        within `timeout_s`, and later when the connection is lost.
        """
        executor = RemoteExecutor(address, timeout_s=timeout_s)
        engine = Engine.__new__(Engine)
        engine._home = Home("the engine")
        engine._own(executor)
        engine._tokenizer = None
        engine.config = executor.config
        engine.model_path = executor.config.model_path
        if not (skip_tokenizer_init or executor.config.skip_tokenizer_init):
            folder = tokenizer_path or executor.config.tokenizer_path or executor.config.model_path
            try:
                engine._tokenizer = Tokenizer(folder)
            except BaseException:
                engine.shutdown()
                raise
        return engine

    def _own(self, executor: Executor) -> None:
        self._maybe_executor = executor
        # An engine that nobody holds any more ends, and all end before the interpreter does: native code
        # on a thread that outlives it would abort the process.
        self._finalizer = weakref.finalize(self, close_forgotten, executor.close, self._home)

    def _start(self) -> Executor:
        return make_executor(self.config)

    @property
    def address(self) -> str:
        """Where a `WeightPublisher` or a client of another process connects."""
        return self._executor.address

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, None with `skip_tokenizer_init`."""
        return None if self._tokenizer is None else self._tokenizer.inner

    @asks
    def status(self) -> Asking[Status]:
        """Versions, counts, sizes, the resolved configuration, and the process of the engine loop."""
        status: Status = yield GetStatus()
        return status

    async_status = awaitable(status)

    @asks
    def pause_generation(
        self, mode: PauseMode = "abort", lease_s: float | None = None
    ) -> Asking[int]:
        """Stop generating until `continue_generation`, or until the lease of `lease_s` seconds ends.

        mode "abort" ends all requests with their partial results; "retract" drops the KV of running requests and queues
        them again; "in_place" freezes them as they are. Requests that come meanwhile wait. lease_s: None for the
        configured `pause_lease_s`; another pause replaces it. Returns how many requests it touched.
        """
        answer: Done = yield self._pause(mode, lease_s)
        return answer.count

    async_pause_generation = awaitable(pause_generation)

    @asks
    def continue_generation(self) -> Asking[None]:
        """End a pause; no error if there is none."""
        yield ContinueGeneration()

    async_continue_generation = awaitable(continue_generation)

    @asks
    def abort_request(self, rid: str | None = None, abort_all: bool = False) -> Asking[int]:
        """End requests; their callers get the partial results with finish reason "abort". Returns how many ended."""
        answer: Done = yield _abort(rid, abort_all)
        return answer.count

    async_abort_request = awaitable(abort_request)

    @asks
    def flush_cache(self, recompute: bool = False) -> Asking[None]:
        """Drop all cached prefixes. Raises `RolloutError` while requests are pending; with `recompute` those that run,
        frozen ones too, lose their keys and values as well, and compute them again before their next token."""
        yield FlushCache(recompute=recompute)

    async_flush_cache = awaitable(flush_cache)

    @asks
    def start_profile(self) -> Asking[None]:
        """Record what the engine's processes do until `stop_profile`: ranges for steps, kinds of layers, phases of an
        update (docs/gpu.md). Raises `RolloutError` while a profile is under way there, be it one of torch's."""
        yield StartProfile()

    async_start_profile = awaitable(start_profile)

    @asks
    def stop_profile(self) -> Asking[str]:
        """Write a trace that Perfetto opens; the path of rank 0's, on its host, where every rank writes its own."""
        answer: ProfileWritten = yield StopProfile()
        return answer.path

    async_stop_profile = awaitable(stop_profile)

    @asks
    def freeze_gc(self) -> Asking[None]:
        """Collect garbage once and leave all that lives now out of later collections, which then are short."""
        yield FreezeGc()

    async_freeze_gc = awaitable(freeze_gc)

    def collective_rpc(self, method: str, **arguments: Any) -> Any:
        """Call by name what every rank carries out: the common dialect's way to `save_sharded_model` and its kin."""
        if method not in COLLECTIVE_CALLS:
            raise InvalidRequestError(
                f"collective_rpc: got {method!r}, expected one of {', '.join(COLLECTIVE_CALLS)}"
            )
        return getattr(self, method)(**arguments)

    async_collective_rpc = threaded(collective_rpc)

    @asks
    def release_memory_occupation(
        self, tags: Sequence[MemoryTag] | None = None, keep_weights: bool = False
    ) -> Asking[MemoryChanged]:
        """Give memory back to the system: "weights", "kv_cache", or with None both. Addresses stay, and with them the
        captured decode steps; "cuda_graph" gives their memory back too, and they are captured anew, in seconds, once
        everything has been resumed. Whatever was released, nothing is generated until then.

        Requests that run are queued again and wait; none is lost. Released weights are gone: after
        `resume_memory_occupation` the engine generates only when a complete update has committed (the label of its
        parts must be the same). With `keep_weights` they wait in memory of the host, pinned where the engine is on a
        GPU, and the same version serves again once they are resumed. Releasing what is released changes nothing.
        Returns the tags that changed and their bytes, all ranks together.
        """
        answer: MemoryChanged = yield ReleaseMemory(
            tags=memory_tags(("weights", "kv_cache") if tags is None else tags),
            keep_weights=keep_weights,
        )
        return answer

    async_release_memory_occupation = awaitable(release_memory_occupation)

    @asks
    def resume_memory_occupation(
        self, tags: Sequence[MemoryTag] | None = None
    ) -> Asking[MemoryChanged]:
        """Make released memory usable again; resuming what is there changes nothing."""
        answer: MemoryChanged = yield ResumeMemory(tags=memory_tags(tags))
        return answer

    async_resume_memory_occupation = awaitable(resume_memory_occupation)

    def _pause(self, mode: PauseMode, lease_s: float | None) -> PauseGeneration:
        if mode not in ("abort", "retract", "in_place"):
            raise InvalidRequestError(
                f"mode: got {mode!r}, expected 'abort', 'retract' or 'in_place'"
            )
        lease = self.config.pause_lease_s if lease_s is None else lease_s
        if not (isinstance(lease, int | float) and 0 < lease <= 86_400):
            raise InvalidRequestError(
                f"lease_s: got {lease!r}, expected more than 0 seconds, and at most a day (86400)"
            )
        return PauseGeneration(mode=mode, lease_s=lease)

    def shutdown(self) -> None:
        """End the engine and give back its memory, threads, process and sockets; safe to call twice.

        In a forked child it does nothing: the engine is its parent's.
        """
        if not self._home.here:
            return
        executor, self._maybe_executor = self._maybe_executor, None
        if executor is None:
            return
        self._finalizer.detach()
        clients = [self.__dict__.pop(name, None) for name in ("_group_updates", "_publisher")]
        try:
            for client in clients:
                if client is not None:
                    client.close()
        finally:
            executor.close()
            if self._remove_folder is not None:
                self._remove_folder()

    async_shutdown = threaded(shutdown)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        state = "shut down" if self._maybe_executor is None else self.config.executor
        return f"Engine({self.config.model_path!r}, {state})"


def _abort(rid: str | None, abort_all: bool) -> AbortRequests:
    if (rid is None) != abort_all:
        raise InvalidRequestError("abort_request: expected either rid=... or abort_all=True")
    if rid is not None and not isinstance(rid, str):
        raise InvalidRequestError(f"rid: got {type(rid).__name__}, expected the text of one id")
    return AbortRequests(rids=[] if rid is None else [rid], abort_all=bool(abort_all))


def memory_tags(tags: Sequence[MemoryTag] | None) -> list[MemoryTag]:
    """The tags that a caller means; `InvalidRequestError` for unknown ones."""
    if tags is not None and not isinstance(tags, Iterable):
        raise InvalidRequestError(
            f"tags: got {type(tags).__name__}, expected some of {', '.join(MEMORY_TAGS)}"
        )
    chosen: list[Any] = list(
        MEMORY_TAGS if tags is None else [tags] if isinstance(tags, str) else tags
    )
    unknown = [tag for tag in chosen if tag not in MEMORY_TAGS]
    if unknown:
        raise InvalidRequestError(f"tags: got {unknown}, expected some of {', '.join(MEMORY_TAGS)}")
    return chosen
