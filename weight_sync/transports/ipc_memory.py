"""Memory that one process allocates and others of the machine open, by a handle of 64 bytes.

`CudaIpcMemory` is the only class of this transport that knows CUDA; everything else about it also runs over memory of
another kind behind the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from ..devices.driver import driver_of
from ..devices.raw_memory import tensor_at
from ..errors import TransportError

_BLOCK_BYTES = 2 << 20
"""The driver puts smaller allocations together into blocks, which are then exported with whatever else is in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Bytes that this process can reach."""

    address: int
    """First of them, in this process."""
    tensor: torch.Tensor
    """All of them, uint8; of no use after `free` or `close`."""


class IpcMemory(Protocol):
    """The memory of one device, as one process of the machine sees it."""

    @property
    def device_id(self) -> str:
        """Which device it is, 32 hexadecimal digits that are the same in every process."""

    def allocate(self, num_bytes: int) -> Allocation:
        """New memory; `TransportError` where there is none left."""

    def export(self, allocation: Allocation) -> tuple[bytes, int]:
        """The handle under which others open it, and the byte of what they open at which it starts."""

    def free(self, allocation: Allocation) -> None:
        """Give back what `allocate` gave, once nobody reads it any more."""

    def open(self, handle: bytes) -> Allocation:
        """What another living process has exported; at most once until it is closed. `TransportError` if it cannot."""

    def close(self, allocation: Allocation) -> None:
        """Undo `open`."""


class CudaIpcMemory:
    """Plain memory of a GPU: that of torch may be mapped by hand (expandable segments), which has no such handle."""

    def __init__(self, device: torch.device) -> None:
        self._driver = driver_of(device)
        self._device = torch.device("cuda", self._driver.index)

    @property
    def device_id(self) -> str:
        return self._driver.uuid

    def allocate(self, num_bytes: int) -> Allocation:
        num_bytes = -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        address = self._driver.allocate(num_bytes)
        with _or_undone(self._driver.free, address):
            return self._allocation(address, num_bytes)

    def export(self, allocation: Allocation) -> tuple[bytes, int]:
        base, _ = self._driver.extent(allocation.address)
        return self._driver.export(allocation.address), allocation.address - base

    def free(self, allocation: Allocation) -> None:
        torch.cuda.synchronize(self._device)
        self._driver.free(allocation.address)

    def open(self, handle: bytes) -> Allocation:
        address = self._driver.open(handle)
        with _or_undone(self._driver.close, address):
            return self._allocation(address, self._driver.extent(address)[1])

    def close(self, allocation: Allocation) -> None:
        torch.cuda.synchronize(self._device)
        self._driver.close(allocation.address)

    def _allocation(self, address: int, num_bytes: int) -> Allocation:
        return Allocation(address=address, tensor=tensor_at(address, num_bytes, self._device))


@contextmanager
def _or_undone(undo: Callable[[int], None], address: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        undo(address)
        raise


def ipc_memory_of(device: torch.device) -> IpcMemory:
    """The memory of `device`; `TransportError` where other processes cannot open it."""
    if device.type != "cuda":
        raise TransportError(
            f"cannot share memory of {device} between processes by a handle: expected a CUDA device; use "
            "transport='shared_memory'"
        )
    return CudaIpcMemory(device)
