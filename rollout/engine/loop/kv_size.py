"""How large the KV pool of a GPU may be: what is left once weights and libraries are there and a step has been seen.

    pool = free - transient - margin    free: with the weights, without a pool; transient: the peak of the largest step

or less: what `mem_fraction_static` leaves, or what all requests at full length can use. Every rank measures, and the
least number of blocks counts. On a CPU nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ...config import EngineConfig
from ...errors import ConfigError

_MARGIN = 0.03
"""Share of the free memory that stays free: for graphs, and for steps that leave other holes than the measured one."""
_LEAST_MARGIN_BYTES = 512 << 20


class DeviceMemory(Protocol):
    """What can be read about the memory of one device."""

    def free_bytes(self) -> int:
        """Free on the device now; what the allocator keeps for nobody is given back first."""

    def forget_peak(self) -> None:
        """From now on the peak is that of what follows."""

    def taken_bytes(self) -> int:
        """Most that was taken from the device since `forget_peak`, beyond what was taken then."""


class CudaMemory:
    """Of a GPU, as torch's allocator and the driver tell."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._before = 0

    def free_bytes(self) -> int:
        """Waits for the device."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def forget_peak(self) -> None:
        """What the allocator keeps for nobody is given back first."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_reserved(self._device)

    def taken_bytes(self) -> int:
        """By torch's allocator."""
        return torch.cuda.max_memory_reserved(self._device) - self._before


def device_memory(device: str) -> DeviceMemory | None:
    """How to read the memory of `device`; None: a CPU, whose pool is not measured."""
    return CudaMemory(device) if device.startswith("cuda") else None


def measured(memory: DeviceMemory, step: Callable[[], None]) -> int:
    """Bytes that `step` takes at its peak and does not keep for its result."""
    memory.forget_peak()
    step()
    return memory.taken_bytes()


def blocks_that_fit(
    config: EngineConfig,
    *,
    device: str,
    before: int,
    free: int,
    transient: int,
    block_bytes: int,
    longest: int,
) -> int:
    """Blocks of this rank's pool; `ConfigError` where fewer than two fit, or fewer than were asked for.

    before: bytes free before anything was loaded. free: with everything but a pool. longest: blocks of the longest
    request.
    """
    left = free - transient
    used = f"{before - free:,} of {before:,} free bytes are taken, and a step takes {transient:,}"
    advice = "chunked_prefill_size or max_running_requests, or raise tp_size"
    wanted = config.kv_cache_bytes
    if wanted is not None:
        if wanted > left:
            raise ConfigError(
                f"kv_cache_bytes: got {wanted:,}, expected at most {max(left, 0):,} on {device} ({used}); lower it, "
                f"{advice}"
            )
        return wanted // block_bytes
    budget = left - max(int(_MARGIN * before), _LEAST_MARGIN_BYTES)
    if config.mem_fraction_static is not None:
        budget = min(budget, int(config.mem_fraction_static * before) - (before - free))
    budget = min(budget, config.max_running_requests * longest * block_bytes)
    num = budget // block_bytes
    if num < 2:
        raise ConfigError(
            f"KV pool: got room for {max(budget, 0):,} bytes on {device} ({used}), expected at least two blocks of "
            f"{block_bytes:,}; raise mem_fraction_static, lower {advice}"
        )
    return num


@contextmanager
def in_memory(what: str, device: str, advice: str) -> Iterator[None]:
    """Make running out of memory inside a `ConfigError` of one line that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 0
        raise ConfigError(
            f"{device} has too little memory for {what}: got {free:,} bytes free when it ran out, expected room for "
            f"all of it; {advice}"
        ) from error
