"""Arguments of the common dialect that this engine does not have by that name, and what becomes of each.

Where a name means something here it is translated; where leaving it out changes no result it is ignored, with one
warning; otherwise it is refused with the reason, unless its value asks for nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, InvalidRequestError

#: Arguments of `generate` that cannot be honoured, and why.
REFUSED_IN_GENERATE = {
    "image_data": "images are not supported",
    "audio_data": "audio is not supported",
    "video_data": "video is not supported",
    "modalities": "only text is supported",
    "mm_hashes": "only text is supported",
    "mm_content_hashes": "only text is supported",
    "lora_path": "LoRA adapters are not supported; publish the merged weights",
    "lora_id": "LoRA adapters are not supported; publish the merged weights",
    "custom_logit_processor": "custom logit processors are not supported",
    "require_reasoning": "reasoning grammars are not supported",
    "return_hidden_states": "hidden states are not supported",
    "return_bytes": "text is text; take output_ids for exact tokens",
    "return_entropy": "entropies are not computed",
    "session_params": "sessions are not supported; send the whole prompt, its beginning is found in the prefix cache",
    "bootstrap_host": "disaggregated prefill is not supported",
    "bootstrap_port": "disaggregated prefill is not supported",
    "bootstrap_room": "disaggregated prefill is not supported",
    "disagg_prefill_dp_rank": "disaggregated prefill is not supported",
    "data_parallel_rank": "an engine is one replica; a pool chooses the replica itself",
    "routed_dp_rank": "an engine is one replica; a pool chooses the replica itself",
    "extra_key": "it is cache_salt here",
}
_RANKS = ("data_parallel_rank", "routed_dp_rank")
#: Arguments of `generate` whose absence changes no result.
IGNORED_IN_GENERATE = (
    *("priority", "external_trace_header", "session_id", "conversation_id", "routing_key"),
    *("log_metrics", "no_logs", "background", "received_time"),
)

#: Options of the constructor that are an option here, under another name.
RENAMED_OPTIONS = {
    "random_seed": "seed",
    "page_size": "block_size",
    "enable_deterministic_inference": "deterministic",
}
#: Options of the constructor that ask for what is not here: the values that ask for nothing, and why not.
REFUSED_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "pp_size": ((1,), "pipeline parallelism is not supported; use tp_size"),
    "dp_size": ((1,), "an engine is one replica; use rollout.RolloutPool(num_replicas=...)"),
    "nnodes": ((1,), "an engine lives on one machine; use executor='ray' or rollout.RolloutPool"),
    "node_rank": ((0,), "an engine lives on one machine; use executor='ray' or rollout.RolloutPool"),
    "gpu_id_step": ((1,), "ranks take GPUs that follow one another"),
    "quantization": ((), "quantised weights are not supported"),
    "kv_cache_dtype": (("auto",), "the KV cache has the dtype of the model"),
    "cpu_offload_gb": ((0,), "offloading is not supported"),
    "max_total_tokens": ((), "the pool is sized in bytes; use kv_cache_bytes"),
    "max_queued_requests": ((), "the queue has no limit"),
    "enable_lora": ((), "LoRA adapters are not supported; publish the merged weights"),
    "lora_paths": ((), "LoRA adapters are not supported; publish the merged weights"),
    "speculative_algorithm": ((), "speculative decoding is not supported"),
    "speculative_draft_model_path": ((), "speculative decoding is not supported"),
    "disaggregation_mode": (("null",), "disaggregated prefill is not supported"),
    "is_embedding": ((), "every engine has encode, which does not scale to length 1"),
    "enable_multimodal": ((), "only text is supported"),
    "enable_custom_logit_processor": ((), "custom logit processors are not supported"),
    "enable_return_hidden_states": ((), "hidden states are not supported"),
    "enable_weights_cpu_backup": ((), "pass keep_weights=True to release_memory_occupation"),
    "delete_ckpt_after_loading": ((), "the engine never deletes a checkpoint"),
    "custom_weight_loader": ((), "weights come from safetensors, or from a WeightPublisher"),
    "revision": ((), "models are folders; fetch the revision first"),
    "json_model_override_args": (("{}",), "edit the folder's config.json"),
    "preferred_sampling_params": ((), "pass sampling_params to generate"),
    "allow_auto_truncate": ((), "prompts are never shortened; one that is too long is refused"),
    "stream_output": ((), "streams are cumulative"),
    "incremental_streaming_output": ((), "streams are cumulative"),
    "tokenizer_mode": (("auto",), "the tokenizer is what transformers makes of its folder"),
    "model_impl": (("auto",), "the models are this engine's own"),
}  # fmt: skip
#: Options of the constructor whose absence changes no result.
IGNORED_OPTIONS = (
    *("trust_remote_code", "served_model_name", "chat_template", "host", "port", "nccl_port"),
    *("dist_init_addr", "dist_timeout", "watchdog_timeout", "log_level_http", "log_requests"),
    *("log_requests_level", "show_time_cost", "enable_metrics", "crash_dump_folder"),
    *("decode_log_interval", "schedule_policy", "schedule_conservativeness", "max_prefill_tokens"),
    *("enable_mixed_chunk", "cuda_graph_max_bs", "cuda_graph_bs", "disable_cuda_graph_padding"),
    *("enable_p2p_check", "mm_attention_backend", "sampling_backend"),
    *("grammar_backend", "stream_interval", "sleep_on_idle", "download_dir", "warmups"),
    *("tokenizer_worker_num", "skip_server_warmup", "enable_torch_compile", "enable_nan_detection"),
    *("triton_attention_num_kv_splits", "disable_outlines_disk_cache", "context_parallel_size"),
)
#: What these ask for is so in any case.
ALWAYS_SO = ("enable_memory_saver", "is_generation")
_DTYPES = {"half": "float16", "float": "float32"}


def check_generate_argument(name: str, value: Any, call: str = "generate") -> bool:
    """Whether `generate`, or a `call` like it, knows this foreign argument.

    Raises `InvalidRequestError` where it asks for what is not here.
    """
    if name in REFUSED_IN_GENERATE:
        if not _asks_for_nothing(value) and not (name in _RANKS and value == 0):
            raise InvalidRequestError(
                f"{call}: got {name}={_shown(value)}, but {REFUSED_IN_GENERATE[name]}; leave it out"
            )
        return True
    if name in IGNORED_IN_GENERATE:
        if not _asks_for_nothing(value):
            warn_ignored(call, name)
        return True
    return False


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under this engine's names; None stands for the default. What is unknown stays as it is.

    Raises `ConfigError` for what cannot be honoured, and for two names of one thing that contradict each other.
    """
    ours: dict[str, Any] = {}
    for name, value in options.items():
        for key, translated in _translated(name, value).items():
            if key in ours and ours[key] != translated:
                raise ConfigError(
                    f"Engine: got {name}={_shown(value)} beside {key}={_shown(ours[key])}, expected one of the two"
                )
            ours[key] = translated
    return ours


def _translated(name: str, value: Any) -> dict[str, Any]:
    if value is None or name in ALWAYS_SO:
        return {}
    if name in RENAMED_OPTIONS:
        return {RENAMED_OPTIONS[name]: value}
    if name == "disable_radix_cache":
        return {"enable_prefix_cache": False} if value else {}
    if name == "disable_overlap_schedule":
        return {"overlap": False} if value else {}
    if name == "base_gpu_id":
        return {"device": f"cuda:{value}"} if value else {}
    if name == "dtype" and isinstance(value, str):
        return {name: _DTYPES.get(value, value)}
    if name in REFUSED_OPTIONS:
        neutral, reason = REFUSED_OPTIONS[name]
        if value is False or value in neutral or _asks_for_nothing(value):
            return {}
        raise ConfigError(f"Engine: got {name}={_shown(value)}, but {reason}; leave it out")
    if name in IGNORED_OPTIONS:
        if not _asks_for_nothing(value):
            warn_ignored("Engine", name)
        return {}
    return {name: value}


def warn_ignored(call: str, name: str) -> None:
    """Say that an argument does nothing here; Python shows the same warning once in a process."""
    warnings.warn(f"{call}: {name} has no effect on this engine and is ignored", stacklevel=1)


def _asks_for_nothing(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_asks_for_nothing(item) for item in value)
    return value is None or value is False or (isinstance(value, (str, Mapping)) and not value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
