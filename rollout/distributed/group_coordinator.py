"""The ranks that hold one model together, as layers and the engine loop see them."""

from __future__ import annotations

from typing import Any, Self, TypeVar

import torch

from weight_sync.errors import TransportError
from weight_sync.process_groups.backends import open_gloo, open_nccl
from weight_sync.process_groups.communicator import Communicator
from weight_sync.process_groups.rendezvous import under

from .frames import decode, encode, new_frame, rest_of
from .stateless_process_group import StatelessProcessGroup
from .tensor_dict import TensorDict, TensorDictHeader, header_of, pack, unpack

T = TypeVar("T")


class GroupCoordinator:
    """Collectives over gloo (CPU) or NCCL (CUDA), and a gloo group beside it for objects and barriers.

    Every rank calls the same methods in the same order, one thread at a time. Any number of coordinators live in one
    process, beside a default group of `torch.distributed` or without one. With one rank, every call is the identity.
    Over gloo a call that another rank does not join ends by its deadline with `DeadlineExceeded`, one whose peer has
    died with `TransportError`; the coordinator is of no more use then. Over NCCL calls are ordered on the current
    stream, and `abort`, from any thread, is what ends them.

    It is the `tp` object that layers take.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        name: str,
        device: torch.device,
        cpu_group: Communicator | None,
        device_group: Communicator | None,
    ) -> None:
        self.rank = rank
        """This rank's position, from 0."""
        self.size = size
        """Number of ranks."""
        self.name = name
        """What errors call the group."""
        self.device = device
        """Where the tensors of its collectives are."""
        self._cpu_group = cpu_group
        self._device_group = device_group

    @classmethod
    def create(
        cls,
        group: StatelessProcessGroup,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
    ) -> Self:
        """Connect the ranks of `group`; called once by each of them. `group` may be closed afterwards on the CPU.

        `timeout_s` is the deadline of a collective that is given none, and of connecting.
        """
        device = torch.device(device)
        if group.world_size == 1:
            return cls.single(device=device, name=group.name)
        cpu_group = open_gloo(
            under(group.store, "cpu"),
            rank=group.rank,
            size=group.world_size,
            name=group.name,
            address=group.address,
            join_timeout_s=timeout_s,
            timeout_s=timeout_s,
        )
        device_group = cpu_group
        if device.type == "cuda":
            with torch.cuda.device(device):
                device_group = open_nccl(
                    under(group.store, "cuda"),
                    rank=group.rank,
                    size=group.world_size,
                    name=group.name,
                    timeout_s=timeout_s,
                )
        return cls(
            rank=group.rank,
            size=group.world_size,
            name=group.name,
            device=device,
            cpu_group=cpu_group,
            device_group=device_group,
        )

    @classmethod
    def single(cls, *, device: torch.device | str = "cpu", name: str = "single") -> Self:
        """A group of one rank, which needs nobody."""
        return cls(
            rank=0,
            size=1,
            name=name,
            device=torch.device(device),
            cpu_group=None,
            device_group=None,
        )

    @property
    def world_size(self) -> int:
        """`size`, under the name that it has elsewhere."""
        return self.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same bits on all of them; written in place if `tensor` is contiguous."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        self._on(tensor).all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The ranks' tensors, of equal shapes, side by side along `dim` in rank order."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        output = tensor.new_empty((self.size, *tensor.shape))
        self._on(tensor).all_gather(output, tensor)
        return _side_by_side(output, dim)

    def gather(self, tensor: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """The ranks' tensors, of equal shapes, side by side along `dim` on rank `dst`; None on the others."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        if self.rank != dst:
            self._on(tensor).gather([], tensor, root=dst)
            return None
        output = tensor.new_empty((self.size, *tensor.shape))
        self._on(tensor).gather(list(output), tensor, root=dst)
        return _side_by_side(output, dim)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """`tensor` of rank `src`; the others pass one of that shape and dtype, which is filled if it is contiguous."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        self._on(tensor).broadcast(tensor, root=src)
        return tensor

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send `tensor` to rank `dst`, which must `recv` its shape and dtype."""
        self._peer(dst)
        self._on(tensor).send(tensor.contiguous(), dst)

    def recv(
        self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, src: int
    ) -> torch.Tensor:
        """The tensor that rank `src` sends, on this group's device."""
        self._peer(src)
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self._on(tensor).receive(tensor, src)
        return tensor

    def broadcast_object(
        self, value: T | None, type: Any = Any, *, src: int = 0, timeout_s: float | None = None
    ) -> T:
        """The object of rank `src`, decoded on the others as `type`: anything that msgspec encodes, never pickled.

        `ProtocolError` when it is not of that type. `timeout_s` is how long the others may wait for `src`.
        """
        if self.size == 1:
            return value  # type: ignore[return-value]
        group = self._on_cpu()
        frame, rest = encode(value) if self.rank == src else (new_frame(), None)
        group.broadcast(frame, root=src, timeout_s=timeout_s)
        if self.rank != src:
            rest = rest_of(frame)
        if rest is not None:
            group.broadcast(rest, root=src, timeout_s=timeout_s)
        return value if self.rank == src else decode(frame, rest, type)  # type: ignore[return-value]

    def send_object(self, value: Any, dst: int, *, timeout_s: float | None = None) -> None:
        """Send an object to rank `dst`, as in `broadcast_object`."""
        self._peer(dst)
        frame, rest = encode(value)
        self._on_cpu().send(frame, dst, timeout_s=timeout_s)
        if rest is not None:
            self._on_cpu().send(rest, dst, timeout_s=timeout_s)

    def recv_object(self, type: Any = Any, *, src: int, timeout_s: float | None = None) -> Any:
        """The object that rank `src` sends, decoded as `type`."""
        self._peer(src)
        frame = new_frame()
        self._on_cpu().receive(frame, src, timeout_s=timeout_s)
        rest = rest_of(frame)
        if rest is not None:
            self._on_cpu().receive(rest, src, timeout_s=timeout_s)
        return decode(frame, rest, type)

    def broadcast_tensor_dict(
        self, values: TensorDict | None = None, *, src: int = 0
    ) -> TensorDict:
        """A dict of tensors and plain values of rank `src`: metadata as one object, all tensors as one message.

        Tensors come back contiguous, on this group's device.
        """
        if self.size == 1:
            return values or {}
        if self.rank == src:
            assert values is not None, "the source passes the dict"
            self.broadcast_object(header_of(values), TensorDictHeader, src=src)
            self.broadcast(pack(values, self.device), src=src)
            return values
        header: TensorDictHeader = self.broadcast_object(None, TensorDictHeader, src=src)
        buffer = torch.empty(header.num_bytes, dtype=torch.uint8, device=self.device)
        return unpack(header, self.broadcast(buffer, src=src))

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return when every rank has called it. On the CPU group: it says nothing about work on a GPU."""
        if self.size > 1:
            self._on_cpu().barrier(timeout_s=timeout_s)

    def abort(self) -> None:
        """Make NCCL operations that are under way fail; from any thread. Destroy the group afterwards."""
        if self._device_group is not None:
            self._device_group.abort()

    def destroy(self) -> None:
        """Close the connections; other ranks' calls fail. Safe to repeat."""
        for group in (self._device_group, self._cpu_group):
            if group is not None:
                group.close()
        self._device_group = self._cpu_group = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.destroy()

    def _on(self, tensor: torch.Tensor) -> Communicator:
        return self._open(self._cpu_group if tensor.device.type == "cpu" else self._device_group)

    def _on_cpu(self) -> Communicator:
        return self._open(self._cpu_group)

    def _open(self, group: Communicator | None) -> Communicator:
        if group is None:
            raise TransportError(
                f"group {self.name!r}: got a call after it was destroyed, expected none; create a new one"
            )
        return group

    def _peer(self, rank: int) -> None:
        if not 0 <= rank < self.size or rank == self.rank:
            raise TransportError(
                f"group {self.name!r}: rank {self.rank} got {rank} as the other end, expected another rank below "
                f"{self.size}; check the ranks"
            )


def _side_by_side(stacked: torch.Tensor, dim: int) -> torch.Tensor:
    """From (ranks, ...) to the ranks' tensors along `dim`."""
    shape = list(stacked.shape[1:])
    if not shape:
        return stacked
    dim %= len(shape)
    shape[dim] *= stacked.shape[0]
    return stacked.movedim(0, dim).reshape(shape)
