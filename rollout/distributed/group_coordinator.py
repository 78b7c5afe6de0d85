"""The ranks that hold one model together, as layers and the engine loop see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import msgspec
import torch

from weight_sync.errors import ProtocolError, TransportError
from weight_sync.process_groups.backends import open_gloo, open_nccl
from weight_sync.process_groups.communicator import Communicator
from weight_sync.process_groups.rendezvous import under

from .frames import decode, decode_bytes, encode, new_frame, rest_of
from .place import Place
from .small_sums import SmallSums
from .socket_mesh import LARGEST_BYTES, SocketMesh
from .stateless_process_group import StatelessProcessGroup
from .tensor_dict import TensorDict, TensorDictHeader, header_of, pack, unpack

T = TypeVar("T")


class GroupCoordinator(Place):
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
        super().__init__(rank, size)
        self.name = name
        """What errors call the group."""
        self.device = device
        """Where the tensors of its collectives are."""
        self._cpu_group = cpu_group
        self._device_group = device_group
        self._small_sums: SmallSums | None = None
        self._sockets: SocketMesh | None = None
        self._timeout_s = 0.0
        self._muted = False

    @classmethod
    def create(
        cls,
        group: StatelessProcessGroup,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
        small_sums: bool = False,
        quick: bool = False,
    ) -> Self:
        """Connect the ranks of `group`; called once by each of them. `group` may be closed afterwards on the CPU.

        `timeout_s` is the deadline of a collective that is given none, and of connecting. `small_sums`: on CUDA, small
        tensors are summed through memory that all ranks see, where the machine has such (`SmallSums`). `quick`:
        `broadcast_object`, and `all_gather_bytes` of few bytes, go over sockets beside gloo's (`SocketMesh`).
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
        made = cls(
            rank=group.rank,
            size=group.world_size,
            name=group.name,
            device=device,
            cpu_group=cpu_group,
            device_group=cpu_group,
        )
        try:
            if device.type == "cuda":
                with torch.cuda.device(device):
                    made._device_group = open_nccl(
                        under(group.store, "cuda"),
                        rank=group.rank,
                        size=group.world_size,
                        name=group.name,
                        join_timeout_s=timeout_s,
                        timeout_s=timeout_s,
                    )
            if quick:
                made._sockets = SocketMesh.open(group, timeout_s=timeout_s)
                made._timeout_s = timeout_s
            if small_sums and device.type == "cuda":
                made._small_sums = SmallSums.open(made, under(group.store, "sums"), device)
        except BaseException:
            made.destroy()  # What the others wait for fails, whoever keeps the error.
            raise
        return made

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

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same bits on all of them; may be written in place if `tensor` is contiguous."""
        if self.size == 1 or self._muted:
            return tensor
        tensor = tensor.contiguous()
        if self._small_sums is not None and tensor.device == self.device:
            total = self._small_sums.all_reduce(tensor)
            if total is not None:
                return total
        self._on(tensor).all_reduce(tensor)
        return tensor

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory on `device` where the tensor of the next `all_reduce` had better be; None: anywhere."""
        if self._small_sums is None or self._muted:
            return None
        return self._small_sums.room(shape, dtype)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Meanwhile, on any thread, `all_reduce` and `all_gather` of this rank ask nobody, and give anything."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def reduce_scatter_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Fill `output` (contiguous) with this rank's part of the sum over the ranks.

        input: `size` parts of the shape of `output`, one behind the other along its first dimension.
        """
        if input.numel() != self.size * output.numel() or input.dtype != output.dtype:
            raise TransportError(
                f"group {self.name!r}: cannot scatter a sum of {input.dtype} {tuple(input.shape)} into {output.dtype} "
                f"{tuple(output.shape)}, expected one dtype, and an input of {self.size} times the size"
            )
        if self.size == 1:
            output.copy_(input.view(output.shape))
        else:
            self._on(input).reduce_scatter(output, input.contiguous())
        return output

    def reduce_scatter(
        self, output: torch.Tensor, input_list: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """`reduce_scatter_tensor` of parts that are tensors of their own, one for each rank."""
        return self.reduce_scatter_tensor(
            output, torch.cat([part.flatten() for part in input_list])
        )

    def reduce_scatterv(
        self,
        input_: torch.Tensor,
        output: torch.Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """This rank's rows of the sum over the ranks of `input_`; rank i has `sizes[i]` rows, None: as many as each."""
        sizes = self._sizes(input_.shape[0], sizes)
        total = self.all_reduce(input_.clone())
        mine = total.split(list(sizes))[self.rank]
        return mine.clone() if output is None else output.copy_(mine)

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Fill `output` (contiguous) with the ranks' `input`s, one behind the other."""
        if self.size == 1:
            return output.copy_(input.view(output.shape))
        self._on(input).all_gather(output, input.contiguous())
        return output

    def all_gather(
        self,
        tensor: torch.Tensor,
        dim: int = -1,
        output_tensor_list: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The ranks' tensors, of equal shapes, side by side along `dim` in rank order.

        output_tensor_list: `size` tensors that are filled with them as well.
        """
        if self.size == 1:
            gathered = tensor[None]
        else:
            tensor = tensor.contiguous()
            gathered = tensor.new_empty((self.size, *tensor.shape))
            if not self._muted:
                self._on(tensor).all_gather(gathered, tensor)
        for output, part in zip(
            output_tensor_list or (), gathered, strict=output_tensor_list is not None
        ):
            output.copy_(part)
        return tensor if self.size == 1 else _side_by_side(gathered, dim)

    def all_gatherv(
        self, input_: torch.Tensor | Sequence[torch.Tensor], sizes: Sequence[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """The ranks' rows, one rank's behind another's; rank i has `sizes[i]` of them, None: all have as many.

        input_: one tensor, or a list of them with as many rows each.
        """
        if not isinstance(input_, torch.Tensor):
            return [self._all_rows(tensor, sizes) for tensor in input_]
        return self._all_rows(input_, sizes)

    def _all_rows(self, own: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
        if sizes is None or self.size == 1:
            return self.all_gather(own, dim=0)
        if len(sizes) != self.size or sizes[self.rank] != own.shape[0]:
            raise self._wrong_sizes(own.shape[0], sizes)
        rows = own.new_zeros((max(sizes), *own.shape[1:]))
        rows[: own.shape[0]] = own
        gathered = self.all_gather(rows[None], dim=0)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

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

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Send `tensor` to rank `dst` (None: the next one), which must `recv` its shape and dtype."""
        dst = self._peer(self.next_rank if dst is None else dst)
        self._on(tensor).send(tensor.contiguous(), dst)

    def recv(self, size: Sequence[int], dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """The tensor that rank `src` (None: the one before) sends, on this group's device."""
        src = self._peer(self.prev_rank if src is None else src)
        tensor = torch.empty(tuple(size), dtype=dtype, device=self.device)
        self._on(tensor).receive(tensor, src)
        return tensor

    def broadcast_object(
        self, obj: Any = None, src: int = 0, *, type: Any = Any, timeout_s: float | None = None
    ) -> Any:
        """The object of rank `src`, decoded on the others as `type`: anything that msgspec encodes, never pickled.

        `ProtocolError` when it is not of that type. `timeout_s` is how long the others may wait for `src`.
        """
        if self.size == 1:
            return obj
        if self._sockets is not None:
            data = self._sockets.broadcast(
                msgspec.msgpack.encode(obj) if self.rank == src else None,
                src,
                timeout_s=self._timeout_s if timeout_s is None else timeout_s,
            )
            return obj if self.rank == src else decode_bytes(data, type)
        group = self._on_cpu()
        frame, rest = encode(obj) if self.rank == src else (new_frame(), None)
        group.broadcast(frame, root=src, timeout_s=timeout_s)
        if self.rank != src:
            rest = rest_of(frame)
        if rest is not None:
            group.broadcast(rest, root=src, timeout_s=timeout_s)
        return obj if self.rank == src else decode(frame, rest, type)

    def broadcast_object_list(
        self, obj_list: list[Any], src: int = 0, *, type: Any = Any, timeout_s: float | None = None
    ) -> list[Any]:
        """Replace the items of `obj_list`, on all ranks as long as on `src`, by those of `src`; returns the list."""
        objects: list[Any] = self.broadcast_object(
            obj_list if self.rank == src else None, src, type=list[type], timeout_s=timeout_s
        )
        if len(objects) != len(obj_list):
            raise ProtocolError(
                f"group {self.name!r}: got a list of {len(objects)} objects, expected {len(obj_list)}; pass lists of "
                "one length on all ranks"
            )
        obj_list[:] = objects
        return obj_list

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's `data`, equally long on all, in rank order."""
        if self.size == 1:
            return [data]
        if self._sockets is not None and len(data) <= LARGEST_BYTES:
            return self._sockets.all_gather(data, timeout_s=self._timeout_s)
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        gathered = torch.empty((self.size, len(data)), dtype=torch.uint8)
        self._on_cpu().all_gather(gathered, mine)
        return [row.tobytes() for row in gathered.numpy()]

    def all_gather_object(
        self, obj: Any, *, type: Any = Any, timeout_s: float | None = None
    ) -> list[Any]:
        """Every rank's object, in rank order, decoded as `type`; this rank's own as it is."""
        if self.size == 1:
            return [obj]
        group = self._on_cpu()
        frame, rest = encode(obj)
        frames = torch.empty((self.size, frame.numel()), dtype=torch.uint8)
        group.all_gather(frames, frame, timeout_s=timeout_s)
        sizes = [0 if (memory := rest_of(one)) is None else memory.numel() for one in frames]
        rests = torch.empty((self.size, max(sizes)), dtype=torch.uint8)
        if max(sizes):
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: sizes[self.rank]] = rest if rest is not None else padded[:0]
            group.all_gather(rests, padded, timeout_s=timeout_s)
        return [
            obj if rank == self.rank else decode(frames[rank], rests[rank, : sizes[rank]], type)
            for rank in range(self.size)
        ]

    def send_object(
        self, obj: Any, dst: int | None = None, *, timeout_s: float | None = None
    ) -> None:
        """Send an object to rank `dst` (None: the next one), as in `broadcast_object`."""
        dst = self._peer(self.next_rank if dst is None else dst)
        frame, rest = encode(obj)
        self._on_cpu().send(frame, dst, timeout_s=timeout_s)
        if rest is not None:
            self._on_cpu().send(rest, dst, timeout_s=timeout_s)

    def recv_object(
        self, src: int | None = None, *, type: Any = Any, timeout_s: float | None = None
    ) -> Any:
        """The object that rank `src` (None: the one before) sends, decoded as `type`."""
        src = self._peer(self.prev_rank if src is None else src)
        frame = new_frame()
        self._on_cpu().receive(frame, src, timeout_s=timeout_s)
        rest = rest_of(frame)
        if rest is not None:
            self._on_cpu().receive(rest, src, timeout_s=timeout_s)
        return decode(frame, rest, type)

    def broadcast_tensor_dict(
        self, tensor_dict: TensorDict | None = None, src: int = 0
    ) -> TensorDict:
        """A dict of tensors and plain values of rank `src`: metadata as one object, all tensors as one message.

        Tensors come back contiguous, on this group's device.
        """
        if self.size == 1:
            return tensor_dict or {}
        if self.rank == src:
            assert tensor_dict is not None, "the source passes the dict"
            self.broadcast_object(header_of(tensor_dict), src)
            self.broadcast(pack(tensor_dict, self.device), src)
            return tensor_dict
        header: TensorDictHeader = self.broadcast_object(None, src, type=TensorDictHeader)
        return unpack(header, self.broadcast(self._buffer(header), src))

    def send_tensor_dict(self, tensor_dict: TensorDict, dst: int | None = None) -> None:
        """Send a dict, as in `broadcast_tensor_dict`, to rank `dst` (None: the next one)."""
        self.send_object(header_of(tensor_dict), dst)
        buffer = pack(tensor_dict, self.device)
        if buffer.numel():
            self.send(buffer, dst)

    def recv_tensor_dict(self, src: int | None = None) -> TensorDict:
        """The dict that rank `src` (None: the one before) sends."""
        header: TensorDictHeader = self.recv_object(src, type=TensorDictHeader)
        buffer = self._buffer(header)
        if header.num_bytes:
            buffer = self.recv(buffer.shape, torch.uint8, src)
        return unpack(header, buffer)

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return when every rank has called it. On the CPU group: it says nothing about work on a GPU."""
        if self.size > 1:
            self._on_cpu().barrier(timeout_s=timeout_s)

    def abort(self) -> None:
        """Make NCCL operations that are under way fail; from any thread. Destroy the group afterwards."""
        if self._device_group is not None:
            self._device_group.abort()

    def destroy(self) -> None:
        """Close the connections; other ranks' calls fail. Safe to repeat. Captured graphs come first."""
        self._small_sums = None
        if self._sockets is not None:
            self._sockets.close()
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

    def _buffer(self, header: TensorDictHeader) -> torch.Tensor:
        return torch.empty(header.num_bytes, dtype=torch.uint8, device=self.device)

    def _sizes(self, num_rows: int, sizes: Sequence[int] | None) -> Sequence[int]:
        """Rows of each rank, which have all rows together."""
        if sizes is None and num_rows % self.size == 0:
            return [num_rows // self.size] * self.size
        if sizes is None or len(sizes) != self.size or sum(sizes) != num_rows:
            raise self._wrong_sizes(num_rows, sizes)
        return sizes

    def _wrong_sizes(self, num_rows: int, sizes: Sequence[int] | None) -> TransportError:
        return TransportError(
            f"group {self.name!r}: got {num_rows} rows and sizes {sizes} on rank {self.rank} of {self.size}, expected "
            "one size for each rank, of the rows that it has; pass the same sizes on all ranks"
        )

    def _peer(self, rank: int) -> int:
        if not 0 <= rank < self.size or rank == self.rank:
            raise TransportError(
                f"group {self.name!r}: rank {self.rank} got {rank} as the other end, expected another rank below "
                f"{self.size}; check the ranks"
            )
        return rank


def _side_by_side(stacked: torch.Tensor, dim: int) -> torch.Tensor:
    """From (ranks, ...) to the ranks' tensors along `dim`."""
    shape = list(stacked.shape[1:])
    if not shape:
        return stacked
    dim %= len(shape)
    shape[dim] *= stacked.shape[0]
    return stacked.movedim(0, dim).reshape(shape)
