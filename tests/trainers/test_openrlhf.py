"""The surface that OpenRLHF's trainer calls, on the class of its actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_group import PlainGroup
from versions import TOLERANCE, Reference, version_weights

from rollout.errors import InvalidRequestError, RolloutError
from trainers_integration.openrlhf.engines import OpenRLHFEngine, opened
from weight_sync.errors import ManifestMismatch, TransportError, WeightUpdateError

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "kv_cache_bytes": 4 << 20,
    "request_timeout_s": 30.0,
}
PROMPT = [5, 9, 2]


class VllmParams:
    """The attributes of vLLM's `SamplingParams` as OpenRLHF fills them in."""

    def __init__(self, **changed: Any) -> None:
        values = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 6, "min_tokens": 1}
        values |= {"skip_special_tokens": False, "include_stop_str_in_output": True, "logprobs": 1}
        values |= {"n": 1, "seed": None, "stop": None, "ignore_eos": True, **changed}
        self.__dict__.update(values)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def actor(folder: Path) -> Iterator[OpenRLHFEngine]:
    actor = OpenRLHFEngine(str(folder), executor="inline", **OPTIONS)
    yield actor
    asyncio.run(actor.shutdown())


class Trainer:
    """Rank 0 of the group, which announces each tensor and then broadcasts it."""

    def __init__(self, actor: OpenRLHFEngine) -> None:
        self.actor = actor
        self.group = PlainGroup.serve(world_size=2, group_name="openrlhf", timeout_s=30)

    async def connect(self) -> None:
        await self.actor.init_process_group(
            "127.0.0.1", self.group.master_port, 1, 2, "openrlhf", backend="gloo"
        )

    async def broadcast(self, tensors: dict[str, torch.Tensor], *, last: bool = True) -> None:
        for number, (name, tensor) in enumerate(tensors.items(), 1):
            answer = asyncio.ensure_future(
                self.actor.update_weight(
                    name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    empty_cache=last and number == len(tensors),
                )
            )
            await asyncio.sleep(0)
            part = tensor.contiguous().view(-1).view(torch.uint8)
            sent = self.group.broadcast(part, [(0, part.numel())], timeout_s=30)
            await asyncio.wrap_future(sent)
            await answer


def test_tensor_by_tensor_becomes_one_version(actor: OpenRLHFEngine, folder: Path) -> None:
    trainer = Trainer(actor)
    reference = Reference(folder)

    async def update() -> None:
        await trainer.connect()
        tensors = version_weights(folder, 1)
        names = list(tensors)
        await trainer.broadcast({name: tensors[name] for name in names[:5]}, last=False)
        old = await actor.generate(PROMPT, VllmParams())
        assert old.weight_versions[0][0]["number"] == 0
        assert own_logprobs(old) == pytest.approx(
            reference.at(0).logprobs(PROMPT, old.outputs[0].token_ids), abs=TOLERANCE
        )
        await trainer.broadcast({name: tensors[name] for name in names[5:]})
        new = await actor.generate(PROMPT, VllmParams())
        assert new.weight_versions[0][0]["number"] == 1
        assert own_logprobs(new) == pytest.approx(
            reference.at(1).logprobs(PROMPT, new.outputs[0].token_ids), abs=TOLERANCE
        )

    try:
        asyncio.run(update())
    finally:
        trainer.group.destroy()


def own_logprobs(output: Any) -> list[float]:
    """As OpenRLHF reads them."""
    sample = output.outputs[0]
    return [
        table[token].logprob for table, token in zip(sample.logprobs, sample.token_ids, strict=True)
    ]


def test_a_refused_tensor_leaves_the_old_version_and_the_next_update_works(
    actor: OpenRLHFEngine, folder: Path
) -> None:
    trainer = Trainer(actor)

    async def update() -> None:
        await trainer.connect()
        tensors = version_weights(folder, 1)
        with pytest.raises(ManifestMismatch, match="no_such"):
            await trainer.broadcast({"no_such.weight": torch.zeros(4)}, last=False)
        assert actor.engine.status().version == 0 and not actor.engine.in_weight_update
        await trainer.broadcast(tensors)
        assert actor.engine.status().version == 1

    try:
        asyncio.run(update())
    finally:
        trainer.group.destroy()


def test_samples_have_the_shape_that_vllm_gives(actor: OpenRLHFEngine) -> None:
    output = asyncio.run(actor.generate(PROMPT, VllmParams(n=4, logprobs=None)))
    assert output.prompt_token_ids == PROMPT and len(output.outputs) == 4
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    assert all(sample.logprobs is None for sample in output.outputs)
    assert {sample.finish_reason for sample in output.outputs} == {"length"}

    async def in_two_calls() -> list[Any]:
        await actor.add_requests(sampling_params=VllmParams(n=2), prompt_token_ids=[PROMPT, [7]])
        assert await actor.get_num_unfinished_requests() == 0
        return await actor.get_responses()

    outputs = asyncio.run(in_two_calls())
    assert [(o.prompt_token_ids, len(o.outputs)) for o in outputs] == [(PROMPT, 2), ([7], 2)]
    with pytest.raises(InvalidRequestError, match="temprature"):
        asyncio.run(actor.generate(PROMPT, {"temprature": 1.0}))


def test_a_trainer_that_came_back_after_an_update_half_sent_begins_anew(
    actor: OpenRLHFEngine, folder: Path
) -> None:
    first, second = Trainer(actor), Trainer(actor)
    tensors = version_weights(folder, 1)

    async def course() -> None:
        await first.connect()
        await first.broadcast(dict(list(tensors.items())[:3]), last=False)
        assert actor.engine.in_weight_update
        await second.connect()
        assert not actor.engine.in_weight_update
        await second.broadcast(tensors)
        assert actor.engine.status().version == 1

    try:
        asyncio.run(course())
    finally:
        first.group.destroy()
        second.group.destroy()


def test_results_come_in_the_order_of_the_calls_and_a_call_without_any_ends_at_once(
    actor: OpenRLHFEngine,
) -> None:
    async def course() -> None:
        with pytest.raises(InvalidRequestError, match="add_requests first"):
            await actor.get_responses()
        with pytest.raises(InvalidRequestError, match="top_p"):
            await actor.add_requests(VllmParams(top_p=7.0), [PROMPT])
        with pytest.raises(InvalidRequestError, match="add_requests first"):
            await actor.get_responses()
        one = asyncio.ensure_future(actor.add_requests(VllmParams(max_tokens=40), [PROMPT]))
        two = asyncio.ensure_future(actor.add_requests(VllmParams(max_tokens=2), [[7]]))
        await asyncio.sleep(0)
        assert [(await actor.get_responses())[0].prompt_token_ids for _ in range(2)] == [
            PROMPT,
            [7],
        ]
        await asyncio.gather(one, two)

    asyncio.run(course())


def test_what_vllm_would_do_otherwise_is_refused_and_not_left_out(actor: OpenRLHFEngine) -> None:
    for asked in ({"bad_words": ["no"]}, {"allowed_token_ids": [1]}, {"structured_outputs": {}}):
        with pytest.raises(InvalidRequestError, match=next(iter(asked))):
            asyncio.run(actor.generate(PROMPT, VllmParams(**asked)))
    alone = asyncio.run(
        actor.generate(PROMPT, VllmParams(bad_words=[], structured_outputs=None, logprobs=0))
    )
    assert len(own_logprobs(alone)) == 6
    biased = asyncio.run(actor.generate(PROMPT, VllmParams(logit_bias={11: 100.0})))
    assert biased.outputs[0].token_ids == [11] * 6


def test_without_a_limit_an_answer_fills_the_context(folder: Path) -> None:
    small = OpenRLHFEngine(str(folder), executor="inline", context_length=200, **OPTIONS)
    output = asyncio.run(small.generate(PROMPT, VllmParams(max_tokens=None)))
    asyncio.run(small.shutdown())
    assert len(PROMPT) + len(output.outputs[0].token_ids) == 200


def test_samples_that_would_be_trained_on_wrongly_are_refused(actor: OpenRLHFEngine) -> None:
    async def aborted() -> None:
        running = asyncio.ensure_future(actor.generate(PROMPT, VllmParams(max_tokens=400)))
        while not await actor.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
        await actor.engine.async_abort_request(abort_all=True)
        await running

    with pytest.raises(RolloutError, match="nothing may abort"):
        asyncio.run(aborted())

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    with pytest.raises(InvalidRequestError, match="prompt of 4 tokens and room for 4"):
        asyncio.run(actor.generate_responses("abcd", "", VllmParams(max_tokens=None), 4, tokenizer))


def test_a_response_covers_prompt_and_output(actor: OpenRLHFEngine) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    rows = asyncio.run(
        actor.generate_responses(
            "ab", "label", VllmParams(max_tokens=None), 8, tokenizer, num_samples=3
        )
    )
    assert len(rows) == 3
    for row in rows:
        assert row["observation_tokens"][:2] == [97, 98] and len(row["observation_tokens"]) == 8
        assert row["action_ranges"] == [(2, 8)] and row["truncated"]
        assert row["rollout_log_probs"][:2] == [0.0, 0.0] and len(row["rollout_log_probs"]) == 8
    with pytest.raises(InvalidRequestError, match="images"):
        asyncio.run(actor.generate_responses("a", "", {}, 8, tokenizer, images=["a picture"]))


def test_it_sleeps_pauses_and_goes_on(actor: OpenRLHFEngine) -> None:
    async def course() -> None:
        await actor.sleep()
        assert actor.engine.status().released == ["kv_cache", "weights"]
        await actor.wake_up()
        await actor.pause_generation()
        running = asyncio.ensure_future(actor.generate(PROMPT, VllmParams()))
        await actor.resume_generation()
        assert len((await running).outputs[0].token_ids) == 6

    asyncio.run(course())


def test_what_cannot_be_done_is_refused_with_the_way_out(actor: OpenRLHFEngine) -> None:
    with pytest.raises(TransportError, match="vllm_sync_with_ray"):
        asyncio.run(actor.init_process_group("127.0.0.1", 1, 1, 2, "g", use_ray=True))
    with pytest.raises(WeightUpdateError, match="init_process_group"):
        asyncio.run(actor.update_weight("a", "float32", [1]))


def test_a_gpu_handle_is_opened_on_this_processs_device_and_nothing_else_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def rebuild(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return torch.zeros(2, 3)

    rebuild.__module__, rebuild.__name__ = "torch.multiprocessing.reductions", "rebuild_cuda_tensor"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"gpu-{i}")
    )
    arguments = ("t", (), (), 0, "s", "float32", 7, "handle")
    opened({"gpu-1": (rebuild, arguments)}, [2, 3])
    assert calls == [("t", (), (), 0, "s", "float32", 1, "handle")]
    with pytest.raises(TransportError, match="rebuilt by"):
        opened({"gpu-1": (print, ("hello",))}, [2, 3])
    with pytest.raises(TransportError, match="elsewhere"):
        opened({"elsewhere": (rebuild, arguments)}, [2, 3])
    with pytest.raises(TransportError, match=r"\[2, 4\]"):
        opened({"gpu-0": (rebuild, arguments)}, [2, 4])
