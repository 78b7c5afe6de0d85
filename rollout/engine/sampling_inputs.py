"""What callers pass as `sampling_params`: dictionaries, `SamplingParams`, and transformers' `GenerationConfig`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import InvalidRequestError
from ..sampling_params import SamplingParams

#: Fields of `GenerationConfig` that mean the same here, and their names here.
_SAME = {
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "repetition_penalty": "repetition_penalty",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
}
_ONLY_WHEN_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_DEFAULT_TOP_K = 50
"""What transformers takes where a sampling configuration names none."""
_DEFAULT_MAX_LENGTH = 20
"""What older versions of transformers fill in where a configuration names none."""
#: Fields that say nothing about which tokens come out.
_WITHOUT_EFFECT = frozenset(
    {
        *("max_length", "min_length", "do_sample", "transformers_version", "_from_model_config"),
        *("pad_token_id", "bos_token_id", "decoder_start_token_id", "early_stopping"),
        *("length_penalty", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "remove_invalid_values", "compile_config", "low_memory"),
        *("disable_compile", "prefill_chunk_size", "continuous_batching_config", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight"),
        *("assistant_lookbehind", "target_lookbehind", "max_matching_ngram_size"),
        *("prompt_lookup_num_tokens", "use_mtp"),
    }
)
#: Values other than None and False by which a field asks for nothing.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}


def read_sampling_params(value: Any, num_prompt_tokens: int) -> tuple[SamplingParams, int | None]:
    """The parameters, and what `logprobs` in them asks for: None, or how many top tokens beside the drawn one's.

    Raises `InvalidRequestError` for what cannot be run.
    """
    if type(value).__name__ == "GenerationConfig" and hasattr(value, "to_dict"):
        return SamplingParams.from_dict(_from_generation_config(value, num_prompt_tokens)), None
    if not isinstance(value, Mapping) or "logprobs" not in value:
        return SamplingParams.from_dict(value), None
    rest = {name: item for name, item in value.items() if name != "logprobs"}
    return SamplingParams.from_dict(rest), _num_logprobs(value["logprobs"])


def _num_logprobs(value: Any) -> int | None:
    if value is None or value is False:
        return None
    if value is True:
        return 0
    if not isinstance(value, int) or value < 0:
        raise InvalidRequestError(
            f"sampling parameter logprobs: got {value!r}, expected true, false or how many of the most likely tokens; "
            "leave it out for none"
        )
    return value


def _from_generation_config(config: Any, num_prompt_tokens: int) -> dict[str, Any]:
    """As `model.generate` of transformers means it: greedy unless `do_sample`, and `top_k` 50 unless it is said."""
    fields = {name: item for name, item in config.to_dict().items() if item is not None}
    params = {ours: fields[theirs] for theirs, ours in _SAME.items() if theirs in fields}
    if fields.get("do_sample"):
        params |= {name: fields[name] for name in _ONLY_WHEN_SAMPLING if name in fields}
        params.setdefault("top_k", _DEFAULT_TOP_K)
    else:
        params["temperature"] = 0.0
    if "stop_token_ids" in params:
        params["stop_token_ids"] = _end_ids(params["stop_token_ids"])
    length = fields.get("max_length", _DEFAULT_MAX_LENGTH)
    if "max_new_tokens" not in params and length != _DEFAULT_MAX_LENGTH:
        params["max_new_tokens"] = max(0, length - num_prompt_tokens)
    if "min_new_tokens" not in params and fields.get("min_length"):
        params["min_new_tokens"] = max(0, fields["min_length"] - num_prompt_tokens)
    known = {*_SAME, *_ONLY_WHEN_SAMPLING, *_WITHOUT_EFFECT}
    for name, item in fields.items():
        if name not in known and item is not False and item != _NEUTRAL.get(name, []):
            raise InvalidRequestError(
                f"GenerationConfig: got {name}={item!r}, which is not supported; leave it out"
            )
    return params


def _end_ids(value: Any) -> Any:
    """End tokens of a configuration, where -1 stands for none."""
    ids = [value] if isinstance(value, int) else value
    known = [token for token in ids if not (isinstance(token, int) and token < 0)]
    if len(known) < len(ids):
        warnings.warn(
            f"GenerationConfig: end-of-sequence ids below 0 are ignored (got {value!r})",
            stacklevel=1,
        )
    return known
