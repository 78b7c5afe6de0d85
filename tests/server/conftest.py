"""Servers in processes of their own, over tiny random models."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rollout.server import ServerProcess, launch_server_process

sys.path.insert(0, str(Path(__file__).parents[1] / "sync"))  # for `foreign_sender`

ENGINE = {"kv_cache_bytes": 4 << 20, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3")


@pytest.fixture(scope="module")
def serve(folder: Path) -> Iterator[Callable[..., ServerProcess]]:
    """`serve(server_options, **engine_options)`: a server that ends with the module."""
    running: list[ServerProcess] = []

    def start(server: dict[str, Any] | None = None, **options: Any) -> ServerProcess:
        found = launch_server_process(
            folder, server={"port": 0, "drain_s": 1.0, **(server or {})}, **{**ENGINE, **options}
        )
        running.append(found)
        return found

    yield start
    for server in running:
        server.close()


@pytest.fixture(scope="module")
def server(serve: Callable[..., ServerProcess]) -> ServerProcess:
    """The one that most tests of a module share."""
    return serve()


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as client:
        yield client


@pytest.fixture
def until() -> Callable[..., None]:
    """`until(what, condition)`: wait for what comes soon, and fail where it does not come at all."""

    def wait(what: str, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not in time: {what}"
            time.sleep(0.02)

    return wait
