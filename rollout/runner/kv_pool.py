"""Memory of the paged KV cache, all layers in one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from weight_sync.devices.mapped_memory import MappedMemory, mapped_tensor


class KVPool:
    """Keys and values, (layers, blocks, block size, 2, KV heads, head size).

    Memory is reserved when the pool is made; on a CPU the system provides pages when they are first written. A block
    holds whatever its last owner left until `clear_blocks`, so a step clears each block that it starts to fill in part:
    attention multiplies what it masks by zero, and zero times an old NaN is NaN.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        experts_per_token: int = 0,
    ) -> None:
        """`experts_per_token`: how many experts of each layer to remember beside a token's keys; 0: none."""
        shape = (num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim)
        self.memory, self.mapped = _memory(shape, dtype, device)
        self.layers: tuple[torch.Tensor, ...] = tuple(self.memory.unbind(0))
        self.routes: torch.Tensor | None = None
        """(blocks * block size + 1, layers, k) int16: the experts that each cached token went to, -1 in layers without.
        They live and are shared as its keys are. The last row is written for rows of padding, whose slot is -1."""
        if experts_per_token:
            routes = (num_blocks * block_size + 1, num_layers, experts_per_token)
            self.routes = torch.full(routes, -1, dtype=torch.int16, device=device)

    def free(self) -> None:
        """Give the memory back, after all work that uses it; the pool is of no more use. Safe to repeat."""
        if self.mapped is not None:
            torch.cuda.synchronize(self.memory.device)
            self.mapped.free()
        self.memory = self.memory.new_empty(0)
        self.layers, self.routes = (), None

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy block to block, (source, destination), in all layers; all sources are read before any is written."""
        if not pairs:
            return
        device = self.memory.device
        self.copy_on_device(
            torch.tensor([source for source, _ in pairs], device=device),
            torch.tensor([destination for _, destination in pairs], device=device),
        )

    def copy_on_device(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """The same with (N) int64 tensors on the pool's device."""
        self.memory.index_copy_(1, destinations, self.memory.index_select(1, sources))
        if self.routes is not None:
            by_block = self.routes[:-1].unflatten(0, (self.memory.shape[1], -1))
            by_block.index_copy_(0, destinations, by_block.index_select(0, sources))

    def read_routes(self, slots: torch.Tensor) -> torch.Tensor:
        """(N, layers, k) int16 on the device: the experts of the tokens at slots (N), `block * block size + offset`."""
        assert self.routes is not None, "routes are not kept"
        return self.routes[slots.to(self.routes.device)]

    def clear_blocks(self, blocks: torch.Tensor) -> None:
        """Fill blocks (N) int64 with zeros, in all layers."""
        if blocks.numel():
            self.memory.index_fill_(1, blocks, 0)

    @staticmethod
    def bytes_per_block(
        *, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block, keys and values of all layers."""
        return num_layers * block_size * 2 * num_kv_heads * head_dim * dtype.itemsize


def _memory(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, MappedMemory | None]:
    """Room for the pool, and what is behind it where that can come and go without moving it."""
    if device.type != "cuda":
        return torch.empty(shape, dtype=dtype, device=device), None
    raw, mapped = mapped_tensor(math.prod(shape) * dtype.itemsize, device)
    return raw.view(dtype).view(shape), mapped
