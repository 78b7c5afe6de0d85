"""`serialized_named_tensors`: what trainers of the common dialect send, read without unpickling."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from ..errors import PayloadRefused
from ..layout.bucket import FlattenedTensorBucket
from .gpu_storages import count_down, read_gpu_storages
from .records import MAX_RANKS, GpuStorage, Payload, Segment, Storage, TensorRecord, read_records
from .segments import SegmentFile, read_segment

MAX_PAYLOAD_BYTES = 64 << 20
"""Of one payload; it holds handles, no weights: a tensor takes about 350 bytes."""

_ALIGNMENT = 16
"""Bytes; any dtype can be viewed from a multiple of it on."""

Serialized = bytes | str


def read_serialized_named_tensors(
    payload: Serialized | Sequence[Serialized], rank: int = 0
) -> list[tuple[str, torch.Tensor]]:
    """The named tensors of a payload: copies, of any dtype and shape, on the CPU or on the GPU of the sender's.

    payload: a pickle by `ForkingPickler`, as bytes or in base64, of `[(name, tensor)]` or of a flattened bucket
        (`{"flattened_tensor", "metadata"}`); or a list of those, one for each tensor-parallel rank of the engine.
    rank: whose of a list is read, and whose part of a `LocalSerializedTensor`. The others are only given back, so that
        their senders' memory is free again: one reader reads for all ranks.

    Nothing is unpickled: the stream's opcodes and globals are on a list, and so are the shapes of what they describe;
    sizes, strides and handles are checked against the memory itself before it is read. A payload is read once: its
    sender's memory is released then. Call it on the machine of the trainer, as the same user.

    Raises `PayloadRefused` (a `WeightUpdateError` and `ValueError`) for what is no such payload, naming the opcode,
    global or value that is wrong; `TransportError` where the shared memory cannot be opened or is not what it claims;
    `ManifestMismatch` where a bucket's metadata do not fit. Nothing has been read or released in the first case.
    """
    serialized: list[Any] = [*payload] if isinstance(payload, list | tuple) else [payload]
    if not 0 <= rank < len(serialized) <= MAX_RANKS:
        raise PayloadRefused(
            f"cannot read serialized tensors: got {len(serialized)} payloads, expected one for each rank, rank {rank} "
            "with them; send a list with one entry per tensor-parallel rank"
        )
    for data in serialized:
        _check(data)
    distinct = {data: read_records(_pickle_of(data), rank) for data in dict.fromkeys(serialized)}
    own = distinct.pop(serialized[rank])
    tensors = _read(own)
    for other in distinct.values():
        _give_back(other)
    return tensors


def _check(data: Serialized) -> None:
    if not isinstance(data, bytes | str):
        raise PayloadRefused(
            f"cannot read serialized tensors: got a {type(data).__name__}, expected bytes, or text in base64"
        )
    if len(data) > MAX_PAYLOAD_BYTES:
        raise PayloadRefused(
            f"cannot read serialized tensors: got {len(data)} bytes, expected at most {MAX_PAYLOAD_BYTES}; a payload "
            "holds handles of shared memory, send fewer tensors in one"
        )


def _pickle_of(data: Serialized) -> bytes:
    if isinstance(data, bytes) and not data.isascii():
        return data
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PayloadRefused(
            f"cannot read serialized tensors: got text that is not base64 ({error}); send the pickle's bytes, or their "
            "base64"
        ) from None


def _read(payload: Payload) -> list[tuple[str, torch.Tensor]]:
    ranges = _ranges([record for _, record in payload.tensors])
    copies = {
        key: read_segment(storage, start, end)
        for key, (storage, start, end) in ranges.items()
        if isinstance(storage, Segment)
    }
    copies.update(read_gpu_storages({k: r for k, r in ranges.items() if k not in copies}))
    named = [
        (name, _view(record, copies[record.storage.key], ranges[record.storage.key][1]))
        for name, record in payload.tensors
    ]
    if payload.metadata is not None:
        bucket = FlattenedTensorBucket(flattened_tensor=named[0][1], metadata=payload.metadata)
        named = bucket.reconstruct_tensors()
    _give_back(payload)
    return named


def _ranges(records: Sequence[TensorRecord]) -> dict[Hashable, tuple[Storage, int, int]]:
    """Which bytes tensors need of every storage; each is read once, however many tensors lie in it."""
    found: dict[Hashable, tuple[Storage, int, int]] = {}
    for record in records:
        start, end = record.extent
        start -= start % _ALIGNMENT
        _, first, last = found.get(record.storage.key, (record.storage, start, end))
        if start < end and first < last:
            start, end = min(first, start), max(last, end)
        elif first < last:
            start, end = first, last
        found[record.storage.key] = record.storage, start, end
    return found


def _view(record: TensorRecord, raw: torch.Tensor, start: int) -> torch.Tensor:
    """The tensor of `record` in `raw`, the bytes of its storage from `start` on."""
    size = record.dtype.itemsize
    if 0 in record.shape:
        return torch.empty(record.shape, dtype=record.dtype, device=raw.device)
    typed = raw[: raw.numel() // size * size].view(record.dtype)
    return typed.as_strided(record.shape, record.stride, record.offset - start // size)


def _give_back(payload: Payload) -> None:
    references: Counter[str] = Counter()
    storages = dict.fromkeys(record.storage for _, record in payload.tensors)
    for storage in storages:
        if isinstance(storage, GpuStorage):
            count_down(storage)
        elif storage.name:
            references[storage.name] += 1
    for name, count in references.items():
        with SegmentFile(name, 0) as file:
            file.give_back(count)
