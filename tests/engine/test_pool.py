"""A pool of two engines in child processes has the surface of one engine, and its results."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import weight_sync
from rollout import Engine, RolloutPool
from rollout.errors import ConfigError, InvalidRequestError, RolloutError
from weight_sync.errors import TornWeightsError
from weight_sync.publisher.publisher import WeightPublisher

PROMPTS = [[i % 250, 7, 3 * i % 250, *range(i % 30)] for i in range(24)]
GREEDY = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
OPTIONS = {"kv_cache_bytes": 4 << 20, "num_threads": 1}
LIMIT = 12


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RolloutPool]:
    with RolloutPool(folder, num_replicas=2, max_inflight_samples=LIMIT, seed=0, **OPTIONS) as pool:
        yield pool


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(folder, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def trainer(folder: Path, pool: RolloutPool) -> Any:
    """The trainer's model, a copy that a test may change; the pool serves it when the test begins."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pool.publish(model)
    return model


def train(model: Any, seed: int) -> None:
    """Stands for an optimiser step: every parameter moves, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


class Watched:
    """Writes down which prompts each replica was given, and how busy it was then."""

    def __init__(self, pool: RolloutPool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rids: dict[int, list[str]] = {}
        self.loads: list[int] = []
        executor = pool._pool
        for number, replica in executor._supervisor.replicas.items():
            self.rids[number] = []
            original = replica.generate

            def generate(job: Any, number: int = number, original: Any = original) -> None:
                self.rids[number].append(job.spec.rid)
                self.loads.append(executor._dispatcher.loads[number])
                original(job)

            monkeypatch.setattr(replica, "generate", generate)


def test_results_are_in_order_and_those_of_one_engine(pool: RolloutPool, engine: Engine) -> None:
    params = [
        {"temperature": 1.0, "max_new_tokens": 5, "n": 1 + i % 3, "sampling_seed": 1000 * i}
        for i in range(len(PROMPTS))
    ]
    arguments = {"input_ids": PROMPTS, "sampling_params": params, "return_logprob": True}
    got, expected = pool.generate(**arguments), engine.generate(**arguments)
    assert len(got) == len(expected) == sum(p["n"] for p in params)
    for mine, other in zip(got, expected, strict=True):
        assert mine["output_ids"] == other["output_ids"] and mine["text"] == other["text"]
        assert mine["meta_info"].keys() == other["meta_info"].keys()
        assert mine["meta_info"]["num_reruns"] == 0
        logprobs = [
            [value for value, _, _ in r["meta_info"]["output_token_logprobs"]]
            for r in (mine, other)
        ]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_both_replicas_work_and_neither_gets_more_than_its_share(
    pool: RolloutPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(pool, monkeypatch)
    pool.generate(input_ids=PROMPTS, sampling_params={**GREEDY, "n": 4})
    given = [len(rids) for rids in watched.rids.values()]
    assert sum(given) == len(PROMPTS) and min(given) >= len(PROMPTS) // 4
    rids = [rid for given_rids in watched.rids.values() for rid in given_rids]
    assert len(set(rids)) == len(PROMPTS)  # All samples of a prompt together.
    assert max(watched.loads) <= LIMIT and len(PROMPTS) * 4 > 2 * LIMIT  # The rest had to wait.


def test_prompts_that_begin_alike_find_their_beginning_in_the_cache(
    pool: RolloutPool, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(pool, monkeypatch)
    heads = [[head + 1] * 70 for head in range(6)]
    for tail in range(3):
        for head in heads:
            result = pool.generate(input_ids=[*head, tail], sampling_params=GREEDY)
            assert tail == 0 or result["meta_info"]["cached_tokens"] >= 64
    assert all(watched.rids.values())


def test_the_same_prompt_many_times_gives_different_samples(pool: RolloutPool) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True}
    results = pool.generate(input_ids=[[5, 9, 2]] * 12, sampling_params=params)
    assert len({tuple(result["output_ids"]) for result in results}) == 12


def test_chunks_of_a_stream_grow_and_end_with_the_result(pool: RolloutPool) -> None:
    chunks = list(pool.generate(input_ids=[[5, 9], [7]], sampling_params=GREEDY, stream=True))
    plain = pool.generate(input_ids=[[5, 9], [7]], sampling_params=GREEDY)
    for index in range(2):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        sizes = [len(chunk["output_ids"]) for chunk in mine]
        assert sizes == sorted(sizes) and len(sizes) > 1
        assert mine[-1]["output_ids"] == plain[index]["output_ids"]


def test_calls_overlap_and_each_gets_its_own(pool: RolloutPool) -> None:
    async def run() -> list[Any]:
        calls = [
            pool.async_generate(input_ids=prompt, sampling_params=GREEDY) for prompt in PROMPTS[:8]
        ]
        return await asyncio.gather(*calls)

    together = asyncio.run(run())
    one_by_one = [pool.generate(input_ids=p, sampling_params=GREEDY) for p in PROMPTS[:8]]
    assert [r["output_ids"] for r in together] == [r["output_ids"] for r in one_by_one]


def test_scores_and_log_probabilities_are_those_of_one_engine(
    pool: RolloutPool, engine: Engine, trainer: Any
) -> None:
    engine.update_weights_from_tensor(trainer)
    got = pool.sequence_logprobs(PROMPTS[5:9], start=1)
    expected = engine.sequence_logprobs(PROMPTS[5:9], start=1)
    for mine, other in zip(got, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    scores = pool.score([5, 6], [[7], [8]], label_token_ids=[1, 2])
    assert scores[0] == pytest.approx(engine.score([5, 6], [[7], [8]], [1, 2])[0], abs=1e-5)


def test_a_bad_prompt_fails_its_call_and_no_other(pool: RolloutPool) -> None:
    good: list[Any] = []
    thread = threading.Thread(
        target=lambda: good.append(pool.generate(input_ids=PROMPTS, sampling_params=GREEDY))
    )
    thread.start()
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        pool.generate(input_ids=[[5], [99_999]], sampling_params=GREEDY)
    thread.join(300)
    assert len(good[0]) == len(PROMPTS)


def start_long(
    pool: RolloutPool, num_prompts: int, **params: Any
) -> tuple[threading.Thread, list[Any]]:
    """Requests that run for a while, on another thread; returns when the replicas have them.

    The replicas are slow from then on, so that the requests run for as long as a test may take to do something.
    """
    pool.slow_down(0.05)
    results: list[Any] = []
    arguments = {"temperature": 1.0, "max_new_tokens": 250, "ignore_eos": True, **params}

    def run() -> None:
        prompts = [[i + 1, 2, 3] for i in range(num_prompts)]
        results.extend(pool.generate(input_ids=prompts, sampling_params=arguments))

    thread = threading.Thread(target=run)
    thread.start()
    end = time.monotonic() + 30
    while pool.status().num_running < min(num_prompts, 8) and time.monotonic() < end:
        time.sleep(0.005)
    return thread, results


def test_an_abort_ends_what_runs_and_what_waits(pool: RolloutPool) -> None:
    thread, results = start_long(pool, 40)
    assert pool.abort_request(abort_all=True) == 40
    pool.slow_down(None)
    thread.join(300)
    assert len(results) == 40
    assert {result["meta_info"]["finish_reason"]["type"] for result in results} == {"abort"}
    assert {len(result["output_ids"]) > 0 for result in results} == {True, False}
    assert len({tuple(sorted(result["meta_info"])) for result in results}) == 1


def test_a_pause_in_mode_abort_ends_everything_and_the_pool_goes_on_after_it(
    pool: RolloutPool,
) -> None:
    thread, results = start_long(pool, 40)
    assert pool.pause_generation("abort") >= 30  # Some may have been on their way.
    pool.continue_generation()
    pool.slow_down(None)
    thread.join(300)
    reasons = [result["meta_info"]["finish_reason"]["type"] for result in results]
    assert len(reasons) == 40 and reasons.count("abort") >= 30
    assert pool.generate(input_ids=[1], sampling_params=GREEDY)["output_ids"]


def test_an_update_reaches_requests_that_run_on_all_replicas(
    pool: RolloutPool, trainer: Any
) -> None:
    thread, results = start_long(pool, 8)
    train(trainer, 1)
    first, end = pool.status().num_decoded_tokens, time.monotonic() + 30
    while pool.status().num_decoded_tokens < first + 8 * 10 and time.monotonic() < end:
        time.sleep(0.02)  # Each of them is to have tokens of the version before.
    report = pool.publish(trainer, label="next", kv_policy="recompute")
    pool.slow_down(None)
    thread.join(300)
    spans = [result["meta_info"]["weight_versions"] for result in results]
    assert {span[-1]["version"] for span in spans} == {"next"} and all(len(s) == 2 for s in spans)
    assert pool.weight_version == pool.get_weight_version() == "next"
    assert pool.version == report.version and report.complete
    assert pool.weights_fingerprint() == report.fingerprint == weight_sync.fingerprint(trainer)


def test_update_calls_sessions_and_reading_back_work_on_a_pool(
    pool: RolloutPool, trainer: Any
) -> None:
    train(trainer, 2)
    tensors = list(trainer.named_parameters())
    pool.begin_weight_update(weight_version=17)
    for first in range(0, len(tensors), 9):
        pool.update_weights_from_tensor(tensors[first : first + 9])
    pool.end_weight_update()
    assert pool.weights_fingerprint() == weight_sync.fingerprint(trainer)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert pool.get_weights_by_name(name, 3) == trainer.get_parameter(name)[:3].tolist()
    assert pool.status().version == pool.version and pool.status().weight_version == "17"


def test_a_trainer_elsewhere_publishes_to_the_address_of_the_pool(
    pool: RolloutPool, trainer: Any
) -> None:
    train(trainer, 3)
    with WeightPublisher(pool.address) as publisher:
        report = publisher.publish(trainer, label="by address")
    assert pool.weight_version == "by address"
    assert pool.weights_fingerprint() == report.fingerprint == weight_sync.fingerprint(trainer)


def test_an_update_goes_to_all_replicas_over_a_group(pool: RolloutPool, trainer: Any) -> None:
    options: dict[str, Any] = {"transport": "process_group", "group_backend": "gloo"}
    with WeightPublisher(pool, **options) as publisher:
        for seed in (6, 7):
            train(trainer, seed)
            report = publisher.publish(trainer)
            assert report.transport == "process_group"
            assert (
                pool.weights_fingerprint() == report.fingerprint == weight_sync.fingerprint(trainer)
            )


def test_a_plain_torch_trainer_broadcasts_to_all_replicas(pool: RolloutPool, trainer: Any) -> None:
    train(trainer, 8)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor() as background:
        joining = background.submit(
            pool.init_weights_update_group, "127.0.0.1", store.port, 1, 3, "plain", "gloo"
        )
        group = dist.ProcessGroupGloo(
            dist.PrefixStore("plain", store), 0, 3, timedelta(seconds=180)
        )
        joining.result(180)
        named = [(name, tensor.detach()) for name, tensor in trainer.named_parameters()]
        pool.begin_weight_update(weight_version="broadcast", strict=True)
        pool.update_weights_from_tensor(named[:8])  # both ways in one session
        for first in range(8, len(named), 8):
            part = named[first : first + 8]
            staged = background.submit(
                pool.update_weights_from_distributed,
                [name for name, _ in part],
                [tensor.dtype for _, tensor in part],
                [tensor.shape for _, tensor in part],
                "plain",
            )
            for _, tensor in part:
                group.broadcast(tensor.contiguous(), 0).wait()
            staged.result(180)
        pool.end_weight_update()
        pool.destroy_weights_update_group("plain")
    assert pool.weights_fingerprint() == weight_sync.fingerprint(trainer)
    assert pool.weight_version == "broadcast"


def test_replicas_come_with_the_served_version_and_go_without_losing_a_request(
    pool: RolloutPool, trainer: Any
) -> None:
    train(trainer, 4)
    pool.publish(trainer, label="grown")
    number = pool.add_replica()
    assert [r.state for r in pool.replicas()] == ["serving"] * 3
    fingerprint = pool.weights_fingerprint()  # Raises when the replicas differ.
    assert fingerprint == weight_sync.fingerprint(trainer)
    thread, results = start_long(pool, 36)
    pool.slow_down(None)
    assert pool.remove_replica(number, timeout_s=300.0) == number
    thread.join(300)
    assert len(results) == 36
    assert {len(result["output_ids"]) for result in results} == {250}
    assert {result["meta_info"]["num_reruns"] for result in results} == {0}  # It was drained.
    assert len(pool.replicas()) == 2
    with pytest.raises(RolloutError, match=f"got {number}"):
        pool.remove_replica(number)


def test_released_weights_are_refused_until_a_complete_update(
    pool: RolloutPool, trainer: Any
) -> None:
    thread, results = start_long(pool, 20)
    pool.slow_down(None)
    changed = pool.release_memory_occupation(["weights"])
    assert changed.tags == ["weights"] and changed.num_bytes > 0
    with pytest.raises(TornWeightsError):
        pool.generate(input_ids=[1], sampling_params=GREEDY)
    pool.resume_memory_occupation(["weights"])
    train(trainer, 5)
    pool.publish(trainer)
    thread.join(300)
    assert [len(result["output_ids"]) for result in results] == [250] * 20
    assert pool.generate(input_ids=[1], sampling_params=GREEDY)["output_ids"]
    assert pool.weights_fingerprint() == weight_sync.fingerprint(trainer)
    assert len(pool.replicas()) == 2


def test_unknown_options_and_an_inline_pool_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="num_replica"):
        RolloutPool(folder, num_replica=2)
    with pytest.raises(ConfigError, match="'inline'"):
        RolloutPool(folder, executor="inline")
    with pytest.raises(ConfigError, match="num_replicas"):
        RolloutPool(folder, num_replicas=0)
