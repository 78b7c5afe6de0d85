"""Makes `sync_support` importable and closes what tests of the sync open."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from left_behind import no_timer_or_thread_outlives_its_test as no_timer_or_thread_outlives_its_test
from left_behind import nothing_outlives_its_module as nothing_outlives_its_module
from process_group_support import Peer, PeerPool
from sync_support import ToyEngine, collect, spawn


@pytest.fixture
def make_engine() -> Iterator[Callable[..., ToyEngine]]:
    """Makes toy engines; none of them may ever have seen a mixture of two versions."""
    made: list[ToyEngine] = []

    def make(**options: Any) -> ToyEngine:
        made.append(ToyEngine(**options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        assert engine.host.mixtures == []


@pytest.fixture
def engine(make_engine: Callable[..., ToyEngine]) -> ToyEngine:
    """One toy engine in this process."""
    return make_engine()


@pytest.fixture
def child() -> Iterator[Callable[..., Any]]:
    """Starts scripts of this folder in processes of their own, and ends them with the test."""
    started: list[Any] = []

    def start(*arguments: str) -> Any:
        started.append(spawn(*arguments))
        return started[-1]

    yield start
    for process in started:
        collect(process)


@pytest.fixture(scope="module")
def peer_pool() -> Iterator[PeerPool]:
    """Processes for members of update groups, used again by the tests of a module."""
    pool = PeerPool()
    yield pool
    pool.close()


@pytest.fixture
def peers(peer_pool: PeerPool) -> Iterator[Callable[[int], list[Peer]]]:
    """Gives that many of them; those that a test leaves unfit for the next are replaced."""
    yield peer_pool.take
    peer_pool.tidy()
