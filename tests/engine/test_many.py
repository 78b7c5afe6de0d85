"""Many prompts as they finish, and samples that go on after they were ended."""

import asyncio
import itertools
import threading
import time

import pytest

from rollout import Engine, RolloutPool
from rollout.errors import InvalidRequestError
from weight_sync import WeightPublisher

PROMPTS = [[3 + i, 5, 9] for i in range(12)]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint("qwen3", head_dim=16)


@pytest.fixture(scope="module")
def engine(folder):
    with Engine(folder, seed=0) as engine:
        yield engine


def greedy(tokens):
    return {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}


def quiet(engine, timeout_s=30.0):
    """Nothing runs or waits in the engine any more."""
    deadline = time.monotonic() + timeout_s
    while (status := engine.status()).num_running or status.num_waiting:
        assert time.monotonic() < deadline, status
        time.sleep(0.01)
    return True


# ---- as_completed ----------------------------------------------------------------------------------------------------


def test_each_prompt_comes_once_with_what_generate_returns_for_it(engine):
    got = dict(engine.as_completed(input_ids=PROMPTS, sampling_params=greedy(4), max_in_flight=3))
    want = engine.generate(input_ids=PROMPTS, sampling_params=greedy(4))
    assert [got[i]["output_ids"] for i in range(len(PROMPTS))] == [r["output_ids"] for r in want]


def test_a_short_prompt_does_not_wait_for_a_long_one(engine):
    texts = iter(["a", "b", "c", "d"])
    params = {"n": 2, "max_new_tokens": 3, "ignore_eos": True}
    found = list(engine.as_completed(texts, params, max_in_flight=2, return_logprob=True))
    assert sorted(place for place, _ in found) == [0, 1, 2, 3]
    for _, samples in found:
        assert len(samples) == 2
        assert all(len(s["meta_info"]["output_token_logprobs"]) == 3 for s in samples)


def test_an_iterator_without_end_is_read_no_further_than_needed_and_closing_it_aborts(engine):
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield [3 + i % 50, 7]

    stream = engine.as_completed(input_ids=endless(), sampling_params=greedy(200), max_in_flight=4)
    assert read == []  # nothing is sent before something is asked for
    next(stream)
    assert read == [0, 1, 2, 3]
    next(stream)
    assert len(read) == 5
    stream.close()
    assert quiet(engine)


def test_asynchronously_too_and_leaving_the_loop_aborts(engine):
    async def some():
        stream = await engine.async_as_completed(
            input_ids=itertools.cycle(PROMPTS), sampling_params=greedy(4), max_in_flight=5
        )
        places = [place async for place, _ in take(stream, 9)]
        await stream.aclose()
        return places

    places = asyncio.run(some())
    assert len(places) == len(set(places)) == 9
    assert quiet(engine)


async def take(stream, count):
    for _ in range(count):
        yield await anext(stream)


def test_one_that_cannot_run_ends_all_and_leaves_nothing_behind(engine):
    prompts = [[3, 4], [10**9], [5, 6]]
    with pytest.raises(InvalidRequestError):
        list(engine.as_completed(input_ids=prompts, sampling_params=greedy(100)))
    assert quiet(engine)
    assert list(engine.as_completed(input_ids=[])) == []


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "neither of prompt and input_ids"),
        ({"prompt": "one"}, "call generate"),
        ({"prompt": ["a"], "max_in_flight": 0}, "at least 1"),
        ({"prompt": ["a"], "stream": True}, "neither stream nor rid"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(engine, call, says):
    with pytest.raises(InvalidRequestError, match=says):
        engine.as_completed(**call)


def test_a_client_of_another_process_and_a_pool_have_it_too(folder):
    with RolloutPool(folder, num_replicas=2, seed=0, num_threads=1) as pool:
        with Engine.connect(pool.address) as client:
            for engine in (pool, client):
                got = engine.as_completed(input_ids=PROMPTS, sampling_params=greedy(3))
                assert sorted(place for place, _ in got) == list(range(len(PROMPTS)))


# ---- resume ----------------------------------------------------------------------------------------------------------


def ended_early(engine, prompts, params, **options):
    """Results of requests that were all aborted after some tokens."""
    found = []
    call = threading.Thread(
        target=lambda: found.extend(
            engine.generate(
                input_ids=prompts,
                sampling_params=params,
                return_logprob=True,
                return_prompt_token_ids=True,
                **options,
            )
        )
    )
    call.start()
    deadline = time.monotonic() + 30
    while engine.status().num_running < len(prompts):
        assert time.monotonic() < deadline
    engine.pause_generation("abort")
    call.join(30)
    engine.continue_generation()
    assert {r["meta_info"]["finish_reason"]["type"] for r in found} == {"abort"}
    return found


def test_a_sample_goes_on_where_it_was_ended_with_the_ids_and_numbers_of_both_parts(engine):
    prompts, params = PROMPTS[:3], greedy(120)
    parts = ended_early(engine, prompts, params, flat_logprobs=True, return_token_versions=True)
    want = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
    for got, whole, part in zip(engine.resume(parts, params), want, parts, strict=True):
        meta = got["meta_info"]
        assert got["output_ids"] == whole["output_ids"]
        assert got["text"] == whole["text"]
        assert got["output_ids"][: len(part["output_ids"])] == part["output_ids"]
        logprobs = [value for value, _, _ in meta["output_token_logprobs"]]
        assert logprobs == pytest.approx(
            [value for value, _, _ in whole["meta_info"]["output_token_logprobs"]], abs=1e-4
        )
        assert meta["output_logprobs"] == logprobs
        assert meta["finish_reason"] == {"type": "length", "length": 120}
        assert (meta["completion_tokens"], meta["prompt_tokens"]) == (120, 3)
        assert [(s["start"], s["end"]) for s in meta["weight_versions"]] == [(0, 120)]
        assert meta["token_versions"] == [meta["weight_versions"][0]["number"]] * 120
        assert meta["num_resumes"] == 1


def test_tokens_on_either_side_of_an_update_say_which_version_drew_them(engine, reference_model):
    params = {"max_new_tokens": 150, "ignore_eos": True, "sampling_seed": 5}
    parts = ended_early(engine, PROMPTS[:2], params)
    model = reference_model(engine.model_path)
    with WeightPublisher(engine) as publisher:
        report = publisher.publish({name: 0.9 * p for name, p in model.named_parameters()})
        got = engine.resume(parts, params, min_weight_version=report.version)
        again = asyncio.run(engine.async_resume(parts, params))
        publisher.publish(model)
    assert [r["output_ids"] for r in again] == [r["output_ids"] for r in got]
    assert got[0]["output_ids"][-20:] != got[1]["output_ids"][-20:]
    for part, result in zip(parts, got, strict=True):
        border = len(part["output_ids"])
        first, second = result["meta_info"]["weight_versions"]
        assert (first["start"], first["end"]) == (0, border)
        assert (second["start"], second["end"]) == (border, 150)
        assert second["number"] == report.version > first["number"]


def test_texts_of_tokens_are_there_for_both_parts_or_for_none(engine):
    params = greedy(60)
    for asked in (True, False):
        (part,) = ended_early(engine, PROMPTS[:1], params, return_text_in_logprobs=asked)
        (got,) = engine.resume([part], params)
        texts = [text for _, _, text in got["meta_info"]["output_token_logprobs"]]
        assert len(texts) == 60 and all((text is not None) == asked for text in texts)


def test_what_has_finished_comes_back_as_it_is_and_twice_ended_samples_go_on_twice(engine):
    params = greedy(160)
    whole = engine.generate(
        input_ids=[PROMPTS[0]], sampling_params=greedy(2), return_prompt_token_ids=True
    )
    assert engine.resume(whole, greedy(2)) == whole
    assert engine.resume([], greedy(2)) == []
    part = ended_early(engine, PROMPTS[:1], params)[0]
    cut = dict(part)
    keep = max(1, len(part["output_ids"]) // 2)
    cut["output_ids"] = part["output_ids"][:keep]
    meta = dict(part["meta_info"])
    meta["output_token_logprobs"] = meta["output_token_logprobs"][:keep]
    meta["weight_versions"] = [{**meta["weight_versions"][0], "end": keep}]
    meta["completion_tokens"] = keep
    first = engine.resume([{**cut, "meta_info": meta}], greedy(keep + 1))[0]
    assert first["meta_info"]["finish_reason"] == {"type": "length", "length": keep + 1}
    aborted = {**first["meta_info"], "finish_reason": {"type": "abort", "message": "again"}}
    second = engine.resume([{**first, "meta_info": aborted}], params)[0]
    assert second["meta_info"]["num_resumes"] == 2
    want = engine.generate(input_ids=PROMPTS[0], sampling_params=params)
    assert second["output_ids"] == want["output_ids"]


def test_a_sample_that_was_ended_before_its_first_token_begins(engine):
    nothing = {
        "text": "",
        "output_ids": [],
        "prompt_token_ids": PROMPTS[0],
        "meta_info": {
            **engine.generate(input_ids=PROMPTS[0], sampling_params=greedy(1))["meta_info"],
            "finish_reason": {"type": "abort", "message": "before it began"},
            "completion_tokens": 0,
            "weight_versions": [{"version": "0", "number": 0, "start": 0, "end": 0}],
        },
    }
    (got,) = engine.resume([nothing], greedy(3))
    assert len(got["output_ids"]) == got["meta_info"]["completion_tokens"] == 3
    assert [(s["start"], s["end"]) for s in got["meta_info"]["weight_versions"]] == [(0, 3)]


def test_a_resumed_sample_shares_prefixes_with_its_own_salt_alone(engine):
    prompts = [[*range(100, 164)], [*range(200, 264)]]
    parts = ended_early(engine, prompts, greedy(120), cache_salt=["a", "b"])

    def cached(prompt, salt):
        result = engine.generate(input_ids=prompt, sampling_params=greedy(1), cache_salt=salt)
        return result["meta_info"]["cached_tokens"]

    whole = engine.resume(parts, greedy(120), cache_salt=["a", "b"])
    assert [cached(prompt, None) for prompt in prompts] == [0, 0]
    ids = [
        part["prompt_token_ids"] + got["output_ids"] for part, got in zip(parts, whole, strict=True)
    ]
    assert cached(ids[0], "b") == 0
    assert cached(ids[0], "a") >= 128 and cached(ids[1], "b") >= 128
    for salt in (["a"], ["a", 7]):
        with pytest.raises(InvalidRequestError, match="cache_salt"):
            engine.resume(parts, greedy(120), cache_salt=salt)


@pytest.mark.parametrize(
    "results", [None, "text", 7, {"output_ids": []}, [["nested"]], [None], [{}]]
)
def test_what_are_no_results_is_refused(engine, results):
    with pytest.raises(InvalidRequestError, match=r"resume: got .*expected a (list|dictionary)"):
        engine.resume(results, greedy(3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stop": ["x"]}, "no strings"),
        ({"frequency_penalty": 0.5}, "expected neither"),
        ({"max_new_tokens": 150}, "without prompt_token_ids"),
        ({"max_new_tokens": 150}, "with .'routed_experts'."),
    ],
)
def test_two_parts_that_cannot_be_one_sample_are_refused(engine, change, says):
    params = {**greedy(150), **change}
    part = ended_early(engine, PROMPTS[:1], greedy(150))[0]
    if "prompt_token_ids" in says:
        del part["prompt_token_ids"]
    if "routed_experts" in says:  # those of one part would be taken for those of the whole
        part["meta_info"]["routed_experts"] = []
    with pytest.raises(InvalidRequestError, match=says):
        engine.resume([part], params)
