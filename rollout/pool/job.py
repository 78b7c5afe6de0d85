"""A call of `generate` in a pool, and its prompts, each of which runs on one replica at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec

from weight_sync.wire.futures import answer, fail

from ..protocol.commands import Done, FinishReason, Generate, PromptSpec, SampleUpdate, Span

OnChunk = Callable[[Any], None]


@dataclass(slots=True, eq=False, kw_only=True)
class PoolCall:
    """One `Generate` command of a caller; ends when all of its prompts have, or with the first error."""

    stream: bool
    """Tokens are wanted as they come."""
    deadline: float
    """When it ends with what there is, on the monotonic clock."""
    min_version: int = 0
    """Number of the oldest version that may compute it."""
    grace_s: float = 0.0
    """How much longer its caller waits for that."""
    on_chunk: OnChunk | None
    """Takes every `SampleUpdate`, with the index that the caller counts by."""
    future: Future[Any] = field(default_factory=Future)
    """`Done`, or the error."""
    began: float = field(default_factory=time.monotonic)
    """When it came."""
    jobs: list[Job] = field(default_factory=list)
    """Its prompts."""

    @property
    def over(self) -> bool:
        """Nobody waits for more of it."""
        return self.future.done()

    def emit(self, update: SampleUpdate) -> None:
        """Hand an update to the caller."""
        if self.on_chunk is not None and not self.over:
            try:
                self.on_chunk(update)
            except RuntimeError as error:  # The caller's event loop is closed.
                self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End with an error; nothing happens if it has ended."""
        fail(self.future, error)

    def finish_if_complete(self) -> None:
        """End, once every sample of every prompt has finished."""
        if all(job.complete for job in self.jobs):
            answer(self.future, Done(count=sum(job.num_samples for job in self.jobs)))


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One prompt with its samples."""

    call: PoolCall
    """Whose it is."""
    spec: PromptSpec
    """What to run; it has a sampling seed, so that it draws the same samples on any replica."""
    first: int
    """Index of its first sample in the call."""
    affinity: bytes | None
    """What it shares with prompts that begin alike; None: nothing."""
    replica: int | None = None
    """Number of the replica that runs it; None: it waits."""
    attempt: int = 0
    """How often it was given to a replica; answers of an earlier attempt are dropped."""
    wire_rid: str = ""
    """Its id at that replica, another one each time: an earlier attempt may still be running there."""
    num_reruns: int = 0
    """How often it was lost with a replica."""
    load: int = 0
    """Samples that keep its replica busy."""
    finished: set[int] = field(default_factory=set)
    """Samples that the caller has."""
    aborted: bool = False
    """Its end was asked for, so samples that end with "abort" are what the caller wants."""

    @property
    def num_samples(self) -> int:
        """Samples of the prompt."""
        return self.spec.params.n

    @property
    def complete(self) -> bool:
        """All of its samples have finished."""
        return len(self.finished) == self.num_samples

    @property
    def command(self) -> Generate:
        """What its replica is told."""
        spec = msgspec.structs.replace(self.spec, rid=self.wire_rid)
        return Generate(
            prompts=[spec],
            stream=self.call.stream,
            grace_s=self.call.grace_s,
            min_weight_version=self.call.min_version,
        )

    def sample_rid(self, sample: int) -> str:
        """The id of one of its samples, as engines make it."""
        return f"{self.spec.rid}-{sample}" if self.num_samples > 1 else self.spec.rid

    @property
    def sample_rids(self) -> list[str]:
        """The ids of all of its samples."""
        return [self.sample_rid(sample) for sample in range(self.num_samples)]

    def wire_rids(self, rids: Collection[str]) -> list[str]:
        """What its replica calls those of `rids` that are its own: the prompt, or some of its samples."""
        if self.spec.rid in rids:
            return [self.wire_rid]
        return [f"{self.wire_rid}-{i}" for i, rid in enumerate(self.sample_rids) if rid in rids]

    def named_by(self, rids: set[str]) -> bool:
        """Whether one of `rids` is its id or a sample's."""
        return self.spec.rid in rids or not rids.isdisjoint(self.sample_rids)

    def empty_sample(self, sample: int, message: str, version: str, number: int) -> SampleUpdate:
        """The answer for a sample that was ended before a replica had it: the same fields as any other."""
        spec = self.spec
        return SampleUpdate(
            index=self.first + sample,
            rid=self.sample_rid(sample),
            output_ids=[],
            finish_reason=FinishReason(type="abort", message=message),
            prompt_tokens=len(spec.input_ids),
            cached_tokens=0,
            weight_version=version,
            weight_version_number=number,
            weight_versions=[Span(version, 0, 0, number)],
            output_logprobs=[] if spec.return_logprob else None,
            output_top_logprobs=[] if spec.top_logprobs_num > 0 else None,
            output_ids_logprobs=[] if spec.token_ids_logprob is not None else None,
            token_times=[] if spec.return_token_times else None,
            e2e_latency=time.monotonic() - self.call.began,
            num_reruns=self.num_reruns,
        )
