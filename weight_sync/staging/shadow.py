"""A second memory with the layout of a model's own: where an update is whole before the model is.

Parameters that are neighbours are neighbours in the shadow too, so that writing a whole update is a handful of large
copies, without strides and without casts. Where a GPU's memory is mapped behind the parameters' addresses, the shadow
is as much of it again, and an update of all of it exchanges the two: no byte is moved.
"""

from __future__ import annotations

import mmap
import operator
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from weakref import finalize

import torch

from ..devices.driver import DeviceOutOfMemory
from ..devices.mapped_memory import MappedMemory
from ..layout.manifest import ALIGNMENT, align
from ..layout.memory import Range, Storage, byte_range, joined, storage_key, storage_view
from ..layout.weight_map import WeightMap
from ..plan.copies import copy_ranges, only_padding
from ..transports.arena import Mapping

_SWAPPED_BYTES = 256 << 20
"""Least bytes of an allocation that are exchanged. The driver's calls take 0.7 ms for 1 GB on an H200 and 1.2 for 16; a
copy of 1 GB is 0.2 faster, and has no way back."""


@dataclass(slots=True, kw_only=True)
class ShadowWrite:
    """What writes tensors from their shadows into the model."""

    swaps: list[tuple[MappedMemory, MappedMemory]] = field(default_factory=list)
    """Memory behind allocations of the model, and behind their shadows."""
    targets: list[torch.Tensor] = field(default_factory=list)
    """Memory of the model that is copied into."""
    sources: list[torch.Tensor] = field(default_factory=list)
    """What of the shadow is copied there."""

    _done: list[tuple[MappedMemory, MappedMemory]] = field(default_factory=list)
    _copied: bool = False

    @torch.no_grad()
    def run(self) -> None:
        """Returns when every copy was issued."""
        self._copied = False
        self._exchange(self.swaps)
        self._copied = bool(self.targets)
        copy_ranges(self.targets, self.sources)

    @property
    def reversible(self) -> bool:
        """What was resident before `run` is in the shadow, or still resident: nothing was copied over it."""
        return not self._copied

    def take_back(self) -> None:
        """After `run`, or as far as that came: make it resident again."""
        self._exchange(self._done[::-1])

    def _exchange(self, pairs: Sequence[tuple[MappedMemory, MappedMemory]]) -> None:
        self._done = []
        for device in {memory.tensor.device for memory, _ in pairs}:
            _wait_for(device)
        for memory, shadow in pairs:
            memory.swap(shadow)
            self._done.append((memory, shadow))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extent:
    """Parameters that follow each other in one allocation, with less than 256 bytes between them."""

    first: int
    """First byte in the model's allocation."""
    end: int
    """One past the last one."""
    at: int
    """Where the first byte is in the shadow."""


class Shadow:
    """As many bytes as the parameters of `weight_map` are on this rank, on their device; zeros at first."""

    def __init__(self, weight_map: WeightMap) -> None:
        self._occupied = weight_map.occupied()
        self._address: dict[
            Storage, int
        ] = {}  # modulo 256; memory that is released comes back alike
        self._mapped: dict[Storage, tuple[MappedMemory, MappedMemory]] = {}
        shadows: list[MappedMemory] = []
        free = finalize(self, _free, shadows)
        free.atexit = False
        try:
            self._lay_out(weight_map, shadows)
        except BaseException:
            free()  # now: whoever keeps the error keeps this object
            raise

    def _lay_out(self, weight_map: WeightMap, shadows: list[MappedMemory]) -> None:
        """Take the memory; what is mapped is in `shadows` too."""
        extents: defaultdict[Storage, list[Range]] = defaultdict(list)
        for parameter in weight_map.parameters.values():
            if parameter.numel():
                key = storage_key(parameter)
                if key not in extents and (memory := _exchangeable(parameter)) is not None:
                    shadows.append(_as_much_as(memory))
                    shadows[-1].tensor.zero_()
                    self._mapped[key] = memory, shadows[-1]
                extents[key].append(byte_range(parameter))
                self._address[key] = parameter.untyped_storage().data_ptr() % ALIGNMENT
        self._extents: dict[Storage, list[_Extent]] = {}
        sizes: defaultdict[torch.device, int] = defaultdict(int)
        for key, held in extents.items():
            device = key[0]
            self._extents[key] = []
            for first, end in joined(sorted(held), lambda end, start: start - end < ALIGNMENT):
                if key in self._mapped:
                    at = first
                else:
                    # At the same place within 256 bytes: what is aligned there is aligned here.
                    at = align(sizes[device]) + (self._address[key] + first) % ALIGNMENT
                    sizes[device] = at + end - first
                self._extents[key].append(_Extent(first=first, end=end, at=at))
        buffers = {device: _zeros(device, align(size)) for device, size in sizes.items()}
        self._buffers = {
            key: self._mapped[key][1].tensor if key in self._mapped else buffers[key[0]]
            for key in extents
        }
        self._own = {storage_key(buffer): buffer for buffer in self._buffers.values()}

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return sum(buffer.nbytes for buffer in self._own.values())

    def occupied(self) -> dict[Storage, list[Range]]:
        """As `WeightMap.occupied`, here."""
        moved: dict[Storage, list[Range]] = {key: [] for key in self._own}
        for key, ranges in self._occupied.items():
            held = moved[storage_key(self._buffers[key])]
            for first, end in ranges:
                at = self._at(key, first)
                held.append((at, at + end - first))
        return {key: sorted(held) for key, held in moved.items()}

    def room(self, tensor: torch.Tensor, first: int, num_bytes: int) -> torch.Tensor | None:
        """The bytes around `tensor`, which is of this shadow: uint8, from byte `first` of its allocation.

        None where the shadow does not reach so far, or they do not begin on a 64-byte boundary, as all of torch's do.
        """
        buffer = self._own[storage_key(tensor)]
        fits = 0 <= first and first + num_bytes <= buffer.numel()
        aligned = (buffer.data_ptr() + first) % 64 == 0
        return buffer[first : first + num_bytes] if fits and aligned else None

    @torch.inference_mode(False)
    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The shadow of `tensor`, a view of parameters: its dtype, shape and strides."""
        key = storage_key(tensor)
        at = self._at(key, byte_range(tensor)[0])
        memory = storage_view(self._buffers[key], tensor.dtype)
        return memory.as_strided(tensor.shape, tensor.stride(), at // tensor.element_size())

    @torch.inference_mode(False)
    def write(self, tensors: Iterable[torch.Tensor]) -> ShadowWrite:
        """What writes `tensors`, views of parameters, from their shadows: as few copies as there can be, or none.

        Padding between parameters may be written too; no byte of a parameter that is not among `tensors` is. The
        parameters' memory must not be released at the moment.
        """
        by_storage: defaultdict[Storage, list[torch.Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_storage[storage_key(tensor)].append(tensor)
        found = ShadowWrite()
        for key, held in by_storage.items():
            ranges, strided = self._ranges(key, held)
            if key in self._mapped and not strided and self._is_all(key, ranges):
                found.swaps.append(self._mapped[key])
                continue
            memory = storage_view(held[0], torch.uint8)
            found.targets += [memory[first:end] for first, end in ranges]
            found.targets += strided
        found.sources = [self.of(target) for target in found.targets]
        return found

    def _is_all(self, key: Storage, ranges: Sequence[Range]) -> bool:
        """Whether nothing but padding of an allocation lies outside of `ranges`, ascending."""
        stretches = joined(ranges, lambda end, start: start - end < ALIGNMENT)
        first, end = stretches[0]
        # Two steps at the end: an allocation may be longer by what it takes to begin on one.
        rest = self._mapped[key][0].tensor.numel() - end
        union = joined(sorted([*ranges, *self._occupied[key]]), operator.ge)
        one = len(stretches) == 1 and first < ALIGNMENT and rest < 2 * ALIGNMENT
        return one and union == joined(ranges, operator.ge)

    def _ranges(
        self, key: Storage, tensors: Sequence[torch.Tensor]
    ) -> tuple[list[Range], list[torch.Tensor]]:
        """What the tensors fill without a gap, neighbours joined, and those that leave gaps."""
        ranges: list[Range] = []
        strided: list[torch.Tensor] = []
        for first, end, group in _overlapping(tensors):
            if sum(tensor.nbytes for tensor in group) != end - first:
                strided += group
            else:
                ranges.append((first, end))
        address, occupied = self._address[key], self._occupied[key]

        def follows(end: int, start: int) -> bool:
            aligned = (address + start) % ALIGNMENT == 0
            return start == end or (aligned and only_padding(occupied, end, start))

        return joined(ranges, follows), strided

    def _at(self, key: Storage, byte: int) -> int:
        extents = self._extents[key]
        extent = extents[bisect_right(extents, byte, key=lambda extent: extent.first) - 1]
        return extent.at + byte - extent.first


def _overlapping(
    tensors: Sequence[torch.Tensor],
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """Tensors of one allocation that reach over each other: first byte, end, and which they are, in ascending order."""
    ranges = sorted((*byte_range(tensor), i) for i, tensor in enumerate(tensors))
    first, end, group = ranges[0][0], ranges[0][1], [tensors[ranges[0][2]]]
    for start, stop, i in ranges[1:]:
        if start >= end:
            yield first, end, group
            first, end, group = start, stop, []
        end = max(end, stop)
        group.append(tensors[i])
    yield first, end, group


def _exchangeable(parameter: torch.Tensor) -> MappedMemory | None:
    memory = MappedMemory.behind(parameter)
    return memory if memory is not None and memory.num_bytes >= _SWAPPED_BYTES else None


def _as_much_as(memory: MappedMemory) -> MappedMemory:
    """It holds anything; `torch.OutOfMemoryError`."""
    try:
        try:
            return memory.another()
        except DeviceOutOfMemory:  # torch may keep some that nobody uses
            torch.cuda.empty_cache()
            return memory.another()
    except DeviceOutOfMemory as error:
        raise torch.OutOfMemoryError(str(error)) from error


def _free(shadows: Iterable[MappedMemory]) -> None:
    for memory in shadows:
        _wait_for(memory.tensor.device)
        memory.free()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _zeros(device: torch.device, num_bytes: int) -> torch.Tensor:
    if device.type == "cpu":  # in large pages, and all of them there
        return Mapping(-1, max(num_bytes, mmap.PAGESIZE), writable=True).tensor[:num_bytes]
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
