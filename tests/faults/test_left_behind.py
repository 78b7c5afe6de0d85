"""The fixtures that look for what tests leave behind find it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import left_behind
import pytest
from sync_support import ToyEngine

from weight_sync import WeightPublisher


def test_a_timer_a_pool_and_a_thread_of_a_test_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "GRACE_S", 0.05)
    stop, before = threading.Event(), set(threading.enumerate())

    def wait() -> None:
        stop.wait(10)

    timer, thread = threading.Timer(10, stop.set), threading.Thread(target=wait)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(wait)
        timer.start()
        thread.start()
        found = left_behind.started_since(before)
        assert timer in found and thread in found and len(found) == 3
        with pytest.raises(AssertionError, match="left threads behind"):
            left_behind.wait_until_gone("threads", lambda: found)
        timer.cancel()
        stop.set()
    thread.join()
    timer.join()


def test_threads_and_arenas_of_an_engine_that_was_not_closed_are_found() -> None:
    before, arenas = set(threading.enumerate()), left_behind.num_arenas()

    def left() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before and left_behind.ours(t)]

    engine = ToyEngine(serve=True)
    publisher = WeightPublisher(engine.address, transport="shared_memory")
    publisher.begin()
    assert left() and left_behind.num_arenas() > arenas
    publisher.close()
    engine.close()
    left_behind.wait_until_gone("threads", left)
    assert left_behind.num_arenas() == arenas
