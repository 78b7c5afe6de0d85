"""What `torch.nn.attention.varlen.varlen_attn` promises of paged inference, in float64, for machines without a GPU.

It refuses what FlashAttention 2 refuses, but for the dtype and the device, and returns NaN for what nobody defined.
"""

from __future__ import annotations

import torch


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """(T, H, D) of query (T, H, D) over pages (pages, S, K, D); causal from the end of each sequence."""
    assert block_table is not None and seqused_k is not None and scale is not None
    num = cu_seq_q.numel() - 1
    num_heads, num_kv_heads = query.shape[1], key.shape[2]
    page = key.shape[1]
    if cu_seq_k is not None:  # FlashAttention 2; others want None, and take any page
        assert page % 256 == 0
        assert cu_seq_k.dtype == torch.int32 and cu_seq_k.is_contiguous()
        assert cu_seq_k.shape == (num + 1,) and bool((cu_seq_k.diff() >= seqused_k).all())
    for lengths in (cu_seq_q, seqused_k):
        assert lengths.dtype == torch.int32 and lengths.is_contiguous()
    assert seqused_k.shape == (num,)
    assert block_table.dtype == torch.int32 and block_table.stride(1) == 1
    assert block_table.shape[0] == num
    assert key.shape == value.shape and key.shape[3] == query.shape[2]
    assert query.stride(2) == key.stride(3) == value.stride(3) == 1
    assert enable_gqa or num_heads == num_kv_heads
    assert window_size[1] in (-1, 0)
    out = torch.full(query.shape, float("nan"), dtype=query.dtype, device=query.device)
    for n in range(num):
        first, last = cu_seq_q[n : n + 2].tolist()
        length = int(seqused_k[n])
        assert last - first <= max_q and length <= max_k
        pages = block_table[n, : -(-length // page)].long()
        keys, values = (
            pool[pages]
            .flatten(0, 1)[:length]
            .double()
            .repeat_interleave(num_heads // num_kv_heads, 1)
            for pool in (key, value)
        )
        at = torch.arange(length - (last - first), length)[:, None]
        seen = torch.arange(length)[None]
        hidden = torch.zeros(last - first, length, dtype=torch.bool)
        if window_size[1] == 0:
            hidden |= seen > at
        if window_size[0] >= 0:
            hidden |= seen < at - window_size[0]
        scores = torch.einsum("qhd,khd->hqk", query[first:last].double(), keys) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        if length:
            out[first:last] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
        else:
            out[first:last] = 0
    return out
