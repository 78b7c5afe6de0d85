"""What verl's agent loops ask and read, and its streams of weights; all of it without verl."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from versions import version_weights

from rollout import Engine
from rollout.errors import ConfigError, InvalidRequestError
from trainers_integration.actors import answer
from trainers_integration.pushing import Pusher, exhaust
from trainers_integration.verl.checkpoint_engine import PublishingCheckpointEngine
from trainers_integration.verl.options import engine_options
from trainers_integration.verl.requests import Limits, generate_call, refuse_media, token_output
from weight_sync.errors import DeadlineExceeded, ManifestMismatch

LIMITS = Limits(prompt_length=8, response_length=6, ignore_eos=False, seed=None)
ASKED = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, skip_tokenizer_init=True, kv_cache_bytes=4 << 20) as engine:
        yield engine


def rollout_config(**changed: Any) -> Any:
    """The fields of verl's `RolloutConfig` that are read, with its defaults."""
    fields: dict[str, Any] = {
        "data_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_parallel_size": 1,
        "tensor_model_parallel_size": 2,
        "quantization": None,
        "enable_rollout_routing_replay": False,
        "mtp": SimpleNamespace(enable=False, enable_rollout=False),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "seed": 42,
        "max_model_len": None,
        "max_num_seqs": 1024,
        "max_num_batched_tokens": 8192,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "enforce_eager": False,
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.5,
        "engine_kwargs": {},
    }
    return SimpleNamespace(**{**fields, **changed})


@pytest.mark.parametrize(
    ("prompt_length", "asked", "expected"),
    [
        (3, {}, 6),  # the response's room
        (10, {}, 4),  # what both together leave
        (20, {}, 0),
        (3, {"max_tokens": 2}, 2),
        (3, {"max_new_tokens": 3, "max_tokens": None}, 3),
        (3, {"max_tokens": -1}, 0),  # what is left of a response that was aborted at its very end
    ],
)
def test_a_request_without_a_limit_gets_what_the_tensors_have_room_for(
    prompt_length: int, asked: dict[str, Any], expected: int
) -> None:
    params = {**ASKED, **asked}
    call = generate_call([1] * prompt_length, params, "r", LIMITS)
    assert call["sampling_params"]["max_new_tokens"] == expected
    assert params == {**ASKED, **asked}


def test_full_determinism_makes_a_seed_of_the_request_alone() -> None:
    fixed = Limits(prompt_length=8, response_length=6, ignore_eos=False, seed=42)
    seeds = [
        generate_call([1], ASKED, rid, fixed)["sampling_params"]["sampling_seed"]
        for rid in ("a", "b", "a")
    ]
    assert seeds[0] == seeds[2] != seeds[1]
    assert "sampling_seed" not in generate_call([1], ASKED, "a", LIMITS)["sampling_params"]


def test_a_result_has_the_exact_numbers_of_the_engine(engine: Engine) -> None:
    call = generate_call([5, 9, 2], {**ASKED, "temperature": 0, "ignore_eos": True}, "r", LIMITS)
    result = engine.generate(**call)
    output = token_output(result, call)
    assert output["token_ids"] == result["output_ids"] and len(output["token_ids"]) == 6
    (expected,) = engine.sequence_logprobs([[5, 9, 2, *output["token_ids"]]], start=3)
    assert output["log_probs"] == pytest.approx(expected, abs=1e-4)
    assert output["stop_reason"] == "completed"
    assert output["extra_fields"]["global_steps"] == 0


def test_a_teachers_prompt_logprobs_are_one_row_ahead_and_end_with_zeros(engine: Engine) -> None:
    prompt = [5, 9, 2, 7]
    (expected,) = engine.sequence_logprobs([prompt])
    for num_top, width in ((0, 1), (3, 3)):
        asked = {**ASKED, "prompt_logprobs": num_top, "max_tokens": 1, "logprobs": False}
        call = generate_call(prompt, asked, "r", LIMITS)
        fields = token_output(engine.generate(**call), call)["extra_fields"]
        assert [len(row) for row in fields["prompt_ids"]] == [width] * len(prompt)
        assert fields["prompt_logprobs"][-1] == [0.0] * width
        if num_top == 0:
            assert [row[0] for row in fields["prompt_ids"][:-1]] == prompt[1:]
            values = [row[0] for row in fields["prompt_logprobs"][:-1]]
            assert values == pytest.approx(expected[1:], abs=1e-5)
        else:
            assert all(row == sorted(row, reverse=True) for row in fields["prompt_logprobs"])


def test_pictures_are_refused_and_none_of_them_are_not() -> None:
    refuse_media(image_data=None, video_data=[], audio_data=None)
    with pytest.raises(InvalidRequestError, match="image_data"):
        refuse_media(image_data=["a picture"], video_data=None)


def test_replicas_have_seeds_of_their_own_and_options_of_the_engine_win() -> None:
    config = rollout_config(engine_kwargs={"rollout_sync": {"kv_policy": "flush", "dtype": "auto"}})
    first, second = (engine_options(config, "model", rank, on_gpu=False) for rank in (0, 1))
    assert first.pop("seed") != second.pop("seed") and first == second
    assert (first["kv_policy"], first["dtype"], first["tp_size"]) == ("flush", "auto", 2)
    assert "mem_fraction_static" not in first
    assert engine_options(config, "model", 0, on_gpu=True)["mem_fraction_static"] == 0.5


def test_everything_that_cannot_be_honoured_is_named_at_once() -> None:
    config = rollout_config(data_parallel_size=2, quantization="fp8", load_format="megatron")
    with pytest.raises(ConfigError, match=r"data_parallel_size=2.*'fp8'.*'megatron'"):
        engine_options(config, "model", 0, on_gpu=False)


def stream(tensors: dict[str, torch.Tensor], walked: list[str]) -> Iterator[Any]:
    for name, tensor in tensors.items():
        walked.append(name)
        yield name, tensor


async def awaited(tensors: dict[str, torch.Tensor], walked: list[str]) -> AsyncIterator[Any]:
    for item in stream(tensors, walked):
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize("kind", [stream, awaited])
def test_a_stream_becomes_a_version_and_is_exhausted_also_where_it_is_refused(
    kind: Callable[..., Any], engine: Engine, folder: Path
) -> None:
    tensors = version_weights(folder, 1)
    pusher = Pusher([engine.address], bucket_bytes=1 << 20)
    try:
        walked: list[str] = []
        report = asyncio.run(pusher.push(kind(tensors, walked), 17))
        assert walked == list(tensors)
        assert engine.get_weight_version() == "17" and engine.status().version == report.version
        wrong = {**tensors, "model.norm.weight": torch.zeros(3)}
        walked = []
        with pytest.raises(ManifestMismatch, match=r"model\.norm\.weight"):
            asyncio.run(pusher.push(kind(wrong, walked), 18))
        assert walked == list(wrong)
        assert engine.get_weight_version() == "17"
    finally:
        pusher.close()


def test_ranks_that_send_nothing_exhaust_their_streams() -> None:
    tensors = {"a": torch.zeros(1), "b": torch.zeros(1)}
    for kind in (stream, awaited):
        walked: list[str] = []
        asyncio.run(exhaust(kind(tensors, walked)))
        assert walked == ["a", "b"]
    sender = PublishingCheckpointEngine(bucket_size=1 << 20)
    walked = []
    assert asyncio.run(sender.send_weights(stream(tensors, walked), 1)) == {}
    assert walked == ["a", "b"]


def test_the_topology_names_every_replicas_server_once() -> None:
    trainers = [{"node": "n0", "server": None}] * 2
    workers = [{"node": "n0", "server": "s0"}, {"node": "n0", "server": None}]
    workers += [{"node": "n1", "server": "s1"}]
    ours, theirs = PublishingCheckpointEngine.build_topology(2, 3, [*trainers, *workers])
    servers = [("s0", "n0"), ("s1", "n1")]
    assert ours == {"servers": [servers] * 2} and theirs == {"servers": [servers] * 3}


def test_a_master_without_replicas_says_so_and_exhausts() -> None:
    walked: list[str] = []
    master = PublishingCheckpointEngine(bucket_size=1 << 20, is_master=True)
    with pytest.raises(ConfigError, match=r"rollout\.name=rollout_sync"):
        asyncio.run(master.send_weights(stream({"a": torch.zeros(1)}, walked), 1))
    assert walked == ["a"]


def test_beside_another_series_of_verl_nothing_is_registered_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = importlib.import_module("trainers_integration.verl.plugin")
    monkeypatch.setitem(sys.modules, "verl", SimpleNamespace(__version__="0.10.0"))
    with pytest.raises(ConfigError, match=r"got verl 0\.10\.0"):
        plugin.register()
    plugin._register_if_possible()
    (record,) = caplog.records
    assert "got verl 0.10.0; expected verl 0.9.1" in record.getMessage()
    assert "pip install" in record.getMessage()


def test_an_actor_that_does_not_answer_is_named() -> None:
    async def ask(reference: Any) -> Any:
        return await answer(reference, "the server of rollout replica 3", timeout_s=0.05)

    async def never() -> None:
        with pytest.raises(DeadlineExceeded, match=r"server of rollout replica 3.*ray status"):
            await ask(asyncio.get_running_loop().create_future())

    async def its_own() -> None:
        failed = asyncio.get_running_loop().create_future()
        failed.set_exception(DeadlineExceeded("what the engine says"))
        with pytest.raises(DeadlineExceeded, match="what the engine says"):
            await ask(failed)

    asyncio.run(never())
    asyncio.run(its_own())
