"""The end of the loop, and memory that is released, as seen by those who wait for it on other threads."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from versions import version_weights

from rollout import Engine
from rollout.errors import RolloutError
from rollout.protocol.commands import FlushCache, Generate, PromptSpec, Shutdown
from rollout.sampling_params import SamplingParams
from weight_sync import WeightPublisher
from weight_sync.errors import DeadlineExceeded, EngineDiedError, SyncError
from weight_sync.wire.local_call import LocalCall


@pytest.fixture
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    folder = tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)
    with Engine(folder, kv_cache_bytes=4 << 20) as engine:
        yield engine


def core_of(engine: Engine) -> Any:
    return engine._executor._core  # type: ignore[attr-defined]


def stuck(core: Any) -> threading.Event:
    """Keep the loop busy until the event is set."""
    go_on, there = threading.Event(), threading.Event()

    def wait() -> None:
        there.set()
        go_on.wait(30)

    core.soon(wait, "stuck")
    assert there.wait(10)
    return go_on


def later(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_publish_that_waits_for_a_boundary_hears_at_once_that_the_loop_has_ended(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = core_of(engine)
    go_on = stuck(core)
    publisher = WeightPublisher(engine, timeout_s=45)
    thread, outcome = later(lambda: publisher.publish(version_weights(Path(engine.model_path), 1)))
    deadline = time.monotonic() + 20
    while not core._boundaries._armed and time.monotonic() < deadline:
        time.sleep(0.01)

    def broken() -> Any:
        raise RuntimeError("broke on purpose")

    monkeypatch.setattr(core, "_next_tick", broken)
    start = time.monotonic()
    # The boundary is in the queue already: the loop dies when it comes to take it.
    go_on.set()
    thread.join(20)
    engine._executor._thread.join(20)  # type: ignore[attr-defined]
    assert time.monotonic() - start < 10
    assert isinstance(outcome[0], EngineDiedError), outcome
    with pytest.raises((EngineDiedError, RolloutError)):
        engine.generate(input_ids=[5], sampling_params={"max_new_tokens": 1})
    publisher.close()


def test_a_session_id_that_comes_again_after_a_missed_boundary_does_not_end_the_loop(
    engine: Engine,
) -> None:
    core = core_of(engine)
    go_on = stuck(core)
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match="no step boundary"):
            core.between_steps(lambda: None, 0.05, "commit/again")
    thread, outcome = later(lambda: core.between_steps(lambda: "written", 20.0, "commit/again"))
    go_on.set()
    thread.join(20)
    assert outcome == ["written"]
    params = {"max_new_tokens": 2, "ignore_eos": True}
    result = engine.generate(input_ids=[5, 6], sampling_params=params)
    assert len(result["output_ids"]) == 2


def test_weights_that_are_being_read_are_not_released_meanwhile(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = core_of(engine).host
    whole = engine.weights_fingerprint()
    reads, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        reads.set()
        go_on.wait(20)

    monkeypatch.setattr(host, "unwritable", slowly)
    reader, found = later(engine.weights_fingerprint)
    assert reads.wait(10)
    releaser, released = later(lambda: engine.release_memory_occupation(["weights"]))
    releaser.join(0.3)
    assert released == []
    go_on.set()
    reader.join(20)
    releaser.join(20)
    monkeypatch.undo()
    assert found == [whole] and released[0].tags == ["weights"]
    with pytest.raises(SyncError, match="cannot be read"):
        engine.weights_fingerprint()


def test_a_call_that_came_too_late_is_remembered_by_nobody(engine: Engine) -> None:
    core = core_of(engine)
    spec = PromptSpec(rid="late", input_ids=[5, 6], params=SamplingParams(max_new_tokens=1))
    call = LocalCall(Generate(prompts=[spec]), time.monotonic() - 1.0, None)
    held = weakref.ref(call)
    future = call.future
    core.submit(call)
    with pytest.raises(DeadlineExceeded, match="before the loop came to it"):
        future.result(20)
    engine.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 1})
    del call
    gc.collect()
    assert held() is None


def test_whoever_asked_for_the_end_is_answered_after_all_whose_calls_it_ends(
    engine: Engine,
) -> None:
    """The owner of an engine in another process hangs up then, and answers that came later would reach nobody."""
    core, order = core_of(engine), []

    def call_of(body: Any) -> LocalCall:
        call = LocalCall(body, time.monotonic() + 60.0)
        call.future.add_done_callback(lambda _: order.append(type(body).__name__))
        return call

    params = SamplingParams(max_new_tokens=100_000, ignore_eos=True)
    endless = call_of(Generate(prompts=[PromptSpec(rid="one", input_ids=[5], params=params)]))
    core.submit(endless)
    go_on = stuck(core)
    end, behind = call_of(Shutdown()), call_of(FlushCache())
    core.submit(end)
    core.submit(behind)
    go_on.set()
    end.future.result(20)
    assert sorted(order[:-1]) == ["FlushCache", "Generate"] and order[-1] == "Shutdown"
    with pytest.raises(RolloutError, match="shut down"):
        behind.future.result(0)
    assert endless.future.result(0) is not None
