"""Storages in memory of a GPU that torch exported, copied out so that their sender gets them back at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch

from ..errors import TransportError
from ..transports.ipc_memory import IpcMemory, ipc_memory_of
from .records import COUNTERS, GpuStorage, Storage
from .segments import SegmentFile

_COUNTER_FILE_BYTES = COUNTERS * 8


def read_gpu_storages(
    ranges: Mapping[Hashable, tuple[Storage, int, int]],
    memory_of: Callable[[torch.device], IpcMemory] | None = None,
) -> dict[Hashable, torch.Tensor]:
    """A copy of each range, by first byte and end (uint8, 1-d), on the GPU that it is on where this process sees that.

    An allocation is opened once, however many storages lie in it, and closed before this returns. `TransportError`
    where one cannot be opened, is smaller than what its sender says, or does not fit beside what is here.
    """
    copies: dict[Hashable, torch.Tensor] = {}
    groups: dict[tuple[int | str, bytes], list[Hashable]] = {}
    for key, (storage, _, _) in ranges.items():
        assert isinstance(storage, GpuStorage), "others are read elsewhere"
        if storage.handle:
            groups.setdefault((storage.device, storage.handle), []).append(key)
        else:
            copies[key] = torch.empty(0, dtype=torch.uint8)
    for (number, handle), keys in groups.items():
        device = _device(number)
        memory = (memory_of or ipc_memory_of)(device)
        allocation = memory.open(handle)
        try:
            for key in keys:
                copies[key] = _copy(allocation.tensor, device, *ranges[key])
        finally:
            memory.close(allocation)  # waits for the copies
    return copies


def _copy(
    memory: torch.Tensor, device: torch.device, storage: Storage, start: int, end: int
) -> torch.Tensor:
    assert isinstance(storage, GpuStorage)
    last = storage.offset + storage.num_bytes
    if last > memory.numel():
        raise TransportError(
            f"cannot read a tensor in memory of {device}: got bytes {storage.offset} to {last}, expected "
            f" them within an allocation of {memory.numel()}; send the tensors again"
        )
    if storage.must_wait:
        try:
            event = torch.cuda.Event.from_ipc_handle(device, storage.event)
        except RuntimeError as error:
            raise TransportError(
                f"cannot wait for a tensor in memory of {device}: {error}; expected the event of a living process of "
                "this machine; send the tensors again"
            ) from error
        torch.cuda.current_stream(device).wait_event(event)
    try:
        return memory[storage.offset + start : storage.offset + end].clone()
    except torch.OutOfMemoryError as error:
        raise TransportError(
            f"cannot copy tensors of {end - start} bytes on {device}: {error}; expected that much free beside the "
            "model; send smaller buckets"
        ) from error


def count_down(storage: GpuStorage) -> None:
    """Tell the sender that the storage has been read."""
    if storage.handle:
        with SegmentFile(storage.counters, _COUNTER_FILE_BYTES) as counters:
            counters.count_down(storage.counter)


def _device(number: int | str) -> torch.device:
    """This process' GPU of that number or UUID; where it sees no such, one that may reach it over their link."""
    count = torch.cuda.device_count()
    if isinstance(number, int):
        return torch.device("cuda", number if number < count else 0)
    for index in range(count):
        if str(torch.cuda.get_device_properties(index).uuid).replace("-", "") == number:
            return torch.device("cuda", index)
    return torch.device("cuda", 0)
