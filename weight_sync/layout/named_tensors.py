"""Tensors with their names, as trainers have them: a module, a mapping, or (name, tensor) pairs in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ManifestMismatch

NamedTensors = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
"""Hugging Face names: of a module's parameters, of a mapping, or of pairs."""

_PLAIN = (torch.Tensor, nn.Parameter)
OFFSETS = 1 << 40
"""Bytes of which no tensor is an offset: what has a higher address than that is somewhere (see `is_nowhere`)."""
_BUFFERS = ("e_score_correction_bias",)


def named_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's parameters, and the buffers that are weights although no optimiser moves them: routers' biases."""
    yield from module.named_parameters()
    for name, buffer in module.named_buffers():
        if name.endswith(_BUFFERS):
            yield name, buffer


def pairs_of(source: NamedTensors) -> Iterable[tuple[str, torch.Tensor]]:
    """The pairs, not looked at: a list where all tensors exist at once, else what was given.

    `ManifestMismatch` for what can hold none.
    """
    if isinstance(source, nn.Module):
        return list(named_weights(source))
    if isinstance(source, Mapping):
        return list(source.items())
    if isinstance(source, tuple):
        return list(source)
    if isinstance(source, (str, bytes, Path, torch.Tensor)) or not isinstance(source, Iterable):
        raise ManifestMismatch(
            f"named_tensors: got {type(source).__name__} {str(source)[:60]!r}, expected a module, a mapping, or "
            "(name, tensor) pairs; a checkpoint's folder goes to update_weights_from_disk"
        )
    return source


def checked_pair(item: Any) -> tuple[str, torch.Tensor]:
    """One of them; `ManifestMismatch` for anything else."""
    try:
        name, tensor = item
    except (TypeError, ValueError):
        name, tensor = None, None
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise ManifestMismatch(
            f"not a named tensor: got {type(item).__name__} of ({type(name).__name__}, "
            f"{type(tensor).__name__}), expected (str, torch.Tensor); pass a module, a mapping or pairs"
        )
    return name, tensor


def unreadable(tensor: torch.Tensor) -> str | None:
    """Why a tensor's elements cannot be read, as words behind "a tensor"; None: they can."""
    if tensor.is_nested:
        return "that is nested"
    if tensor.is_meta:
        return "without data (device meta)"
    if tensor.layout is not torch.strided:
        return f"with {tensor.layout}"
    if type(tensor) not in _PLAIN and hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if type(tensor) in _PLAIN and tensor.numel() and is_nowhere(tensor):
        return "whose memory was given back (its storage was resized)"
    return None


def is_nowhere(tensor: torch.Tensor) -> bool:
    """Whether there is no memory behind a tensor: its address is its offset then, which need not be 0. Also of an empty
    one."""
    return tensor.data_ptr() == tensor.storage_offset() * tensor.element_size()


def readable_pair(item: Any) -> tuple[str, torch.Tensor]:
    """One of them; `ManifestMismatch` also for a tensor whose elements cannot be read, which may end the process."""
    name, tensor = checked_pair(item)
    why = unreadable(tensor)
    if why is not None:
        raise ManifestMismatch(
            f"{name}: got a tensor {why}, expected a dense one with data; bring it back first"
        )
    return name, tensor
