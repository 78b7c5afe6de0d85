"""Memory that comes and goes behind addresses that stay; without a GPU, pages of the process stand in."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import pytest
import torch
from mapped_pages import Pages

from weight_sync.devices.driver import CudaDriver, DeviceOutOfMemory
from weight_sync.devices.mapped_memory import MappedMemory, mapped_tensor
from weight_sync.errors import TransportError
from weight_sync.transports import ipc_memory

CPU = torch.device("cpu")


def test_the_address_stays_and_the_content_goes() -> None:
    pages = Pages()
    memory = MappedMemory(5000, CPU, pages)
    assert memory.num_bytes == 2 * mmap.PAGESIZE and memory.tensor.numel() == 5000
    address = memory.tensor.data_ptr()
    memory.tensor.fill_(7)
    memory.release()
    memory.release()
    assert pages.mapped == set()
    memory.resume()
    memory.resume()
    assert pages.mapped == {address} and memory.tensor.data_ptr() == address
    memory.tensor.fill_(3)
    assert int(memory.tensor.sum()) == 15_000


def test_where_there_is_none_left_nothing_changes() -> None:
    pages = Pages()
    memory = MappedMemory(100, CPU, pages)
    memory.release()
    pages.full = True
    with pytest.raises(DeviceOutOfMemory):
        memory.resume()
    with pytest.raises(DeviceOutOfMemory):
        MappedMemory(100, CPU, pages)
    assert pages.reserved == 1
    pages.full = False
    memory.resume()
    assert len(pages.mapped) == 1


def test_addresses_are_given_back_once() -> None:
    pages = Pages()
    for released in (False, True):
        memory = MappedMemory(100, CPU, pages)
        if released:
            memory.release()
        memory.free()
        memory.free()
        assert pages.reserved == 0 and pages.mapped == set()


def test_on_a_cpu_it_is_torchs_own_memory() -> None:
    tensor, memory = mapped_tensor(1000, CPU)
    assert memory is None and tensor.tolist() == [0] * 1000


class Library:
    """The driver's, as far as it says how each call went: error 0, or the one of `fails`."""

    def __init__(self, **fails: int) -> None:
        self.fails = fails
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*_: object) -> int:
            self.calls.append(name)
            return self.fails.get(name, 0)

        return call

    def times(self, name: str) -> int:
        return self.calls.count(name)


def driver_over(library: Library) -> CudaDriver:
    driver = object.__new__(CudaDriver)
    driver.index, driver._lib = 0, library  # type: ignore[assignment]
    driver._device, driver._context = ctypes.c_int(), ctypes.c_void_p()
    return driver


@pytest.mark.parametrize("name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_memory_that_cannot_be_reached_is_not_left_behind_addresses(name: str) -> None:
    """Else they could neither be mapped again nor be given back."""
    library = Library(**{name: 2})
    with pytest.raises(DeviceOutOfMemory):
        driver_over(library).map(1 << 21, 1 << 21)
    created = int(name != "cuMemCreate")
    assert library.times("cuMemRelease") == created
    assert library.times("cuMemUnmap") == int(name == "cuMemSetAccess")
    assert library.times("cuCtxPushCurrent_v2") == library.times("cuCtxPopCurrent_v2")


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("cuMemGetAddressRange_v2", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle"),
        ("tensor_at", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle"),
        ("tensor_at", "cuMemAlloc_v2", "cuMemFree_v2"),
    ],
)
def test_memory_that_cannot_be_looked_at_is_given_back(
    monkeypatch: pytest.MonkeyPatch, name: str, begin: str, end: str
) -> None:
    library = Library(**{name: 1})
    memory = object.__new__(ipc_memory.CudaIpcMemory)
    memory._driver, memory._device = driver_over(library), CPU

    def refuse(*_: object) -> None:
        raise RuntimeError("no tensor")

    monkeypatch.setattr(ipc_memory, "tensor_at", refuse)
    with pytest.raises((TransportError, RuntimeError)):
        if begin == "cuMemAlloc_v2":
            memory.allocate(100)
        else:
            memory.open(bytes(64))
    assert library.times(begin) == library.times(end) == 1
