"""The driver's calls of an exchange: wherever they fail, everything is where it was."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from weight_sync.devices.driver import CudaDriver
from weight_sync.errors import TransportError


class Mappings:
    """As much of the driver as an exchange needs: which memory is behind which address. Call number `fails` does, and
    every call that would unmap `stuck`."""

    def __init__(self, fails: int, stuck: int = 0) -> None:
        self.stuck = stuck
        self.behind: dict[int, int | None] = {1 << 21: 7, 1 << 22: 8}
        self.accessible = {1 << 21, 1 << 22}
        self.references = 0
        self.fails, self.calls = fails, 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if not name.startswith("cuMem"):
                return 0
            if name == "cuMemUnmap" and arguments[0].value == self.stuck:
                return 1
            if name != "cuMemRelease":  # which cannot fail
                self.calls += 1
                if self.calls == self.fails:
                    return 1
            getattr(self, f"_{name}")(*arguments)
            return 0

        return call

    def _cuMemRetainAllocationHandle(self, handle: Any, address: ctypes.c_void_p) -> None:
        handle._obj.value = self.behind[address.value or 0]
        self.references += 1

    def _cuMemRelease(self, handle: ctypes.c_ulonglong) -> None:
        self.references -= 1

    def _cuMemUnmap(self, address: ctypes.c_uint64, size: object) -> None:
        assert self.behind[address.value] is not None
        self.behind[address.value] = None
        self.accessible.discard(address.value)

    def _cuMemMap(
        self, address: ctypes.c_uint64, size: Any, at: Any, handle: Any, flags: Any
    ) -> None:
        assert self.behind[address.value] is None
        self.behind[address.value] = handle.value

    def _cuMemSetAccess(self, address: ctypes.c_uint64, *_: object) -> None:
        assert self.behind[address.value] is not None
        self.accessible.add(address.value)


@pytest.mark.parametrize("fails", range(10))
def test_a_driver_that_fails_on_the_way_puts_everything_back(fails: int) -> None:
    """Call 0: none does; there are eight."""
    library = Mappings(fails)
    driver = object.__new__(CudaDriver)
    driver.index, driver._lib = 0, library  # type: ignore[assignment]
    driver._device, driver._context = ctypes.c_int(), ctypes.c_void_p()
    one, other = library.behind
    if 1 <= fails <= 8:
        with pytest.raises(TransportError, match="failed on GPU 0"):
            driver.swap(one, other, 1 << 21)
        assert library.behind == {one: 7, other: 8}
    else:
        driver.swap(one, other, 1 << 21)
        assert library.behind == {one: 8, other: 7}
    assert library.accessible == {one, other} and library.references == 0


@pytest.mark.parametrize("stuck", [1 << 21, 1 << 22])
def test_what_cannot_be_unmapped_stays_with_what_it_was_to_be_exchanged_with(stuck: int) -> None:
    library = Mappings(0, stuck)
    driver = object.__new__(CudaDriver)
    driver.index, driver._lib = 0, library  # type: ignore[assignment]
    driver._device, driver._context = ctypes.c_int(), ctypes.c_void_p()
    with pytest.raises(TransportError, match="cuMemUnmap failed on GPU 0"):
        driver.swap(*library.behind, 1 << 21)
    assert library.behind == {1 << 21: 7, 1 << 22: 8}
    assert library.accessible == set(library.behind) and library.references == 0
