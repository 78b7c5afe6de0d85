"""The CUDA driver, called directly: memory that other processes can open, memory that keeps its addresses.

The library comes with every GPU and its calls keep their signatures, whatever CUDA release torch was built for; so it
is loaded by name and called through `ctypes`, and nothing has to be installed for it. Every call is checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from ..errors import TransportError

HANDLE_BYTES = 64
"""Length of a handle under which another process opens an allocation."""

_LAZY_PEER_ACCESS = 1
_OUT_OF_MEMORY = 2
_PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 3
_RECOMMENDED = 1


class DeviceOutOfMemory(TransportError):
    """The GPU has no room for an allocation."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _AllocationProperties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    )


class _AccessDescription(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class CudaDriver:
    """One GPU of this process, by torch's number for it. Safe to use from any thread."""

    def __init__(self, index: int) -> None:
        """`TransportError` where there is no driver or no such GPU."""
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransportError(
                f"no CUDA driver: {error}; expected libcuda.so.1, which comes with the GPU's driver"
            ) from error
        # As any other use of the GPU by torch does: the context that is retained here is torch's own.
        torch.cuda.init()
        self.index = index
        self._call("cuInit", ctypes.c_uint(0))
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(index))
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    @property
    def uuid(self) -> str:
        """Which GPU it is, 32 hexadecimal digits: the same in every process, whatever number it has there."""
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", ctypes.byref(raw), self._device)
        return bytes(raw).hex()

    # ---- plain memory, and other processes' ------------------------------------------------------------------------

    def allocate(self, num_bytes: int) -> int:
        """The address of memory that other processes can open."""
        address = ctypes.c_uint64()
        with self._current():
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value

    def free(self, address: int) -> None:
        """Give it back."""
        with self._current():
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def extent(self, address: int) -> tuple[int, int]:
        """First address and bytes of the allocation that `address` lies in."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with self._current():
            self._call(
                "cuMemGetAddressRange_v2",
                ctypes.byref(base),
                ctypes.byref(size),
                ctypes.c_uint64(address),
            )
        return base.value, size.value

    def export(self, address: int) -> bytes:
        """The handle of the allocation that `address` lies in."""
        handle = _IpcHandle()
        with self._current():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """The address here of another process's allocation, on this GPU or on one whose memory this one can read."""
        address = ctypes.c_uint64()
        with self._current():
            self._call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                _IpcHandle.from_buffer_copy(handle),
                ctypes.c_uint(_LAZY_PEER_ACCESS),
            )
        return address.value

    def close(self, address: int) -> None:
        """Undo `open`."""
        with self._current():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def read(self, address: int, num_bytes: int) -> bytes:
        """Bytes of the GPU, now."""
        out = ctypes.create_string_buffer(num_bytes)
        with self._current():
            self._call("cuMemcpyDtoH_v2", out, ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))
        return out.raw

    def write(self, address: int, data: bytes) -> None:
        """Set bytes of the GPU, now."""
        with self._current():
            self._call(
                "cuMemcpyHtoD_v2",
                ctypes.c_uint64(address),
                ctypes.c_char_p(data),
                ctypes.c_size_t(len(data)),
            )

    # ---- memory of the host ----------------------------------------------------------------------------------------

    def register_host(self, address: int, num_bytes: int, *, read_only: bool = False) -> None:
        """Pin pages of this process, so that copies to the GPU run at the link's rate and by themselves."""
        portable, read = 1, 8
        flags = portable | (read if read_only else 0)
        with self._current():
            self._call(
                "cuMemHostRegister_v2",
                ctypes.c_void_p(address),
                ctypes.c_size_t(num_bytes),
                ctypes.c_uint(flags),
            )

    def unregister_host(self, address: int) -> None:
        """Undo `register_host`, before the pages are unmapped."""
        with self._current():
            self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    # ---- addresses without memory ----------------------------------------------------------------------------------

    @property
    def granularity(self) -> int:
        """Bytes of which mapped memory is a multiple."""
        size = ctypes.c_size_t()
        properties = self._properties()
        with self._current():
            self._call(
                "cuMemGetAllocationGranularity",
                ctypes.byref(size),
                ctypes.byref(properties),
                ctypes.c_int(_RECOMMENDED),
            )
        return size.value

    def reserve(self, num_bytes: int) -> int:
        """Addresses with nothing behind them."""
        address = ctypes.c_uint64()
        with self._current():
            self._call(
                "cuMemAddressReserve",
                ctypes.byref(address),
                ctypes.c_size_t(num_bytes),
                ctypes.c_size_t(0),
                ctypes.c_uint64(0),
                ctypes.c_ulonglong(0),
            )
        return address.value

    def unreserve(self, address: int, num_bytes: int) -> None:
        """Give addresses back."""
        with self._current():
            self._call("cuMemAddressFree", ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))

    def map(self, address: int, num_bytes: int) -> None:
        """Put new memory behind reserved addresses; it holds anything. An error leaves nothing there."""
        handle = ctypes.c_ulonglong()
        properties = self._properties()
        with self._current():
            self._call(
                "cuMemCreate",
                ctypes.byref(handle),
                ctypes.c_size_t(num_bytes),
                ctypes.byref(properties),
                ctypes.c_ulonglong(0),
            )
            try:
                self._put(address, num_bytes, handle)
            finally:  # the mapping keeps the memory
                self._call("cuMemRelease", handle)

    def swap(self, one: int, other: int, num_bytes: int) -> None:
        """Exchange the memory behind two addresses, which one `map` of `num_bytes` each put there; nothing may use it.

        It takes a millisecond for 16 GiB, whatever is in them. An error leaves everything as it was.
        """
        handles: dict[int, ctypes.c_ulonglong] = {}
        with self._current():
            try:
                for address in (one, other):
                    handle = ctypes.c_ulonglong()
                    self._call(
                        "cuMemRetainAllocationHandle",
                        ctypes.byref(handle),
                        ctypes.c_void_p(address),
                    )
                    handles[address] = handle
                self._exchange(one, other, num_bytes, handles)
            finally:
                for handle in handles.values():
                    self._call("cuMemRelease", handle)

    def _exchange(
        self, one: int, other: int, num_bytes: int, before: dict[int, ctypes.c_ulonglong]
    ) -> None:
        behind: dict[int, int | None] = {one: one, other: other}
        try:
            for address in (one, other):
                self.unmap(address, num_bytes)
                behind[address] = None
            for address, wanted in ((one, other), (other, one)):
                self._put(address, num_bytes, before[wanted])
                behind[address] = wanted
        except TransportError:
            # Nothing else: what could not be unmapped before cannot be now, and is where it was.
            for address, found in behind.items():
                if found not in (None, address):
                    self.unmap(address, num_bytes)
                    behind[address] = None
            for address, found in behind.items():
                if found is None:
                    self._put(address, num_bytes, before[address])
            raise

    def _put(self, address: int, num_bytes: int, handle: ctypes.c_ulonglong) -> None:
        """Memory behind reserved addresses, for this GPU to read and write; an error leaves nothing there."""
        size = ctypes.c_size_t(num_bytes)
        self._call(
            "cuMemMap",
            ctypes.c_uint64(address),
            size,
            ctypes.c_size_t(0),
            handle,
            ctypes.c_ulonglong(0),
        )
        access = _AccessDescription(self._properties().location, _READ_WRITE)
        try:
            self._call(
                "cuMemSetAccess",
                ctypes.c_uint64(address),
                size,
                ctypes.byref(access),
                ctypes.c_size_t(1),
            )
        except TransportError:
            self.unmap(address, num_bytes)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        """Take the memory away; the addresses stay reserved."""
        with self._current():
            self._call("cuMemUnmap", ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))

    def _properties(self) -> _AllocationProperties:
        properties = _AllocationProperties()
        properties.type = _PINNED
        properties.location = _Location(_ON_DEVICE, self._device.value)
        return properties

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The GPU's context on this thread, and whatever was there afterwards."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            popped = ctypes.c_void_p()
            self._call("cuCtxPopCurrent_v2", ctypes.byref(popped))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code:
            kind = DeviceOutOfMemory if code == _OUT_OF_MEMORY else TransportError
            raise kind(f"{name} failed on GPU {self.index}: {self._error(code)}")

    def _error(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._lib.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode()} ({code})"


@lru_cache(maxsize=64)
def driver_of(device: torch.device) -> CudaDriver:
    """The driver of a CUDA device; the same object for the same device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return CudaDriver(index)
