"""Memory of the host that a GPU copies to and from by itself, at its link's rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import TransportError
from .driver import CudaDriver, driver_of


@dataclass(slots=True)
class Registration:
    """Pages that are registered with CUDA, until `end`; they must stay mapped until then."""

    _driver: CudaDriver
    _address: int | None

    @classmethod
    def of(cls, memory: torch.Tensor, device: torch.device) -> Registration | None:
        """Register `memory` (uint8, of the CPU); None where it cannot be: copies work all the same, slower."""
        if device.type != "cuda" or not memory.numel():
            return None
        try:
            driver = driver_of(device)
            driver.register_host(memory.data_ptr(), memory.numel())
        except TransportError:
            return None
        return cls(driver, memory.data_ptr())

    def end(self) -> None:
        """Give the registration back. Safe to repeat."""
        address, self._address = self._address, None
        if address is not None:
            self._driver.unregister_host(address)
