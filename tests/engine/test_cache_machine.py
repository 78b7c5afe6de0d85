"""Random histories of the KV bookkeeping against a record of what was computed into each block."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollout.cache import CachedSequence, KVCacheManager


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCacheManager(num_blocks=9, block_size=2)
        self.sequences: list[CachedSequence] = []
        self.content: dict[int, tuple[int, ...]] = {}
        self.epoch_of: dict[int, int] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8), cut=st.integers(0, 2))
    def admit(self, tokens: list[int], cut: int) -> None:
        sequence = CachedSequence(tokens)
        hits = self.kv.match(sequence, max(len(tokens) - 1 - cut, 0))
        for index, block in enumerate(hits):
            assert self.content[block] == tuple(tokens[: 2 * index + 2])
            assert self.epoch_of[block] == self.kv.epoch
        before, cost = self.kv.num_available, self.kv.cost(hits, len(tokens))
        if cost > before:
            return
        self.kv.admit(sequence, hits, len(tokens))
        assert self.kv.num_available == before - cost
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(pick=st.integers(0, 99), length=st.integers(1, 4))
    def compute(self, pick: int, length: int) -> None:
        sequence = self.sequences[pick % len(self.sequences)]
        start = sequence.num_computed
        end = min(start + length, len(sequence.token_ids))
        if start == end:
            return
        sequence.num_computed = end
        self.kv.commit(sequence, start, end)
        for position in range(start, end):
            block = sequence.block_ids[position // 2]
            self.content[block] = tuple(sequence.token_ids[: position + 1])
            if position % 2 == 0:
                self.epoch_of[block] = self.kv.epoch
            elif self.epoch_of[block] != self.kv.epoch:
                self.epoch_of[block] = -1

    @precondition(lambda self: self.sequences)
    @rule(pick=st.integers(0, 99), token=st.integers(0, 1))
    def append(self, pick: int, token: int) -> None:
        sequence = self.sequences[pick % len(self.sequences)]
        if sequence.num_computed < len(sequence.token_ids):
            return
        if sequence.num_computed == sequence.capacity:
            if not self.kv.num_available:
                return
            self.kv.extend(sequence)
        sequence.token_ids.append(token)

    @precondition(lambda self: self.sequences)
    @rule(pick=st.integers(0, 99))
    def fork(self, pick: int) -> None:
        parent = self.sequences[pick % len(self.sequences)]
        ready = parent.num_computed == len(parent.token_ids) and self.kv.can_fork(parent)
        if not ready or not self.kv.num_available:
            return
        child = CachedSequence(parent.token_ids)
        self.kv.fork(parent, child)
        self.sequences.append(child)
        for source, destination in self.kv.take_copies():
            self.content[destination] = self.content[source]
            self.epoch_of[destination] = self.epoch_of[source]

    @precondition(lambda self: self.sequences)
    @rule(pick=st.integers(0, 99))
    def release(self, pick: int) -> None:
        self.kv.release(self.sequences.pop(pick % len(self.sequences)))

    @rule()
    def change_weights(self) -> None:
        self.kv.set_weight_version(self.kv.version + 1)

    @rule()
    def flush(self) -> None:
        self.kv.flush()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.kv.check_invariants(self.sequences)
        for sequence in self.sequences:
            for position in range(1, sequence.num_computed, 2):
                block = sequence.block_ids[position // 2]
                assert self.content[block] == tuple(sequence.token_ids[: position + 1])


CacheMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestEveryHitHoldsWhatItClaims = CacheMachine.TestCase
