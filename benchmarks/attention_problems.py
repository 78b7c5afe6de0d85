"""What the search for shapes of attention launches tries: candidates, and problems to time them on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rollout_kernels import attention_configs as configs

GROUP = 4
"""Query heads of a KV head, of which all candidates are tried."""
GROUPS = (1, 2, 4, 8)
"""Each is the upper limit of a class; the last one's holds for larger ones too."""
HEAD_DIMS = (64, 128)
"""Likewise; 256 is searched when asked for."""
EXACT_KEYS = {64: 64, 128: 64, 256: 32}
"""Keys of a tile in deterministic entries."""
DECODE_PROGRAMS = 400
SHARED_PROGRAMS = 1056
"""Programs that fill a large GPU."""
Config = Any
"""A `DecodeConfig`, `SharedConfig` or `PrefillConfig`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a candidate is timed on."""

    kind: str
    """`decode`, `shared`, `after` (the decode after a shared prefix) or `prefill`."""
    head_dim: int
    """D."""
    lengths: tuple[int, ...]
    """Keys of each sequence."""
    block_size: int = 16
    """S."""
    group: int = GROUP
    """G."""
    kv_heads: int = 8
    """K."""
    deterministic: bool = False
    """As of the kernels."""
    samples: int = 1
    """Sequences that share a prefix."""
    prefix: int = 0
    """Keys of it."""

    def small(self) -> Problem:
        """The same kernels on little data."""
        few = self.lengths[:8] if self.kind != "prefill" else (256,)
        return Problem(**{**asdict(self), "lengths": few})

    def work(self) -> float:
        """Bytes of a decode, operations of a prefill."""
        if self.kind == "prefill":
            return (
                sum(4 * n * (n + 1) / 2 for n in self.lengths)
                * self.group
                * self.kv_heads
                * self.head_dim
            )
        tokens = sum(self.lengths) - self.prefix * (
            len(self.lengths) - len(self.lengths) // self.samples
        )
        return tokens * self.kv_heads * self.head_dim * 4


def decode_candidates(keys: int | None, programs: int) -> Iterator[configs.DecodeConfig]:
    """Of all sizes of tiles, or of one."""
    for size, warps, stages in (
        (64, 2, 3), (64, 4, 3), (64, 2, 4), (128, 4, 3), (32, 2, 3), (32, 4, 3), (32, 4, 4), (32, 2, 2),
        (64, 4, 5), (64, 2, 7), (32, 2, 7),
    ):  # fmt: skip
        if keys in (None, size):
            yield configs.DecodeConfig(
                keys=size, warps=warps, stages=stages, programs=programs, split_keys=64
            )


def shared_candidates(keys: int | None, programs: int) -> Iterator[configs.SharedConfig]:
    """Of all sizes of tiles, or of one."""
    for rows, size, warps, stages in (
        (32, 64, 2, 3), (32, 64, 4, 3), (16, 64, 2, 3), (64, 64, 4, 3), (32, 32, 2, 3), (32, 32, 4, 3),
    ):  # fmt: skip
        if keys in (None, size):
            yield configs.SharedConfig(
                rows=rows, keys=size, warps=warps, stages=stages, programs=programs
            )


def prefill_candidates(keys: int | None, head_dim: int) -> Iterator[configs.PrefillConfig]:
    """Of all sizes of tiles, or of one."""
    shapes = [
        (64, 32, 4, 3, 0), (64, 64, 4, 3, 0), (64, 64, 4, 2, 0), (128, 32, 8, 3, 0), (128, 64, 8, 3, 0),
    ]  # fmt: skip
    if head_dim <= 128:
        shapes += [
            (64, 32, 4, 3, 128),
            (128, 128, 8, 3, 0),
            (128, 64, 4, 3, 0),
            (64, 64, 4, 3, 160),
        ]
    else:
        shapes += [(64, 32, 4, 2, 0), (128, 32, 8, 2, 0), (128, 64, 8, 2, 0)]
    for rows, size, warps, stages, registers in shapes:
        if keys in (None, size):
            yield configs.PrefillConfig(
                rows=rows, keys=size, warps=warps, stages=stages, registers=registers
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A problem, its candidates, and the limits of the entry that the best of them becomes."""

    name: str
    """In `attention_configs.json`."""
    problem: Problem
    """What they are timed on."""
    candidates: tuple[Config, ...]
    """Among which to choose."""
    limits: tuple[tuple[str, int], ...]
    """Of the entry."""


def searches(head_dims: Sequence[int], group: int, tiny: bool = False) -> list[Search]:
    """In the order of the entries."""
    rng = random.Random(0)
    many: tuple[int, ...] = tuple(rng.randint(530, 660) for _ in range(256))
    samples: tuple[int, ...] = tuple(
        512 + min(500, 1 + int(rng.expovariate(1 / 200))) for _ in range(512)
    )
    prompts: tuple[int, ...] = (2048,) * 8
    prefix, programs, shared_programs = 512, DECODE_PROGRAMS, SHARED_PROGRAMS
    if tiny:
        many, samples, prompts = (70, 20), (80, 90), (40, 20)
        prefix, programs, shared_programs = 64, 6, 2
    found: list[Search] = []
    for size in head_dims:
        exact = EXACT_KEYS[size]
        common: dict[str, Any] = {"head_dim": size, "group": group, "kv_heads": 1 if tiny else 8}

        def add(name: str, problem: Problem, candidates: Iterator[Config], **more: int) -> None:
            chosen = tuple(candidates)[: 2 if tiny else None]
            limits = (("dtype_bytes", 2), ("max_head_dim", problem.head_dim), *more.items())
            found.append(Search(name=name, problem=problem, candidates=chosen, limits=limits))

        for few in (True, False):
            more = {"max_programs": 256} if few else {}
            facts = {**common, "kind": "decode", "lengths": many[:8] if few else many}
            add("decode", Problem(**facts), decode_candidates(None, programs), **more)
            add(
                "decode_deterministic",
                Problem(**facts, deterministic=True),
                decode_candidates(exact, 0),
                **more,
            )
        rl = {**common, "lengths": samples, "samples": 2 if tiny else 8, "prefix": prefix}
        add("shared", Problem(**rl, kind="shared"), shared_candidates(None, shared_programs))
        add(
            "shared_deterministic",
            Problem(**rl, kind="shared", deterministic=True),
            shared_candidates(exact, shared_programs),
        )
        after = (each for each in decode_candidates(None, programs) if each.keys <= 64)
        add("decode_after_prefix", Problem(**rl, kind="after"), after)
        for whole in (True, False):
            more = {"whole_tiles": True} if whole else {}
            text = {**common, "kind": "prefill", "lengths": prompts}
            text["block_size"] = 64 if whole else 16
            for name, keys in (("prefill", None), ("prefill_deterministic", exact)):
                shapes = prefill_candidates(keys, size)
                if whole:
                    shapes = (each for each in shapes if text["block_size"] % each.keys == 0)
                add(name, Problem(**text, deterministic=keys is not None), shapes, **more)
    return found
