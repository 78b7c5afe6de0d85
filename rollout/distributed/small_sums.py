"""Sums of small tensors over GPUs that read each other's memory: one kernel, where NCCL's latency would be most of it.

Every rank has a buffer that the others see (torch's symmetric memory). What is to be summed is written there, by the
product that computes it where that is possible; then one kernel waits for all ranks, reads all buffers and adds them in
the order of the ranks, so that all get the same bits. "One shot": each rank reads everything; "two shot": each sums a
part, and reads the others' parts. NVLink multicast is never used.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup, Store

from .frames import decode, encode

logger = logging.getLogger(__name__)

_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
_DTYPES = (torch.bfloat16, torch.float32)
"""What torch's kernels add."""
_TEXT = 500
"""Characters of an error that are told to other ranks."""
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Limits:
    """Up to how many bytes which way is faster than NCCL."""

    one_shot: int
    two_shot: int


LIMITS = {
    2: Limits(1 << 20, 8 << 20),
    4: Limits(256 << 10, 2 << 20),
    8: Limits(128 << 10, 2 << 20),
}
"""By the number of ranks, the only numbers for which torch has kernels. 2: measured on H200s, in graphs, up to 8 MiB
(8 KiB: 6.4 us instead of 11.6; 1 MiB: 13.1, 20; 8 MiB: 38, 51); 4 and 8: careful guesses."""


def forbid_multicast() -> None:
    """In this process neither NCCL nor torch uses NVLink multicast; to be called before either looks."""
    os.environ.update(_NO_MULTICAST)


class Group(Protocol):
    """As much of a group as it takes to agree."""

    rank: int
    size: int
    name: str

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors, on the CPU, side by side along `dim` in rank order."""


class SmallSums:
    """One rank's end; one thread and one stream at a time, every rank in the same order."""

    def __init__(
        self, buffer: torch.Tensor, group_name: str, limits: Limits, kept: Any = None
    ) -> None:
        self._buffer = buffer
        self._name = group_name
        self._limits = limits
        self._kept = kept

    @classmethod
    def open(cls, group: Group, store: Store, device: torch.device) -> SmallSums | None:
        """Make and try the buffers; called once by every rank, and None on all of them where it does not work on one.

        Why it does not is logged by rank 0, in one line.
        """
        problem = _problem(group, device)
        opened = None
        if not any(problems := _texts(group, problem)):
            try:
                opened = cls._open(group, store, device)
            except Exception as error:  # whatever this torch, driver or machine lacks
                problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            problems = _texts(group, problem)
        for rank, found in enumerate(problems):
            if found:
                if group.rank == 0:
                    logger.warning(
                        "small sums of group %r go through NCCL: rank %d has %s",
                        group.name,
                        rank,
                        found,
                    )
                return None
        return opened

    @classmethod
    def _open(cls, group: Group, store: Store, device: torch.device) -> SmallSums:
        from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

        forbid_multicast()
        limits, name = LIMITS[group.size], f"rollout-{group.name}-{next(_numbers)}"
        # torch looks for rank, size and store under the name; this group has nothing else.
        named = ProcessGroup(store, group.rank, group.size)
        _register_process_group(name, named)  # type: ignore[arg-type]
        size = max(limits.one_shot, limits.two_shot)
        buffer = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
        handle = _SymmetricMemory.rendezvous(buffer, name)
        sums = cls(buffer, name, limits, (named, handle))
        sums._try(group, device)
        return sums

    def _try(self, group: Group, device: torch.device) -> None:
        """A sum of each kind is what it must be."""
        expected = group.size * (group.size + 1) / 2
        for num_bytes in (4096, self._limits.one_shot, self._limits.two_shot):
            if num_bytes:
                mine = torch.full((num_bytes // 4,), group.rank + 1.0, device=device)
                total = self.all_reduce(mine)
                if total is None or not bool((total == expected).all()):
                    raise RuntimeError("sums through it that are wrong")

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Where to write what `all_reduce` is called with next; None: too large, or of another dtype."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._way(num_bytes, dtype) is None:
            return None
        return self._buffer[:num_bytes].view(dtype).view(shape)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A new tensor with the sum; None where `room` would be. What is not in `room` is copied there."""
        add = self._way(tensor.nbytes, tensor.dtype)
        if add is None:
            return None
        shared = tensor
        if tensor.data_ptr() != self._buffer.data_ptr():
            shared = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            shared.copy_(tensor)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        add(shared, "sum", self._name, out)
        return out

    def _way(self, num_bytes: int, dtype: torch.dtype) -> Any:
        if dtype not in _DTYPES or num_bytes % 16 or not num_bytes:
            return None
        if num_bytes <= self._limits.one_shot:
            return torch.ops.symm_mem.one_shot_all_reduce_out
        if num_bytes <= self._limits.two_shot:
            return torch.ops.symm_mem.two_shot_all_reduce_out
        return None


def _texts(group: Group, text: str) -> list[str]:
    """Every rank's short text, in rank order."""
    frame, _ = encode(text[:_TEXT])
    return [decode(row, None, str) for row in group.all_gather(frame[None], dim=0)]


def _problem(group: Group, device: torch.device) -> str:
    """Why it cannot work on this rank; empty where nothing is known against it. Collective."""
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    uuids = _texts(group, uuid)
    if group.size not in LIMITS:
        return f"{group.size} ranks, expected {', '.join(map(str, LIMITS))}"
    if not all(uuids):
        return "no GPU"
    here = {
        str(torch.cuda.get_device_properties(index).uuid): index
        for index in range(torch.cuda.device_count())
    }
    for other in uuids:
        if other not in here:
            return "no view of the other ranks' GPUs (CUDA_VISIBLE_DEVICES, or another machine)"
        mine = here[uuid]
        if here[other] != mine and not torch.cuda.can_device_access_peer(mine, here[other]):
            return f"no way from cuda:{mine} to the memory of cuda:{here[other]}"
    return ""
