"""Memory that comes and goes behind addresses that stay; without a GPU, pages of the process stand in."""

from __future__ import annotations

import mmap

import pytest
import torch
from mapped_pages import Pages

from weight_sync.devices.driver import DeviceOutOfMemory
from weight_sync.devices.mapped_memory import MappedMemory, mapped_tensor

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
