"""Fixtures of the tests that break whole engines in real processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_faults import FaultyEngine, Nursery, without_breakpoints
from forks import Forking, Zygote
from versions import Reference


@pytest.fixture(scope="module", autouse=True)
def breakpoints_end_with_their_module() -> Iterator[None]:
    """Tests of other modules, in the same process, start engines as users do."""
    yield
    without_breakpoints()


@pytest.fixture(scope="session")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with biases and tied embeddings."""
    return tiny_checkpoint("qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def reference(folder: Path) -> Reference:
    """What transformers computes with it."""
    return Reference(folder)


@pytest.fixture
def socket_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], set[str]]:
    """Private folders for sockets in this test's own folder for temporary files."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return lambda: {path.name for path in folder.glob("rollout-*")}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Where trainers and owners to be killed come from."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def zygote(forks: Forking) -> Zygote:
    """Where the ranks of engines in child processes come from."""
    return forks.zygote(None)


@pytest.fixture(scope="module")
def make_engine_with_faults(
    folder: Path, reference: Reference, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., FaultyEngine]:
    """Makes an engine that the caller closes."""

    def make(**options: Any) -> FaultyEngine:
        points = tmp_path_factory.mktemp("points") / "points"
        return FaultyEngine(folder, points, reference, zygote, **options)

    return make


@pytest.fixture(scope="module")
def engine_of(
    make_engine_with_faults: Callable[..., FaultyEngine],
) -> Iterator[Callable[..., FaultyEngine]]:
    """`engine_of(tp_size=2, ...)`: an engine that tests of a module share as long as they ask for the same one."""
    current: list[tuple[dict[str, Any], FaultyEngine]] = []

    def find(**options: Any) -> FaultyEngine:
        if current and current[0][0] != options:
            current.pop()[1].close()
        if not current:
            current.append((options, make_engine_with_faults(**options)))
        current[0][1].points.clear()
        return current[0][1]

    yield find
    for _, engine in current:
        engine.close()
