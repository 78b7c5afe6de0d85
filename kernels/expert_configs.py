"""How the kernels of experts are shaped on each device: tiles, warps, stages; measured once, and stored.

`expert_configs.json` beside this file maps a device's name to entries in order; the first whose `max_rows_per_expert`
is at least the rows of a call over its experts is used, the last one has none. A device that is not there takes
"default". Nothing is searched at start; the benchmark `expert_kernels` searches and writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .launching import device_name

FILE = Path(__file__).with_name("expert_configs.json")
"""The stored entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """The shape of one product's launch."""

    columns: int
    """Outputs of a tile; a power of two, at least 16."""
    depth: int
    """Inputs at once; a power of two, at least 16."""
    warps: int
    """Warps of a program."""
    stages: int
    """Loads under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """The shapes of both products, which share their tiles of rows."""

    rows: int
    """Of one expert in a tile; a power of two, at least 16."""
    gate_up: TileConfig
    """Of the first product; its columns are of the gate, and as many of the up part come with them."""
    down: TileConfig
    """Of the second product."""


EXACT = ExpertConfig(
    rows=64,
    gate_up=TileConfig(columns=64, depth=64, warps=4, stages=3),
    down=TileConfig(columns=64, depth=64, warps=4, stages=4),
)
"""For rows that have the same bits in any batch: one shape for all."""


def expert_config(
    device: torch.device, *, num_rows: int, num_experts: int, dtype: torch.dtype
) -> ExpertConfig:
    """From numbers that the host knows."""
    config = next(
        config for limit, config in _entries(device_name(device)) if num_rows <= limit * num_experts
    )
    if dtype.itemsize <= 2:
        return config
    gate_up, down = (
        replace(tile, depth=max(16, tile.depth // 2)) for tile in (config.gate_up, config.down)
    )
    return replace(config, gate_up=gate_up, down=down)  # as many bytes of a tile


@lru_cache(maxsize=16)
def _entries(name: str) -> Sequence[tuple[float, ExpertConfig]]:
    stored = json.loads(FILE.read_text())
    entries = stored.get(name, stored["default"])
    if isinstance(entries, str):  # another device's
        entries = stored[entries]
    return [(entry.get("max_rows_per_expert", float("inf")), config_of(entry)) for entry in entries]


def config_of(entry: Mapping[str, Any]) -> ExpertConfig:
    """An entry of the file without its limit."""
    return ExpertConfig(
        rows=entry["rows"],
        gate_up=TileConfig(**entry["gate_up"]),
        down=TileConfig(**entry["down"]),
    )
