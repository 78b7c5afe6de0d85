"""What a payload may describe: tensors in shared memory, or a bucket of them. Inert values in, checked records out.

The shapes are those that `torch.multiprocessing.reductions` (torch 2.11 to 2.13) gives tensors, and those that trainers
of the common dialect put around them: `[(name, tensor)]`, `[(name, LocalSerializedTensor)]` with a payload for every
rank, and `{"flattened_tensor", "metadata"}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch

from ..errors import PayloadRefused
from ..layout.manifest import DTYPES, MAX_ARENA_BYTES, MAX_DIMS, MAX_NAME_LENGTH
from .stream import Budget, Global, Node, Role, Value, read_stream

MAX_TENSORS = 1 << 16
"""Named tensors, or entries of a bucket's metadata, in one payload."""
MAX_RANKS = 1 << 12
COUNTERS = 10_000
"""Reference counters that torch keeps in one file for memory of GPUs."""
CUDA_HANDLE_BYTES = 64

_SEGMENT = re.compile(rb"/torch_[0-9]{1,20}(_[0-9]{1,20}){1,2}")
_REDUCTIONS = "torch.multiprocessing.reductions"
#: Globals of a tensor's pickle, by module: what may be done with them, and their names.
_NAMES: list[tuple[str, Role, str]] = [
    (_REDUCTIONS, "function", "rebuild_tensor rebuild_cuda_tensor rebuild_typed_storage"),
    (_REDUCTIONS, "function", "rebuild_storage_filename rebuild_storage_empty rebuild_storage_fd"),
    ("torch", "function", "Size"),
    ("torch", "value", "Tensor"),
    ("torch", "value", " ".join(DTYPES)),
    ("torch.nn.parameter", "value", "Parameter"),
    ("torch.storage", "value", "UntypedStorage TypedStorage"),
    ("multiprocessing.resource_sharer", "class", "DupFd"),
]
_GLOBALS = {
    (module, name): Global(name, role) for module, role, names in _NAMES for name in names.split()
}
#: Classes that trainers keep a copy of, each in a module of its own; only the name is theirs.
_COPIED = {
    "FlattenedTensorMetadata": Global("FlattenedTensorMetadata", "class"),
    "LocalSerializedTensor": Global("LocalSerializedTensor", "class"),
    # rebuild_cuda_tensor with the GPU's UUID in place of its number
    "_rebuild_cuda_tensor_modified": Global("rebuild_cuda_tensor", "function"),
}


def known_global(module: str, name: str) -> Global | None:
    """The global of a tensor's pickle with that name, or None."""
    return _GLOBALS.get((module, name)) or _COPIED.get(name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segment:
    """A storage in a file of shared memory, which its sender has made one reference of for the reader."""

    name: str
    """As of `shm_open`; empty: there are no bytes."""
    num_bytes: int
    """Of the storage."""

    @property
    def key(self) -> Hashable:
        """Equal for all that are the same bytes."""
        return self.name, self.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GpuStorage:
    """A storage in memory of a GPU, exported by the process that it belongs to."""

    device: int | str
    """The sender's number of the GPU, or its UUID."""
    handle: bytes
    """Under which the allocation around it is opened; empty: there are no bytes."""
    offset: int
    """First byte of the storage in that allocation."""
    num_bytes: int
    """Of the storage."""
    counters: str
    """The file with the sender's reference counters; empty: there is none."""
    counter: int
    """Which of them is the reader's to count down."""
    event: bytes
    """What the sender recorded after its last write."""
    must_wait: bool
    """Whether the event has to be waited for."""

    @property
    def key(self) -> Hashable:
        """Equal for all that are the same bytes."""
        return self.device, self.handle, self.offset, self.num_bytes


Storage = Segment | GpuStorage


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """A tensor: part of a storage."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    offset: int
    """In elements."""

    @property
    def extent(self) -> tuple[int, int]:
        """First byte in the storage, and one past the last."""
        size = self.dtype.itemsize
        if 0 in self.shape:
            return 0, 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset * size, (self.offset + last + 1) * size


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """All that one payload describes."""

    tensors: Sequence[tuple[str, TensorRecord]]
    """With their names; of a bucket, the one tensor that holds all."""
    metadata: Sequence[dict[str, Any]] | None
    """Of a bucket: where its tensors are; fields as of `FlattenedTensorMetadata`."""


def read_records(data: bytes, rank: int) -> Payload:
    """What `data`, a pickle, describes for tensor-parallel rank `rank`.

    Raises `PayloadRefused` for anything but the payloads that this module names.
    """
    return _Records(rank).read(data)


class _Records:
    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._budget = Budget()
        self._storages: dict[Node, Storage] = {}

    def read(self, data: bytes) -> Payload:
        value = read_stream(data, known_global, self._budget)
        if isinstance(value, Node) and value.kind == "dict":
            return self._bucket(_fields(value, "a bucket", ("flattened_tensor", "metadata")))
        pairs = [_pair(item) for item in _items(value, "named tensors", MAX_TENSORS, "list")]
        tensors = [(name, self._tensor_of(name, tensor)) for name, tensor in pairs]
        return Payload(tensors=tensors, metadata=None)

    def _bucket(self, fields: dict[str, Value]) -> Payload:
        name = "flattened_tensor"
        flattened = self._tensor_of(name, fields[name])
        entries = _items(fields["metadata"], "metadata", MAX_TENSORS, "list")
        return Payload(
            tensors=[(name, flattened)], metadata=[_metadata(entry) for entry in entries]
        )

    def _tensor_of(self, name: str, value: Value) -> TensorRecord:
        if isinstance(value, Node) and value.kind == "instance":
            value = self._own_part(name, value)
        if _is_call(value, "rebuild_tensor"):
            return self._cpu_tensor(name, value)
        if _is_call(value, "rebuild_cuda_tensor"):
            return self._gpu_tensor(name, value)
        raise _refusal(f"{_what(value)} for {name[:80]}", "a tensor in shared memory")

    def _own_part(self, name: str, node: Node) -> Value:
        """What a `LocalSerializedTensor` holds for this rank: a payload of its own, which is one tensor."""
        if node.of is not _COPIED["LocalSerializedTensor"] or not node.items:
            raise _refusal(f"{_what(node)} for {name[:80]}", "a tensor in shared memory")
        fields = _fields(node.items[0], "LocalSerializedTensor", ("values",))
        values = _items(fields["values"], "values of every rank", MAX_RANKS, "list")
        if self._rank >= len(values):
            raise _refusal(
                f"values of {len(values)} ranks for {name[:80]}", f"one for rank {self._rank}"
            )
        part = values[self._rank]
        if not isinstance(part, bytes):
            raise _refusal(f"{_what(part)} for {name[:80]}", "a payload of one rank")
        return read_stream(part, known_global, self._budget)

    def _cpu_tensor(self, name: str, node: Node) -> TensorRecord:
        kind, storage, metadata = _arguments(node, 3)
        _check_kind(kind)
        if not _is_call(storage, "rebuild_typed_storage"):
            raise _refusal(f"{_what(storage)} for {name[:80]}", "a storage with a dtype")
        untyped, dtype = _arguments(storage, 2)
        offset, shape, stride, _requires_grad = _items(metadata, "a tensor's place", 4, "tuple", 4)
        return _tensor(name, self._storage_of(untyped), dtype, shape, stride, offset)

    def _gpu_tensor(self, name: str, node: Node) -> TensorRecord:
        arguments = _arguments(node, 15)
        kind, shape, stride, offset, _storage_kind, dtype = arguments[:6]
        _check_kind(kind)
        storage = self._once(node, lambda: _gpu_storage(arguments))
        return _tensor(name, storage, dtype, shape, stride, offset)

    def _storage_of(self, value: Value) -> Storage:
        if _is_call(value, "rebuild_storage_empty"):
            return Segment(name="", num_bytes=0)
        if _is_call(value, "rebuild_storage_fd"):
            raise PayloadRefused(
                "cannot read serialized tensors: got rebuild_storage_fd (torch's sharing strategy 'file_descriptor'), "
                "whose descriptors only child processes of the sender can ask for; expected 'file_system': call "
                "torch.multiprocessing.set_sharing_strategy('file_system') in the trainer"
            )
        if not _is_call(value, "rebuild_storage_filename"):
            raise _refusal(_what(value), "a storage in shared memory")
        return self._once(value, lambda: _segment(value))

    def _once(self, node: Node, make: Callable[[], Storage]) -> Storage:
        # What is referred to twice was shared once, and is given back once.
        found = self._storages.get(node)
        if found is None:
            found = self._storages[node] = make()
        return found


def _segment(node: Node) -> Segment:
    _kind, _manager, name, size = _arguments(node, 4)
    num_bytes = _integer(size, "bytes of a storage", MAX_ARENA_BYTES)
    return Segment(name=_segment_name(name), num_bytes=num_bytes)


def _segment_name(value: Value) -> str:
    if not isinstance(value, bytes) or not _SEGMENT.fullmatch(value):
        shown = repr(value[:80]) if isinstance(value, bytes) else _what(value)
        raise _refusal(f"{shown} as a file of shared memory", "one named by torch, /torch_*_*_*")
    return value.decode()


def _gpu_storage(arguments: Sequence[Value]) -> GpuStorage:
    """From the arguments of `rebuild_cuda_tensor`, from the seventh on."""
    device, handle, size, offset = arguments[6:10]
    counters, counter, event, must_wait = arguments[11:15]
    num_bytes = _integer(size, "bytes of a storage", MAX_ARENA_BYTES)
    if isinstance(device, str):
        number: int | str = device.removeprefix("GPU-").replace("-", "").lower()
        if not re.fullmatch("[0-9a-f]{32}", str(number)):
            raise _refusal(f"{device[:80]!r} as a GPU", "its number or UUID")
    else:
        number = _integer(device, "a GPU", 1024)
    if handle is None or num_bytes == 0:
        return GpuStorage(
            device=number, handle=b"", offset=0, num_bytes=0, counters="", counter=0, event=b"", must_wait=False
        )  # fmt: skip
    waits = must_wait is True
    if waits and not (isinstance(event, bytes) and len(event) == CUDA_HANDLE_BYTES):
        raise _refusal(f"{_what(event)} as an event of a GPU", f"{CUDA_HANDLE_BYTES} bytes")
    return GpuStorage(
        device=number,
        handle=_cuda_handle(handle),
        offset=_integer(offset, "a storage's first byte", MAX_ARENA_BYTES),
        num_bytes=num_bytes,
        counters=_segment_name(counters),
        counter=_integer(counter, "a reference counter", COUNTERS),
        event=event if waits and isinstance(event, bytes) else b"",
        must_wait=waits,
    )


def _cuda_handle(value: Value) -> bytes:
    """The driver's handle; torch puts a version and the kind of memory in front of it."""
    if isinstance(value, bytes):
        if len(value) == CUDA_HANDLE_BYTES:
            return value
        if len(value) == CUDA_HANDLE_BYTES + 2 and value[1:2] == b"c":
            return value[2:]
        if value[1:2] == b"e":
            raise _refusal(
                "memory of expandable segments, which has no such handle,",
                "plain memory: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False in the trainer",
            )
    raise _refusal(
        f"{_what(value)} as a handle of GPU memory", f"{CUDA_HANDLE_BYTES} bytes, as torch sends"
    )


def _tensor(
    name: str, storage: Storage, dtype: Value, shape: Value, stride: Value, offset: Value
) -> TensorRecord:  # fmt: skip
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise _refusal(f"{_what(dtype)} as a dtype", "one of torch")
    sizes = _sizes(shape)
    record = TensorRecord(
        storage=storage,
        dtype=DTYPES[dtype.name],
        shape=sizes,
        stride=_integers(stride, "strides", len(sizes)),
        offset=_integer(offset, "a tensor's first element", MAX_ARENA_BYTES),
    )
    _start, end = record.extent
    needed = math.prod(sizes) * record.dtype.itemsize
    if end > storage.num_bytes:
        raise _refusal(
            f"{name[:80]} up to byte {end} of a storage of {storage.num_bytes} bytes",
            "a tensor inside its storage",
        )
    if needed > storage.num_bytes:
        raise _refusal(
            f"{name[:80]} with {needed} bytes of elements over a storage of {storage.num_bytes} bytes (expanded)",
            "a tensor of its own, as .contiguous() makes it",
        )
    return record


def _metadata(value: Value) -> dict[str, Any]:
    if isinstance(value, Node) and value.kind == "instance" and value.items:
        if value.of is not _COPIED["FlattenedTensorMetadata"]:
            raise _refusal(f"{_what(value)} in the metadata", "FlattenedTensorMetadata")
        value = value.items[0]
    names = ("name", "shape", "dtype", "start_idx", "end_idx", "numel")
    fields = _fields(value, "FlattenedTensorMetadata", names)
    dtype = fields["dtype"]
    start, end = (_integer(fields[key], key, MAX_ARENA_BYTES) for key in ("start_idx", "end_idx"))
    return {
        "name": _name(fields["name"]),
        "shape": _sizes(fields["shape"]),
        "dtype": dtype.name if isinstance(dtype, Global) else dtype,
        "start_idx": start,
        "end_idx": end,
    }


# ---- shapes of values ------------------------------------------------------------------------------------------------


def _is_call(value: Value, name: str) -> TypeGuard[Node]:
    return isinstance(value, Node) and value.kind == "call" and value.of == Global(name, "function")


def _arguments(node: Node, count: int) -> list[Value]:
    if len(node.items) != count:
        raise _refusal(f"{_what(node)} with {len(node.items)} arguments", f"{count}")
    return node.items


def _items(
    value: Value, what: str, most: int, kind: Literal["list", "tuple"], exactly: int | None = None
) -> list[Value]:
    if not isinstance(value, Node) or value.kind not in ("list", "tuple"):
        raise _refusal(f"{_what(value)} as {what}", f"a {kind}")
    if len(value.items) > most or (exactly is not None and len(value.items) != exactly):
        wanted = f"at most {most}" if exactly is None else f"{exactly}"
        raise _refusal(f"{len(value.items)} items as {what}", wanted)
    return value.items


def _fields(value: Value, what: str, names: Sequence[str]) -> dict[str, Value]:
    if not isinstance(value, Node) or value.kind != "dict":
        raise _refusal(f"{_what(value)} as {what}", "a mapping")
    keys, values = value.items[::2], value.items[1::2]
    if len(keys) != len(names) or {key for key in keys if isinstance(key, str)} != set(names):
        shown = [key[:40] if isinstance(key, str) else _what(key) for key in keys[:8]]
        raise _refusal(f"the keys {shown} in {what}", f"{list(names)}")
    return {key: item for key, item in zip(keys, values, strict=True) if isinstance(key, str)}


def _pair(value: Value) -> tuple[str, Value]:
    name, tensor = _items(value, "a name and its tensor", 2, "tuple", 2)
    return _name(name), tensor


def _name(value: Value) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME_LENGTH:
        raise _refusal(
            f"{_what(value)} as a tensor's name", f"at most {MAX_NAME_LENGTH} characters"
        )
    return value


def _sizes(value: Value) -> tuple[int, ...]:
    if _is_call(value, "Size"):
        (value,) = _arguments(value, 1)
    return _integers(value, "a shape")


def _integers(value: Value, what: str, count: int | None = None) -> tuple[int, ...]:
    items = _items(value, what, MAX_DIMS, "tuple", count)
    return tuple(_integer(item, what, MAX_ARENA_BYTES) for item in items)


def _integer(value: Value, what: str, below: int) -> int:
    if type(value) is not int or not 0 <= value < below:
        shown = value if type(value) is int else _what(value)
        raise _refusal(f"{shown} as {what}", f"an integer from 0, below {below}")
    return value


def _check_kind(value: Value) -> None:
    if not isinstance(value, Global) or value.name not in ("Tensor", "Parameter"):
        raise _refusal(f"{_what(value)} as a tensor's class", "Tensor or Parameter")


def _what(value: Value) -> str:
    if isinstance(value, Global):
        return value.name
    if isinstance(value, Node):
        return f"a {value.kind}" + (f" of {value.of.name}" if value.of else "")
    return f"a {type(value).__name__}"


def _refusal(got: str, expected: str) -> PayloadRefused:
    return PayloadRefused(
        f"cannot read serialized tensors: got {got}, expected {expected}; nothing was executed. Send [(name, tensor)] "
        "or a flattened bucket, by ForkingPickler"
    )
