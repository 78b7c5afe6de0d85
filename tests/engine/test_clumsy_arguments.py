"""Arguments of another kind than the calls expect: one line that names them, and nothing has happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout import Engine
from rollout.errors import InvalidRequestError, RolloutError
from weight_sync.errors import DeadlineExceeded, SyncError

JOIN: dict[str, Any] = {
    "master_address": "127.0.0.1",
    "master_port": 9,
    "rank_offset": 1,
    "world_size": 2,
    "backend": "gloo",
    "timeout_s": 0.2,
}
ANNOUNCED: dict[str, Any] = {
    "names": ["model.norm.weight"],
    "dtypes": ["float32"],
    "shapes": [[64]],
}


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(tiny_checkpoint("qwen3"), kv_cache_bytes=4 << 20, num_threads=1) as engine:
        yield engine


def refused(action: Callable[[], Any], says: str) -> None:
    with pytest.raises((RolloutError, SyncError), match=says) as refusal:
        action()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"master_address": "a..b"}, "cannot find the rendezvous host 'a..b'.*expected"),
        ({"master_address": "\0"}, "master_address|rendezvous host"),
        ({"master_address": 5}, "master_address"),
        ({"master_port": 9.5}, "master_port: got '9.5', expected"),
        ({"master_port": 1 << 16}, "master_port"),
        ({"backend": []}, r"backend: got \[\], expected"),
        ({"rank_offset": 0}, "rank_offset"),
        ({"timeout_s": "soon"}, "timeout_s"),
    ],
)
def test_a_group_that_cannot_be_joined_is_refused_at_once(
    engine: Engine, change: dict[str, Any], says: str
) -> None:
    refused(lambda: engine.init_weights_update_group(**{**JOIN, **change}), says)
    with pytest.raises(DeadlineExceeded, match="no rendezvous at"):
        engine.init_weights_update_group(**JOIN)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": "x"}, "fingerprint: got x, expected a number of 64 bits"),
        ({"fingerprint": 1 << 64}, "fingerprint"),
        ({"load_format": []}, "load_format"),
        ({"dtypes": None}, "dtypes: got NoneType, expected a list"),
        ({"shapes": 7}, "shapes: got int, expected a list"),
        ({"names": "model.norm.weight"}, "names: got str, expected a list"),
    ],
)
def test_what_a_trainer_announces_is_lists(
    engine: Engine, change: dict[str, Any], says: str
) -> None:
    refused(lambda: engine.update_weights_from_distributed(**{**ANNOUNCED, **change}), says)
    assert engine.version == 0


@pytest.mark.parametrize("path", [None, 5, ["a"], b"bytes"])
def test_a_folder_is_a_path(engine: Engine, path: Any) -> None:
    for call in (engine.update_weights_from_disk, engine.save_sharded_model):
        with pytest.raises(InvalidRequestError, match=r"path: got \w+, expected the path"):
            call(path)
    assert engine.version == 0
