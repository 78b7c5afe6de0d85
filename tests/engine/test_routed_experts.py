"""`return_routed_experts`: which experts each token went to, as transformers routes it, however it was computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from versions import pool_bytes, version_weights

from rollout import Engine
from rollout.errors import ConfigError, InvalidRequestError, RolloutError

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 16}
PROMPTS = [[5, 9, 2], list(range(20, 61)), [17, 40, 3, 99, 5, 5, 200, 31, 8, 60], [11] * 17]
SAMPLED = {"temperature": 1.0, "max_new_tokens": 14, "ignore_eos": True, "sampling_seed": 3}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=3, **MOE)


@pytest.fixture(scope="module")
def routes_of(folder, reference_model):
    """`routes_of(ids)`: what transformers' routers choose, (tokens - 1, layers, k), each row sorted."""
    model = reference_model(folder)

    def compute(ids):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]), output_router_logits=True).router_logits
        chosen = [layer.topk(3, -1).indices.sort(-1).values.numpy() for layer in logits]
        return np.stack([np.full_like(chosen[0], -1), *chosen], axis=1)

    return compute


def engine_for(folder, **options):
    return Engine(
        folder,
        skip_tokenizer_init=True,
        enable_return_routed_experts=True,
        block_size=4,
        kv_cache_bytes=pool_bytes(folder, num_blocks=options.pop("num_blocks", 64), block_size=4),
        **options,
    )


def check(results, prompts, routes_of, start=0):
    for prompt, result in zip(prompts, results, strict=True):
        got = result["meta_info"]["routed_experts"]
        expected = routes_of([*prompt, *result["output_ids"]])[start:]
        assert got.dtype == np.int32 and got.shape == expected.shape
        np.testing.assert_array_equal(np.sort(got, axis=-1), expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_routes_are_right_under_chunks_retraction_and_prefix_hits(folder, routes_of, overlap):
    with engine_for(folder, num_blocks=24, chunked_prefill_size=8, overlap=overlap) as engine:
        asked = {"return_routed_experts": True}
        long = {**SAMPLED, "max_new_tokens": 30}
        results = engine.generate(input_ids=PROMPTS, sampling_params=long, **asked)
        assert sum(result["meta_info"]["num_retractions"] for result in results) > 0
        check(results, PROMPTS, routes_of)
        again = engine.generate(input_ids=PROMPTS[1], sampling_params=SAMPLED, **asked)
        third = engine.generate(input_ids=PROMPTS[1], sampling_params=SAMPLED, **asked)
        assert third["meta_info"]["cached_tokens"] > 0
        check([again, third], [PROMPTS[1]] * 2, routes_of)


def test_samples_of_one_prompt_have_routes_of_their_own_also_when_they_end_at_once(
    folder, routes_of
):
    with engine_for(folder) as engine:
        for length in (1, 6):
            params = {**SAMPLED, "n": 3, "max_new_tokens": length}
            results = engine.generate(
                input_ids=PROMPTS[2], sampling_params=params, return_routed_experts=True
            )
            check(results, [PROMPTS[2]] * 3, routes_of)


def test_a_start_a_stream_and_prompts_that_do_not_ask(folder, routes_of):
    with engine_for(folder) as engine:
        results = engine.generate(
            input_ids=PROMPTS,
            sampling_params=SAMPLED,
            return_routed_experts=[True, True, False, True],
            routed_experts_start_len=[2, 7, 0, 30],
        )
        assert "routed_experts" not in results[2]["meta_info"]
        for i, start in ((0, 2), (1, 7), (3, 30)):
            check([results[i]], [PROMPTS[i]], routes_of, start)
        *before, last = engine.generate(
            input_ids=PROMPTS[0], sampling_params=SAMPLED, return_routed_experts=True, stream=True
        )
        assert before and all("routed_experts" not in part["meta_info"] for part in before)
        check([last], [PROMPTS[0]], routes_of)
        nothing = {"max_new_tokens": 0}
        scored = engine.generate(
            input_ids=PROMPTS[1], sampling_params=nothing, return_routed_experts=True
        )
        check([scored], [PROMPTS[1]], routes_of)


def test_after_a_sync_routes_are_those_of_the_new_weights(folder, routes_of):
    with engine_for(folder) as engine:

        def routed():
            return engine.generate(
                input_ids=PROMPTS[1], sampling_params=SAMPLED, return_routed_experts=True
            )

        engine.update_weights_from_tensor(version_weights(folder, 1))
        with pytest.raises(AssertionError):  # the reference has the first weights
            check([routed()], [PROMPTS[1]], routes_of)
        engine.update_weights_from_tensor(version_weights(folder, 0))
        check([routed()], [PROMPTS[1]], routes_of)


def test_who_did_not_say_so_at_the_start_or_has_no_experts_is_told(folder, tiny_checkpoint):
    with Engine(folder, skip_tokenizer_init=True, kv_cache_bytes=1 << 20) as engine:
        with pytest.raises(InvalidRequestError, match="enable_return_routed_experts=True"):
            engine.generate(input_ids=[1, 2], return_routed_experts=True)
    with pytest.raises(ConfigError, match="has no experts"):
        engine_for(tiny_checkpoint("qwen3"))


def test_a_record_counts_where_tokens_go_between_start_and_stop(folder, routes_of):
    with engine_for(folder, enable_prefix_cache=False) as engine:
        with pytest.raises(RolloutError, match="call start_expert_distribution_record first"):
            engine.dump_expert_distribution_record()
        engine.generate(input_ids=PROMPTS[0], sampling_params=SAMPLED)
        engine.start_expert_distribution_record()
        result = engine.generate(input_ids=PROMPTS[1], sampling_params=SAMPLED)
        engine.stop_expert_distribution_record()
        engine.generate(input_ids=PROMPTS[2], sampling_params=SAMPLED)
        counts = engine.dump_expert_distribution_record()
        routes = routes_of([*PROMPTS[1], *result["output_ids"]])
        expected = [np.bincount(routes[:, layer].ravel(), minlength=8) for layer in (1, 2)]
        np.testing.assert_array_equal(counts, [[0] * 8, *expected])
        engine.start_expert_distribution_record()
        assert not engine.dump_expert_distribution_record().any()


def test_a_model_without_experts_has_nothing_to_record(tiny_checkpoint):
    with Engine(tiny_checkpoint("qwen3"), skip_tokenizer_init=True, kv_cache_bytes=1 << 20) as one:
        with pytest.raises(RolloutError, match="a model without any"):
            one.start_expert_distribution_record()
