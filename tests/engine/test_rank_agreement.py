"""Two ranks that are fed the same ticks stay identical: the same batches, blocks and ends, in the same order.

Each rank is a whole engine loop of one process's own; only the ticks go from the first to the second. Whatever a rank
decided by identity, hash order or a clock of its own would drive them apart: objects lie at other addresses in each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rollout.config import EngineConfig
from rollout.engine.loop import core as core_module
from rollout.engine.loop.build import build_core
from rollout.engine.loop.core import EngineCore
from rollout.protocol import commands as cmd
from rollout.protocol.tick_messages import Tick
from rollout.sampling_params import SamplingParams
from weight_sync.wire.local_call import LocalCall

FOREVER = float("inf")
NUM_BLOCKS = 14  # Few: requests are retracted, and prefixes evicted.
BLOCK_BYTES = 2 * 2 * 16 * 2 * 32 * 4


class Wire:
    """What the first rank tells, the second hears."""

    def __init__(self) -> None:
        self.ticks: deque[Tick] = deque()

    def send(self, tick: Tick) -> None:
        self.ticks.append(tick)

    def receive(self) -> Tick:
        return self.ticks.popleft()


def batch_of(core: EngineCore) -> list[Any]:
    """Wrap `launch` so that every batch is noted."""
    batches: list[Any] = []
    launch = core.runner.launch

    def noted(batch: Any, drawn: Any) -> Any:
        batches.append(
            (
                [(i.request.rid, i.start, i.length, i.samples) for i in batch.items],
                batch.block_copies,
            )
        )
        return launch(batch, drawn)

    core.runner.launch = noted  # type: ignore[method-assign]
    return batches


def everything(core: EngineCore) -> dict[str, Any]:
    """All that the next step depends on."""
    scheduler, kv = core.scheduler, core.scheduler.kv
    return {
        "requests": [
            (r.rid, r.arrival, r.status, r.token_ids, r.block_ids, r.num_computed, r.chain_uid)
            for r in scheduler.requests
        ],
        "running": [r.rid for r in scheduler.running],
        "calls": [
            (n, [r.rid for r in g.requests], g.opening and g.opening.num_left)
            for n, g in core.post.groups.items()
        ],
        "free": kv._allocator._free,
        "held": kv._allocator.ref_counts,
        "idle": list(kv._prefixes.idle_blocks()),
        "prefixes": kv._prefixes.keys(),
        "copies": kv._copies,
        "state": (core._paused, core.post.version, kv.version, sorted(core.memory.released)),
    }


class Ranks(RuleBasedStateMachine):
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        config = EngineConfig(
            model_path=str(self.folder),
            kv_cache_bytes=NUM_BLOCKS * BLOCK_BYTES,
            max_running_requests=6,
            seed=0,
            chunked_prefill_size=24,
            num_threads=1,
        )
        self.wire = Wire()
        self.cores = [build_core(config), build_core(config)]
        for core in self.cores:
            core._ticks = self.wire
            core._follows = core is self.cores[1]
        self.batches = [batch_of(core) for core in self.cores]
        self.num = 0
        self.version = 0

    @property
    def leader(self) -> EngineCore:
        return self.cores[0]

    def tell(self, body: Any, deadline: float = FOREVER) -> None:
        self.leader.submit(LocalCall(body, deadline))

    @rule(
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
        stem=st.integers(0, 2),
        n=st.integers(1, 3),
        num_prompts=st.integers(1, 2),
        max_new=st.integers(0, 24),
    )
    def generate(
        self, lengths: list[int], stem: int, n: int, num_prompts: int, max_new: int
    ) -> None:
        params = SamplingParams(max_new_tokens=max_new, n=n, temperature=1.5)
        for length in lengths:
            self.num += 1
            prompts = [
                cmd.PromptSpec(
                    rid=f"r{self.num}.{i}",
                    input_ids=[10 + stem + j // 9 for j in range(length)],
                    params=params,
                )
                for i in range(num_prompts)
            ]
            self.tell(cmd.Generate(prompts=prompts))

    @precondition(lambda self: len(self.leader.post.groups) > 1)
    @rule(kind=st.sampled_from(["abort", "abort all", "deadlines", "pause"]), data=st.data())
    def end_some(self, kind: str, data: st.DataObject) -> None:
        groups = list(self.leader.post.groups.values())
        if kind == "abort all":
            self.tell(cmd.AbortRequests(abort_all=True))
        elif kind == "pause":
            self.tell(cmd.PauseGeneration(mode="abort", lease_s=3600.0))
            self.tell(cmd.ContinueGeneration())
        else:
            chosen = data.draw(st.lists(st.sampled_from(groups), min_size=1, unique=True))
            for group in chosen if kind == "deadlines" else ():
                group.deadline = 0.0
            if kind == "abort":
                rids = [r.outputs.spec.rid for group in chosen for r in group.requests][:3]
                self.tell(cmd.AbortRequests(rids=rids))

    @rule(mode=st.sampled_from(["abort", "retract", "in_place"]))
    def pause(self, mode: Any) -> None:
        self.tell(cmd.PauseGeneration(mode=mode, lease_s=3600.0))

    @rule(by_lease=st.booleans())
    def go_on(self, by_lease: bool) -> None:
        if by_lease:
            self.leader._pause_ends = 0.0
        else:
            self.tell(cmd.ContinueGeneration())

    @rule(policy=st.sampled_from(["keep", "recompute", "flush"]))
    def weights_change(self, policy: str) -> None:
        self.version += 1
        for core in reversed(self.cores):  # As the receivers do: the first rank comes last.
            core._arm(self._written(core, self.version, policy), f"commit/{self.version}")

    @staticmethod
    def _written(core: EngineCore, version: int, policy: str) -> Callable[[], None]:
        return lambda: core.host.weights_written(version, f"step {version}", policy)

    @rule()
    def release(self) -> None:
        self.tell(cmd.ReleaseMemory(tags=["kv_cache"]))

    @rule()
    def resume(self) -> None:
        self.tell(cmd.ResumeMemory(tags=["kv_cache"]))

    @rule()
    def flush(self) -> None:
        self.tell(cmd.FlushCache())

    @precondition(lambda self: self.num > 0)
    @rule(times=st.integers(1, 8))
    def ticks(self, times: int) -> None:
        for _ in range(times):
            if self.leader._patience() > 0 and not self.leader._may_step:
                self.leader._inbox.put_call(LocalCall(cmd.GetStatus(), FOREVER))
            for core in self.cores:
                core.turn()
            assert self.batches[0] == self.batches[1]
            assert everything(self.cores[0]) == everything(self.cores[1])

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        for core in self.cores:
            core.scheduler.check_invariants()

    def teardown(self) -> None:
        for core in self.cores:
            core._follows = False
            core._close()


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("qwen3", head_dim=32, tie_word_embeddings=True)


def test_ranks_stay_identical_whatever_ends_or_interrupts_their_requests(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ranks.folder = folder
    monkeypatch.setattr(core_module, "PIECE", 3)  # Calls become requests bit by bit.
    monkeypatch.setattr(core_module, "BACKLOG", 5)
    run_state_machine_as_test(
        Ranks,
        settings=settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True),
    )
