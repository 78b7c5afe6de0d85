"""A plain trainer that does something else than it has announced: the engine lives, holds what it held, and tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_group import PlainGroup

import weight_sync
from rollout import Engine
from weight_sync.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    ManifestMismatch,
    SyncError,
    TransportError,
)
from weight_sync.staging.joined_group import JoinedGroup

NAME = "trainers"
NORM, OTHER_NORM, HEAD = (
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "lm_head.weight",
)
SHAPES = {NORM: [64], OTHER_NORM: [64], HEAD: [288, 64]}


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    options: dict[str, Any] = {"skip_tokenizer_init": True, "kv_cache_bytes": 1 << 20}
    with Engine(folder, request_timeout_s=5.0, **options) as engine:
        yield engine


class Trainer:
    """Rank 0 of a group of two; its broadcasts are under way when `send` returns."""

    def __init__(self, engine: Engine, world_size: int = 2, timeout_s: float = 60) -> None:
        self.engine, self.pool = engine, ThreadPoolExecutor(2)
        self.group = PlainGroup.serve(world_size=world_size, group_name=NAME, timeout_s=timeout_s)
        if world_size == 2:
            self.join(60.0).result(60)

    def join(self, timeout_s: float) -> Future[None]:
        return self.pool.submit(
            self.engine.init_weights_update_group,
            *("127.0.0.1", self.group.master_port, 1, self.group.world_size, NAME, "gloo"),
            timeout_s=timeout_s,
        )

    def announce(self, *names: str, **options: Any) -> Future[Any]:
        shapes = [SHAPES[name] for name in names]
        return self.pool.submit(
            self.engine.update_weights_from_distributed,
            *(list(names), ["float32"] * len(names), shapes, NAME),
            **options,
        )

    def send(self, name: str, value: float) -> Future[None]:
        part = torch.full(SHAPES[name], value).view(-1).view(torch.uint8)
        return self.group.broadcast(part, [(0, part.numel())], timeout_s=10)

    def close(self) -> None:
        self.group.destroy()
        self.pool.shutdown()


@pytest.fixture
def trainer(engine: Engine) -> Iterator[Trainer]:
    """In a group that is in step; afterwards the engine holds what it held, and takes an update in a new one."""
    with ExitStack() as stack:
        trainer = Trainer(engine)
        stack.callback(trainer.close)
        answer = trainer.announce(NORM, OTHER_NORM)
        for name in (NORM, OTHER_NORM):
            trainer.send(name, 1.0)
        answer.result(20)
        before = engine.weights_fingerprint()
        yield trainer
        assert engine.weights_fingerprint() == before
        again = Trainer(engine)
        stack.callback(again.close)
        answer = again.announce(NORM)
        again.send(NORM, 2.0)
        answer.result(20)
        assert engine.get_weights_by_name(NORM, truncate_size=64) == [2.0] * 64
        assert engine.generate(input_ids=[5, 9], sampling_params={"max_new_tokens": 2})


def said(**values: float) -> int:
    return weight_sync.fingerprint([(n, torch.full(SHAPES[n], v)) for n, v in values.items()])


def test_it_announces_and_never_sends(trainer: Trainer) -> None:
    with pytest.raises(DeadlineExceeded, match="look for one that is late"):
        trainer.announce(NORM).result(20)


def test_it_sends_one_of_two_and_leaves(trainer: Trainer) -> None:
    answer = trainer.announce(NORM, OTHER_NORM)
    trainer.send(NORM, 3.0).result(10)
    trainer.group.destroy()
    with pytest.raises(TransportError):
        answer.result(20)


def test_it_sends_tensors_of_other_sizes_in_another_order(trainer: Trainer) -> None:
    answer = trainer.announce(HEAD, NORM)
    trainer.send(NORM, 3.0)
    trainer.send(HEAD, 3.0)
    with pytest.raises(TransportError, match="bytes than announced"):
        answer.result(20)


def test_it_sends_tensors_of_one_size_in_another_order_and_has_said_what_they_are(
    trainer: Trainer,
) -> None:
    values = {NORM: 3.0, OTHER_NORM: 4.0}
    answer = trainer.announce(NORM, OTHER_NORM, fingerprint=said(**values))
    trainer.send(OTHER_NORM, 4.0)
    trainer.send(NORM, 3.0)
    with pytest.raises(FingerprintMismatch):
        answer.result(20)


def test_it_sends_twice_and_the_next_call_has_said_what_it_sends(trainer: Trainer) -> None:
    answer = trainer.announce(NORM, fingerprint=said(**{NORM: 1.0}))
    trainer.send(NORM, 1.0)
    trainer.send(NORM, 1.0)
    answer.result(20)
    with pytest.raises(FingerprintMismatch):
        trainer.announce(NORM, fingerprint=said(**{NORM: 5.0})).result(20)


def test_it_announces_a_name_twice(trainer: Trainer) -> None:
    answer = trainer.announce(NORM, NORM)
    trainer.send(NORM, 3.0)
    trainer.send(NORM, 4.0)
    with pytest.raises(ManifestMismatch, match="more than once"):
        answer.result(20)


def test_it_does_something_else_than_a_broadcast(trainer: Trainer) -> None:
    communicator: Any = trainer.group._connection
    answer = trainer.announce(NORM)
    summing = trainer.pool.submit(communicator.all_reduce, torch.full((64,), 3.0), timeout_s=6)
    with pytest.raises(SyncError):
        answer.result(20)
    assert summing.exception(20) is not None


def test_another_member_has_taken_the_engines_rank(engine: Engine, trainer: Trainer) -> None:
    """Two engines were told the same rank of three: nobody is the third, and all hear of it by the deadline."""
    crowded = Trainer(engine, world_size=3, timeout_s=5)  # gloo waits that long, whoever leaves
    member = JoinedGroup.join(
        master_address="127.0.0.1",
        master_port=crowded.group.master_port,
        rank=1,
        world_size=3,
        group_name=NAME,
        timeout_s=3,
    )
    with pytest.raises((DeadlineExceeded, TransportError)):
        crowded.join(3.0).result(20)
    assert isinstance(member.joined.exception(10), SyncError)
    member.destroy()
    crowded.close()
