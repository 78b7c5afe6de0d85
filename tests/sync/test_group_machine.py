"""Whatever is refused before, while or after a plain trainer broadcasts: no update ever takes the bytes of another one.

All broadcasts are of one shape, each with a value of its own, so bytes that were left in the group would fit the next
call. Real groups over gloo, real engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kinds_of_engines import KINDS, engine_of_kind
from plain_group import PlainGroup

from weight_sync.errors import SyncError, TransportError
from weight_sync.publisher.publisher import WeightPublisher

NAME, TENSOR, SIZE = "machine", "model.norm.weight", 64
SOUND: dict[str, Any] = {"names": [TENSOR], "dtypes": ["float32"], "shapes": [[SIZE]]}
REFUSED: list[dict[str, Any]] = [
    {"load_format": "pickle"},
    {"flush_cash": True},
    {"kv_policy": "sideways"},
    {"is_async": True},
    {"names": ["model.nrm.weight"]},
    {"names": [TENSOR, TENSOR]},
    {"dtypes": ["float33"]},
    {"shapes": [[SIZE // 2, 2]]},
    {"shapes": [[-SIZE]]},
    {"shapes": [[SIZE << 40]]},
    {"shapes": []},
]
"""What makes an update wrong, before or after its bytes could be received."""
ORDERS = ("asks first", "sends first", "asks first", "sends late", "never sends")


class Updates(RuleBasedStateMachine):
    """A trainer and an engine in one group; `value` is what the engine must hold."""

    def __init__(self, engine: Any, pool: ThreadPoolExecutor) -> None:
        super().__init__()
        self.engine, self.pool = engine, pool
        self.group: PlainGroup | None = None
        self.others: WeightPublisher | None = None
        self.session: str | None = None
        self.staged = 0.0
        self.value = self.sent = 1.0

    @initialize()
    def start(self) -> None:
        self.engine.update_weights_from_tensor([(TENSOR, torch.full((SIZE,), 1.0))])
        self.join()

    def join(self) -> None:
        """What a trainer does first, and when its group was left."""
        if self.group is not None:
            self.group.destroy(wait_s=5.0)
        world = 1 + self.engine.num_members
        self.group = PlainGroup.serve(world_size=world, group_name=NAME, timeout_s=120)
        self.engine.init_weights_update_group(
            *("127.0.0.1", self.group.master_port, 1, world, NAME, "gloo"), timeout_s=120
        )
        self.group.joined.result(120)

    def broadcast(self, value: float) -> None:
        """As a trainer does that has asked for an update; it goes on to wait where nobody takes it, as theirs do."""
        assert self.group is not None
        part = torch.full((SIZE,), value).view(torch.uint8)
        with suppress(SyncError, TimeoutError):
            self.group.broadcast(part, [(0, part.numel())], timeout_s=20.0).result(0.2)

    def ask(self, **options: Any) -> Any:
        return self.engine.update_weights_from_distributed(group_name=NAME, **{**SOUND, **options})

    def settled(self, answer: Future[Any], value: float) -> None:
        """An update that is accepted took its own bytes; after any other the group is in step, or was left."""
        try:
            answer.result(150)
        except (SyncError, ValueError, TypeError):
            if self.session is not None:
                self.session = "failed"
        else:
            if self.session is None:
                self.value = value
            else:
                assert self.session == "open"
                self.staged, self.session = value, "staged"

    def next_value(self) -> float:
        self.sent += 1.0
        return self.sent

    @rule(order=st.sampled_from(["asks first", "sends first"]))
    def update(self, order: str) -> None:
        self.exchange({}, order)

    @rule(wrong=st.sampled_from(REFUSED), order=st.sampled_from(ORDERS))
    def wrong_update(self, wrong: dict[str, Any], order: str) -> None:
        self.exchange(wrong, order)

    @rule(order=st.sampled_from(["sends late", "never sends"]))
    def update_that_is_aborted(self, order: str) -> None:
        self.exchange({}, order)

    def exchange(self, options: dict[str, Any], order: str) -> None:
        value = self.next_value()
        if order == "sends first":
            sending = self.pool.submit(self.broadcast, value)
            self.settled(self.pool.submit(lambda: self.ask(**options)), value)
            sending.result(150)
            return
        answer = self.pool.submit(lambda: self.ask(**options))
        if order == "asks first":
            self.broadcast(value)
        else:  # somebody has to end the wait
            with suppress(TimeoutError, SyncError, ValueError, TypeError):
                answer.result(0.2)
            self.engine.abort_weight_update()
            self.session = None
        self.settled(answer, value)
        if order == "sends late":
            self.broadcast(value)

    @rule(sends=st.booleans())
    def cancel(self, sends: bool) -> None:
        """A coroutine that waits for the trainer, and is given up."""

        async def cancelled() -> None:
            call = self.engine.async_update_weights_from_distributed(group_name=NAME, **SOUND)
            with suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(call, 0.1)

        with suppress(SyncError):
            asyncio.run(cancelled())
        if self.session is not None:
            self.session = "failed"
        if sends:
            self.broadcast(self.next_value())

    @rule(joins=st.booleans())
    def new_group(self, joins: bool) -> None:
        if joins:
            self.join()
            return
        with suppress(TransportError):
            self.engine.destroy_weights_update_group(NAME)

    @precondition(lambda self: self.session is None)
    @rule()
    def another_trainer(self) -> None:
        """Begins a session, or gives it up."""
        if self.others is None:
            self.others = WeightPublisher(self.engine, timeout_s=20)
            self.others.begin(strict=False)
        else:
            self.others.close()
            self.others = None

    @precondition(lambda self: self.others is None and self.session is None)
    @rule()
    def begin(self) -> None:
        self.engine.begin_weight_update()
        self.session = "open"

    @precondition(lambda self: self.session is not None)
    @rule(commits=st.booleans())
    def end(self, commits: bool) -> None:
        session, self.session = self.session, None
        if not commits:
            self.engine.abort_weight_update()
        elif session == "failed":
            with pytest.raises(SyncError):
                self.engine.end_weight_update()
        else:
            self.engine.end_weight_update()
            self.value = self.staged if session == "staged" else self.value

    @invariant()
    def serves_what_was_sent_for_it(self) -> None:
        assert self.engine.get_weights_by_name(TENSOR, truncate_size=SIZE) == [self.value] * SIZE

    def teardown(self) -> None:
        """When all is quiet an update comes through, in the group as it is or in a new one."""
        if self.others is not None:
            self.others.close()
        self.engine.abort_weight_update()
        self.session = None
        self.join()
        self.update("asks first")
        assert self.value == self.sent
        self.serves_what_was_sent_for_it()
        assert self.group is not None
        self.group.destroy(wait_s=5.0)
        self.engine.destroy_weights_update_group(NAME)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Iterator[Any]:
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    options: dict[str, Any] = {
        "kv_cache_bytes": 1 << 20,
        "skip_tokenizer_init": True,
        "num_threads": 1,
        "request_timeout_s": 20.0,
    }
    made: Any = engine_of_kind(request.param, folder, **options)
    with made as engine:
        engine.num_members = 1 if request.param == "inline" else 2
        yield engine


@pytest.mark.slow
def test_no_update_takes_the_bytes_of_another_one_whatever_is_refused(engine: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        run_state_machine_as_test(
            lambda: Updates(engine, pool),
            settings=settings(
                max_examples=20,
                stateful_step_count=10,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )
