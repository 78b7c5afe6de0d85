"""Kernels where sizes end: nothing at all, windows at edges of tiles, every block size, more than 2^31 elements."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch
from attention_batch import Batch, Case
from interpreted import Checks, poisoned, relative_error

CHECKS = Checks()
MAP_NORESERVE = 0x4000  # Linux's; Python has no name for it before 3.13
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def right(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """NaN where anything was not written."""
    assert relative_error(out, expected) < TOLERANCE[dtype]


def zeros_beyond(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of more than 2^31 elements; on a CPU memory is there for what is touched alone."""
    size = torch.Size(shape).numel()
    assert size > 1 << 31
    if device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@CHECKS.add(*({"window": window} for window in (1, 2, 16, 31, 32, 33, 64, 65)))
def windows_at_the_edges_of_tiles(device: torch.device, window: int) -> None:
    case = Case(lengths=(1, window, 33, 64, 100), window=window, heads=2, kv_heads=1)
    batch = Batch(case, str(device))
    right(batch.decode(), batch.expected(), case.dtype)
    chunks = replace(case, queries=(1, window, 3, 40, 100))
    batch = Batch(chunks, str(device))
    right(batch.prefill(), batch.expected(), case.dtype)


@CHECKS.add(
    *(
        {"block_size": size, "head_dim": head_dim, "dtype": dtype}
        for size, head_dim, dtype in (
            (16, 80, torch.float16),
            (32, 64, torch.bfloat16),
            (48, 96, torch.bfloat16),
            (64, 256, torch.float16),
            (128, 128, torch.float16),
            (128, 80, torch.float32),
            (256, 64, torch.bfloat16),
            (256, 96, torch.float32),
        )
    )
)
def blocks_of_every_size(
    device: torch.device, block_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    sizes = {"block_size": block_size, "head_dim": head_dim, "dtype": dtype}
    long = block_size + 70
    batch = Batch(Case(lengths=(long, 3, block_size), heads=2, kv_heads=1, **sizes), str(device))
    right(batch.decode(), batch.expected(), dtype)
    batch.share({(0, 2): 1})  # one of them is no longer than what is shared
    right(batch.shared_decode(), batch.expected(), dtype)
    case = Case(lengths=(long, 3), queries=(81, 3), heads=2, kv_heads=1, **sizes)
    batch = Batch(case, str(device))
    right(batch.prefill(), batch.expected(), dtype)


@CHECKS.add(*({"dtype": dtype} for dtype in (torch.float16, torch.bfloat16)))
def attention_over_a_pool_beyond_2_31_elements(device: torch.device, dtype: torch.dtype) -> None:
    for queries in ((), (40, 1)):
        lengths = (100, 70)
        case = Case(lengths=lengths, queries=queries, block_size=64, dtype=dtype)
        batch = Batch(case, str(device))
        if not queries:
            batch.share({(0, 1): 1})
        expected = batch.expected()
        small = batch.pool
        num = (1 << 31) // small[0].numel() + 64
        batch.pool = zeros_beyond((num, *small.shape[1:]), dtype, device)
        batch.pool[-len(small) :] = small
        batch.block_tables += num - len(small)
        if queries:
            right(batch.prefill(), expected, dtype)
        else:
            right(batch.decode(), expected, dtype)
            right(batch.shared_decode(), expected, dtype)
        del batch


@CHECKS.add()
def cache_writes_beyond_2_31_elements(device: torch.device) -> None:
    from rollout_kernels.qk_norm_rope import rotary_table, rotate_and_store

    num_tokens, size = 3, 128
    qkv = torch.randn(num_tokens, 4 * size).half().to(device)
    table = rotary_table(torch.rand(size // 2).to(device), 8, torch.float16)
    positions = torch.arange(num_tokens, dtype=torch.int32, device=device)
    small = poisoned((2, 64, 2, 1, size), torch.float16, device)
    slots = torch.tensor([5, 127, -1], dtype=torch.int32, device=device)
    queries = rotate_and_store(qkv.clone(), small, table, positions, slots)
    num = (1 << 31) // small[0].numel() + 2
    big = zeros_beyond((num, *small.shape[1:]), torch.float16, device)
    shifted = torch.where(slots < 0, slots, slots + 64 * (num - 2))
    assert torch.equal(rotate_and_store(qkv.clone(), big, table, positions, shifted), queries)
    for slot in (5, 63):
        block = -2 if slot == 5 else -1
        assert torch.equal(big[block, slot], small[block, slot])
    assert not big[-2, :5].any() and not big[-2, 6:].any() and not big[0].any()


@CHECKS.add()
def logits_beyond_2_31_elements(device: torch.device) -> None:
    from rollout_kernels import sampling

    vocab = 151_937  # no multiple of anything that a tile is
    rows = (1 << 31) // vocab + 3
    big = zeros_beyond((rows, vocab), torch.float16, device)
    big[-2:] = (torch.randn(2, vocab) * 2).half().to(device)
    found = []
    for logits, first in ((big[-2:].clone(), 0), (big, rows - 2)):
        asked = sampling.SamplingRows(
            seeds=torch.tensor([5, 6], device=device),
            positions=torch.tensor([3, 4], dtype=torch.int32, device=device),
            temperature=torch.tensor([1.0, 0.7], device=device),
            greedy=torch.tensor([False, True], device=device),
            logit_rows=torch.tensor([first, first + 1], dtype=torch.int32, device=device),
        )
        out = sampling.SampledTokens.allocate(2, device)
        scratch = sampling.SamplingScratch.allocate(2, vocab, device, filters=False)
        sampling.sample(logits, asked, scratch, out)
        found.append((out.token_ids, out.logprobs))
        if first == 0:
            tokens, logprobs = sampling.reference(logits, asked)
            assert torch.equal(out.token_ids, tokens)
            assert (out.logprobs - logprobs).abs().max() < 1e-5
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@CHECKS.add(*({"vocab": vocab} for vocab in (1, 2, 511, 512, 513, 2049)))
def draws_from_vocabularies_at_the_edges_of_chunks(device: torch.device, vocab: int) -> None:
    from rollout_kernels import sampling
    from rollout_kernels.logit_filters import SamplingFilters

    kinds = [  # temperature, top-k, top-p, min-p
        *((1.0, 0, 1.0, 0.0), (1e-3, 0, 1.0, 0.0), (100.0, 0, 1.0, 0.0)),
        *((1.0, 1, 1.0, 0.0), (1.0, vocab, 1.0, 0.0), (1.0, vocab - 1, 1.0, 0.0)),
        *((1.0, 0, 1e-6, 0.0), (1.0, 0, 0.999, 0.0), (1.0, 0, 1.0, 1.0), (0.5, 3, 0.5, 0.2)),
    ]
    heats, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*kinds, strict=True))
    num = len(kinds)
    logits = (torch.randn(num, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(
        device
    )
    rows = sampling.SamplingRows(
        seeds=torch.arange(num, device=device),
        positions=torch.arange(num, dtype=torch.int32, device=device),
        temperature=heats.float().to(device),
        greedy=(torch.arange(num) == 0).to(device),
    )
    filters = SamplingFilters(
        top_k=top_k.int().to(device),
        top_p=top_p.float().to(device),
        min_p=min_p.float().to(device),
    )
    out = sampling.SampledTokens.allocate(num, device)
    scratch = sampling.SamplingScratch.allocate(num, vocab, device)
    sampling.sample(logits, rows, scratch, out, filters=filters)
    tokens, logprobs = sampling.reference(logits, rows, filters=filters)
    assert torch.equal(out.token_ids, tokens) and not out.bad.any()
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=2e-6, atol=2e-6)


@CHECKS.add()
def batches_of_nothing(device: torch.device) -> None:
    from rollout_kernels import fused_norm, invariant_matmul, sampling, silu_mul, token_logprobs
    from rollout_kernels.qk_norm_rope import rotary_table, rotate_and_store

    whole = Batch(Case(lengths=(20, 30), queries=(20, 30)), str(device))
    for name in ("seq_lens", "block_tables", "fused"):
        setattr(whole, name, getattr(whole, name)[:0])
    whole.query_starts = whole.query_starts[:1]
    assert whole.prefill().shape == (0, 4, 64)
    single = Batch(Case(lengths=(20, 30)), str(device))
    for name in ("seq_lens", "block_tables", "fused"):
        setattr(single, name, getattr(single, name)[:0])
    single.case = Case(lengths=(), dtype=torch.float32)
    assert single.decode().shape == (0, 4, 64)
    assert single.shared_decode().shape == (0, 4, 64)
    none = torch.empty(0, 64, device=device)
    weight = torch.ones(64, device=device)
    assert fused_norm.add_rms_norm(none, none.clone(), weight, 1e-6, none.clone()).shape == (0, 64)
    assert silu_mul.silu_mul(none, torch.empty(0, 32, device=device)).shape == (0, 32)
    assert invariant_matmul.invariant_linear(none, torch.ones(8, 64, device=device)).shape == (0, 8)
    table = rotary_table(torch.rand(8).to(device), 4, torch.float32)
    pool = torch.zeros(1, 16, 2, 1, 16, device=device)
    index = torch.empty(0, dtype=torch.int32, device=device)
    qkv = torch.empty(0, 64, device=device)
    assert rotate_and_store(qkv, pool, table, index, index).shape == (0, 32)
    out = sampling.SampledTokens.allocate(0, device)
    scratch = sampling.SamplingScratch.allocate(0, 64, device)
    rows = sampling.SamplingRows(
        seeds=index.long(), positions=index, temperature=none[:, 0], greedy=index.bool()
    )
    sampling.sample(none, rows, scratch, out)
    values = torch.empty(0, device=device)
    got = token_logprobs.gather_logprobs(none, none[:, 0], index.long(), scratch.stats, values)
    assert got.shape == (0,)


verdicts, test_interpreted, test_on_gpu = CHECKS.as_tests(__file__)


@pytest.mark.gpu
def test_on_gpu_a_prefill_has_room_for_more_tiles_than_a_grids_second_axis() -> None:
    """64 heads of one KV head take a tile for each token."""
    case = Case(lengths=(70, 5), queries=(70, 5), heads=64, kv_heads=1, dtype=torch.float16)
    batch = Batch(case, "cuda")
    expected = batch.expected()
    many = 66_000 // 75
    shift = torch.arange(many, device="cuda").repeat_interleave(2) * 75
    batch.query_starts = torch.cat(
        [
            torch.tensor([0, 70], device="cuda").repeat(many) + shift,
            torch.tensor([75 * many]).cuda(),
        ]
    ).int()
    batch.seq_lens = batch.seq_lens.repeat(many)
    batch.block_tables = batch.block_tables.repeat(many, 1)
    batch.fused = batch.fused.repeat(many, 1, 1)
    out = batch.prefill().view(many, 75, 64, 64)
    assert torch.equal(out, out[:1].expand_as(out))
    right(out[0], expected, torch.float16)


if __name__ == "__main__":
    CHECKS.main()
