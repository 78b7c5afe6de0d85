"""A plain trainer sends more or less than it has announced, in a group where some members pass on what they get.

Whatever the length: no engine ends, none takes a byte of it, each says so in one line, and the next update is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_group import PlainGroup

from rollout import Engine, RolloutPool
from weight_sync.errors import SyncError, TransportError

NAME, TENSOR, OTHER = "lengths", "model.norm.weight", "lm_head.weight"
SIZE = 64
MIB = 1 << 20
LENGTHS = {
    "none of it": 0,
    "half": 2 * SIZE,
    "one number less": 4 * SIZE - 4,
    "one number more": 4 * SIZE + 4,
    "twice": 8 * SIZE,
    "ten times": 40 * SIZE,
    "three times and 64 MiB": 12 * SIZE + 64 * MIB,
}


class Fleet:
    """Engines (or one, or a pool) and their trainer, in one group of gloo."""

    def __init__(self, engines: list[Any], num_ranks: int) -> None:
        self.engines, self.world = engines, 1 + num_ranks
        self.group: PlainGroup | None = None

    def connect(self) -> None:
        if self.group is not None:
            self.group.destroy(wait_s=5.0)
        self.group = PlainGroup.serve(world_size=self.world, group_name=NAME, timeout_s=90)
        each = (self.world - 1) // len(self.engines)
        with ThreadPoolExecutor(len(self.engines)) as pool:
            joining = [
                pool.submit(
                    engine.init_weights_update_group,
                    *("127.0.0.1", self.group.master_port, 1 + i * each, self.world, NAME, "gloo"),
                    timeout_s=90,
                )
                for i, engine in enumerate(self.engines)
            ]
        for future in joining:
            future.result()

    def each(self, call: str, *arguments: Any, **options: Any) -> list[BaseException | None]:
        """What each engine raises."""
        with ThreadPoolExecutor(len(self.engines)) as pool:
            futures = [
                pool.submit(getattr(engine, call), *arguments, **options) for engine in self.engines
            ]
        return [future.exception() for future in futures]

    def send(self, name: str, shape: list[int], sent: torch.Tensor) -> list[BaseException | None]:
        """Announce float32 of that shape, send these bytes; what each engine raises."""
        assert self.group is not None
        sending = self.group.broadcast(sent, [(0, sent.numel())], timeout_s=50)
        errors = self.each("update_weights_from_distributed", [name], ["float32"], [shape], NAME)
        assert sending.exception(60) is None, "the trainer's own broadcast ends well"
        return errors

    def values(self) -> set[float]:
        held = [engine.get_weights_by_name(TENSOR, truncate_size=SIZE) for engine in self.engines]
        return {value for row in held for value in row}

    def close(self) -> None:
        if self.group is not None:
            self.group.destroy()


def filled(num_bytes: int, value: float) -> torch.Tensor:
    return torch.full((-(-num_bytes // 4),), value).view(torch.uint8)[:num_bytes]


@pytest.fixture(
    scope="module",
    params=[
        "three engines",
        pytest.param("four ranks", marks=pytest.mark.slow),
        pytest.param("pool of three", marks=pytest.mark.slow),
    ],
)
def fleet(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Iterator[Fleet]:
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    options: dict[str, Any] = {
        "kv_cache_bytes": 1 << 20,
        "skip_tokenizer_init": True,
        "num_threads": 1,
        "request_timeout_s": 30.0,
    }
    with ExitStack() as stack:
        if request.param == "three engines":
            engines = [stack.enter_context(Engine(folder, **options)) for _ in range(3)]
            made = Fleet(engines, 3)
        elif request.param == "four ranks":
            engine: Any = stack.enter_context(
                Engine(folder, executor="local", tp_size=4, **options)
            )
            made = Fleet([engine], 4)
        else:
            pool: Any = stack.enter_context(RolloutPool(folder, num_replicas=3, **options))
            made = Fleet([pool], 3)
        stack.callback(made.close)
        yield made


@pytest.mark.parametrize("when", ["as the first message", "in a session"])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_message_of_another_length_is_refused_and_the_next_update_is_taken(
    fleet: Fleet, length: str, when: str
) -> None:
    fleet.connect()
    assert fleet.send(TENSOR, [SIZE], filled(4 * SIZE, 1.0)) == [None] * len(fleet.engines)
    if when == "as the first message":
        fleet.connect()
    else:
        assert fleet.each("begin_weight_update") == [None] * len(fleet.engines)
        shape = [288, SIZE]
        sent = filled(4 * 288 * SIZE, 7.0)
        assert fleet.send(OTHER, shape, sent) == [None] * len(fleet.engines)
    errors = fleet.send(TENSOR, [SIZE], filled(LENGTHS[length], 2.0))
    words = [str(error) for error in errors]
    assert all(isinstance(error, TransportError) and "\n" not in str(error) for error in errors)
    assert all("bytes than announced" in text for text in words), words
    if when == "in a session":
        assert all(isinstance(error, SyncError) for error in fleet.each("end_weight_update"))
    assert fleet.values() == {1.0}
    fleet.connect()
    assert fleet.send(TENSOR, [SIZE], filled(4 * SIZE, 3.0)) == [None] * len(fleet.engines)
    assert fleet.values() == {3.0}
    for engine in fleet.engines:
        assert engine.generate(input_ids=[5, 9], sampling_params={"max_new_tokens": 2})
