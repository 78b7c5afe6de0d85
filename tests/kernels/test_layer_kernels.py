"""Norms, rotary embedding with the cache write, and the gate: the kernels round as the layers do."""

from __future__ import annotations

from typing import Any

import torch
from interpreted import Checks, poisoned, relative_error

from rollout.layers.norm import RMSNorm
from rollout.layers.rotary import RopeConfig, RotaryEmbedding, rotate_
from rollout.layers.workspace import Workspace
from rollout_kernels import fused_norm, qk_norm_rope, silu_mul

CHECKS = Checks()
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Relative error against float64: two roundings to the dtype."""
DTYPES = tuple(TOLERANCE)
NORM_CASES = [
    *({"dtype": dtype, "size": 64, "rows": 5} for dtype in DTYPES),
    *({"dtype": torch.bfloat16, "size": size, "rows": 3} for size in (96, 1000, 1024, 4096)),
    {"dtype": torch.bfloat16, "size": 64, "rows": 0},
]


def noise(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2).to(dtype).to(device)


def share_of_other_bits(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu() != want.cpu()).double().mean())


@CHECKS.add(*NORM_CASES)
def norm_with_addition(device: torch.device, dtype: torch.dtype, size: int, rows: int) -> None:
    residual, x = (noise((rows, size), dtype, device, seed) for seed in (1, 2))
    layer = RMSNorm(size, 1e-6)
    layer.weight.data = noise((size,), dtype, device, 3)
    total = residual + x
    scratch = torch.empty_like(total)
    want = layer(total, scratch, Workspace(dtype, device))
    exact = total.double()
    exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight.double()
    out = poisoned((rows, size), dtype, device)
    fused_norm.add_rms_norm(residual, x, layer.weight, 1e-6, out)
    assert torch.equal(residual, total)
    if rows:
        assert relative_error(out, exact) < TOLERANCE[dtype]
        # A sum in another order may round the statistic otherwise, and then few elements of a row.
        assert dtype == torch.float32 or share_of_other_bits(out, want) < 2e-3
        alone = poisoned((1, size), dtype, device)
        fused_norm.add_rms_norm(total[1:2].clone(), None, layer.weight, 1e-6, alone)
        assert torch.equal(alone, out[1:2])
        fused_norm.add_rms_norm(total, None, layer.weight, 1e-6, total)
        assert torch.equal(total, out)


@CHECKS.add(
    *({"dtype": dtype, "width": 96, "rows": 3} for dtype in DTYPES),
    {"dtype": torch.bfloat16, "width": 3072, "rows": 2},
)
def gate(device: torch.device, dtype: torch.dtype, width: int, rows: int) -> None:
    fused = noise((rows, 2 * width), dtype, device, 4)
    fused[0, 0], fused[0, 1] = -1000.0, 1000.0
    out = silu_mul.silu_mul(fused, poisoned((rows, width), dtype, device))
    wide = fused.double()
    gates, ups = wide[:, :width], wide[:, width:]
    assert relative_error(out, gates * torch.sigmoid(gates) * ups) < TOLERANCE[dtype]
    want = silu_mul.reference(fused)
    torch.testing.assert_close(out, want, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=1e-6)
    assert dtype == torch.float32 or share_of_other_bits(out, want) < 2e-3


ROPE_CASES: list[dict[str, Any]] = [
    *(
        {"dtype": dtype, "heads": (4, 2), "size": size, "norm": norm}
        for dtype in DTYPES
        for size, norm in ((64, True), (128, False))
    ),
    *(
        {"dtype": torch.bfloat16, "heads": heads, "size": size, "norm": True}
        for heads, size in (((3, 1), 80), ((6, 3), 96), ((16, 8), 128), ((5, 5), 256))
    ),
    *(
        {"dtype": torch.bfloat16, "heads": (4, 2), "size": size, "norm": norm, "fraction": 0.5}
        for size, norm in ((64, True), (80, False))
    ),
]


@CHECKS.add(*ROPE_CASES)
def rotation_and_cache_write(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    size: int,
    norm: bool,
    fraction: float = 1.0,
) -> None:
    num_heads, num_kv = heads
    tokens, blocks, block_size = 5, 4, 16
    qkv = noise((tokens, (num_heads + 2 * num_kv) * size), dtype, device, 5)
    positions = torch.tensor([0, 1, 77, 299, 3], device=device)
    slots = torch.tensor([17, 0, 63, -1, 33], device=device)
    rotary = RotaryEmbedding(RopeConfig(theta=1e4, fraction=fraction), size, device)
    table = qk_norm_rope.rotary_table(rotary.frequencies, 300, dtype)
    norms = None
    want = qkv.clone().view(tokens, -1, size)
    rotated = want[:, : num_heads + num_kv]
    workspace = Workspace(dtype, device)
    if norm:
        norms = qk_norm_rope.HeadNorms(
            query=noise((size,), dtype, device, 6), key=noise((size,), dtype, device, 7), eps=1e-6
        )
        for part, weight in (
            (rotated[:, :num_heads], norms.query),
            (rotated[:, num_heads:], norms.key),
        ):
            layer = RMSNorm(size, norms.eps)
            layer.weight.data = weight
            layer(part, part, workspace)
    rotate_(rotated, rotary.angles(positions, dtype), workspace)
    pool = poisoned((blocks, block_size, 2, num_kv, size), dtype, device)
    before = qkv.clone()
    q_out = poisoned((tokens, num_heads * size), dtype, device)
    qk_norm_rope.rotate_and_store(qkv, pool, table, positions, slots, norms=norms, q_out=q_out)
    assert torch.equal(qkv, before)
    kept = slots >= 0
    stored = pool.view(-1, 2 * num_kv, size)
    for got, expected in (
        (q_out.view(tokens, num_heads, size), want[:, :num_heads]),
        (stored[slots[kept]], want[kept, num_heads:]),
    ):
        if norm:
            assert relative_error(got, expected) < TOLERANCE[dtype]
            assert dtype == torch.float32 or share_of_other_bits(got, expected) < 4e-3
        else:
            assert torch.equal(got, expected)
    untouched = torch.ones(len(stored), dtype=torch.bool, device=device)
    untouched[slots[kept]] = False
    assert stored[untouched].isnan().all()
    queries, kv = qk_norm_rope.reference(before, table, positions, num_heads, num_kv, norms)
    assert relative_error(q_out.view(tokens, num_heads, size), queries) < TOLERANCE[dtype]
    assert relative_error(stored[slots[kept]], kv[kept].flatten(1, 2)) < TOLERANCE[dtype]
    again = poisoned(tuple(pool.shape), dtype, device)
    in_place = qk_norm_rope.rotate_and_store(
        qkv[2:3], again, table, positions[2:3].int(), slots[2:3].int(), norms=norms
    )
    assert torch.equal(in_place, q_out[2:3])
    assert torch.equal(again.view(-1, 2 * num_kv, size)[63], stored[63])


verdicts, test_under_the_interpreter, test_on_the_gpu = CHECKS.as_tests(__file__)


if __name__ == "__main__":
    CHECKS.main()
