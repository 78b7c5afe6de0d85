"""Memory of a GPU that comes and goes while its addresses stay, so that graphs captured over it stay valid."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakValueDictionary

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

    def swap(self, one: int, other: int, num_bytes: int) -> None: ...


_BY_ADDRESS: WeakValueDictionary[int, MappedMemory] = WeakValueDictionary()


class MappedMemory:
    """Addresses for `num_bytes`, with memory behind them except between `release` and `resume`.

    Other processes cannot open it by a handle. Reading or writing it while it is released is an error of the GPU that
    ends the process's work there.
    """

    def __init__(
        self, num_bytes: int, device: torch.device, driver: MapsMemory | None = None
    ) -> None:
        """`TransportError` where the driver cannot map memory, `DeviceOutOfMemory` where there is none left."""
        self._device = device
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
        _BY_ADDRESS[self._address] = self

    @staticmethod
    def behind(tensor: torch.Tensor) -> MappedMemory | None:
        """What the storage of `tensor` is the memory of, or None: torch's own."""
        return _BY_ADDRESS.get(tensor.untyped_storage().data_ptr())

    def another(self) -> MappedMemory:
        """As much memory again, at other addresses, that this can be exchanged with; `DeviceOutOfMemory`."""
        return MappedMemory(self.tensor.numel(), self._device, self._driver)

    def swap(self, other: MappedMemory) -> None:
        """What was behind one of them is behind the other, in the time of a few calls of the driver.

        Nothing may be using either. `other` is of `another`. An error changes nothing.
        """
        if not (self._mapped and other._mapped):
            raise TransportError("memory that is released cannot be exchanged: resume it first")
        self._driver.swap(self._address, other._address, self.num_bytes)

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
            _BY_ADDRESS.pop(address, None)
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
