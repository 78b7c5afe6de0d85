"""Publishers of many ranks that nobody closed: collected, left open at the end of a script, or copied by a fork."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sync_support import FOLDER, ToyEngine, arenas_mapped, eventually, num_descriptors, weights

from weight_sync import SpmdPublisher
from weight_sync.errors import ForkedProcessError
from weight_sync.spmd.handover import HandOver


class Taker:
    """An engine that is handed whole tensors."""

    def update_weights_from_tensor(self, pairs: Any) -> str:
        return f"{len(pairs)} taken"


def ours() -> int:
    """Threads and descriptors."""
    return threading.active_count() + num_descriptors()


def sockets() -> list[Path]:
    return list(Path(os.environ["TMPDIR"]).glob("rollout-*"))


@pytest.mark.parametrize("target", ["object", "address", "handed over", "group"])
def test_publishers_that_are_collected_close(make_engine: Callable[..., Any], target: str) -> None:
    engine = make_engine(serve=True)
    to: Any = {"object": engine, "handed over": HandOver(engine=Taker())}.get(
        target, engine.address
    )
    options: dict[str, Any] = {}
    if target == "group":
        options = {"transport": "process_group", "group_backend": "gloo"}
    SpmdPublisher(None, **options).publish(weights(0.5), to)  # what is made once is there
    gc.collect()
    assert eventually(lambda: not engine.receiver._arenas and arenas_mapped() == 0)
    assert eventually(lambda: len(sockets()) == 1)  # the engine's own
    before = ours()
    for step in range(3):
        publisher = SpmdPublisher(None, **options)
        publisher.publish(weights(float(step)), to)
        publisher.cycle = publisher  # type: ignore[attr-defined]  # found by the collector alone
        del publisher
        gc.collect()
    assert eventually(lambda: ours() <= before)
    assert eventually(lambda: not engine.receiver._arenas and arenas_mapped() == 0)
    assert eventually(lambda: len(sockets()) == 1)


def test_a_publisher_may_be_collected_on_a_thread_of_its_own(engine: ToyEngine) -> None:
    """Which that thread cannot wait for."""
    publisher = SpmdPublisher(None)
    publisher.publish(weights(1.0), engine)
    held, pool, client = [publisher], publisher._thread, publisher._client
    assert pool is not None
    del publisher
    pool.submit(held.clear)
    assert eventually(lambda: client.dead is not None and arenas_mapped() == 0)
    assert eventually(lambda: not any(t.is_alive() for t in pool._threads))


def test_a_publisher_that_was_closed_leaves_nothing_to_do(engine: ToyEngine) -> None:
    publisher = SpmdPublisher(None)
    finalizer = publisher._finalizer
    publisher.close()
    assert not finalizer.alive
    publisher.close()


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from sync_support import weights
from weight_sync import SpmdPublisher

publisher = SpmdPublisher(None)
print(publisher.publish(weights(4.0), sys.argv[2]).version)
"""


def test_a_script_may_end_without_closing_its_publisher(
    make_engine: Callable[..., ToyEngine], tmp_path: Path
) -> None:
    engine = make_engine(serve=True)
    script = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(FOLDER), engine.address],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (script.returncode, script.stdout, script.stderr) == (0, "1\n", "")
    assert list(tmp_path.iterdir()) == []
    assert engine.values() == {4.0}
    assert eventually(lambda: not engine.receiver._arenas)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_forked_child_can_neither_use_nor_close_its_parents_publisher(
    engine: ToyEngine,
) -> None:
    publisher = SpmdPublisher(None)
    publisher.publish(weights(1.0), engine)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        try:
            with pytest.raises(ForkedProcessError):
                publisher.publish(weights(5.0), engine)
            publisher.close()
            held = [publisher]
            del publisher
            held.clear()  # collected
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert publisher.publish(weights(2.0), engine).version == 2
    publisher.close()
    assert engine.values() == {2.0}
