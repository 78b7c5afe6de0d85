"""Which known name an unknown one was probably meant to be: by meaning first, by letters last."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

#: Names of one meaning in this field, by those who use them: SGLang, vLLM, transformers, TRL, verl, and this engine.
SYNONYMS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            ("lr", "learning_rate"),
            ("model", "model_path", "model_name", "model_name_or_path", "checkpoint", "path"),
            ("tokenizer", "tokenizer_path", "tokenizer_name"),
            ("skip_tokenizer_init", "skip_tokenizer"),
            ("tp", "tp_size", "tensor_parallel_size", "tensor_model_parallel_size", "num_gpus"),
            ("context_length", "max_model_len", "max_seq_len", "max_sequence_length", "max_length"),
            ("max_running_requests", "max_num_seqs", "max_batch_size", "max_num_requests"),
            ("chunked_prefill_size", "max_num_batched_tokens", "max_prefill_tokens"),
            ("mem_fraction_static", "gpu_memory_utilization", "mem_fraction", "memory_fraction"),
            ("kv_cache_bytes", "kv_cache_memory_bytes", "kv_cache_size", "swap_space"),
            ("block_size", "page_size"),
            ("enable_prefix_cache", "enable_prefix_caching", "disable_radix_cache"),
            ("executor", "distributed_executor_backend", "backend"),
            ("start_timeout_s", "startup_timeout", "init_timeout", "start_timeout"),
            ("request_timeout_s", "timeout", "request_timeout", "timeout_s"),
            ("listen", "host", "port", "address", "bind"),
            ("dtype", "torch_dtype", "precision"),
            ("seed", "sampling_seed", "random_seed"),
            (
                *("max_new_tokens", "max_tokens", "max_completion_tokens", "max_length"),
                *("max_gen_len", "max_response_length", "max_completion_length"),
            ),
            ("min_new_tokens", "min_tokens", "min_length"),
            (
                *("n", "num_return_sequences", "num_samples", "num_generations", "best_of"),
                *("samples_per_prompt", "group_size", "rollout_n"),
            ),
            ("temperature", "do_sample", "temp"),
            ("top_p", "nucleus", "p"),
            ("top_k", "k"),
            ("stop", "stop_strings", "stop_sequences", "stop_words", "until"),
            ("stop_token_ids", "eos_token_id", "stop_tokens", "end_ids"),
            ("repetition_penalty", "repeat_penalty"),
            ("no_stop_trim", "include_stop_str_in_output"),
            ("return_logprob", "logprobs", "return_log_probs", "return_logprobs"),
            ("top_logprobs_num", "top_logprobs", "num_logprobs"),
            ("input_ids", "prompt_token_ids", "prompt_ids", "token_ids"),
            ("prompt", "text", "prompts"),
            ("rid", "request_id"),
            ("kl_coef", "beta", "kl_beta", "init_kl_coef", "kl_coefficient", "kl_loss_coef"),
            ("clip_low", "epsilon", "clip_eps", "cliprange", "clip_ratio_low", "clip_ratio"),
            ("clip_high", "epsilon_high", "clip_ratio_high"),
            ("importance_cap", "is_cap", "tis_cap", "vllm_importance_sampling_cap"),
            ("max_grad_norm", "grad_clip", "gradient_clip", "clip_grad"),
            ("epochs", "num_epochs", "ppo_epochs", "num_iterations", "num_train_epochs"),
            ("minibatches", "num_minibatches", "mini_batch_size", "ppo_mini_batch_size"),
            ("steps", "max_steps", "num_steps", "total_steps", "num_train_steps"),
            ("lr_warmup_steps", "warmup_steps", "num_warmup_steps"),
            ("prompts_per_step", "batch_size", "train_batch_size", "rollout_batch_size"),
            ("weight_version", "version", "label", "global_step"),
        ),
    )
)


def best_match(name: str, known: Sequence[str], *, cutoff: float = 0.6) -> str | None:
    """The one of `known` that `name` most likely stands for, or None.

    In this order: the same but for case and dashes, a synonym, a name with the same words, whose initials it is, or
    that is spelled almost so, itself or a synonym of it.
    """
    plain = _plain(name)
    by_plain = {_plain(key): key for key in reversed(known)}
    if plain in by_plain:
        return by_plain[plain]
    for group in SYNONYMS:
        if plain in group:
            for key in known:
                if _plain(key) in group:
                    return key
    words = set(plain.split("_"))
    holders = [key for key in known if words <= set(_plain(key).split("_"))]
    if holders:
        return min(holders, key=len)
    for key in known:
        parts = _plain(key).split("_")
        if len(parts) > 1 and plain == "".join(part[:1] for part in parts):
            return key
    close = difflib.get_close_matches(plain, list(by_plain), n=1, cutoff=cutoff)
    if close:
        return by_plain[close[0]]
    other_names = {
        alias: key
        for group in SYNONYMS
        for key in known
        if _plain(key) in group
        for alias in sorted(group)
    }
    close = difflib.get_close_matches(plain, list(other_names), n=1, cutoff=0.85)
    return other_names[close[0]] if close else None


def did_you_mean(name: str, known: Sequence[str], *, cutoff: float = 0.6) -> str:
    """The end of an error message: the name that was probably meant, or all of them."""
    match = best_match(name, known, cutoff=cutoff)
    return f"did you mean {match!r}?" if match is not None else f"known are {', '.join(known)}"


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_")
