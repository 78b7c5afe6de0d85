"""Paged attention kernels against their references in float64: under Triton's interpreter, and on a GPU.

The interpreter is chosen when triton is imported, so its checks run as a process of its own: this file, as a script.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from attention_batch import Batch, Case
from interpreted import told_by

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of |out - ref| / |ref|: the rounding of inputs is not in it, that of weights and outputs to the dtype is."""


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the norms; NaN where anything was not written."""
    return float((out.double() - expected).norm() / expected.norm())


DECODES = {
    "one sequence": Case(lengths=(37,)),
    "block edges": Case(lengths=(15, 16, 17, 63, 64, 65, 128, 1)),
    "a padded row": Case(lengths=(20, 0, 7)),
    "one head per KV head": Case(lengths=(40, 70), heads=2, kv_heads=2),
    "a group that is no power of two": Case(lengths=(40, 70), heads=14, kv_heads=2),
    "more heads of a group than 16": Case(lengths=(40, 7), heads=24, kv_heads=1),
    "a window": Case(lengths=(5, 33, 100, 130), window=32),
    "a window of odd size": Case(lengths=(5, 33, 100, 130), window=19, block_size=8),
    "head size 80": Case(lengths=(33, 50), head_dim=80),
    "head size 96": Case(lengths=(33, 50), head_dim=96, dtype=torch.float16),
    "head size 128": Case(lengths=(33, 150), head_dim=128, heads=8, dtype=torch.bfloat16),
    "head size 256": Case(lengths=(33, 50), head_dim=256, block_size=32, dtype=torch.bfloat16),
    "blocks of 64": Case(lengths=(33, 150), block_size=64, dtype=torch.bfloat16),
    "blocks of 256": Case(lengths=(33, 270), heads=1, kv_heads=1, block_size=256),
    "blocks of no power of two": Case(lengths=(33, 100), block_size=24),
}
PREFILLS = {
    "a prompt": Case(lengths=(37,), queries=(37,)),
    "prompts of many lengths": Case(lengths=(1, 70, 16, 33), queries=(1, 70, 16, 33)),
    "chunks over cached prefixes": Case(lengths=(50, 100, 64), queries=(10, 60, 32)),
    "a mixed batch": Case(lengths=(50, 1, 100, 64, 90), queries=(1, 1, 40, 1, 90)),
    "sequences without queries": Case(lengths=(50, 0, 10, 0), queries=(1, 0, 4, 0)),
    "one head per KV head": Case(lengths=(70, 20), queries=(50, 20), heads=2, kv_heads=2),
    "a group that is no power of two": Case(lengths=(40, 70), queries=(40, 30), heads=14),
    "more heads of a group than 16": Case(
        lengths=(40, 7), queries=(20, 7), heads=24, kv_heads=1, dtype=torch.float16
    ),
    "a window": Case(lengths=(5, 150, 130), queries=(5, 90, 40), window=32),
    "a window of odd size": Case(lengths=(150, 130), queries=(100, 1), window=45, block_size=8),
    "head size 80": Case(lengths=(60, 50), queries=(60, 1), head_dim=80, dtype=torch.bfloat16),
    "head size 96": Case(lengths=(60, 50), queries=(60, 1), head_dim=96),
    "head size 128": Case(lengths=(150, 50), queries=(140, 50), head_dim=128, dtype=torch.bfloat16),
    "head size 256": Case(lengths=(60, 50), queries=(60, 9), head_dim=256, dtype=torch.float16),
    "blocks of 64": Case(lengths=(150, 100), queries=(150, 1), block_size=64, dtype=torch.bfloat16),
}
SHARED = {
    "one group": (Case(lengths=(70, 100, 66)), {(0, 1, 2): 4}),
    "two groups, one row alone": (Case(lengths=(150, 80, 140, 0, 20, 70)), {(0, 2): 8, (1, 5): 4}),
    "no group": (Case(lengths=(70, 100)), {}),
    "more members than a tile takes": (
        Case(lengths=(70,) * 11, heads=8, kv_heads=1, head_dim=128, dtype=torch.bfloat16),
        {tuple(range(11)): 4},
    ),
    "a group that is no power of two": (
        Case(lengths=(100, 130, 77), heads=7, kv_heads=1, dtype=torch.float16),
        {(0, 1, 2): 4},
    ),
    "blocks larger than a tile": (
        Case(lengths=(150, 170, 30), head_dim=96, block_size=128),
        {(0, 1): 1},
    ),
}
CHECKS: dict[str, Callable[[str], str]] = {}


def check(function: Callable[[str], str]) -> Callable[[str], str]:
    """Registers a check: device -> "right", or what is wrong."""
    CHECKS[function.__name__] = function
    return function


def close(out: torch.Tensor, batch: Batch) -> str:
    found = error(out, batch.expected())
    return "right" if found < TOLERANCE[batch.case.dtype] else f"error {found}"


def same(results: list[torch.Tensor]) -> str:
    """Bit for bit on a GPU; the interpreter's products are numpy's, where a row's bits depend on its place."""
    if any(result.isnan().any() for result in results):
        return "not a number"
    allowed = 0 if results[0].is_cuda else torch.finfo(results[0].dtype).eps * 8
    worst = max(float((results[0] - other).abs().max()) for other in results)
    return "right" if worst <= allowed else f"results differ by {worst}"


@check
def sequences_are_found_among_many(device: str) -> str:
    """Among more than are looked through at once."""
    from rollout_kernels import paged_prefill as kernels

    at_once, kernels.SEARCHED = kernels.SEARCHED, 16
    try:
        batch = Batch(Case(lengths=(3,) * 20, queries=(1, 2) * 10, heads=1, kv_heads=1), device)
        return close(batch.prefill(), batch)
    finally:
        kernels.SEARCHED = at_once


@check
def splits_add_up(device: str) -> str:
    """However many there are, and also where a sequence has fewer tiles than splits."""
    from rollout_kernels.attention_configs import DecodeConfig

    batch = Batch(replace(DECODES["block edges"], lengths=(100, 0, 1, 40)), device)
    for splits in (3, 7):
        config = DecodeConfig(keys=16, warps=4, stages=2, programs=splits * 8, split_keys=16)
        verdict = close(batch.decode(config=config), batch)
        if verdict != "right":
            return f"{splits} splits: {verdict}"
    return "right"


@check
def launches_follow_each_other(device: str) -> str:
    """One workspace serves launch after launch, of other shapes too."""
    from rollout_kernels import paged_decode as kernels
    from rollout_kernels.attention_configs import DecodeConfig

    config = DecodeConfig(keys=16, warps=4, stages=2, programs=12, split_keys=16)
    workspace = kernels.DecodeWorkspace.allocate(
        max_batch=8, num_heads=4, num_kv_heads=2, head_dim=64, device=device
    )
    for lengths in ((60,), (20, 40), (60,)):
        batch = Batch(Case(lengths=lengths), device, seed=len(lengths))
        verdict = close(batch.decode(workspace=workspace, config=config), batch)
        if verdict != "right":
            return f"{lengths}: {verdict}"
    return "right"


@check
def a_captured_decode_follows_its_inputs(device: str) -> str:
    """Lengths, tables and groups change between replays; on the CPU, between calls."""
    from rollout_kernels import paged_decode as kernels

    first = Batch(Case(lengths=(40, 0, 70)), device, seed=1)
    second = Batch(Case(lengths=(7, 64, 0)), device, seed=2)
    width = min(first.block_tables.shape[1], second.block_tables.shape[1])
    pool = first.pool.new_full((64, *first.pool.shape[1:]), math.nan)
    tables, lens = first.block_tables[:, :width].clone(), first.seq_lens.clone()
    q, out = first.fused.clone(), first.poisoned()
    workspace = kernels.DecodeWorkspace.allocate(
        max_batch=3, num_heads=4, num_kv_heads=2, head_dim=64, device=device
    )

    def launch() -> None:
        kernels.paged_decode(
            q[:, :4], pool, tables, lens, out, scale=0.125, workspace=workspace, max_len=128
        )

    replay = launch
    if device != "cpu":
        launch()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        replay = graph.replay
    for batch in (first, second, first):
        out.fill_(math.nan)
        pool[: len(batch.pool)].copy_(batch.pool)
        tables.copy_(batch.block_tables[:, :width])
        lens.copy_(batch.seq_lens)
        q.copy_(batch.fused)
        replay()
        verdict = close(out, batch)
        if verdict != "right":
            return f"{batch.case.lengths}: {verdict}"
    return "right"


@check
def a_deterministic_decode_has_the_same_bits_in_any_batch(device: str) -> str:
    batch = Batch(Case(lengths=(130, 5, 77, 64), head_dim=128, dtype=torch.bfloat16), device)
    whole = batch.decode(deterministic=True)
    parts = []
    for n in range(4):
        alone = Batch(batch.case, device)
        for name in ("seq_lens", "block_tables", "fused"):
            setattr(alone, name, getattr(batch, name)[n : n + 1])
        parts.append(alone.decode(deterministic=True, max_len=4096))
    return same([whole, torch.cat(parts)])


@check
def a_deterministic_prefill_has_the_same_bits_under_any_chunking(device: str) -> str:
    case = Case(lengths=(150,), queries=(150,), head_dim=128, dtype=torch.bfloat16)
    results = [Batch(case, device).prefill(deterministic=True)]
    for sizes in (
        ((33, 50, 1, 66),) if device == "cpu" else ((1, 149), (64, 64, 22), (33, 50, 1, 66))
    ):
        done, chunks = 0, []
        for size in sizes:
            chunk = Batch(case, device)
            chunk.fused = chunk.fused[done : done + size]
            done += size
            chunk.seq_lens = torch.tensor([done], dtype=torch.int32, device=device)
            chunk.query_starts = torch.tensor([0, size], dtype=torch.int32, device=device)
            chunks.append(chunk.prefill(deterministic=True))
        results.append(torch.cat(chunks))
    return same(results)


@check
def a_deterministic_decode_has_the_bits_of_a_prefill(device: str) -> str:
    case = Case(lengths=(100, 64, 1), head_dim=128, dtype=torch.bfloat16)
    verdicts = []
    for change in ({}, {"window": 70}, {"heads": 8}, {"heads": 2})[
        : 2 if device == "cpu" else None
    ]:
        batch = Batch(replace(case, **change), device)
        verdicts.append(same([batch.decode(deterministic=True), batch.prefill(deterministic=True)]))
    return next((verdict for verdict in verdicts if verdict != "right"), "right")


@check
def a_deterministic_decode_has_the_same_bits_with_and_without_sharing(device: str) -> str:
    verdicts = []
    for heads in (4,) if device == "cpu" else (2, 4, 8):
        case = Case(
            lengths=(150, 90, 140, 0, 200, 99), heads=heads, head_dim=128, dtype=torch.bfloat16
        )
        batch = Batch(case, device)
        batch.share({(0, 2, 4): 8, (1, 5): 4})
        shared = batch.shared_decode(deterministic=True)
        verdicts.append(same([shared, batch.decode(deterministic=True)]))
    return next((verdict for verdict in verdicts if verdict != "right"), "right")


@check
def sequences_of_a_trainer_get_the_bits_of_a_decode_and_true_gradients(device: str) -> str:
    from rollout_kernels import sequence_attention as trainer

    lengths = (70, 64, 1)
    plain = Case(lengths=lengths, queries=lengths, dtype=torch.bfloat16)
    for case in (plain, replace(plain, dtype=torch.float32, window=40)):
        batch = Batch(replace(case, window=None), device)
        rows = [
            batch.pool[table[: -(-length // 16)].long()].flatten(0, 1)[:length]
            for table, length in zip(batch.block_tables, case.lengths, strict=True)
        ]
        k, v = torch.cat(rows).unbind(1)
        inputs = [tensor.clone().requires_grad_() for tensor in (batch.q, k, v)]
        options = {"scale": batch.scale, "window": case.window}
        layout = trainer.SequenceLayout(case.lengths, torch.device(device))
        out = trainer.sequence_attention(*inputs, layout, **options)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        expected = trainer.reference(*wide, case.lengths, **options)
        found = [error(out.detach(), expected.detach())]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        out.backward(weights)
        expected.backward(weights.double())
        found += [error(a.grad, b.grad) for a, b in zip(inputs, wide, strict=True)]
        if not max(found) < 2 * TOLERANCE[case.dtype]:
            return f"errors {found}"
        # The last token of each sequence, as an engine decodes it.
        last = torch.tensor(case.lengths).cumsum(0).to(out.device) - 1
        batch.fused, batch.case = batch.fused[last], case
        verdict = same([out.detach()[last], batch.decode(deterministic=True)])
        if verdict != "right":
            return verdict
    return "right"


def verdicts(device: str) -> dict[str, str]:
    """Of every case and check."""
    found = {}
    for name, case in DECODES.items():
        batch = Batch(case, device)
        found[f"decode: {name}"] = close(batch.decode(), batch)
    for name, case in PREFILLS.items():
        batch = Batch(case, device)
        found[f"prefill: {name}"] = close(batch.prefill(), batch)
    for name, (case, groups) in SHARED.items():
        batch = Batch(case, device)
        batch.share(groups)
        found[f"shared: {name}"] = close(batch.shared_decode(), batch)
    for name, function in CHECKS.items():
        found[name] = function(device)
    return found


NAMES = [
    *(f"decode: {name}" for name in DECODES),
    *(f"prefill: {name}" for name in PREFILLS),
    *(f"shared: {name}" for name in SHARED),
    *CHECKS,
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """The verdicts under the interpreter."""
    return told_by(__file__)


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_compute_the_formula(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == "right"


@pytest.mark.gpu
def test_the_kernels_compute_the_formula_on_a_gpu() -> None:
    assert {name: found for name, found in verdicts("cuda").items() if found != "right"} == {}


if __name__ == "__main__":
    for name, verdict in verdicts(sys.argv[1] if len(sys.argv) > 1 else "cpu").items():
        print(f"{name}={verdict}", flush=True)
