"""Pages of the process in the place of a GPU's memory that comes and goes behind addresses that stay."""

from __future__ import annotations

import ctypes
import mmap

from weight_sync.devices.driver import DeviceOutOfMemory


class Pages:
    """`MapsMemory` over anonymous pages: unmapping forgets what was in them."""

    granularity = mmap.PAGESIZE

    def __init__(self) -> None:
        self.maps: dict[int, mmap.mmap] = {}
        self.mapped: set[int] = set()
        self.full = False
        self.reserved = 0
        self.swaps = 0

    def reserve(self, num_bytes: int) -> int:
        pages = mmap.mmap(-1, num_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self.maps[address] = pages
        self.reserved += 1
        return address

    def unreserve(self, address: int, num_bytes: int) -> None:
        self.maps.pop(address)
        self.reserved -= 1

    def map(self, address: int, num_bytes: int) -> None:
        if self.full:
            raise DeviceOutOfMemory("none left")
        assert address not in self.mapped and len(self.maps[address]) == num_bytes
        self.mapped.add(address)

    def unmap(self, address: int, num_bytes: int) -> None:
        self.mapped.remove(address)
        self.maps[address].madvise(mmap.MADV_DONTNEED)

    def swap(self, one: int, other: int, num_bytes: int) -> None:
        assert {one, other} <= self.mapped and one != other
        assert len(self.maps[one]) == len(self.maps[other]) == num_bytes
        self.swaps += 1
        kept = self.maps[one][:]
        self.maps[one][:] = self.maps[other][:]
        self.maps[other][:] = kept
