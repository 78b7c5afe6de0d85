"""Decides, step by step, which positions of which requests are computed, and in which KV blocks.

Order of calls, all on the engine loop's thread: `schedule` -> the runner's forward -> `complete` -> one `append_token`
per row that draws -> `finish` for requests that ended. Between two steps, anything else: `add`, `abort`,
`retract_all`, `recompute_all`, `limit`, a change of weights.

A drawn token may be appended as `PENDING` and put in its place later, but before the `complete` that follows; then the
requests that it ends are finished, and `complete` leaves them out. Between two steps no token is pending.

Pure Python without clocks or random numbers: a function of the sequence of calls, so every tensor-parallel rank that
makes the same calls schedules the same steps.

Policy: requests are served in order of arrival. Running requests decode first, one token each; what is left of the
step's token budget goes to prompts that are under way, then to waiting ones. A request gets blocks for all of its known
tokens when it is admitted, and one more block whenever it fills its last. When blocks run out, the request that came
last gives its blocks back and waits again; the one that came first never does, so there is always progress.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..cache.kv_cache_manager import KVCacheManager
from ..errors import ConfigError
from ..types import RequestStatus
from .admission import check_new_requests
from .batch import SampleRow, ScheduledBatch, ScheduledItem
from .request import PENDING, Request, SampleGroup
from .waiting_queue import WaitingQueue

WAITING, RUNNING, FINISHED = RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.FINISHED


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step."""

    max_running_requests: int
    """Requests that own blocks at the same time."""
    chunked_prefill_size: int
    """Tokens computed in one step at most; it also limits the running requests, which decode in every step."""

    def __post_init__(self) -> None:
        for name in ("max_running_requests", "chunked_prefill_size"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1; raise it")


class Scheduler:
    """Owns the queue and the running requests; `kv` owns their blocks."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager) -> None:
        self.config = config
        self.kv = kv
        self.num_retractions = 0
        """Times that a request gave its blocks back, all requests together."""
        self.before_suspend: Callable[[Request], None] | None = None
        """Called with a running request that is about to give its blocks back and be computed again."""
        self._max_running = min(config.max_running_requests, config.chunked_prefill_size)
        self._requests: dict[str, Request] = {}
        self._running: dict[Request, None] = {}
        self._queue = WaitingQueue()
        self._num_arrivals = 0
        # The head of the queue that did not fit, and the count of releases at that time: no use to try again before.
        self._stalled: tuple[Request, int] | None = None

    @property
    def num_running(self) -> int:
        """Requests that own blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that own none: queued, retracted, or parked behind their group's leader."""
        return len(self._requests) - len(self._running)

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return bool(self._requests)

    @property
    def running(self) -> list[Request]:
        """Running requests in order of admission (a copy)."""
        return list(self._running)

    @property
    def requests(self) -> list[Request]:
        """All unfinished requests in order of arrival (a copy)."""
        return sorted(self._requests.values(), key=lambda request: request.arrival)

    def find(self, rid: str) -> Request | None:
        """The unfinished request of this id."""
        return self._requests.get(rid)

    # Coming and going -------------------------------------------------------------------------------------------------

    def add(self, requests: Sequence[Request]) -> None:
        """Queue one request, or several with the same prompt (the samples of it; the first leads).

        Raises `InvalidRequestError`, with nothing queued, if one of them can never run.
        """
        check_new_requests(requests, self._requests, self.kv)
        group = SampleGroup(requests) if len(requests) > 1 else None
        for request in requests:
            request.group = group
            request.status = WAITING
            request.arrival = self._num_arrivals
            self._num_arrivals += 1
            self._requests[request.rid] = request
        self._queue.push(requests[0])

    def append_token(self, request: Request, token: int) -> None:
        """Add the token that a request has drawn; called once per row of `complete` that draws."""
        assert request.num_computed == len(request.token_ids), "drew before its tokens are computed"
        request.token_ids.append(token)

    def finish(self, request: Request) -> None:
        """Forget a request that ended; its full blocks stay in the prefix cache until they are needed."""
        self._remove(request)

    def abort(self, request: Request) -> None:
        """Forget a request wherever it is; does nothing if it is forgotten already. Its output so far stays in it."""
        if request.status is not FINISHED:
            self._remove(request)

    def revive(self, request: Request) -> None:
        """Queue a finished request again, in its old place, because tokens that ended it were taken back."""
        assert request.status is FINISHED and request.rid not in self._requests
        request.status = WAITING
        self._requests[request.rid] = request
        self._queue.push(request)

    def _remove(self, request: Request) -> None:
        assert self._requests.get(request.rid) is request, f"{request!r} is not here"
        del self._requests[request.rid]
        if request.status is RUNNING:
            del self._running[request]
            self.kv.release(request)
        request.status = FINISHED
        group = request.group
        if group is not None and group.parked:
            if group.leader is request:
                self._promote(group)
            elif request in group.parked:
                group.parked.remove(request)

    def _promote(self, group: SampleGroup) -> None:
        group.leader = group.parked.pop(0)
        self._queue.push(group.leader)

    def limit(self, config: SchedulerConfig) -> None:
        """Other limits from the next step on; running requests beyond them wait again, those that came last first."""
        self.config = config
        self._max_running = min(config.max_running_requests, config.chunked_prefill_size)
        self._stalled = None
        while len(self._running) > self._max_running:
            self._retract(max(self._running, key=lambda request: request.arrival))

    # A step -----------------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step; None: there is nothing to compute. Blocks of all its positions are owned on return."""
        items: list[ScheduledItem] = []
        prefills: list[Request] = []
        full: list[Request] = []
        for request in self._running:
            start, num_tokens = request.num_computed, len(request.token_ids)
            if num_tokens - start == 1:
                if num_tokens >= request.final_length:
                    if request.token_ids[-1] != PENDING:
                        prefills.append(
                            request
                        )  # Draws nothing: the end of a prompt, and no decode.
                    continue  # Else it ends as soon as its last token is known.
                items.append(ScheduledItem(request, start, 1, True))
                if start == request.capacity:
                    full.append(request)
            else:
                prefills.append(request)
        if full and self._make_room(full):
            items = [item for item in items if item.request.status is RUNNING]
            prefills = [request for request in prefills if request.status is RUNNING]
        num_decodes = len(items)
        budget = self.config.chunked_prefill_size - num_decodes
        for request in prefills:
            budget -= self._add_chunk(items, request, budget)
        budget = self._admit_waiting(items, prefills, budget)
        if not items:
            return None
        num_tokens = self.config.chunked_prefill_size - budget
        return ScheduledBatch(items, self.kv.take_copies(), num_tokens, num_decodes)

    def _make_room(self, full: list[Request]) -> bool:
        """One more block for each of `full` that is not retracted on the way; whether somebody was."""
        kv, before = self.kv, self.num_retractions
        while len(full) > kv.num_available:
            self._retract(max(self._running, key=lambda request: request.arrival))
            full = [request for request in full if request.status is RUNNING]
        for request in full:
            kv.extend(request)
        return self.num_retractions != before

    def _add_chunk(self, items: list[ScheduledItem], request: Request, budget: int) -> int:
        """Append the next chunk of a prompt within `budget`; its length, which may be 0."""
        start, num_tokens = request.num_computed, len(request.token_ids)
        length = min(num_tokens - start, budget)
        if length > 0:
            end = start + length
            wanted = range(
                max(start, request.logprob_position), min(end, request.num_prompt_tokens - 1)
            )
            items.append(
                ScheduledItem(request, start, length, end == num_tokens, wanted if wanted else None)
            )
        return length

    def _admit_waiting(
        self, items: list[ScheduledItem], prefills: list[Request], budget: int
    ) -> int:
        """Admit from the queue, in order of arrival, while slots, blocks and budget last; the budget that is left.

        Whoever would compute a block that a running request is about to compute waits for it, and keeps its slot.
        """
        queue, running, kv = self._queue, self._running, self.kv
        # Slots and blocks of samples that will be forked from a prompt under way are spoken for.
        promised = sum(len(_parked_behind(request)) for request in prefills)
        under_way = {kv.growing_block(request) for request in prefills}
        deferred: list[Request] = []
        while budget > 0 and (request := queue.first()) is not None:
            if running and len(running) + promised >= self._max_running:
                break
            if request.token_ids[-1] == PENDING:
                break  # Retracted a moment ago; its last token is known before the next step.
            if self._stalled == (request, kv.num_releases):
                break
            hits = kv.match(request, request.reuse_limit)
            missing = kv.missing_block(request, hits, request.reuse_limit)
            if missing is not None and missing in under_way:
                # Whoever computes that block runs, so it comes closer with every step, or gives it up.
                deferred.append(queue.pop())
                promised += 1 + len(_parked_behind(request))
                continue
            if not self._take_blocks(request, hits, promised):
                break
            queue.pop()
            request.status = RUNNING
            running[request] = None
            promised += len(_parked_behind(request))
            under_way.add(kv.growing_block(request))
            budget -= self._add_chunk(items, request, budget)
        for request in deferred:
            queue.push(request)
        return budget

    def _take_blocks(self, request: Request, hits: list[int], promised: int) -> bool:
        """Blocks for all known tokens of a waiting request, if the running ones then still have one more block each."""
        kv, running = self.kv, self._running
        num_tokens = len(request.token_ids)
        headroom = 0
        if running:
            headroom = len(running) + promised + 1 + len(_parked_behind(request))
        if kv.cost(hits, num_tokens) + headroom > kv.num_available:
            if not promised:  # Else it may fit without a release, when those who wait are gone.
                self._stalled = (request, kv.num_releases)
            return False
        kv.admit(request, hits, num_tokens)
        if not request.was_admitted:
            request.was_admitted = True
            request.num_cached_tokens = request.num_computed
        return True

    def complete(self, batch: ScheduledBatch) -> list[SampleRow]:
        """After the forward: what was computed is recorded, and who draws a token now is returned, in item order.

        Samples of a prompt that is now computed are forked here, so their rows share the leader's item. Requests that
        were aborted or retracted since `schedule` are left out.
        """
        rows: list[SampleRow] = []
        kv = self.kv
        size, epoch = kv.block_size, kv.epoch
        for index, item in enumerate(batch.items):
            request = item.request
            if request.status is not RUNNING:
                continue
            start, length = item.start, item.length
            end = start + length
            request.num_computed = end
            if length > 1 or not start % size or not end % size or request.kv_epoch != epoch:
                kv.commit(request, start, end)
            if end <= request.num_prompt_tokens:
                self._complete_prompt(index, item, rows)
            elif item.samples:
                rows.append(SampleRow(index, request, True))
        return rows

    def _complete_prompt(self, index: int, item: ScheduledItem, rows: list[SampleRow]) -> None:
        """Part of a prompt is computed; at its end the leader draws, and the samples behind it are forked."""
        request = item.request
        request.logprob_position = max(request.logprob_position, item.end)
        if not item.samples:
            return
        rows.append(SampleRow(index, request, request.params.max_new_tokens > 0))
        group = request.group
        if group is None or not _parked_behind(request):
            return
        if not self.kv.can_fork(request):
            self._promote(group)
            return
        parked, group.parked = group.parked, []
        for sibling in parked:
            sibling.logprob_position = request.num_prompt_tokens
        # Each fork takes one block: for its copy of a partial last block now, or for its first token in the next step.
        spare = min(self._max_running - len(self._running), self.kv.num_available)
        for sibling in parked[:spare]:
            self._fork(request, sibling)
            rows.append(SampleRow(index, sibling, sibling.params.max_new_tokens > 0))
        for sibling in parked[spare:]:
            self._queue.push(sibling)

    def _fork(self, leader: Request, sibling: Request) -> None:
        self.kv.fork(leader, sibling)
        sibling.status = RUNNING
        sibling.was_admitted = True
        sibling.num_cached_tokens = sibling.num_computed
        self._running[sibling] = None

    # Giving blocks back -----------------------------------------------------------------------------------------------

    def retract_all(self) -> None:
        """Every running request gives its blocks back and waits, in order of arrival, to be computed again."""
        for request in list(self._running):
            self._retract(request)

    def recompute_all(self) -> None:
        """No running request keeps KV: prompt and output are computed again before its next token.

        They go on before all requests that came later. Input log-probabilities of a prompt that is not yet computed
        to its end are computed again too; the later value replaces the earlier one.
        """
        for request in list(self._running):
            self._suspend(request)
            request.rewind_input_logprobs()

    def _retract(self, request: Request) -> None:
        request.num_retractions += 1
        self.num_retractions += 1
        self._suspend(request)

    def _suspend(self, request: Request) -> None:
        if self.before_suspend is not None:
            self.before_suspend(request)
        del self._running[request]
        self.kv.release(request)
        request.status = WAITING
        self._queue.push(request)

    # Checks -----------------------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Every unfinished request is in exactly one place, and owns blocks exactly if it runs; for tests."""
        parked = [p for request in self._requests.values() for p in _parked_behind(request)]
        places = [*self._queue.waiting(), *parked, *self._running]
        assert len(set(places)) == len(places), "a request is in two places"
        assert set(places) == set(self._requests.values()), "a request is lost"
        assert len(self._running) <= self._max_running
        for request in self._requests.values():
            running = request in self._running
            assert request.status is (RUNNING if running else WAITING)
            assert bool(request.block_ids) == running
            assert 0 <= request.num_computed <= len(request.token_ids)
        assert all(request.num_output_tokens == 0 for request in parked)
        self.kv.check_invariants(self._running)


def _parked_behind(request: Request) -> Sequence[Request]:
    """Samples of the same prompt that wait for this request."""
    group = request.group
    return group.parked if group is not None and group.leader is request else ()
