"""Another engine takes the place, and the address, of the one that a trainer published to."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from os import kill
from pathlib import Path
from typing import Any

import pytest
from versions import version_weights

from rollout import Engine
from rollout.errors import EngineDiedError, EngineRestartedError
from weight_sync import WeightPublisher

PARAMS = {"temperature": 0.0, "max_new_tokens": 2}


def test_a_publisher_notices_that_its_engine_was_started_anew(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)
    weights = version_weights(folder, 1)
    some = dict(list(weights.items())[:2])
    options: dict[str, Any] = {
        "executor": "local",
        "listen": f"ipc://{tmp_path}/engine",
        "kv_cache_bytes": 1 << 20,
        "num_threads": 1,
    }

    def life(engine: Engine) -> str:
        meta = engine.generate(input_ids=[5], sampling_params=PARAMS)["meta_info"]
        assert meta["engine_id"] == engine.status().engine_id
        return str(meta["engine_id"])

    with Engine(folder, **options) as first, WeightPublisher(first.address) as publisher:
        publisher.publish(weights, label="step 17")
        publisher.publish(some, strict=False)
        before = life(first)
        kill(first.status().pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError):
            first.generate(input_ids=[5], sampling_params=PARAMS)
        first.shutdown()
        with Engine(folder, **options) as second:
            assert life(second) != before
            with pytest.raises(EngineRestartedError, match=r"committed version 2.*started anew"):
                publisher.publish(some, strict=False)
            with caplog.at_level(logging.WARNING):
                assert publisher.publish(weights, label="step 18").version == 1
            assert "started anew" in caplog.text
            publisher.publish(some, strict=False)


def test_publishers_of_the_engine_before_close_nothing_of_each_other(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Each opens its arena again when it comes to it; what it closes is its own of a life that has ended."""
    folder = tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)
    weights = version_weights(folder, 1)
    options: dict[str, Any] = {
        "executor": "inline",
        "listen": f"ipc://{tmp_path}/engine",
        "kv_cache_bytes": 1 << 20,
    }
    with ExitStack() as stack:
        with Engine(folder, **options) as first:
            publishers = [stack.enter_context(WeightPublisher(first.address)) for _ in range(3)]
            for publisher in publishers:
                publisher.publish(weights)
        with Engine(folder, **options) as second:
            late = publishers.pop()
            for _ in range(2):
                for publisher in publishers:
                    publisher.publish(weights)
            late.close()  # without having noticed
            publishers[0].close()
            assert publishers[1].publish(weights).complete
            assert second.status().version == 5
