"""Batches of queries over a paged KV pool, for tests of attention kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch: the last `queries[n]` tokens of each sequence of `lengths[n]` are queries."""

    lengths: tuple[int, ...]
    queries: tuple[int, ...] = ()
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32


class Batch:
    """Random tensors of a case. What no kernel may read is NaN, and so is the output."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case = case
        random = torch.Generator().manual_seed(seed)
        counts = [-(-length // case.block_size) for length in case.lengths]
        shape = (case.block_size, 2, case.kv_heads, case.head_dim)
        self.pool = torch.full((sum(counts) + 3, *shape), math.nan, dtype=case.dtype)
        order = torch.randperm(sum(counts) + 3, generator=random).tolist()
        self.block_tables = torch.full(
            (len(counts), max(counts) + 1), len(order) + 1_000_000, dtype=torch.int32
        )
        for n, (count, length) in enumerate(zip(counts, case.lengths, strict=True)):
            blocks = [order.pop() for _ in range(count)]
            self.block_tables[n, :count] = torch.tensor(blocks, dtype=torch.int32)
            rows = torch.randn((count * case.block_size, *shape[1:]), generator=random)
            rows[length:] = math.nan
            if case.window is not None:
                rows[: max(0, length - max(self._queries(n), 1) - case.window + 1)] = math.nan
            self.pool[blocks] = rows.view(count, *shape).to(case.dtype)
        self.seq_lens = torch.tensor(case.lengths, dtype=torch.int32)
        starts = [0]
        for n in range(len(counts)):
            starts.append(starts[-1] + self._queries(n))
        self.query_starts = torch.tensor(starts, dtype=torch.int32)
        # A row of queries lies among others, as it does in a fused projection.
        fused = torch.randn((starts[-1], case.heads + 3, case.head_dim), generator=random)
        self.fused = fused.to(case.dtype)
        self.to(device)

    def _queries(self, n: int) -> int:
        return self.case.queries[n] if self.case.queries else 1

    def to(self, device: str) -> None:
        for name in ("pool", "block_tables", "seq_lens", "query_starts", "fused"):
            setattr(self, name, getattr(self, name).to(device))

    @property
    def q(self) -> torch.Tensor:
        return self.fused[:, : self.case.heads]

    @property
    def scale(self) -> float:
        return self.case.head_dim**-0.5

    def poisoned(self) -> torch.Tensor:
        return torch.full(self.q.shape, math.nan, dtype=self.case.dtype, device=self.q.device)

    def decode(self, **options: object) -> torch.Tensor:
        from rollout_kernels import paged_decode as kernels

        case = self.case
        workspace = kernels.DecodeWorkspace.allocate(
            max_batch=len(case.lengths),
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            device=self.q.device,
        )
        workspace.parts.fill_(math.nan)
        settings = {"scale": self.scale, "window": case.window, "workspace": workspace}
        settings |= {"max_len": max(case.lengths, default=1), **options}
        out = kernels.paged_decode(
            self.q, self.pool, self.block_tables, self.seq_lens, self.poisoned(), **settings
        )
        assert not workspace.arrivals.any(), "a launch leaves the counters as it found them"
        return out

    def share(self, groups: dict[tuple[int, ...], int]) -> None:
        """Rows that begin with the same blocks, as many as it says."""
        for rows, num_blocks in groups.items():
            for row in rows[1:]:
                self.block_tables[row, :num_blocks] = self.block_tables[rows[0], :num_blocks]

    def shared_decode(self, **options: object) -> torch.Tensor:
        from rollout_kernels import paged_decode as decode
        from rollout_kernels import shared_prefix_decode as kernels
        from rollout_kernels import shared_prefixes as host

        case, device = self.case, self.q.device
        max_batch = len(case.lengths) + 3
        sizes = {"num_heads": case.heads, "num_kv_heads": case.kv_heads, "head_dim": case.head_dim}
        sizes |= {"max_batch": max_batch, "device": device}
        groups = host.find_shared_prefixes(
            [
                table[: max(0, length - 1) // case.block_size]
                for table, length in zip(self.block_tables.tolist(), case.lengths, strict=True)
            ],
            block_size=case.block_size,
        )
        members = kernels.members_per_tile(
            device,
            head_dim=case.head_dim,
            group=case.heads // case.kv_heads,
            dtype=case.dtype,
            deterministic=bool(options.get("deterministic")),
        )
        numbers = host.packed(
            groups, max_batch=max_batch, block_size=case.block_size, members_per_tile=members
        )
        assert len(numbers) == host.num_numbers(max_batch)
        buffer = torch.tensor(numbers, dtype=torch.int32, device=device)
        state = kernels.SharedState.allocate(**sizes)
        state.parts.fill_(math.nan)
        return kernels.shared_prefix_decode(
            self.q,
            self.pool,
            self.block_tables,
            self.seq_lens,
            self.poisoned(),
            scale=self.scale,
            shared=host.SharedPrefixes.views(buffer, max_batch),
            workspace=decode.DecodeWorkspace.allocate(**sizes),
            state=state,
            max_len=max(case.lengths, default=1),
            **options,
        )

    def prefill(self, **options: object) -> torch.Tensor:
        from rollout_kernels import paged_prefill as kernels

        settings = {"scale": self.scale, "window": self.case.window}
        settings |= {"max_query_len": max(self.case.queries or (1,)), **options}
        return kernels.paged_prefill(
            self.q,
            self.pool,
            self.block_tables,
            self.query_starts,
            self.seq_lens,
            self.poisoned(),
            **settings,
        )

    def expected(self) -> torch.Tensor:
        from rollout_kernels import paged_prefill as kernels

        return kernels.reference(
            self.q,
            self.pool,
            self.block_tables,
            self.query_starts,
            self.seq_lens,
            scale=self.scale,
            window=self.case.window,
        )
