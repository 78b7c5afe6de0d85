"""Tensors in a request: typed records of name, dtype and shape, with their bytes, or with where these lie.

MessagePack carries bytes as they are; in JSON they are base64. On one machine they may stay in shared memory: a file
below /dev/shm that belongs to the user of this server, of which the bytes are read and never mapped, so that whoever
shortens it meanwhile harms nobody.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta

from weight_sync.errors import ManifestMismatch
from weight_sync.layout.bucket import FlattenedTensorBucket
from weight_sync.layout.manifest import parse_dtype

from ..errors import InvalidRequestError

_SHM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_SHM_FOLDER = "/dev/shm"
_MOST_DIMS = 16
NamedTensors = list[tuple[str, torch.Tensor]]


class SharedMemory(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Bytes in POSIX shared memory of this machine."""

    shm: str
    """Its name, without a folder."""
    offset: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    """First byte."""
    num_bytes: Annotated[int, Meta(ge=0, lt=1 << 62)]
    """How many."""


class TensorRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One tensor, contiguous, little-endian."""

    name: Annotated[str, Meta(max_length=512)]
    """Its Hugging Face name."""
    dtype: str
    """Such as "bfloat16"."""
    shape: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 62)]], Meta(max_length=_MOST_DIMS)]
    data: bytes | SharedMemory
    """Its bytes."""


def named_tensors(
    records: Sequence[TensorRecord] | None,
    flattened: bytes | SharedMemory | None,
    metadata: Sequence[dict[str, Any]] | None,
) -> NamedTensors:
    """The tensors of a request, from records or from the parts of a bucket; `InvalidRequestError` for neither or both.

    `ManifestMismatch` where bytes, dtypes and shapes do not fit together.
    """
    if (records is None) == (flattened is None):
        raise InvalidRequestError(
            "expected either `tensors`, or `flattened_tensor` with its `metadata`"
        )
    if records is not None:
        return [(record.name, _tensor(record)) for record in records]
    content = _bytes(flattened)
    buffer = (
        torch.frombuffer(content, dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
    )
    try:
        bucket = FlattenedTensorBucket(flattened_tensor=buffer, metadata=list(metadata or ()))
    except ManifestMismatch:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidRequestError(f"metadata: cannot be read: {error}") from None
    return list(bucket.reconstruct_tensors())


def _tensor(record: TensorRecord) -> torch.Tensor:
    try:
        dtype = parse_dtype(record.dtype)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{record.name}: {error}") from None
    content = _bytes(record.data)
    expected = math.prod(record.shape) * dtype.itemsize
    if len(content) != expected:
        raise ManifestMismatch(
            f"{record.name}: got {len(content):,} bytes, expected {expected:,} for {record.dtype} {record.shape}"
        )
    try:
        if not content:
            return torch.empty(record.shape, dtype=dtype)
        return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(record.shape)
    except RuntimeError as error:  # No elements, and more along a dimension than can be counted.
        raise ManifestMismatch(
            f"{record.name}: no tensor has shape {record.shape}: {error}"
        ) from None


def _bytes(data: bytes | SharedMemory | None) -> bytearray:
    """A copy that may be written to, which is what torch wants to see."""
    if isinstance(data, SharedMemory):
        return _read_shared(data)
    return bytearray(data or b"")


def _read_shared(place: SharedMemory) -> bytearray:
    if not _SHM_NAME.fullmatch(place.shm):
        raise InvalidRequestError(f"shm: got {place.shm[:100]!r}, expected the name of a segment")
    try:
        fd = os.open(
            f"{_SHM_FOLDER}/{place.shm}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        )
    except OSError as error:
        raise InvalidRequestError(f"shm {place.shm!r}: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise InvalidRequestError(f"shm {place.shm!r}: expected a segment of this user's")
        if place.offset + place.num_bytes > found.st_size:
            raise InvalidRequestError(
                f"shm {place.shm!r}: got {place.num_bytes:,} bytes at {place.offset:,}, expected them within its "
                f"{found.st_size:,}"
            )
        content = bytearray(place.num_bytes)
        done = 0
        while done < place.num_bytes:
            read = os.preadv(fd, [memoryview(content)[done:]], place.offset + done)
            if not read:
                raise InvalidRequestError(f"shm {place.shm!r}: ended while it was read")
            done += read
        return content
    finally:
        os.close(fd)
