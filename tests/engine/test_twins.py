"""Each call of an engine is there twice, with one signature and, but for the awaiting, one behaviour."""

import asyncio
import inspect

import pytest

from rollout import Engine, RolloutPool
from rollout.engine.twins import asks, awaitable

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
