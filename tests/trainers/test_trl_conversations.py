"""Tools and environments in the AsyncGRPO worker: TRL's reconciler, its parser's place, a tiny model."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from trl_support import async_settings as settings
from trl_support import data, noise, wait_until

from rollout.errors import ConfigError, RolloutError
from trainers_integration.trl import RolloutWorker, WeightTransfer

pytestmark = pytest.mark.trl

TOLERANCE = 1e-4


def asks(*calls: tuple[str, dict[str, Any]] | None) -> Callable[..., Any]:
    """A parser that finds `calls` in the answers of a conversation, one after the other; None: it is the last answer.

    Which answer it is follows from how many answers of tools, "=", the prompt has.
    """

    def parse(tokenizer: Any, ids: Any, prefix: Any, tools: Any) -> dict[str, Any]:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        message: dict[str, Any] = {"role": "assistant", "content": text.replace("=", "")}
        turn = tokenizer.decode(prefix).count("=") - 1
        call = calls[turn] if turn < len(calls) else None
        if call is not None:
            function = {"name": call[0], "arguments": call[1]}
            message["tool_calls"] = [{"type": "function", "function": function}]
        return message

    return parse


def make(
    task: Any,
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    parse: Any,
    *,
    rows: Any = "conversations",
    **options: Any,
) -> tuple[RolloutWorker, WeightTransfer, Any]:
    from transformers import AutoTokenizer

    folder, examples = task
    monkeypatch.setattr("trl.experimental.async_grpo.async_rollout_worker.parse_response", parse)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.response_template = "as parsed by the test"
    given = {
        "num_generations": 2,
        "max_inflight_tasks": 4,
        "max_completion_length": 4,
        **options.pop("args", {}),
    }
    worker = RolloutWorker(
        engine,
        options.pop("reward_funcs", None),
        train_dataset=data(examples, conversational=True) if isinstance(rows, str) else rows,
        args=settings(folder, **given),
        processing_class=tokenizer,
        **options,
    )
    transfer = WeightTransfer(engine)
    transfer.init_weight_transfer()
    model = noise(folder)
    transfer.send_weights(iter(list(model.named_parameters())))
    worker.update_model_version(1)
    return worker, transfer, model


def samples_of(worker: RolloutWorker, transfer: WeightTransfer, count: int) -> list[Any]:
    """So many samples; the worker ends."""
    found: list[Any] = []

    def enough() -> bool:
        worker.check_health(60.0)
        while len(found) < count:
            try:
                found.append(worker.rollout_buffer.get_nowait())
            except queue.Empty:
                return False
        return True

    worker.start()
    try:
        wait_until(enough)
    finally:
        worker.stop()
        transfer.destroy()
    return found


def lengths(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def check_logprobs(model: Any, sample: Any) -> None:
    """Tokens that count have the policy's log-probabilities, all others 0."""
    ids = torch.tensor(sample.input_ids)[None]
    with torch.no_grad():
        rows = torch.log_softmax(model(ids).logits[0, :-1], -1)
    want = rows.gather(1, ids[0, 1:, None])[:, 0].numpy()
    counts = sample.completion_mask[1:] == 1
    assert np.abs(sample.old_log_probs[1:] - want)[counts].max() < TOLERANCE
    assert not sample.old_log_probs[sample.completion_mask == 0].any()


def test_a_tool_is_called_and_its_answer_counts_for_nothing(
    task: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def digits(count: int) -> str:
        """Some digits.

        Args:
            count: How many.
        """
        calls.append(count)
        return "12345678"[:count] + "="

    parse = asks(("digits", {"count": 4}))
    worker, transfer, model = make(
        task, engine, monkeypatch, parse, tools=[digits], reward_funcs=lengths
    )
    samples = samples_of(worker, transfer, 8)
    assert len(calls) >= 8 and set(calls) == {4}
    for sample in samples:
        roles = [message["role"] for message in sample.completion]
        assert roles == ["assistant", "tool", "assistant"]
        assert sample.completion[1] == {"role": "tool", "name": "digits", "content": "1234="}
        assert sample.metrics["tools/call_frequency"] == 1.0
        assert sample.metrics["tools/failure_frequency"] == 0.0
        assert sample.model_version == 1
        assert 0 < sample.completion_mask.sum() < len(sample.input_ids)
        check_logprobs(model, sample)
    by_group: dict[int, list[float]] = {}
    for sample in samples:
        by_group.setdefault(sample.group_id, []).append(sample.advantage)
    assert all(sum(advantages) == pytest.approx(0.0) for advantages in by_group.values())


async def fails() -> str:
    """Raises."""
    raise ValueError("no=")


@pytest.mark.parametrize(
    ("name", "answer", "counter"),
    [
        ("fails", {"error": "no="}, "tools/fails/failure_total"),
        ("x", {"error": "unknown tool x"}, "tools/unknown_name_total"),
    ],
)
def test_what_goes_wrong_is_an_answer_and_calls_have_a_limit(
    task: Any,
    engine: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    answer: dict[str, str],
    counter: str,
) -> None:
    worker, transfer, _ = make(
        task,
        engine,
        monkeypatch,
        asks((name, {}), (name, {})),
        tools=[fails],
        reward_funcs=lengths,
        args={"max_tool_calling_iterations": 1},
    )
    (sample, *_) = samples_of(worker, transfer, 4)
    assert [message["role"] for message in sample.completion] == ["assistant", "tool", "assistant"]
    assert sample.completion[1]["content"] == str(answer)
    assert sample.metrics["tools/call_frequency"] == 1.0
    assert sample.metrics["tools/failure_frequency"] == 1.0
    told = worker.metrics_queue.get_nowait()
    assert told[counter] >= 1
    cut, size = told["tools/loop_exhausted_frac"]
    assert cut == size


def test_a_conversation_that_fills_the_context_ends_with_what_it_has(
    task: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def much() -> str:
        """Too much."""
        return "1" * 80 + "="

    worker, transfer, model = make(
        task, engine, monkeypatch, asks(("much", {})), tools=[much], reward_funcs=lengths
    )
    (sample, *_) = samples_of(worker, transfer, 2)
    assert [message["role"] for message in sample.completion] == ["assistant", "tool"]
    assert sample.completion_mask.sum() > 0
    check_logprobs(model, sample)
    told = worker.metrics_queue.get_nowait()
    assert told["completions/clipped_ratio"] == (2.0, 2.0)


class Sorting:
    """An environment that gives the digits, has a tool, and scores by itself."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.busy = False
        self.asked = 0

    def reset(self, **row: Any) -> str:
        assert not self.busy, "two conversations have one environment"
        self.busy, self.asked = True, 0
        return "4321="

    def help(self) -> str:
        """Say something."""
        self.asked += 1
        return "12="

    def get_reward(self) -> float:
        assert self.busy
        self.busy = False
        return float(self.asked)


@pytest.mark.parametrize("named", [False, True])
def test_an_environment_gives_the_prompt_answers_and_scores(
    task: Any, engine: Any, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    from datasets import Dataset

    Sorting.made = 0
    rows = None
    if named:
        prompt = [{"role": "user", "content": ""}]
        rows = Dataset.from_list([{"prompt": prompt, "environment": "sorting"}])
    worker, transfer, model = make(
        task,
        engine,
        monkeypatch,
        asks(("help", {})),
        rows=rows,
        environment_factory={"sorting": Sorting} if named else Sorting,
    )
    samples = samples_of(worker, transfer, 8)
    for sample in samples:
        assert sample.prompt == [{"role": "user", "content": "4321="}]
        assert sample.metrics["rewards/Sorting"] == sample.metrics["reward"] == 1.0
        assert sample.completion[1]["content"] == "12="
        check_logprobs(model, sample)
    assert 1 <= Sorting.made <= 4  # as many as converse at once, each used again


def test_what_a_conversation_lacks_is_said(
    task: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf:
        """No reset."""

    with pytest.raises(ConfigError, match="without `reset`"):
        make(task, engine, monkeypatch, asks(), environment_factory=Deaf)
    with pytest.raises(ConfigError, match="neither train_dataset nor"):
        make(task, engine, monkeypatch, asks(), rows=None, reward_funcs=lengths)
    with pytest.raises(ConfigError, match="no reward function"):
        make(task, engine, monkeypatch, asks(), tools=[lengths])
    examples = task[1]
    worker, transfer, _ = make(
        task,
        engine,
        monkeypatch,
        asks(),
        rows=data(examples),
        tools=[lengths],
        reward_funcs=lengths,
    )
    with pytest.raises(RolloutError, match="expected a list of messages"):
        samples_of(worker, transfer, 1)
