"""Which GPU and streams a thread works on: the current ones are each thread's own. A stand-in for `torch.cuda`'s."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sync_support import ToyEngine, toy_map, weights

from rollout.engine.weights import WeightCalls
from weight_sync import WeightPublisher, update_weights
from weight_sync.publisher.update import Update
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.service import WeightService
from weight_sync.spmd import mesh_update
from weight_sync.wire.cancellation import on_a_thread
from weight_sync.wire.process import Home


class Gpus(threading.local):
    """As torch has it: a thread begins with the first GPU and with default streams."""

    def __init__(self) -> None:
        self.current = 0
        self.streams = {i: (i, "default") for i in range(4)}

    def set_stream(self, stream: tuple[int, str]) -> None:
        self.current = stream[0]
        self.streams[stream[0]] = stream

    def set_device(self, device: Any) -> None:
        self.current = device if isinstance(device, int) else device.index


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    gpus = Gpus()
    for name, stand_in in {
        "is_initialized": lambda: True,
        "device_count": lambda: len(gpus.streams),
        "current_device": lambda: gpus.current,
        "current_stream": lambda device=None: gpus.streams[
            gpus.current if device is None else device
        ],
        "default_stream": lambda device=None: (
            gpus.current if device is None else device,
            "default",
        ),
        "set_stream": gpus.set_stream,
        "set_device": gpus.set_device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return gpus


def here(gpus: Gpus) -> tuple[int, list[tuple[int, str]]]:
    return gpus.current, [gpus.streams[i] for i in range(len(gpus.streams))]


@pytest.fixture
def caller(gpus: Gpus) -> Callable[[], Any]:
    """This thread works on the third GPU, on streams of its own there and on the second. What its calls should see."""
    gpus.set_stream((1, "a side stream"))
    gpus.set_stream((2, "another"))
    expected = here(gpus)
    assert expected[0] == 2
    return lambda: expected


@pytest.fixture
def packed_on(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where tensors were packed."""
    seen: list[Any] = []
    pack, copy = Update.pack, Update.copy

    def noted(self: Update, selection: Any) -> Any:
        seen.append(here(gpus))
        return pack(self, selection)

    def noted_copy(self: Update, rows: Any, sources: Any) -> None:
        seen.append(here(gpus))
        copy(self, rows, sources)

    monkeypatch.setattr(Update, "pack", noted)
    monkeypatch.setattr(Update, "copy", noted_copy)
    return seen


def test_an_awaited_call_works_where_its_caller_does(gpus: Gpus, caller: Callable[[], Any]) -> None:
    assert asyncio.run(on_a_thread(here, gpus)) == caller() == here(gpus)


def test_without_a_gpu_in_use_none_is_touched(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", None)
    assert asyncio.run(on_a_thread(lambda: 1)) == 1


@pytest.mark.parametrize("how", ["publish", "send"])
def test_what_is_published_from_a_coroutine_is_packed_behind_what_its_caller_has_asked_for(
    caller: Callable[[], Any],
    packed_on: list[Any],
    make_engine: Callable[..., ToyEngine],
    how: str,
) -> None:
    engine = make_engine()

    async def publish() -> None:
        with WeightPublisher(engine) as publisher:
            if how == "publish":
                await publisher.async_publish(weights(1.0))
                return
            await publisher.async_begin()
            await publisher.async_send(iter(weights(1.0).items()))
            await publisher.async_commit()

    asyncio.run(publish())
    assert engine.values() == {1.0} and set(map(repr, packed_on)) == {repr(caller())}


def test_an_engines_own_publisher_has_the_gpu_of_the_coroutine_that_first_used_it(
    gpus: Gpus, caller: Callable[[], Any], packed_on: list[Any], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine()
    own = {"__init__": lambda self: None, "_executor": engine, "_home": Home("the engine")}
    kind: Any = type("Calls", (WeightCalls,), own)
    kind.config, kind.__abstractmethods__ = SimpleNamespace(request_timeout_s=10.0), frozenset()
    calls = kind()
    asyncio.run(calls.async_update_weights_from_tensor(weights(1.0)))
    assert calls._publisher._endpoint._gpu == 2
    assert set(map(repr, packed_on)) == {repr(caller())}
    calls._publisher.close()


def test_the_call_of_all_ranks_of_a_trainer_works_where_its_caller_does(
    gpus: Gpus, caller: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Call:
        def update_weights_from_tensor(self, pairs: Any) -> None:
            seen.append(here(gpus))

    class Publisher:
        async def async_publish(self, *_: Any, **options: Any) -> None:
            pass

    def publisher(mesh: Any, key: Any) -> Publisher:
        seen.append(here(gpus))
        return Publisher()

    monkeypatch.setattr(mesh_update, "_publisher", publisher)
    asyncio.run(update_weights(Call(), [], None, None))
    asyncio.run(update_weights(None, [], None, SimpleNamespace(size=lambda: 2)))
    assert seen == [caller(), caller()]


def test_a_receivers_thread_works_on_the_gpu_of_its_weights(
    gpus: Gpus, make_engine: Callable[..., ToyEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    receiver = WeightReceiver(toy_map(), engine.host)
    monkeypatch.setattr(WeightReceiver, "device", torch.device("cuda", 3))
    seen: list[int] = []
    monkeypatch.setattr(receiver, "close", lambda: seen.append(gpus.current))
    WeightService(receiver).close()
    assert seen == [3] and gpus.current == 0
