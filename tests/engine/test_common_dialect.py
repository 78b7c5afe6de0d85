"""Calls as trainers of the common dialect write them: names, positions, arguments that mean nothing here."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from rollout import Engine, RolloutPool
from rollout.config import EngineConfig
from rollout.engine.options import engine_config
from rollout.engine.sampling_inputs import read_sampling_params
from rollout.errors import ConfigError, InvalidRequestError
from rollout.pool.config import PoolConfig
from rollout.sampling_params import SamplingParams

GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, kv_cache_bytes=4 << 20) as engine:
        yield engine


def test_the_constructor_names_every_option_with_its_default() -> None:
    parameters = inspect.signature(Engine.__init__).parameters
    fields = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    named = [name for name in parameters if name not in ("self", "others")]
    assert named == list(fields)
    del fields["model_path"]
    # None stands for the default, whatever that is.
    assert all(parameters[name].default in (None, fields[name]) for name in fields)


def test_a_pool_names_its_own_options_with_their_defaults() -> None:
    parameters = inspect.signature(RolloutPool.__init__).parameters
    fields = {field.name: field.default for field in dataclasses.fields(PoolConfig)}
    assert {name: parameters[name].default for name in fields} == fields
    assert list(parameters) == ["self", "model_path", *fields, "options"]


def test_generate_takes_positions_as_the_common_dialect_has_them() -> None:
    both = [
        list(inspect.signature(call).parameters)
        for call in (Engine.generate, Engine.async_generate)
    ]
    assert both[0] == both[1]
    assert both[0][1:] == [
        *("prompt", "sampling_params", "input_ids", "image_data", "audio_data", "video_data"),
        *("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob"),
        *("lora_path", "custom_logit_processor", "return_hidden_states", "return_routed_experts"),
        *("stream", "bootstrap_host", "bootstrap_port", "bootstrap_room", "data_parallel_rank"),
        *("external_trace_header", "rid", "session_params", "priority"),
        *("return_text_in_logprobs", "return_token_times", "routed_experts_start_len"),
        *("timeout_s", "attention_mask","add_special_tokens", "flat_logprobs", "return_token_versions"),
        *("return_prompt_token_ids", "min_weight_version", "cache_salt", "input_embeds", "others"),
    ]  # fmt: skip


def test_foreign_arguments_are_refused_with_the_reason_or_ignored_with_a_warning(
    engine: Engine,
) -> None:
    expected = engine.generate(input_ids=[5, 9], sampling_params=GREEDY)["output_ids"]
    neutral: dict[str, Any] = {
        "image_data": [],
        "lora_path": [None],
        "return_hidden_states": False,
        "data_parallel_rank": 0,
        "logprob_start_len": None,
        "top_logprobs_num": None,
        "video_data": None,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = engine.generate(input_ids=[5, 9], sampling_params=GREEDY, **neutral)
    assert result["output_ids"] == expected
    with pytest.warns(UserWarning, match="priority has no effect"):
        result = engine.generate(input_ids=[5, 9], sampling_params=GREEDY, priority=3)
    assert result["output_ids"] == expected
    for name, value, reason in [
        ("session_params", {"id": "a"}, "whole prompt"),
        ("return_hidden_states", True, "hidden states"),
        ("data_parallel_rank", 1, "pool chooses"),
        ("extra_key", "a", "cache_salt here"),
    ]:
        with pytest.raises(InvalidRequestError, match=reason):
            engine.generate(input_ids=[5, 9], sampling_params=GREEDY, **{name: value})


def test_prompts_share_prefixes_within_a_salt_alone(engine: Engine) -> None:
    prompt = list(range(60, 110))

    def cached(salt: str | None) -> int:
        result = engine.generate(input_ids=prompt, sampling_params=GREEDY, cache_salt=salt)
        found: int = result["meta_info"]["cached_tokens"]
        return found

    assert [cached(salt) > 0 for salt in ("a", "b", None, "a", "b", None, "")] == [False] * 3 + [
        True
    ] * 4
    results = engine.generate(
        input_ids=[prompt, prompt], sampling_params=GREEDY, cache_salt=["a", "c"]
    )
    assert [result["meta_info"]["cached_tokens"] > 0 for result in results] == [True, False]
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        engine.generate(input_ids=prompt, cache_salt=7)


def test_text_is_another_name_for_prompt(engine: Engine) -> None:
    one, other = engine.generate("the", GREEDY), engine.generate(text="the", sampling_params=GREEDY)
    assert one["output_ids"] == other["output_ids"]
    assert engine.generate(text=[]) == []
    with pytest.raises(InvalidRequestError, match="prompt and text"):
        engine.generate("a", text="b")


def test_logprobs_among_the_sampling_parameters_ask_for_them(engine: Engine) -> None:
    for logprobs, top in ((True, 0), (0, 0), (2, 2)):
        params = {**GREEDY, "logprobs": logprobs}
        meta = engine.generate(input_ids=[5, 9], sampling_params=params)["meta_info"]
        assert len(meta["output_token_logprobs"]) == 4
        assert len(meta["output_top_logprobs"][0] or ()) == top if top else True
    meta = engine.generate(input_ids=[5, 9], sampling_params={**GREEDY, "logprobs": None})[
        "meta_info"
    ]
    assert "output_token_logprobs" not in meta
    with pytest.raises(InvalidRequestError, match="logprobs"):
        engine.generate(input_ids=[5, 9], sampling_params={**GREEDY, "logprobs": -1})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_new_tokens": 5}, {"max_new_tokens": 5, "temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, {"top_k": -1, "top_p": 0.9}),
        ({"do_sample": False, "top_p": 0.9}, {"temperature": 0.0}),
        ({"max_length": 12, "min_length": 8}, {"max_new_tokens": 9, "min_new_tokens": 5, "temperature": 0.0}),
        (
            {"do_sample": True, "top_k": 7, "num_return_sequences": 3, "eos_token_id": 9, "stop_strings": ["x"]},
            {"top_k": 7, "n": 3, "stop_token_ids": (9,), "stop": ("x",)},
        ),
        ({"pad_token_id": 0, "use_cache": False, "typical_p": 1.0}, {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_a_generation_config_means_what_it_means_to_transformers(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    params, logprobs = read_sampling_params(GenerationConfig(**config), num_prompt_tokens=3)
    assert params == SamplingParams(**expected) and logprobs is None


@pytest.mark.parametrize(
    "config", [{"num_beams": 4}, {"no_repeat_ngram_size": 1}, {"typical_p": 0.5}]
)
def test_a_generation_config_that_asks_for_more_is_refused(
    engine: Engine, config: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(config))):
        engine.generate(input_ids=[5], sampling_params=GenerationConfig(**config))


def test_foreign_engine_options_are_translated_ignored_or_refused() -> None:
    config = engine_config(
        "x",
        {
            "random_seed": 7,
            "page_size": 32,
            "disable_radix_cache": True,
            "dtype": "half",
            "base_gpu_id": 1,
            "pp_size": 1,
            "kv_cache_dtype": "auto",
            "enable_memory_saver": True,
            "chunked_prefill_size": None,
            "disable_overlap_schedule": True,
            "lora_paths": None,
        },
    )
    assert (config.seed, config.block_size, config.enable_prefix_cache) == (7, 32, False)
    assert (config.dtype, config.device, config.overlap) == ("float16", "cuda:1", False)
    assert engine_config("x", {"dtype": torch.bfloat16}).dtype == "bfloat16"
    with pytest.warns(UserWarning, match="trust_remote_code has no effect"):
        assert engine_config("x", {"trust_remote_code": True}) == EngineConfig(model_path="x")
    for options, reason in [
        ({"quantization": "fp8"}, "quantised"),
        ({"dp_size": 2}, "RolloutPool"),
        ({"seed": 1, "random_seed": 2}, "one of the two"),
        ({"tpsize": 2}, "did you mean 'tp_size'"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            engine_config("x", options)


def test_an_engine_describes_itself_under_the_keys_that_callers_read(
    engine: Engine, folder: Path
) -> None:
    server, model = engine.get_server_info(), engine.get_model_info()
    assert (server["tp_size"], server["pp_size"], server["dp_size"], server["num_gpus"]) == (
        1,
        1,
        1,
        0,
    )
    assert server["model_path"] == model["model_path"] == str(folder)
    assert server["dtype"] == "float32" and server["disaggregation_mode"] == "null"
    assert server["max_total_num_tokens"] >= 512
    assert (model["weight_version"], model["model_type"]) == ("0", "qwen3")
    assert asyncio.run(engine.async_get_model_info()) == model
    assert asyncio.run(engine.async_get_server_info()) == server
