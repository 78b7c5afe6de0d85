"""What `Engine.generate` promises, through the public surface, against transformers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import Engine
from rollout.errors import ConfigError, InvalidRequestError, RolloutError

PROMPTS = [[5, 9, 2], [7] * 40, [11, 12, 13, 14, 15, 16, 17], list(range(20, 53))]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}


def reference_greedy(model: Any, prompt: list[int], num: int) -> tuple[list[int], list[float]]:
    """Greedy continuation by the transformers model, with the log-probability of each token."""
    ids, values = list(prompt), []
    for _ in range(num):
        logits = model(torch.tensor([ids])).logits[0, -1].float()
        token = int(logits.argmax())
        values.append(float(torch.log_softmax(logits, -1)[token]))
        ids.append(token)
    return ids[len(prompt) :], values


def reference_logprobs(model: Any, ids: list[int], temperature: float = 1.0) -> list[float]:
    """Log-probability of every token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
    rows = torch.log_softmax(logits, -1)
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    """Steps one ahead, as on a GPU; `test_overlap` holds them to the results of steps in turn."""
    with Engine(folder, kv_cache_bytes=4 << 20, overlap=True) as engine:
        yield engine


def values(result: dict[str, Any], key: str = "output_token_logprobs") -> list[Any]:
    return [value for value, _, _ in result["meta_info"][key]]


def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    results = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY, return_logprob=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        tokens, logprobs = reference_greedy(reference_model(folder), prompt, 12)
        assert result["output_ids"] == tokens
        assert values(result) == pytest.approx(logprobs, abs=1e-4)
        assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 12}


def test_sampled_logprobs_are_those_of_transformers_after_temperature(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    params = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 20, "sampling_seed": 3, "n": 3}
    for result in engine.generate(
        input_ids=PROMPTS[2], sampling_params=params, return_logprob=True
    ):
        ids = PROMPTS[2] + result["output_ids"]
        expected = reference_logprobs(reference_model(folder), ids, 0.7)[len(PROMPTS[2]) - 1 :]
        assert values(result) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_chunked_prefill_changes_nothing(engine: Engine, folder: Path, chunk: int) -> None:
    whole = engine.generate(
        input_ids=PROMPTS, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0
    )
    with Engine(
        folder, chunked_prefill_size=chunk, enable_prefix_cache=False, kv_cache_bytes=4 << 20
    ) as other:
        pieces = other.generate(
            input_ids=PROMPTS, sampling_params=GREEDY, return_logprob=True, logprob_start_len=0
        )
    for a, b in zip(whole, pieces, strict=True):
        assert a["output_ids"] == b["output_ids"]
        assert values(a) == pytest.approx(values(b), abs=1e-4)
        assert values(a, "input_token_logprobs")[1:] == pytest.approx(
            values(b, "input_token_logprobs")[1:], abs=1e-4
        )


def test_retraction_under_memory_pressure_loses_nothing(engine: Engine, folder: Path) -> None:
    params = {"temperature": 0.0, "max_new_tokens": 60, "ignore_eos": True}
    expected = engine.generate(input_ids=PROMPTS * 2, sampling_params=params)
    # 2 layers x 16 tokens x 2 x 2 heads x 32 x 4 bytes = 16 KiB per block: 14 blocks for 8 requests of 4 to 7.
    with Engine(folder, kv_cache_bytes=14 * (16 << 10)) as small:
        results = small.generate(input_ids=PROMPTS * 2, sampling_params=params)
    assert [r["output_ids"] for r in results] == [r["output_ids"] for r in expected]
    assert sum(r["meta_info"]["num_retractions"] for r in results) > 0


def test_a_prefix_hit_is_counted_and_changes_nothing(engine: Engine) -> None:
    prompt = list(range(60, 130))
    engine.flush_cache()
    first = engine.generate(input_ids=prompt, sampling_params=GREEDY, return_logprob=True)
    second = engine.generate(input_ids=prompt, sampling_params=GREEDY, return_logprob=True)
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] == 64
    assert second["output_ids"] == first["output_ids"]
    assert values(second) == pytest.approx(values(first), abs=1e-4)


def test_n_samples_share_the_prompt_and_come_in_prompt_major_order(engine: Engine) -> None:
    params = {
        "temperature": 1.0,
        "max_new_tokens": 6,
        "n": 4,
        "sampling_seed": 11,
        "ignore_eos": True,
    }
    results = engine.generate(input_ids=PROMPTS[:2], sampling_params=[params] * 2, rid=["a", "b"])
    assert [r["meta_info"]["id"] for r in results] == [
        "a-0",
        "a-1",
        "a-2",
        "a-3",
        "b-0",
        "b-1",
        "b-2",
        "b-3",
    ]
    assert len({tuple(r["output_ids"]) for r in results[:4]}) > 1
    alone = engine.generate(input_ids=PROMPTS[1], sampling_params=params)
    assert [r["output_ids"] for r in alone] == [r["output_ids"] for r in results[4:]]


def test_a_prompt_that_is_sent_n_times_is_computed_once(engine: Engine) -> None:
    prompt = list(range(40, 51))  # shorter than a block: the prefix cache cannot help
    call = {
        "input_ids": [prompt, PROMPTS[0], prompt, prompt],
        "sampling_params": [{**GREEDY, "sampling_seed": i} for i in range(4)],
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    together = engine.generate(**call)
    alone = engine.generate(**{**call, "input_ids": prompt, "sampling_params": GREEDY})
    assert [r["meta_info"]["cached_tokens"] for r in together] == [0, 0, 11, 11]
    for result in (together[0], together[2], together[3]):
        assert result["output_ids"] == alone["output_ids"]
        known = values(result, "input_token_logprobs")[1:]
        assert known == pytest.approx(values(alone, "input_token_logprobs")[1:], abs=1e-4)


def test_input_logprobs_are_those_of_transformers(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    prompt = PROMPTS[3]
    expected = reference_logprobs(reference_model(folder), prompt)
    for start in (0, 1, 5, len(prompt) - 1):
        result = engine.generate(
            input_ids=prompt,
            sampling_params={"max_new_tokens": 2, "n": 2},
            return_logprob=True,
            logprob_start_len=start,
        )[1]
        entries = result["meta_info"]["input_token_logprobs"]
        assert [token for _, token, _ in entries] == prompt[start:]
        if start == 0:
            assert entries[0] == (None, prompt[0], None)
        known = [value for value, _, _ in entries if value is not None]
        assert known == pytest.approx(expected[max(start - 1, 0) :], abs=1e-4)


def test_sequence_logprobs_are_what_a_trainer_computes(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    rows = engine.sequence_logprobs(PROMPTS, start=1)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row == pytest.approx(reference_logprobs(reference_model(folder), prompt), abs=1e-4)


def test_top_and_selected_logprobs_agree_with_the_full_distribution(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    result = engine.generate(
        input_ids=PROMPTS[0],
        sampling_params={"temperature": 0.0, "max_new_tokens": 1},
        return_logprob=True,
        top_logprobs_num=3,
        token_ids_logprob=[4, 200],
    )
    row = torch.log_softmax(reference_model(folder)(torch.tensor([PROMPTS[0]])).logits[0, -1], -1)
    top, selected = (
        result["meta_info"][key][0] for key in ("output_top_logprobs", "output_token_ids_logprobs")
    )
    assert [token for _, token, _ in top] == row.topk(3).indices.tolist()
    assert [value for value, _, _ in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert [(token, value) for value, token, _ in selected] == [
        (token, pytest.approx(float(row[token]), abs=1e-4)) for token in (4, 200)
    ]


def test_score_gives_label_probabilities(
    engine: Engine, folder: Path, reference_model: Callable[[Path], Any]
) -> None:
    labels = [3, 77]
    rows = engine.score([5, 6, 7], [[8], [9, 10]], labels)
    for item, row in zip([[8], [9, 10]], rows, strict=True):
        logits = reference_model(folder)(torch.tensor([[5, 6, 7, *item]])).logits[0, -1]
        expected = torch.softmax(logits, -1)[labels].tolist()
        assert row == pytest.approx(expected, rel=1e-3)
    assert sum(engine.score([5], [[8]], labels, apply_softmax=True)[0]) == pytest.approx(1.0)


def test_seeds_reproduce_whatever_else_runs(engine: Engine) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 10, "sampling_seed": 5, "ignore_eos": True}
    alone = engine.generate(input_ids=PROMPTS[0], sampling_params=params)
    others = [{"temperature": 0.5, "max_new_tokens": 3 + i} for i in range(3)]
    crowd = engine.generate(
        input_ids=[PROMPTS[1], *PROMPTS[1:3], PROMPTS[0]], sampling_params=[*others, params]
    )
    assert crowd[3]["output_ids"] == alone["output_ids"]


def test_samples_of_one_seed_differ_and_so_do_those_of_two_seeds(engine: Engine) -> None:
    params = {"temperature": 1.5, "max_new_tokens": 12, "sampling_seed": 10, "ignore_eos": True}
    eight = engine.generate(input_ids=[PROMPTS[0]] * 8, sampling_params=params)
    again = engine.generate(input_ids=PROMPTS[0], sampling_params={**params, "n": 8})
    other = engine.generate(
        input_ids=PROMPTS[0], sampling_params={**params, "n": 8, "sampling_seed": 11}
    )
    drawn = [[tuple(r["output_ids"]) for r in results] for results in (eight, again, other)]
    assert drawn[0] == drawn[1] and len({*drawn[0], *drawn[2]}) == 16


def test_engines_without_a_seed_draw_differently_and_one_with_a_seed_repeats(folder: Path) -> None:
    params = {"temperature": 1.5, "max_new_tokens": 12, "ignore_eos": True}
    drawn, seeds = [], []
    for seed in (None, None, 5, 5):
        with Engine(folder, kv_cache_bytes=1 << 20, seed=seed) as engine:
            result = engine.generate(input_ids=PROMPTS[0], sampling_params=params)
            drawn.append(result["output_ids"])
            seeds.append(engine.status().resolved["seed"])
    assert drawn[0] != drawn[1] and drawn[2] == drawn[3]
    assert seeds[0] != seeds[1] and seeds[2:] == [5, 5]


def test_streaming_is_cumulative_and_ends_with_the_whole_result(engine: Engine) -> None:
    whole = engine.generate("the cat", GREEDY, return_logprob=True)
    chunks = list(engine.generate("the cat", GREEDY, return_logprob=True, stream=True))
    assert [len(c["output_ids"]) for c in chunks] == list(range(1, 13))
    assert all(c["meta_info"]["finish_reason"] is None for c in chunks[:-1])
    assert chunks[-1]["output_ids"] == whole["output_ids"]
    assert chunks[-1]["text"] == whole["text"]
    assert values(chunks[-1]) == pytest.approx(values(whole), abs=1e-5)
    assert chunks[-1]["meta_info"].keys() == whole["meta_info"].keys()


def test_a_stop_string_ends_the_output_and_is_trimmed(engine: Engine) -> None:
    whole = engine.generate("the cat", {**GREEDY, "max_new_tokens": 30})
    stop = whole["text"][6:9]
    cut = engine.generate("the cat", {**GREEDY, "max_new_tokens": 30, "stop": [stop]})
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["text"] == whole["text"][: whole["text"].find(stop)]
    kept = engine.generate(
        "the cat", {**GREEDY, "max_new_tokens": 30, "stop": stop, "no_stop_trim": True}
    )
    assert stop in kept["text"]


def test_a_stop_token_ends_the_output_unless_too_early(engine: Engine) -> None:
    tokens = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)["output_ids"]
    stop = tokens[4]
    first = tokens.index(stop)
    result = engine.generate(
        input_ids=PROMPTS[0], sampling_params={**GREEDY, "stop_token_ids": [stop]}
    )
    assert result["output_ids"] == tokens[: first + 1]
    assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    later = engine.generate(
        input_ids=PROMPTS[0],
        sampling_params={**GREEDY, "stop_token_ids": [stop], "min_new_tokens": 8},
    )
    assert len(later["output_ids"]) >= 8 and stop not in later["output_ids"][:8]


def test_no_new_tokens_means_prompt_only(engine: Engine) -> None:
    result = engine.generate(input_ids=PROMPTS[0], sampling_params={"max_new_tokens": 0})
    assert result["output_ids"] == []
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert result["meta_info"]["weight_versions"] == [
        {"version": "0", "number": 0, "start": 0, "end": 0}
    ]


def start_long(engine: Engine, results: list[Any], **extra: Any) -> threading.Thread:
    """Run one long request on a thread and return when it has produced something; it goes on for seconds, unless the
    engine is told not to be slow."""
    ready = threading.Event()
    engine.slow_down(0.02)

    def run() -> None:
        params = {"temperature": 0.0, "max_new_tokens": 400, "ignore_eos": True}
        for chunk in engine.generate(
            input_ids=PROMPTS[0], sampling_params=params, stream=True, **extra
        ):
            ready.set()
            last = chunk
        engine.slow_down(None)
        results.append(last)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(30)
    return thread


def test_an_aborted_request_returns_what_it_has(engine: Engine) -> None:
    results: list[Any] = []
    thread = start_long(engine, results, rid="long", return_logprob=True)
    assert engine.abort_request("long") == 1
    thread.join(300)
    meta = results[0]["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert 0 < meta["completion_tokens"] < 400
    assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
    assert meta["weight_versions"] == [
        {"version": "0", "number": 0, "start": 0, "end": meta["completion_tokens"]}
    ]


def test_a_request_aborted_in_the_queue_has_the_same_keys(engine: Engine) -> None:
    whole = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, return_logprob=True)
    engine.pause_generation("in_place")
    try:
        results: list[Any] = []
        call = {
            "input_ids": PROMPTS[0],
            "sampling_params": GREEDY,
            "return_logprob": True,
            "rid": "queued",
        }
        thread = threading.Thread(target=lambda: results.append(engine.generate(**call)))
        thread.start()
        while engine.abort_request("queued") == 0:
            time.sleep(0.01)
        thread.join(300)
    finally:
        engine.continue_generation()
    assert results[0]["meta_info"].keys() == whole["meta_info"].keys()
    assert results[0]["output_ids"] == []
    assert results[0]["meta_info"]["weight_versions"] == [
        {"version": "0", "number": 0, "start": 0, "end": 0}
    ]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_holds_requests_and_they_finish_as_if_nothing_had_been(
    engine: Engine, mode: Any
) -> None:
    params = {"temperature": 0.0, "max_new_tokens": 400, "ignore_eos": True}
    expected = engine.generate(input_ids=PROMPTS[0], sampling_params=params)["output_ids"]
    results: list[Any] = []
    thread = start_long(engine, results)
    engine.pause_generation(mode)
    before = engine.status()
    time.sleep(0.1)
    after = engine.status()
    assert thread.is_alive() and before.paused == after.paused == mode
    assert before.num_running == after.num_running == (1 if mode == "in_place" else 0)
    engine.continue_generation()
    engine.slow_down(None)
    thread.join(300)
    assert results[0]["output_ids"] == expected


def test_a_pause_of_mode_abort_returns_partial_results(engine: Engine) -> None:
    results: list[Any] = []
    thread = start_long(engine, results)
    assert engine.pause_generation("abort") == 1
    thread.join(300)
    engine.continue_generation()
    assert results[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert results[0]["output_ids"]


def test_a_pause_ends_with_its_lease(engine: Engine) -> None:
    engine.pause_generation("in_place", lease_s=0.2)
    start = time.monotonic()
    engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY)
    assert time.monotonic() - start > 0.1
    assert engine.status().paused is None


def test_flush_cache_refuses_while_requests_run(engine: Engine) -> None:
    results: list[Any] = []
    thread = start_long(engine, results)
    with pytest.raises(RolloutError, match="pending"):
        engine.flush_cache()
    engine.slow_down(None)
    thread.join(300)
    engine.flush_cache()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [999]}, "token id 999.*vocabulary"),
        ({"input_ids": []}, "at least one"),
        ({"input_ids": [1, -1]}, "got -1"),
        ({"input_ids": [1, 2.5]}, "got 2.5"),
        ({"input_ids": list(range(100)) * 6}, "600 tokens.*context length 512"),
        ({"prompt": "a", "input_ids": [1]}, "both"),
        ({}, "neither"),
        ({"prompt": 7}, "prompt 0|int"),
        ({"input_ids": [1], "sampling_params": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"input_ids": [1], "sampling_params": {"top_p": 2}}, "top_p"),
        ({"input_ids": [1], "sampling_params": {"logit_bias": {"400": 1.0}}}, "logit_bias"),
        ({"input_ids": [1], "retrun_logprob": True}, "did you mean 'return_logprob'"),
        ({"input_ids": [1], "lora_path": "x"}, "not supported"),
        ({"input_ids": [1], "return_logprob": True, "logprob_start_len": 5}, "logprob_start_len"),
        ({"input_ids": [1], "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
        ({"input_ids": [[1], [2]], "rid": ["x", "x"]}, "different id"),
        ({"input_ids": [1], "timeout_s": -1}, "timeout_s"),
    ],
)
def test_a_bad_request_is_refused_in_words_and_disturbs_nobody(
    engine: Engine, arguments: dict[str, Any], message: str
) -> None:
    results: list[Any] = []
    thread = start_long(engine, results)
    with pytest.raises(InvalidRequestError, match=f"(?s){message}"):
        engine.generate(**arguments)
    engine.slow_down(None)
    thread.join(300)
    assert len(results[0]["output_ids"]) == 400


def test_an_unknown_engine_option_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tp_size'"):
        Engine(folder, tpsize=2)
    with pytest.raises(ConfigError, match="model_path"):
        Engine("no/such/folder", skip_tokenizer_init=True)


def test_async_twins_work_inside_a_running_event_loop(engine: Engine) -> None:
    async def run() -> tuple[list[Any], list[Any], str]:
        calls = [engine.async_generate(input_ids=p, sampling_params=GREEDY) for p in PROMPTS]
        together = await asyncio.gather(*calls)
        stream = await engine.async_generate(
            input_ids=PROMPTS[0], sampling_params=GREEDY, stream=True
        )
        chunks = [chunk async for chunk in stream]
        return together, chunks, await engine.async_get_weight_version()

    together, chunks, version = asyncio.run(run())
    expected = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
    assert [r["output_ids"] for r in together] == [r["output_ids"] for r in expected]
    assert chunks[-1]["output_ids"] == expected[0]["output_ids"]
    assert version == "0"


def test_cancelling_an_async_call_aborts_its_request(engine: Engine) -> None:
    async def run() -> None:
        params = {"max_new_tokens": 400, "ignore_eos": True}
        task = asyncio.create_task(
            engine.async_generate(input_ids=PROMPTS[0], sampling_params=params)
        )
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    deadline = time.monotonic() + 10
    while engine.status().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.status().num_running == 0


def test_token_times_are_given_on_request(engine: Engine) -> None:
    result = engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY, return_token_times=True)
    times = result["meta_info"]["token_times"]
    assert len(times) == 12 and times == sorted(times) and abs(times[-1] - time.time()) < 30
