"""A dict of tensors and plain values as a typed header and one buffer."""

from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta

from weight_sync.layout.manifest import align, dtype_name, parse_dtype

TensorDict = dict[str, Any]
"""Names to tensors, or to plain values: None, bool, int, float, str, bytes, and lists and dicts of them."""

Size = Annotated[int, Meta(ge=0, lt=2**48)]


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="t"):
    """A tensor of the dict."""

    shape: tuple[Size, ...]
    """Its shape."""
    dtype: str
    """Its dtype, such as "bfloat16"."""


class PlainEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="p"):
    """Any other value of the dict."""

    value: Any
    """The value itself."""


class TensorDictHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the receiver must know before the buffer comes."""

    entries: dict[str, TensorEntry | PlainEntry]
    """In the order of the dict, which is that of the buffer."""
    num_bytes: Size
    """Size of the buffer."""


def header_of(values: TensorDict) -> TensorDictHeader:
    """The header of `values`."""
    entries: dict[str, TensorEntry | PlainEntry] = {}
    num_bytes = 0
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            entries[name] = TensorEntry(shape=tuple(value.shape), dtype=dtype_name(value.dtype))
            num_bytes += align(value.nbytes)
        else:
            entries[name] = PlainEntry(value=value)
    return TensorDictHeader(entries=entries, num_bytes=num_bytes)


def pack(values: TensorDict, device: torch.device) -> torch.Tensor:
    """The tensors of `values` in one buffer, each at an aligned offset."""
    tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
    buffer = torch.empty(sum(align(t.nbytes) for t in tensors), dtype=torch.uint8, device=device)
    start = 0
    for tensor in tensors:
        view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        start += align(tensor.nbytes)
    return buffer


def unpack(header: TensorDictHeader, buffer: torch.Tensor) -> TensorDict:
    """The dict again; its tensors are views of `buffer`."""
    values: TensorDict = {}
    start = 0
    for name, entry in header.entries.items():
        if isinstance(entry, PlainEntry):
            values[name] = entry.value
            continue
        dtype = parse_dtype(entry.dtype)
        num_bytes = dtype.itemsize * torch.Size(entry.shape).numel()
        values[name] = buffer[start : start + num_bytes].view(dtype).view(entry.shape)
        start += align(num_bytes)
    return values
