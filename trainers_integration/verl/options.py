"""What verl's rollout configuration asks for, as options of `Engine`; what this engine cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout.errors import ConfigError

NAME = "rollout_sync"
"""Of the rollout and of the checkpoint engine, in verl's configuration."""

_LOAD_FORMATS = {"auto": "auto", "safetensors": "auto", "hf": "auto", "dummy": "dummy"}

SEED_STRIDE = 1 << 32
"""Between the seeds of two replicas; verl's own seeds are smaller, so two jobs do not share streams either."""

LONGEST_PAUSE_S = 86_400.0
"""verl resumes what it paused, and its actors end with the job: shorter limits could only end a long training step."""


def engine_options(
    config: Any, model_path: str, replica_rank: int, *, on_gpu: bool
) -> dict[str, Any]:
    """Options of the `Engine` of one replica.

    `config.engine_kwargs["rollout_sync"]` holds any others, which win. A replica's seed is its own: with the same one,
    two replicas would draw the same samples of a prompt that both of them got. Raises `ConfigError` for everything at
    once that cannot be honoured.
    """
    refuse_unsupported(config)
    options: dict[str, Any] = {
        "model_path": model_path,
        "executor": "local",
        "load_format": _LOAD_FORMATS[config.load_format],
        "dtype": config.dtype,
        "tp_size": config.tensor_model_parallel_size,
        "seed": (config.seed + SEED_STRIDE * replica_rank) % (1 << 62),
        "context_length": config.max_model_len,
        "max_running_requests": config.max_num_seqs,
        "enable_prefix_cache": config.enable_prefix_caching,
        "disable_cuda_graph": config.enforce_eager,
        "skip_tokenizer_init": config.skip_tokenizer_init,
        "pause_lease_s": LONGEST_PAUSE_S,
        "progress_timeout_s": LONGEST_PAUSE_S,
    }
    if config.enable_chunked_prefill:
        options["chunked_prefill_size"] = config.max_num_batched_tokens
    if on_gpu:  # on a CPU it would be a share of the whole machine's memory
        options["mem_fraction_static"] = config.gpu_memory_utilization
    return {**options, **engine_kwargs(config)}


def engine_kwargs(config: Any) -> dict[str, Any]:
    """`engine_kwargs["rollout_sync"]` of a rollout configuration; empty: there are none."""
    found: Mapping[str, Any] | None = (config.engine_kwargs or {}).get(NAME)
    return dict(found or {})


def refuse_unsupported(config: Any) -> None:
    """Raise one `ConfigError` that names every option which asks for what this engine does not do."""
    problems = [
        f"{name}={getattr(config, name)!r}, expected {expected!r}"
        for name, expected in (
            ("data_parallel_size", 1),
            ("pipeline_model_parallel_size", 1),
            ("expert_parallel_size", 1),
            ("quantization", None),
            ("enable_rollout_routing_replay", False),
        )
        if getattr(config, name) != expected
    ]
    if config.load_format not in _LOAD_FORMATS:
        problems.append(
            f"load_format={config.load_format!r}, expected one of {', '.join(_LOAD_FORMATS)}"
        )
    mtp = config.mtp
    if mtp is not None and mtp.enable and mtp.enable_rollout:
        problems.append("mtp.enable_rollout=True, expected False")
    if problems:
        raise ConfigError(
            f"actor_rollout_ref.rollout: got {'; '.join(problems)}; more replicas stand in for data parallelism, the "
            "rest this engine does not have"
        )
