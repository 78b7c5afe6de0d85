"""Fingerprints of tensors, arenas and models; `rollout_kernels.fingerprint` defines the sum that they are.

A model's fingerprint is the sum over its tensors of an odd key of the name times the tensor's value, modulo 2^64. Like
the tensors' own it is linear: ranks that hold shards add up to the whole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from rollout_kernels.span_table import ByteSpan, SpanTable

from . import region as regions
from .device_sums import device_sums
from .manifest import Manifest, TensorMeta
from .mesh_fingerprint import MeshSums
from .named_tensors import NamedTensors, named_weights, pairs_of, readable_pair
from .shards import is_distributed
from .spellings import canonical
from .tensor_sums import MASK, combine, name_key, region_sum, unsigned

Indices = Sequence[int] | np.ndarray

_BATCH_BYTES = 64 << 20
_DIRECT_BYTES = 1 << 20
_CACHED_ARENAS = 4


@torch.no_grad()
def fingerprint(
    source: NamedTensors, *, dtypes: Mapping[str, torch.dtype] | torch.dtype | None = None
) -> int:
    """The fingerprint of a module's parameters, or of named tensors: what the engine's must be after a sync.

    A module counts each parameter once, under its first name (tied weights), and routers' biases among its buffers. Of
    named tensors every name counts; they may come from an iterator that reuses its memory. Experts count under the
    names of `spellings`, however they are held. `dtypes` is what the engine holds, where it is not what the
    trainer holds: by name, or one for all floating-point tensors; values are converted as a sync converts them.

    DTensors are not gathered: every rank of their mesh calls this at the same point, counts its own shards, and one
    number is added up over the mesh. Plain tensors beside them count on every rank as what they are.
    """
    meshes = MeshSums()
    total = 0
    batch: list[tuple[str, torch.Tensor]] = []
    size = 0
    reused = not isinstance(source, nn.Module | Mapping | list | tuple)
    named = _named(source)
    if not reused:
        done, named = _on_gpus(named, dtypes)
        total += done
    for name, tensor in named:
        dtype = _held_dtype(name, tensor, dtypes)
        if is_distributed(tensor):
            meshes.add(name, tensor, dtype)
            continue
        num_bytes = tensor.numel() * dtype.itemsize
        if num_bytes >= _DIRECT_BYTES:
            total += name_key(name) * unsigned(_whole_sum(tensor.detach().to(dtype)))
            continue
        held = tensor.detach().to(dtype, copy=reused)
        batch.append((name, held))
        size += num_bytes
        if size >= _BATCH_BYTES:
            total += _batch_sum(batch)
            batch, size = [], 0
    return (total + _batch_sum(batch) + meshes.total()) & MASK


class ArenaFingerprints:
    """The fingerprints of every tensor in an arena that is laid out by `manifest`.

    Compiled once per device and per set of tensors asked for, then a few operations whatever their number.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._spans = [
            ByteSpan(offset=offset, num_bytes=meta.num_bytes, output=i)
            for i, (meta, offset) in enumerate(zip(manifest.tensors, manifest.offsets, strict=True))
        ]
        self._tables: dict[torch.device, SubsetSums] = {}

    def values(self, buffer: torch.Tensor, indices: Indices | None = None) -> torch.Tensor:
        """One value per tensor of the manifest, or per index in the order given; int64 on the CPU.

        `buffer`: uint8, contiguous, at least `arena_bytes` long. The call returns when it has been read.
        """
        tables = self._tables.get(buffer.device)
        if tables is None:
            num = len(self.manifest.tensors)
            tables = SubsetSums(self._spans, num_outputs=num, device=buffer.device)
            self._tables[buffer.device] = tables
        words = buffer[: self.manifest.arena_bytes].view(torch.int64)
        return tables.sums(words, indices).cpu()


class SubsetSums:
    """ByteSpan tables of one buffer: of all outputs, and of those subsets that were asked for lately."""

    def __init__(
        self, spans: Sequence[ByteSpan], *, num_outputs: int, device: torch.device
    ) -> None:
        self._spans = spans
        self._num_outputs = num_outputs
        self._device = device
        self._all: SpanTable | None = None
        self._some: OrderedDict[bytes, tuple[SpanTable, int]] = OrderedDict()
        self._cached_bytes = 0
        self._most_bytes = _CACHED_ARENAS * sum(span.num_bytes for span in spans)

    def sums(self, words: torch.Tensor, indices: Indices | None = None) -> torch.Tensor:
        """One sum per output, or per index in the order given; int64 on the buffer's device."""
        if indices is None:
            if self._all is None:
                self._all = SpanTable(
                    self._spans, num_outputs=self._num_outputs, device=self._device
                )
            return self._all.sums(words)
        wanted, order = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        result = self._table(wanted).sums(words)
        if np.array_equal(order, np.arange(len(order))):
            return result
        return result[torch.from_numpy(order).to(result.device)]

    def _table(self, wanted: np.ndarray) -> SpanTable:
        key = wanted.tobytes()
        if key in self._some:
            self._some.move_to_end(key)
            return self._some[key][0]
        number = np.full(self._num_outputs, -1, dtype=np.int64)
        number[wanted] = np.arange(len(wanted))
        outputs = number.tolist()
        spans = [
            replace(span, output=outputs[span.output])
            for span in self._spans
            if outputs[span.output] >= 0
        ]
        table = SpanTable(spans, num_outputs=len(wanted), device=self._device)
        size = sum(span.num_bytes for span in spans)
        self._some[key] = table, size
        self._cached_bytes += size
        while self._cached_bytes > self._most_bytes and len(self._some) > 1:
            self._cached_bytes -= self._some.popitem(last=False)[1][1]
        return table


def _on_gpus(
    named: Iterable[tuple[str, torch.Tensor]],
    dtypes: Mapping[str, torch.dtype] | torch.dtype | None,
) -> tuple[int, Iterable[tuple[str, torch.Tensor]]]:
    """What the tensors that are whole on a GPU add up to, and all the others."""
    names: list[str] = []  # No pair is kept: thousands of new objects are work for the collector.
    tensors: list[torch.Tensor] = []
    here: list[int] = []
    for name, tensor in named:
        if not is_distributed(tensor):
            here.append(len(names))
        names.append(name)
        tensors.append(tensor)
    held = [_held_dtype(names[i], tensors[i], dtypes) for i in here]
    numbers, values = device_sums([tensors[i] for i in here], held)
    found = np.array(here, dtype=np.int64)[numbers]
    keys = (name_key(names[i]) for i in found.tolist())
    total = (np.fromiter(keys, dtype=np.uint64, count=len(found)) * values).sum()
    left = np.ones(len(names), dtype=bool)
    left[found] = False
    others = np.flatnonzero(left).tolist()
    return int(total), ((names[i], tensors[i]) for i in others)


def _named(source: NamedTensors) -> Iterable[tuple[str, torch.Tensor]]:
    if isinstance(source, nn.Module):
        pairs: Iterable[tuple[str, torch.Tensor]] = _unique_parameters(source)
    else:
        pairs = source.items() if type(source) is dict else pairs_of(source)
    return canonical(map(readable_pair, pairs))


def _unique_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    # Tied weights are one `Parameter` under two names as a rule, but also two views of one storage.
    seen: set[tuple[torch.device, int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in named_weights(module):
        held = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if held.numel():
            key = (held.device, held.data_ptr(), tuple(held.shape), held.stride())
            if key in seen:
                continue
            seen.add(key)
        yield name, tensor


def _held_dtype(
    name: str, tensor: torch.Tensor, dtypes: Mapping[str, torch.dtype] | torch.dtype | None
) -> torch.dtype:
    if dtypes is None:
        return tensor.dtype
    if isinstance(dtypes, Mapping):
        return dtypes.get(name, tensor.dtype)
    return dtypes if tensor.is_floating_point() else tensor.dtype


def _whole_sum(tensor: torch.Tensor) -> torch.Tensor:
    return region_sum(tensor, tensor.shape, regions.whole(tensor.shape))


def _batch_sum(batch: Sequence[tuple[str, torch.Tensor]]) -> int:
    """The model sum of many small tensors: packed into one arena per device, read in one go."""
    total = 0
    for device in {tensor.device for _, tensor in batch}:
        here = [(name, tensor) for name, tensor in batch if tensor.device == device]
        # Positions stand in for names, which an iterable may repeat.
        metas = tuple(TensorMeta.of(str(i), tensor) for i, (_, tensor) in enumerate(here))
        manifest = Manifest(tensors=metas, bucket_bytes=_BATCH_BYTES)
        buffer = torch.empty(manifest.arena_bytes, dtype=torch.uint8, device=device)
        torch._foreach_copy_(manifest.views(buffer), [tensor for _, tensor in here])
        values = ArenaFingerprints(manifest).values(buffer)
        total += combine([name for name, _ in here], values)
    return total
