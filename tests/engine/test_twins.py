"""Each call of an engine is there twice, with one signature and, but for the awaiting, one behaviour."""

import asyncio
import inspect
from concurrent.futures import Future

import msgspec
import numpy as np
import pytest

from rollout import Engine, RolloutPool
from rollout.engine.client import sendable
from rollout.engine.twins import asks, awaitable
from rollout.errors import InvalidRequestError
from rollout.protocol import commands as cmd
from weight_sync.wire.futures import answer_of
from weight_sync.wire.process import Home

NO_TWIN = {"connect", "from_model", "weight_channel"}
"""Constructors, and what sends nothing."""
OTHER_SIGNATURE = {"publish"}
"""The twin also takes asynchronous iterators."""


def calls(kind):
    for name, member in inspect.getmembers(kind, inspect.isroutine):
        if not name.startswith(("_", "async_")) and name not in NO_TWIN:
            yield name, member


@pytest.mark.parametrize("kind", [Engine, RolloutPool])
def test_every_call_has_a_twin_of_the_same_signature(kind):
    listed = dict(calls(kind))
    assert {"generate", "pause_generation", "shutdown", "weights_fingerprint"} <= listed.keys()
    for name, call in listed.items():
        if name == "replicas":  # what the pool remembers: nobody is asked
            continue
        twin = getattr(kind, f"async_{name}")
        assert inspect.iscoroutinefunction(twin), name
        assert twin.__name__ == f"async_{name}"
        assert twin.__doc__.startswith(f"As `{name}`"), name
        if name not in OTHER_SIGNATURE:
            assert parameters(twin) == parameters(call), name


def parameters(call):
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(call).parameters.values()
    ]


def test_a_signature_says_what_the_call_returns_and_not_how_it_is_written():
    assert inspect.signature(Engine.abort_request).return_annotation == "int"
    assert inspect.signature(Engine.async_get_weights_by_name).return_annotation == "list[Any]"


class Recorder:
    """Answers each command with its double, and notes the deadlines."""

    def __init__(self):
        self.limits = []

    def _call(self, command, timeout_s):
        self.limits.append(timeout_s)
        if command < 0:
            raise ValueError(command)
        return 2 * command

    async def _async_call(self, command, timeout_s):
        return self._call(command, timeout_s)

    @asks
    def twice(self, value, timeout_s=None):
        """Double it, and once more."""
        once = yield value
        again = yield once
        return again + 1

    async_twice = awaitable(twice)


def test_commands_of_one_call_are_sent_in_turn_with_its_deadline():
    recorder = Recorder()
    assert recorder.twice(3) == 13
    assert recorder.twice(3, 5.0) == 13
    assert asyncio.run(recorder.async_twice(3, timeout_s=7.0)) == 13
    assert recorder.limits == [None, None, 5.0, 5.0, 7.0, 7.0]


def test_what_is_answered_with_an_error_raises_it_in_both():
    recorder = Recorder()
    with pytest.raises(ValueError, match="-3"):
        recorder.twice(-3)
    with pytest.raises(ValueError, match="-3"):
        asyncio.run(recorder.async_twice(-3))


def test_wrong_arguments_are_refused_before_anything_is_sent():
    recorder = Recorder()
    with pytest.raises(TypeError, match="unexpected keyword argument 'valeu'"):
        recorder.twice(valeu=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'valeu'"):
        asyncio.run(recorder.async_twice(valeu=3))
    assert recorder.limits == []


class Closed:
    """An executor that must not be asked."""

    def submit(self, body, *, timeout_s, on_chunk=None):
        raise AssertionError(f"{body} was sent")


def engine_of_this_process():
    engine = Engine.__new__(Engine)
    engine._home, engine._maybe_executor = Home("the engine"), Closed()
    return engine


@pytest.mark.parametrize(
    ("call", "arguments", "says"),
    [
        ("get_weights_by_name", {"name": 5}, r"\$\.name"),
        ("get_weights_by_name", {"name": "x" * 513}, r"\$\.name"),
        ("get_weights_by_name", {"name": "\ud800"}, "surrogates"),
        ("get_weights_by_name", {"name": "x", "truncate_size": -1}, "truncate_size"),
        ("get_weights_by_name", {"name": "x", "truncate_size": 1.5}, "truncate_size"),
        ("get_weights_by_name", {"name": object()}, "no message carries"),
        ("save_sharded_model", {"path": "x" * 5000}, "path"),
        ("save_sharded_model", {"path": "x", "max_size": 0}, "max_size"),
        ("abort_request", {"rid": "x" * 300}, "rids"),
        ("abort_request", {"rid": ["a"]}, "rid"),
        ("flush_cache", {"recompute": "yes"}, "recompute"),
        ("release_memory_occupation", {"tags": 5}, "tags"),
        ("release_memory_occupation", {"tags": [["weights"]]}, "tags"),
        ("set_internal_state", {"server_args": None}, "expected a dict"),
        ("set_internal_state", {"server_args": {"max_running_requests": "1"}}, "int"),
    ],
)
def test_an_engine_of_this_process_takes_no_more_than_one_elsewhere(call, arguments, says):
    engine = engine_of_this_process()
    engine.config = type("Config", (), {"request_timeout_s": 5.0})
    with pytest.raises(InvalidRequestError, match=says):
        getattr(engine, call)(**arguments)
    with pytest.raises(InvalidRequestError, match=says):
        asyncio.run(getattr(engine, f"async_{call}")(**arguments))


def test_numbers_of_other_libraries_are_sent_as_numbers():
    command = cmd.GetWeights(name="x", truncate_size=np.int64(3))
    assert sendable(command) == cmd.GetWeights(name="x", truncate_size=3)
    assert sendable(cmd.SlowDown(seconds=np.float32(0.5))).seconds == 0.5
    for kind in msgspec.inspect.type_info(cmd.Command).types:
        assert kind.cls.__struct_config__.tag is not None  # all of them are messages


@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_that_comes_with_the_answer_is_not_lost(turns: int) -> None:
    """Whoever cancels a task waits for its end, which one that goes on with its answer may never reach."""

    async def run() -> None:
        future: Future[int] = Future()
        task = asyncio.ensure_future(answer_of(future, 60.0, "a call"))
        await asyncio.sleep(0)
        future.set_result(7)
        for _ in range(turns):
            await asyncio.sleep(0)
        ends = task.cancel()  # False: it had ended before
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError) if ends else outcome == 7

    asyncio.run(run())
