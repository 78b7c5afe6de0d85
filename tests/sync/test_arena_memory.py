"""Making an arena's memory resident does not stop the other threads of a process."""

from __future__ import annotations

import mmap
from typing import Any

import pytest

from weight_sync.transports import arena


class Recorder:
    """A memory map that writes down what it is advised."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.calls: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return self.num_bytes

    def madvise(self, *arguments: int) -> None:
        self.calls.append(arguments)


@pytest.mark.parametrize("writable", [True, False])
def test_memory_is_populated_piece_by_piece_and_to_its_end(writable: bool) -> None:
    memory: Any = Recorder(21 * (1 << 20) + 5)
    arena._prepare(memory, writable)
    assert memory.calls[0] == (mmap.MADV_HUGEPAGE,)
    end = 0
    for _, start, length in memory.calls[1:]:
        assert start == end and start % mmap.PAGESIZE == 0 and 0 < length <= 8 << 20
        end = start + length
    assert end == len(memory)


def test_every_page_of_a_mapping_is_there() -> None:
    mapping = arena.Mapping(-1, 20 << 20, writable=True)
    address = mapping.tensor.data_ptr()
    resident = None
    with open("/proc/self/smaps") as lines:
        inside = False
        for line in lines:
            if "-" in line.split()[0] and ":" not in line.split()[0]:
                first, last = (int(part, 16) for part in line.split()[0].split("-"))
                inside = first <= address < last
            elif inside and line.startswith("Rss:"):
                resident = int(line.split()[1]) * 1024
                break
    assert resident is not None and resident >= 20 << 20
