"""Memory of a GPU that comes and goes while its addresses stay, so that graphs captured over it stay valid."""

from __future__ import annotations

from typing import Protocol

import torch

from ..errors import TransportError
from .driver import DeviceOutOfMemory, driver_of
from .raw_memory import tensor_at


class MapsMemory(Protocol):
    """What this needs of a GPU; `CudaDriver` has it."""

    @property
    def granularity(self) -> int: ...

    def reserve(self, num_bytes: int) -> int: ...

    def unreserve(self, address: int, num_bytes: int) -> None: ...

    def map(self, address: int, num_bytes: int) -> None: ...

    def unmap(self, address: int, num_bytes: int) -> None: ...


class MappedMemory:
    """Addresses for `num_bytes`, with memory behind them except between `release` and `resume`.

    Other processes cannot open it by a handle. Reading or writing it while it is released is an error of the GPU that
    ends the process's work there.
    """

    def __init__(
        self, num_bytes: int, device: torch.device, driver: MapsMemory | None = None
    ) -> None:
        """`TransportError` where the driver cannot map memory, `DeviceOutOfMemory` where there is none left."""
        self._driver = driver_of(device) if driver is None else driver
        unit = self._driver.granularity
        self.num_bytes = -(-max(1, num_bytes) // unit) * unit
        """Bytes that it takes, whole units of the driver's."""
        self._address = self._driver.reserve(self.num_bytes)
        self._mapped = False
        try:
            self.resume()
        except BaseException:
            self._driver.unreserve(self._address, self.num_bytes)
            raise
        self.tensor = tensor_at(self._address, num_bytes, device)
        """The first `num_bytes` bytes, uint8; at the same address for ever."""

    def release(self) -> None:
        """Give the memory back to the device; nothing may be using it. Safe to repeat."""
        if self._mapped:
            self._driver.unmap(self._address, self.num_bytes)
            self._mapped = False

    def free(self) -> None:
        """Give back the addresses too; `tensor` must not be used any more. Safe to repeat."""
        self.release()
        address, self._address = self._address, 0
        if address:
            self._driver.unreserve(address, self.num_bytes)

    def resume(self) -> None:
        """Put memory behind the addresses again; it holds anything. `DeviceOutOfMemory` changes nothing."""
        if not self._mapped:
            self._driver.map(self._address, self.num_bytes)
            self._mapped = True


def mapped_tensor(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, MappedMemory | None]:
    """Zeros (uint8) on `device`, and the memory behind them where it can come and go; else torch's own and None."""
    if device.type != "cuda":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device), None
    try:
        memory = MappedMemory(num_bytes, device)
    except DeviceOutOfMemory as error:
        raise torch.OutOfMemoryError(str(error)) from error
    except TransportError:  # a driver without it
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device), None
    memory.tensor.zero_()
    return memory.tensor, memory
