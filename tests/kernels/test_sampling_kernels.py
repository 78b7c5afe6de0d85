"""Sampling on the device draws what the CPU sampler draws, whatever the batch, and flags rows that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import Checks, poisoned

from rollout.layers.logit_edits import edit_logits
from rollout.layers.sampler import Sampler
from rollout.sampling_params import SamplingParams
from rollout.scheduling import Request
from rollout_kernels import logit_edits, logit_filters, logit_stats, random_numbers, sampling
from rollout_kernels.logit_edits import LogitEdits
from rollout_kernels.logit_filters import SamplingFilters
from rollout_kernels.sampling import SampledTokens, SamplingRows, SamplingScratch

CHECKS = Checks()
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"temperature": 0.8, "top_p": 0.9},
    {"top_k": 5},
    {"top_k": 1, "temperature": 0.7},
    {"top_k": 200, "top_p": 0.75, "min_p": 0.01},
    {"min_p": 0.05},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": -0.4},
    {"repetition_penalty": 1.3, "temperature": 0.0},
    {"logit_bias": {3: 4.0, 5: -3.0, 250: 1.5}, "top_k": 12},
    {"min_new_tokens": 9},
    {"min_new_tokens": 1},
    {"presence_penalty": 1.0, "min_p": 0.1, "top_p": 0.95, "logit_bias": {250: -100.0}},
]


def noise(num_rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * spread


def make_requests(vocab: int, num: int) -> list[Request]:
    requests = []
    for i in range(num):
        request = Request(
            rid=f"r{i}",
            prompt_ids=[1, 2, i % vocab],
            params=SamplingParams(**KINDS[i % len(KINDS)]),
            seed=(2**64 - 1 - i) if i % 2 else i * 7919,
            return_logprob=True,
            stop_ids=(1, vocab - 1),
        )
        request.token_ids += [5, 5, i % vocab, 7][: i % 5]
        requests.append(request)
    return requests


class Batch:
    """What requests ask for, as the kernels take it."""

    def __init__(self, requests: list[Request], vocab: int, device: torch.device) -> None:
        everything = [request.params for request in requests]

        def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def padded(rows: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
            width = max(1, *(len(row) for row in rows))
            return column([row + [7] * (width - len(row)) for row in rows], dtype)

        signed = [r.seed - (1 << 64) if r.seed >> 63 else r.seed for r in requests]
        self.rows = SamplingRows(
            seeds=column(signed, torch.int64),
            positions=column([r.num_output_tokens for r in requests], torch.int64),
            temperature=column([p.logprob_temperature for p in everything], torch.float32),
            greedy=column([p.is_greedy for p in everything], torch.bool),
        )
        self.filters = SamplingFilters(
            top_k=column([p.top_k for p in everything], torch.int32),
            top_p=column([p.top_p for p in everything], torch.float32),
            min_p=column([p.min_p for p in everything], torch.float32),
        )
        penalised = [i for i, p in enumerate(everything) if p.has_penalties]
        biases = [p.logit_bias or {} for p in everything]
        self.edits = LogitEdits(
            counts=torch.full(
                (max(len(penalised), 1), vocab), -3, dtype=torch.int16, device=device
            ),
            tables=column(
                [penalised.index(i) if i in penalised else -1 for i in range(len(requests))],
                torch.int32,
            ),
            repetition=column([p.repetition_penalty for p in everything], torch.float32),
            frequency=column([p.frequency_penalty for p in everything], torch.float32),
            presence=column([p.presence_penalty for p in everything], torch.float32),
            bias_ids=padded([list(bias) for bias in biases], torch.int32),
            biases=padded([list(bias.values()) for bias in biases], torch.float32),
            num_biases=column([len(bias) for bias in biases], torch.int32),
            end_ids=padded([list(r.stop_ids) for r in requests], torch.int32),
            num_ends=column([len(r.stop_ids) for r in requests], torch.int32),
            min_tokens=column([p.min_new_tokens for p in everything], torch.int32),
        )
        for table, i in enumerate(penalised):
            request, ids = requests[i], torch.tensor(requests[i].token_ids, device=device)
            prompt, output = ids.split([request.num_prompt_tokens, request.num_output_tokens])
            has_prompt = request.params.repetition_penalty != 1.0
            logit_edits.count_table(
                self.edits.counts[table], prompt if has_prompt else None, output
            )


def run(
    logits: torch.Tensor,
    rows: SamplingRows,
    *,
    edits: LogitEdits | None = None,
    filters: SamplingFilters | None = None,
) -> SampledTokens:
    """`sample` with poisoned memory, one row larger than needed."""
    num_rows, device = len(rows.seeds) + 1, logits.device
    scratch = SamplingScratch.allocate(num_rows, logits.shape[1], device)
    poison(scratch.stats)
    poison(scratch.filters)
    out = SampledTokens(
        token_ids=poisoned((num_rows,), torch.int64, device),
        logprobs=poisoned((num_rows,), torch.float32, device),
        bad=torch.ones(num_rows, dtype=torch.bool, device=device),
    )
    sampling.sample(logits, rows, scratch, out, edits=edits, filters=filters)
    assert out.token_ids[-1] < -7 and out.logprobs[-1].isnan() and out.bad[-1]
    return SampledTokens(
        token_ids=out.token_ids[:-1].cpu(), logprobs=out.logprobs[:-1].cpu(), bad=out.bad[:-1].cpu()
    )


def poison(scratch: Any) -> None:
    for name in scratch.__slots__:
        memory = getattr(scratch, name)
        memory.fill_(float("nan") if memory.dtype == torch.float32 else -7)


def pick(value: Any, rows: torch.Tensor) -> Any:
    """The rows of each tensor of a dataclass of rows; count tables stay."""
    parts = {name: getattr(value, name) for name in value.__slots__}
    return type(value)(
        **{
            name: part if part is None or name == "counts" else part[rows]
            for name, part in parts.items()
        }
    )


@CHECKS.add(
    {"vocab": 288, "dtype": torch.float32, "num": 15},
    {"vocab": 3000, "dtype": torch.bfloat16, "num": 15},
)
def draws_of_the_cpu_sampler(
    device: torch.device, vocab: int, dtype: torch.dtype, num: int
) -> None:
    logits = noise(num, vocab).to(dtype)
    requests = make_requests(vocab, num)
    batch = Batch(requests, vocab, device)
    before = logits.clone().to(device)
    counts = batch.edits.counts.clone()
    there = before.clone()
    edited = logit_edits.reference(there, batch.edits, batch.rows.positions).cpu()
    kinds = {"edits": batch.edits, "filters": batch.filters}
    tokens, logprobs = sampling.reference(there, batch.rows, **kinds)
    got = run(there, batch.rows, edits=batch.edits, filters=batch.filters)
    want = Sampler().sample(logits.float(), requests)
    assert got.token_ids.tolist() == want.token_ids == tokens.tolist()
    assert want.logprobs is not None and not got.bad.any()
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(got.logprobs.double(), logprobs.cpu(), atol=3e-6, rtol=1e-6)
    by_layer = logits.float()
    edit_logits(by_layer, requests)
    assert torch.equal(edited, by_layer)
    assert torch.equal(there, before)
    for row, table in enumerate(batch.edits.tables.tolist()):
        if table >= 0:
            counts[table, got.token_ids[row]] += 1
    assert torch.equal(batch.edits.counts, counts)
    # A row draws the same in any company, and without what it does not ask for.
    order = torch.randperm(num, generator=torch.Generator().manual_seed(1))[: num // 2]
    fresh = Batch(requests, vocab, device)
    rows, edits = pick(fresh.rows, order.to(device)), pick(fresh.edits, order.to(device))
    some = run(there[order], rows, edits=edits, filters=pick(batch.filters, order.to(device)))
    assert torch.equal(some.token_ids, got.token_ids[order])
    assert torch.equal(some.logprobs, got.logprobs[order])
    kinds = torch.arange(num) % len(KINDS)
    plain = torch.isin(kinds, torch.tensor([0, 1, 2, 3, 6]))
    alone = run(there[plain.to(device)], pick(batch.rows, plain.to(device)))
    assert torch.equal(alone.token_ids, got.token_ids[plain])
    assert torch.equal(alone.logprobs, got.logprobs[plain])


@CHECKS.add()
def rows_of_logits_that_several_samples_share(device: torch.device) -> None:
    logits = noise(3, 2050).to(device)[:, :2049]  # columns end inside a chunk, rows are strided
    where = torch.tensor([2, 0, 2, 1, 2], dtype=torch.int32, device=device)
    fields = {
        "seeds": torch.arange(5, device=device),
        "positions": torch.arange(5, device=device, dtype=torch.int32),
        "temperature": torch.ones(5, device=device),
        "greedy": torch.zeros(5, dtype=torch.bool, device=device),
    }
    filters = SamplingFilters(
        top_k=torch.full((5,), 40, dtype=torch.int32, device=device),
        top_p=torch.ones(5, device=device),
        min_p=torch.zeros(5, device=device),
    )
    shared = run(logits, SamplingRows(**fields, logit_rows=where), filters=filters)
    apart = run(logits[where.long()].contiguous(), SamplingRows(**fields), filters=filters)
    assert torch.equal(shared.token_ids, apart.token_ids)
    assert torch.equal(shared.logprobs, apart.logprobs)
    assert len(set(shared.token_ids.tolist())) > 2


@CHECKS.add()
def rows_that_are_no_distribution(device: torch.device) -> None:
    vocab = 2500
    logits = noise(10, vocab)
    logits[1, 7] = float("nan")
    logits[2, 2499] = float("inf")
    logits[3] = float("-inf")
    logits[4, :2400] = float("-inf")
    logits[5, 1024:2048] = float("nan")
    logits[6, 1024:2048] = float("-inf")
    logits[7, 0] = float("inf")
    logits[8, :1024] = float("-inf")
    logits[8, 3] = float("nan")
    requests = make_requests(vocab, 10)
    for kinds in ([{}], [{"temperature": 0.0}], [{"top_p": 0.9}], [{"presence_penalty": 0.1}]):
        for request in requests:
            request.params = SamplingParams(**kinds[0])
        batch = Batch(requests, vocab, device)
        got = run(logits.to(device), batch.rows, edits=batch.edits, filters=batch.filters)
        assert got.bad.nonzero()[:, 0].tolist() == [1, 2, 3, 5, 7, 8]
        assert torch.equal(got.logprobs.isnan(), got.bad)
        good = [0, 4, 6, 9]
        want = Sampler().sample(logits[good], [requests[i] for i in good])
        assert got.token_ids[good].tolist() == want.token_ids
        assert got.token_ids[got.bad].eq(0).all()


@CHECKS.add()
def nothing_left_after_edits(device: torch.device) -> None:
    requests = make_requests(2, 1)
    requests[0].params = SamplingParams(min_new_tokens=100)
    requests[0].stop_ids = (0, 1)
    batch = Batch(requests, 2, device)
    assert run(noise(1, 2).to(device), batch.rows, edits=batch.edits).bad.tolist() == [True]


def exact_draw(z: torch.Tensor, left: torch.Tensor, number: float) -> int:
    """The inverse of the cumulative distribution over what is left of tempered logits, in float64."""
    weights = torch.where(left, (z.double() - z.max().double()).exp(), 0.0)
    running = weights.cumsum(0)
    return int(torch.searchsorted(running, number * running[-1], right=True))


@CHECKS.add(
    {"vocab": 300, "spread": 0.01, "dtype": torch.float32, "capacity": 64},
    {"vocab": 1200, "spread": 3.0, "dtype": torch.bfloat16, "capacity": 2048},
    {"vocab": 4500, "spread": 1.0, "dtype": torch.bfloat16, "capacity": 512},
    {"vocab": 1100, "spread": 0.0, "dtype": torch.float16, "capacity": 256},
)
def filters_of_a_sort(
    device: torch.device, vocab: int, spread: float, dtype: torch.dtype, capacity: int
) -> None:
    cases = [
        *((0, p, 0.0) for p in (0.999, 0.9, 0.05)),
        *((k, 1.0, 0.0) for k in (2, 40, vocab // 3)),
        *((k, 0.6, 0.0) for k in (3, vocab // 2)),
        (0, 1.0, 0.02),
        (0, 0.98, 0.3),
        (100, 0.97, 0.02),
        (1, 0.5, 0.999),
    ]
    num = len(cases)
    logits = noise(num, vocab, seed=3, spread=spread).to(dtype)
    logits[::3, ::7] = float("-inf")
    logits[4, 100] = 40.0
    logits -= 3.0
    top_k, top_p, min_p = zip(*cases, strict=True)
    filters = SamplingFilters(
        top_k=torch.tensor(top_k, dtype=torch.int32),
        top_p=torch.tensor(top_p, dtype=torch.float32),
        min_p=torch.tensor(min_p, dtype=torch.float32),
    )
    temperature = torch.linspace(0.5, 1.5, num)
    want = logit_filters.reference(logits.float(), temperature, filters)
    scratch = SamplingScratch(
        stats=logit_stats.LogitStats.allocate(num, vocab, device),
        filters=logit_filters.FilterScratch.allocate(num, device, capacity),
    )
    poison(scratch.stats)
    poison(scratch.filters)
    rows = SamplingRows(
        seeds=torch.arange(num, device=device),
        positions=torch.full((num,), 77, device=device),
        temperature=temperature.to(device),
        greedy=torch.zeros(num, dtype=torch.bool, device=device),
    )
    there = SamplingFilters(
        **{name: getattr(filters, name).to(device) for name in filters.__slots__}
    )
    out = SampledTokens.allocate(num, device)
    sampling.sample(logits.to(device), rows, scratch, out, filters=there)
    assert scratch.filters is not None and not out.bad.any()
    bounds, chosen = scratch.filters.bounds.cpu(), scratch.filters.chosen.cpu()
    # A k above the number of chunks may take a second look even where all fits.
    sure = (filters.top_k <= scratch.stats.maxima.shape[2]) | (filters.top_k >= vocab)
    assert (chosen[sure] >= 0).all() if capacity >= vocab else (chosen < 0).any()
    z = logits.float() / temperature[:, None]
    weights = (z - z.amax(-1, keepdim=True)).exp()
    got = (logits >= bounds[:, None]) & (weights >= filters.min_p[:, None])
    for row, case in enumerate(cases):
        # Minus infinity cannot be drawn either way. A sum that hits its target but for rounding may stop one value,
        # with its equals, earlier or later.
        other = logits[row].isfinite() & (got[row] != want[row])
        assert len(logits[row][other].unique()) <= (case[1] < 1), (case, int(other.sum()))
        token = exact_draw(z[row], got[row], random_numbers.reference(row, 77))
        assert int(out.token_ids[row]) == token, (case, int(chosen[row]))


@pytest.mark.gpu
def test_a_captured_graph_draws_for_whatever_its_tensors_hold_and_nothing_waits() -> None:
    device, vocab = torch.device("cuda"), 3000
    logits = noise(15, vocab).to(device)
    batch = Batch(make_requests(vocab, 15), vocab, device)
    counts = batch.edits.counts.clone()
    scratch = SamplingScratch.allocate(15, vocab, device)
    out, again = (SampledTokens.allocate(15, device) for _ in range(2))

    def draw(to: SampledTokens) -> None:
        sampling.sample(logits, batch.rows, scratch, to, edits=batch.edits, filters=batch.filters)

    draw(out)
    first = out.token_ids.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw(out)
    logits.copy_(noise(15, vocab, seed=6))
    batch.rows.positions.add_(1)
    batch.edits.counts.copy_(counts)
    graph.replay()
    batch.edits.counts.copy_(counts)
    draw(again)
    assert torch.equal(out.token_ids, again.token_ids)
    assert torch.equal(out.logprobs, again.logprobs)
    assert not torch.equal(out.token_ids, first)


verdicts, test_under_the_interpreter, test_on_the_gpu = CHECKS.as_tests(__file__)


if __name__ == "__main__":
    CHECKS.main()
