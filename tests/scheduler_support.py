"""Schedulers of small pools, requests for them, and steps; for tests."""

from __future__ import annotations

from typing import Any

from rollout.cache import KVCacheManager
from rollout.sampling_params import SamplingParams
from rollout.scheduling import Request, SampleRow, ScheduledBatch, Scheduler, SchedulerConfig


def make_scheduler(
    *, running: int = 8, budget: int = 64, blocks: int = 64, prefix_cache: bool = True
) -> Scheduler:
    config = SchedulerConfig(max_running_requests=running, chunked_prefill_size=budget)
    kv = KVCacheManager(num_blocks=blocks, block_size=4, enable_prefix_cache=prefix_cache)
    return Scheduler(config, kv)


def make_requests(
    scheduler: Scheduler, prompt: int | list[int], n: int = 1, max_new: int = 8, **options: Any
) -> list[Request]:
    first = len(scheduler.requests) * 100
    ids = [first + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(max_new_tokens=max_new)
    requests = [
        Request(rid=f"r{first}.{i}", prompt_ids=ids, params=params, **options) for i in range(n)
    ]
    scheduler.add(requests)
    return requests


def step(scheduler: Scheduler, token: int = 7) -> tuple[ScheduledBatch, list[SampleRow]]:
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check_invariants()
    rows = scheduler.complete(batch)
    for row in rows:
        if row.draws:
            scheduler.append_token(row.request, token)
    scheduler.check_invariants()
    return batch, rows


def chunks(batch: ScheduledBatch) -> list[tuple[str, int, int]]:
    return [(item.request.rid, item.start, item.length) for item in batch.items]
