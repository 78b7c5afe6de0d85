"""Random histories of the scheduler against a fake runner that knows what every KV slot must hold.

The fake model's next token is a hash of all tokens before it, read through the block table: a lost, repeated, stale or
foreign KV position changes the output, which is compared with a plain loop over the prompt.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollout.cache import KVCacheManager
from rollout.sampling_params import SamplingParams, mix64
from rollout.scheduling import Request, ScheduledBatch, Scheduler, SchedulerConfig
from rollout.types import RequestStatus

VOCAB = 5
START = 0x5EED


def chain(state: int, token: int) -> int:
    return mix64(state ^ (token + 1))


def draw(state: int, seed: int) -> int:
    return mix64(state + seed) % VOCAB


def expected_output(prompt: list[int], seed: int, num_tokens: int) -> list[int]:
    state, output = START, []
    for token in prompt:
        state = chain(state, token)
    for _ in range(num_tokens):
        output.append(draw(state, seed))
        state = chain(state, output[-1])
    return output


class FakeRunner:
    """KV slots hold (state of the prefix that ends here, version that wrote it)."""

    def __init__(self, kv: KVCacheManager) -> None:
        self.kv = kv
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}
        self.oldest_allowed: dict[str, int] = {}

    def forward(self, batch: ScheduledBatch, running: list[Request]) -> list[int]:
        """The state after each item's last position."""
        destinations = [destination for _, destination in batch.block_copies]
        assert len(set(destinations)) == len(destinations)
        assert not set(destinations) & {source for source, _ in batch.block_copies}
        for source, destination in batch.block_copies:
            for offset in range(self.kv.block_size):
                if (source, offset) in self.slots:
                    self.slots[destination, offset] = self.slots[source, offset]
        owners: dict[int, set[str]] = {}
        for request in running:
            for block in request.block_ids:
                owners.setdefault(block, set()).add(request.rid)
        return [self._run(item.request, item.start, item.end, owners) for item in batch.items]

    def _run(self, request: Request, start: int, end: int, owners: dict[int, set[str]]) -> int:
        size, state = self.kv.block_size, START
        assert start == request.num_computed
        for position in range(end):
            block = request.block_ids[position // size]
            slot = (block, position % size)
            state = chain(state, request.token_ids[position])
            if position < start:
                got, version = self.slots[slot]
                assert got == state, f"{request!r} reads foreign KV at {position}"
                assert version >= self.oldest_allowed.get(request.rid, 0), "KV that was dropped"
            else:
                assert owners[block] == {request.rid}, "writes into a shared block"
                self.slots[slot] = (state, self.kv.version)
        first, last = zip(
            *(self.kv.versions_of(b) for b in self._written(request, end)), strict=True
        )
        wrote = [self.slots[request.block_ids[p // size], p % size][1] for p in range(start)]
        assert all(f <= last[i] for i, f in enumerate(first))
        assert all(first[p // size] <= v <= last[p // size] for p, v in enumerate(wrote))
        return state

    def _written(self, request: Request, end: int) -> list[int]:
        return request.block_ids[: self.kv.blocks_for(end)]


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCacheManager(num_blocks=14, block_size=4)
        config = SchedulerConfig(max_running_requests=5, chunked_prefill_size=9)
        self.scheduler = Scheduler(config, self.kv)
        self.runner = FakeRunner(self.kv)
        self.num_added = 0
        self.steps_without_progress = 0

    @rule(
        length=st.integers(1, 20),
        stem=st.integers(0, 2),
        max_new=st.integers(0, 16),
        n=st.integers(1, 4),
        logprob_start=st.one_of(st.just(-1), st.integers(0, 20)),
    )
    def add(self, length: int, stem: int, max_new: int, n: int, logprob_start: int) -> None:
        prompt = [(stem + i // 7) % VOCAB for i in range(length)]
        requests = []
        outputs: list[int] = []
        for index in range(n):
            self.num_added += 1
            requests.append(
                Request(
                    rid=f"r{self.num_added}",
                    prompt_ids=prompt,
                    params=SamplingParams(max_new_tokens=max_new),
                    seed=self.num_added * 31 + index,
                    logprob_start_len=min(logprob_start, length - 1),
                    outputs=outputs,  # of all samples together
                )
            )
        self.scheduler.add(requests)

    @precondition(lambda self: self.scheduler.has_work)
    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()
            self.scheduler.check_invariants()

    def _step(self) -> None:
        scheduler = self.scheduler
        before = {r.rid: r.status for r in scheduler.requests}
        oldest = min(scheduler.running, key=lambda r: r.arrival, default=None)
        batch = scheduler.schedule()
        if batch is None:
            assert not scheduler.has_work
            return
        assert batch.num_tokens == sum(item.length for item in batch.items)
        assert batch.num_tokens <= scheduler.config.chunked_prefill_size
        assert all(item.length == 1 and item.samples for item in batch.items[: batch.num_decodes])
        if oldest is not None:
            assert oldest.status is RequestStatus.RUNNING, "the first to come is never retracted"
        for item in batch.items:
            request = item.request
            if before[request.rid] is RequestStatus.WAITING:
                self.runner.oldest_allowed[request.rid] = self.kv.version
        states = self.runner.forward(batch, scheduler.running)
        for item in batch.items:
            item.request.outputs.extend(item.input_logprobs or ())
        for row in scheduler.complete(batch):
            item, request = batch.items[row.item_index], row.request
            assert item.samples and item.end == request.num_tokens == request.num_computed
            assert row.draws == (request.params.max_new_tokens > 0)
            if row.draws:
                token = draw(states[row.item_index], request.seed)
                scheduler.append_token(request, token)
            if request.num_output_tokens == request.params.max_new_tokens:
                self._check_output(request)
                self._check_input_logprobs(request)
                scheduler.finish(request)

    def _check_output(self, request: Request) -> None:
        prompt = request.token_ids[: request.num_prompt_tokens]
        want = expected_output(prompt, request.seed, request.num_output_tokens)
        assert request.output_ids == want

    def _check_input_logprobs(self, request: Request) -> None:
        if request.logprob_start_len < 0:
            assert request.outputs == []
            return
        first = max(request.logprob_start_len - 1, 0)
        assert sorted(set(request.outputs)) == list(range(first, request.num_prompt_tokens - 1))

    @precondition(lambda self: self.scheduler.has_work)
    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        requests = self.scheduler.requests
        request = requests[pick % len(requests)]
        self.scheduler.abort(request)
        self.scheduler.abort(request)
        assert self.scheduler.find(request.rid) is None
        self._check_output(request)

    @rule()
    def retract_all(self) -> None:
        self.scheduler.retract_all()
        assert self.scheduler.num_running == 0

    @rule(max_running=st.integers(1, 5), chunk=st.integers(1, 9))
    def limit(self, max_running: int, chunk: int) -> None:
        config = SchedulerConfig(max_running_requests=max_running, chunked_prefill_size=chunk)
        self.scheduler.limit(config)

    @rule(policy=st.sampled_from(["keep", "recompute", "flush"]))
    def change_weights(self, policy: str) -> None:
        if policy != "keep":
            self.scheduler.recompute_all()
        self.kv.set_weight_version(self.kv.version + 1)
        if policy == "flush":
            self.kv.flush()

    @rule()
    def flush(self) -> None:
        self.kv.flush()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.scheduler.check_invariants()

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self._step()
            self.scheduler.check_invariants()
        assert not self.scheduler.has_work, "requests never finish"
        assert self.kv.num_held == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestNoHistoryLosesARequestOrAPosition = SchedulerMachine.TestCase
