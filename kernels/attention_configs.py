"""How attention kernels are shaped on each device: tiles, warps, stages, splits; measured once, and stored.

`attention_configs.json` beside this file maps a device's name to lists of entries, one list for a kind of launch; the
first entry that fits a call is used. A device with a name instead of lists takes that one's; one that is not there, or
whose entries do not fit, takes those under "default". Nothing is searched at start; `rollout bench gpu
attention-kernels --write` searches and writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from .launching import device_name

FILE = Path(__file__).with_name("attention_configs.json")
"""The stored entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """The shape of a decode launch."""

    keys: int
    """Keys of a tile; a power of two, at least 16."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles in flight: loads run ahead of the arithmetic by one less."""
    programs: int = 0
    """Programs that fill the device: sequences are split as long as there are no more."""
    split_keys: int = 256
    """Least keys of a split, as far as `max_len` tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedConfig:
    """The shape of a launch over shared prefixes."""

    rows: int
    """Rows of a tile, G for each of its sequences; a power of two, at least 16."""
    keys: int
    """Keys of a tile; a power of two from 16 to 64."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles in flight."""
    programs: int = 0
    """Programs that fill the device: prefixes are split as long as there are no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """The shape of a prefill launch."""

    rows: int
    """Rows of a tile, G for each of its tokens; a power of two, at least 16."""
    keys: int
    """Keys of a tile; a power of two, at least 16."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles in flight."""
    registers: int = 0
    """Most registers of a thread, so that more programs fit on a multiprocessor; 0: the compiler's choice."""


Config = TypeVar("Config", DecodeConfig, SharedConfig, PrefillConfig)


def decode_config(
    device: torch.device,
    *,
    head_dim: int,
    group: int,
    programs: int,
    dtype: torch.dtype,
    deterministic: bool = False,
    after_prefix: bool = False,
) -> DecodeConfig:
    """For `programs` pairs of a sequence and a KV head; deterministic: the same whatever their number.

    after_prefix: a shared prefix is done, so few keys are left at first, and small programs are started faster.
    """
    facts = {"head_dim": head_dim, "group": group, "programs": programs}
    if after_prefix and not deterministic:
        found = _find(DecodeConfig, "decode_after_prefix", device, dtype, facts)
        if found is not None:
            return found
    kind = "decode_deterministic" if deterministic else "decode"
    return _choose(DecodeConfig, kind, device, dtype, facts)


def shared_config(
    device: torch.device,
    *,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> SharedConfig:
    """For prefixes of any number of sequences; deterministic: with the keys of `decode_config`'s."""
    kind = "shared_deterministic" if deterministic else "shared"
    return _choose(SharedConfig, kind, device, dtype, {"head_dim": head_dim, "group": group})


def prefill_config(
    device: torch.device,
    *,
    head_dim: int,
    group: int,
    rows: int,
    block_size: int,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> PrefillConfig:
    """For sequences of at most `rows` rows (query tokens x G); deterministic: the same whatever their number."""
    kind = "prefill_deterministic" if deterministic else "prefill"
    facts = {"head_dim": head_dim, "group": group, "rows": rows}
    return _choose(PrefillConfig, kind, device, dtype, facts, block_size)


def _choose(
    config: type[Config],
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    facts: Mapping[str, int],
    block_size: int = 1,
) -> Config:
    found = _find(config, kind, device, dtype, facts, block_size)
    if found is None:
        raise LookupError(
            f"cannot shape an attention kernel: got {kind} with {dict(facts)} in {dtype}, expected an entry "
            f"that holds it in {FILE.name}; add one without limits"
        )
    return found


def _find(
    config: type[Config],
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    facts: Mapping[str, int],
    block_size: int = 1,
) -> Config | None:
    """The first entry whose limits (`max_head_dim` and so on) hold all `facts`; with `whole_tiles`, its keys divide the
    block size too."""
    for entry in _entries(device_name(device), kind):
        fits = entry.get("dtype_bytes", 2) >= dtype.itemsize
        if entry.get("whole_tiles", False) and block_size % entry["keys"]:
            fits = False
        if fits and all(facts[fact] <= entry.get(f"max_{fact}", facts[fact]) for fact in facts):
            names = {field.name for field in fields(config)}
            return config(**{name: value for name, value in entry.items() if name in names})
    return None


@lru_cache(maxsize=64)
def _entries(name: str, kind: str) -> Sequence[Mapping[str, Any]]:
    stored = json.loads(FILE.read_text())
    own = stored.get(name, {})
    if isinstance(own, str):
        own = stored[own]
    return [*own.get(kind, []), *stored["default"].get(kind, [])]
