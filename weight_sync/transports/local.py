"""Trainer and engine in one process: the engine reads the trainer's buffer itself."""

import mmap

import torch

from ..errors import TransportError
from ..wire.messages import LocalHandle
from .arena import Mapping, SharedBytes


class LocalArena(SharedBytes):
    """The trainer's end; `lend` gives the buffer to the service and returns the key under which it is known there."""

    def __init__(self, num_bytes: int, device: torch.device | None = None) -> None:
        """`device`: where the engine's weights are; None: the CPU. `TransportError` where it has no room."""
        self._mapping: Mapping | None = None
        if device is None or device.type == "cpu":
            self._mapping = Mapping(-1, max(num_bytes, mmap.PAGESIZE), writable=True)
            self._buffer = self._mapping.tensor[:num_bytes]
        else:
            try:
                self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError as error:
                raise TransportError(
                    f"no memory on {device} for an arena of {num_bytes} bytes: expected room for the "
                    "weights once more; lower kv_cache_bytes or mem_fraction_static, or use transport='shared_memory'"
                ) from error
        self._num_bytes = num_bytes
        self.key = ""

    @property
    def buffer(self) -> torch.Tensor:
        return self._buffer

    @property
    def handle(self) -> LocalHandle:
        return LocalHandle(key=self.key, num_bytes=self._num_bytes)

    def close(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        if self._mapping is not None:
            self._mapping.close()
