"""The compiled update: from the bytes of an arena to the memory of a model, and the fingerprints of both ends.

Everything that depends on names and shapes is worked out once per (manifest, model). After that an update is a few
operations: ranges that are neighbours at both ends are one copy, and fingerprints are tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from rollout_kernels.copy_pieces import Piece, make_piece
from rollout_kernels.copy_table import CopyTable
from rollout_kernels.span_table import ByteSpan

from ..errors import ManifestMismatch
from ..layout import region as regions
from ..layout.encoding import FULL, Encoding
from ..layout.fingerprints import ArenaFingerprints, Indices, SubsetSums
from ..layout.manifest import Manifest, dtype_name, mismatch
from ..layout.memory import Storage, byte_range, storage_key, storage_view, writable
from ..layout.tensor_sums import region_sum
from ..layout.weight_map import Located, Placement, WeightMap
from .copies import Copy, StorageTable
from .decoding import decoder_of
from .read_back import ReadBackCopies


def compile_plan(manifest: Manifest, weight_map: WeightMap, encoding: Encoding = FULL) -> Plan:
    """The plan that writes an arena laid out by `manifest` into the model of `weight_map`.

    The manifest may name any of the model's tensors, in any order, aliases and fused names too, each as `encoding`
    carries it. `ManifestMismatch` lists every tensor that is unknown, of another shape or dtype, or given under two
    names.
    """
    located: list[Located] = []
    problems: list[str] = []
    taken: dict[str, str] = {}
    for meta in manifest.tensors:
        if weight_map.is_ignored(meta.name) and meta.name not in weight_map.names:
            problems.append(f"{meta.name}: got a tensor that this model ignores; leave it out")
            continue
        try:
            here = weight_map.locate(meta.name)
        except ManifestMismatch:
            problems.append(f"{meta.name}: unknown to this model")
            continue
        expected = encoding.carried(here.meta)
        if (meta.shape, meta.dtype) != (expected.shape, expected.dtype):
            problems.append(
                f"{meta.name}: got {dtype_name(meta.dtype)} {list(meta.shape)}, "
                f"expected {dtype_name(expected.dtype)} {list(expected.shape)}"
            )
        for name in here.canonical:
            if taken.setdefault(name, meta.name) != meta.name:
                problems.append(f"{meta.name}: holds {name}, which {taken[name]} holds as well")
        located.append(here)
    if problems:
        raise mismatch(
            "the manifest does not fit the model",
            problems,
            "send each tensor once, under its Hugging Face name, in the engine's shape and dtype",
        )
    return Plan(manifest, located, weight_map, encoding)


class Plan:
    """One manifest against one model, on one rank; made by `compile_plan`.

    Holds the parameters' memory, by views that stay valid. Not safe for two threads at once on one method; staging
    and resident calls may overlap.
    """

    def __init__(
        self,
        manifest: Manifest,
        located: Sequence[Located],
        weight_map: WeightMap,
        encoding: Encoding,
    ) -> None:
        self.manifest = manifest
        """The arena's layout: what travels."""
        self.encoding = encoding
        """How it becomes the parameters."""
        self.placements = tuple(here.placements for here in located)
        """Where the parts of each tensor are that this rank holds."""
        self._staged = ArenaFingerprints(manifest)
        self._resident = PlacedSums(self.placements)
        self.copies = tuple(
            Copy(index=i, region=placement.region, destination=memory, resident=memory)
            for i, here in enumerate(located)
            for placement in here.placements
            if placement.destination.numel()
            for memory in (writable(placement.destination),)
        )
        """The table: what a replay copies, before neighbours are joined."""
        self._decoder = decoder_of(encoding, manifest, self.copies, weight_map.occupied())
        self._devices = {copy.destination.device for copy in self.copies}
        self._read_back: ReadBackCopies | None = None

    def replay(self, stage: torch.Tensor, present: Indices | None = None) -> None:
        """Write the arena `stage` (uint8) into the parameters; only the tensors `present`, unless it is None.

        Returns when every copy was issued: on CUDA the caller records an event and waits for it before it lets go of
        the stage. Padding between parameters may be written too, where both ends have it.
        """
        self._decoder.run(stage, present)

    def replay_and_read(self, stage: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As `replay` of everything; what it returns has `resident_fingerprints()` of what was written, once.

        On the parameters' own GPU they are read back behind the write, in its pass over the bytes.
        """
        if not (stage.is_cuda and self.encoding.verbatim and self._devices == {stage.device}):
            self.replay(stage)
            return self.resident_fingerprints
        if self._read_back is None or not self._read_back.fits(stage):
            self._read_back = ReadBackCopies(self.manifest, stage, self.copies)
        copies, values = self._read_back, self._read_back.run(stage)

        def read() -> torch.Tensor:
            found = torch.zeros(len(self.manifest.tensors), dtype=torch.int64)
            if len(copies.others):
                found[torch.from_numpy(copies.others)] = self.resident_fingerprints(copies.others)
            found[torch.from_numpy(copies.rows)] = values.cpu()
            return found

        return read

    def staged_fingerprints(
        self, stage: torch.Tensor, indices: Indices | None = None
    ) -> torch.Tensor:
        """Of the arena `stage`: one value per tensor, or per index in the order given; int64 on the CPU.

        On several ranks all see the same arena, and the same values.
        """
        return self._staged.values(stage, indices)

    def resident_fingerprints(self, indices: Indices | None = None) -> torch.Tensor:
        """Of the parameters' own memory, likewise. With tensor parallelism: this rank's summands."""
        return self._resident.values(indices)


class PlacedSums:
    """The fingerprints of parts where they are: a table per allocation, and the exact way for odd ones."""

    def __init__(self, placements: Sequence[Sequence[Placement]]) -> None:
        """`placements`: the parts of each tensor."""
        self._num = len(placements)
        self._exact: list[tuple[int, Placement]] = []
        spans: defaultdict[Storage, list[ByteSpan]] = defaultdict(list)
        words: dict[Storage, torch.Tensor] = {}
        for i, parts in enumerate(placements):
            for placement in parts:
                if not placement.destination.numel():
                    continue
                key = storage_key(placement.destination)
                if key not in words:
                    words[key] = storage_view(placement.destination, torch.int64)
                span = _span(placement, i, words[key].numel())
                if span is None:
                    self._exact.append((i, placement))
                else:
                    spans[key].append(span)
        self._tables: list[ResidentTable] = []
        by_device: defaultdict[torch.device, list[Storage]] = defaultdict(list)
        for key in spans:
            by_device[key[0]].append(key)
        for device, keys in by_device.items():
            together = [keys] if device.type == "cuda" else [[key] for key in keys]
            self._tables += [
                ResidentTable([(words[key], spans[key]) for key in group], self._num)
                for group in together
            ]
        on_gpu = [(i, placement) for i, placement in self._exact if placement.destination.is_cuda]
        self._parts = PartSums(on_gpu, num_outputs=self._num) if on_gpu else None

    @torch.no_grad()
    def values(self, indices: Indices | None) -> torch.Tensor:
        num = self._num if indices is None else len(indices)
        result = torch.zeros(num, dtype=torch.int64)
        # All are under way before the first one is waited for.
        sums = [table.sums(indices) for table in self._tables]
        wanted = None if indices is None else set(np.asarray(indices).tolist())
        slow = self._exact
        if self._parts is not None:
            values = self._parts.values()
            sums.append(values if indices is None else values[_on(values.device, indices)])
            slow = self._parts.left
        for value in sums:
            result += value.cpu()
        if slow:
            exact = torch.zeros(self._num, dtype=torch.int64)
            for i, placement in slow:
                if wanted is None or i in wanted:
                    part = region_sum(placement.destination, placement.shape, placement.region)
                    exact[i] += part.cpu()
            result += exact if indices is None else exact[torch.as_tensor(np.asarray(indices))]
        return result


class ResidentTable:
    """Spans of one allocation, or of several of one GPU, whose kernel reads any address: a launch for all of them."""

    def __init__(
        self, parts: Sequence[tuple[torch.Tensor, Sequence[ByteSpan]]], num_outputs: int
    ) -> None:
        """`parts`: the words of an allocation, and spans of it."""
        self._words = [words for words, _ in parts]
        self._spans = [spans for _, spans in parts]
        self._num_outputs = num_outputs
        self._distances: list[int] | None = None
        self._table: SubsetSums | None = None

    def sums(self, indices: Indices | None) -> torch.Tensor:
        """One sum per output, or per index in the order given; int64 on the allocations' device."""
        first = self._words[0].data_ptr()
        # Asked for each time: memory that was released may have come back elsewhere.
        distances = [words.data_ptr() - first for words in self._words]
        if self._table is None or distances != self._distances:
            moved = [
                replace(span, offset=span.offset + distance) if distance else span
                for spans, distance in zip(self._spans, distances, strict=True)
                for span in spans
            ]
            self._table = SubsetSums(
                moved, num_outputs=self._num_outputs, device=self._words[0].device
            )
            self._distances = distances
        return self._table.sums(self._words[0], indices)


class PartSums:
    """Parts of tensors on a GPU that rows cannot express, each where it sits in its tensor: one launch."""

    def __init__(self, parts: Sequence[tuple[int, Placement]], *, num_outputs: int) -> None:
        self.left: list[tuple[int, Placement]] = []
        """What a table cannot sum."""
        self._memory = StorageTable()
        pieces = []
        for output, placement in parts:
            piece = self._piece(output, placement)
            if piece is None:
                self.left.append((output, placement))
            else:
                pieces.append(piece)
        device = parts[0][1].destination.device
        self._table = CopyTable(
            pieces,
            sources=self._memory.addresses(),
            targets=(),
            device=device,
            num_outputs=num_outputs,
            copy=False,
        )

    def values(self) -> torch.Tensor:
        """(N,) int64 on the device."""
        return self._table.run(self._memory.addresses())

    def _piece(self, output: int, placement: Placement) -> Piece | None:
        tensor = placement.destination
        whole = torch.empty(placement.shape, dtype=tensor.dtype, device="meta")
        part = regions.part(whole, placement.region)
        return make_piece(
            shape=tuple(tensor.shape),
            source_strides=tensor.stride(),
            target_strides=part.stride(),
            source_dtype=tensor.dtype,
            target_dtype=tensor.dtype,
            source=self._memory.number(tensor),
            source_offset=int(tensor.storage_offset()) * tensor.element_size(),
            output=output,
            start=int(part.storage_offset()),
        )


def _on(device: torch.device, indices: Indices) -> torch.Tensor:
    return torch.as_tensor(np.asarray(indices, dtype=np.int64)).to(device)


def _span(placement: Placement, output: int, num_words: int) -> ByteSpan | None:
    """The placement's memory as rows of a table, or None where rows cannot express it."""
    tensor = placement.destination
    if not tensor.is_contiguous():
        return None
    first, end = byte_range(tensor)
    starts, _ = regions.runs(placement.shape, placement.region, tensor.element_size())
    single = len(starts) == 1
    span = ByteSpan(
        offset=first,
        num_bytes=end - first,
        output=output,
        start=int(starts[0]) if single else 0,
        run_starts=None if single else starts,
    )
    return span if span.fits_rows() and end <= num_words * 8 else None
