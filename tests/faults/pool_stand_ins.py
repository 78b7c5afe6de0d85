"""Engines and a fleet that do what a test says, for tests of what a pool decides about them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rollout.pool.catch_up import ServedVersion
from rollout.pool.fleet import Known
from rollout.protocol.commands import (
    Done,
    FinishReason,
    Generate,
    SampleUpdate,
    Span,
)
from weight_sync.errors import EngineDiedError


@dataclass
class Prompt:
    """What a replica was given."""

    command: Generate
    on_chunk: Callable[[Any], None]
    future: Future[Any]
    num_told: int = 0

    def tell(self) -> None:
        """One more of its samples has finished."""
        if self.num_told < self.command.prompts[0].params.n:
            self.num_told += 1
            self.on_chunk(finished(self.num_told - 1))


class Engine:
    """What a replica's executor does, as far as the pool sees it."""

    def __init__(self) -> None:
        self.dead = self.killed = self.torn = False
        self.prompts: list[Prompt] = []

    def submit(self, body: Any, *, timeout_s: float, on_chunk: Any = None) -> Future[Any]:
        future: Future[Any] = Future()
        if self.dead:
            future.set_exception(EngineDiedError("dead"))
        elif isinstance(body, Generate):
            self.prompts.append(Prompt(body, on_chunk, future))
        else:
            future.set_result(None)
        return future

    def weight_channel(self) -> Any:
        return None

    def kill(self) -> None:
        self.die()
        self.killed = True

    def close(self) -> None:
        self.kill()

    def die(self) -> None:
        self.dead = True
        while self.prompts:
            self.prompts.pop().future.set_exception(EngineDiedError("dead"))

    def work(self, which: int, error: Exception | None = None) -> None:
        """One of its prompts ends: with all samples, or with an error."""
        prompt = self.prompts.pop(which % len(self.prompts))
        if error is not None:
            prompt.future.set_exception(error)
            return
        num = prompt.command.prompts[0].params.n
        for _ in range(num):
            prompt.tell()
        prompt.future.set_result(Done(count=num))


class Fleet:
    """What replicas hold, by their number, as the machine has it."""

    def __init__(self, brought_up: Callable[[int, Exception | None], None]) -> None:
        self.brought_up = brought_up
        self.served = ServedVersion(version=0, label="0", fingerprint=None)
        self.lost: str | None = None
        self.holds: dict[int, bool] = {}
        self.behind: dict[int, Exception] = {}
        self.asked: list[tuple[int, Future[None]]] = []

    def watch(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def known(self) -> Known:
        return Known(
            served=self.served, serving=self.serving, behind=dict(self.behind), lost=self.lost
        )

    def version_now(self) -> tuple[str, int]:
        return self.served.label, self.served.version

    @property
    def serving(self) -> frozenset[int]:
        return frozenset(number for number, holds in self.holds.items() if holds)

    def add(self, member: Any) -> Future[None]:
        self.holds[member.number] = False
        return self.bring_up(member.number)

    def bring_up(self, number: int) -> Future[None]:
        self.holds[number] = False
        future: Future[None] = Future()
        self.asked.append((number, future))
        return future

    def remove(self, number: int) -> None:
        self.holds.pop(number, None)
        self.behind.pop(number, None)

    def answer(self, which: int, error: Exception | None) -> None:
        number, future = self.asked.pop(which % len(self.asked))
        self.brought_up(number, error)
        if number not in self.holds:
            future.set_result(None)  # It was forgotten meanwhile.
            return
        self.say(number, error)
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def say(self, number: int, error: Exception | None) -> None:
        """What a replica holds: the served version, or another one."""
        self.holds[number] = error is None
        self.behind.pop(number, None)
        if error is not None:
            self.behind[number] = error
        self._changed()


def finished(sample: int) -> SampleUpdate:
    return SampleUpdate(
        index=sample,
        rid="",
        output_ids=[7],
        finish_reason=FinishReason(type="length", length=1),
        prompt_tokens=3,
        cached_tokens=0,
        weight_version="0",
        weight_version_number=0,
        weight_versions=[Span("0", 0, 1, 0)],
    )
