"""Copies of many pieces of memory in one launch or a few, whatever their number, with fingerprints on the way.

A piece is a rectangular part of one allocation that goes to a part of another, from any strides to any strides, cast
where it must be. Allocations are given by address when a table runs, so a compiled table serves as long as shapes and
alignments stay. Two kernels: whole 8-byte words where both ends are contiguous and of one dtype, elements elsewhere.
Either may copy, sum what it has read (`rollout_kernels.fingerprint`), or both in one pass over the bytes.

Shapes: `P` pieces, `T` tiles, `S` allocations to read, `D` allocations to write, `N` sums.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import fingerprint as fp
from .copy_kernels import (
    BLOCK,
    ELEMENT_COLUMNS,
    ROWS_AT_ONCE,
    SHAPE_COLUMNS,
    WORD_COLUMNS,
    flat_kernel,
    strided_kernel,
    words_kernel,
)
from .copy_pieces import MAX_DIMS, Piece, WholePieces, exponent_of
from .launching import launching_on, tl

Addresses = Sequence[int] | torch.Tensor
"""Of allocations: numbers, or their 64 bits as int64 on the CPU, which stay as they are once they were given."""

_TILE_BYTES = fp.TILE_ROWS * fp.WIDE_ROW_BYTES
_RUN_BYTES = 512
"""Least bytes of a strided piece's contiguous runs that are worth a program each."""


class CopyTable:
    """The compiled pieces of one device: a handful of launches whatever their number.

    `sources` and `targets` are the addresses that `run` will get, or others with the same remainder modulo 16.
    """

    def __init__(
        self,
        pieces: Iterable[Piece],
        *,
        sources: Addresses,
        targets: Addresses,
        device: torch.device,
        num_outputs: int = 0,
        copy: bool = True,
        read_back: bool = False,
        whole: WholePieces | None = None,
    ) -> None:
        """`copy`: False sums alone, and reads no target. `read_back`: what is summed is read out of the target, behind
        the write; of pieces that `reads_back` allows. `whole`: more pieces."""
        self.device = device
        self.num_outputs = num_outputs
        self._copy, self._read_back = copy, read_back
        from_, to = _column(sources), _column(targets)
        self._alignment = from_ & 15, to & 15
        self._addresses: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
        pieces = list(pieces)
        with torch.device("cpu"):  # whatever the caller's default is
            self._exponents, self._blank = _exponents_of(pieces, whole, num_outputs, device)
            runs: list[torch.Tensor] = []
            if whole is not None:
                held, odd = whole.runs(from_, to, copy=copy)
                runs.append(held)
                pieces += whole.pieces(odd)
            starts = from_.tolist(), to.tolist()
            if read_back and not all(reads_back(piece, *starts) for piece in pieces):
                raise ValueError("read_back: got pieces that are no runs of whole words")
            self._batches = _compile(pieces, *starts, device, copy=copy, more=runs)
        last_row = max((batch.last_row for batch in self._batches), default=0)
        self._outer = fp.outer_keys(last_row + 1, device)

    def fits(self, sources: Addresses, targets: Addresses) -> bool:
        """Whether these addresses are aligned as those that it was compiled for."""
        both = zip((sources, targets), self._alignment, strict=True)
        return all(torch.equal(_column(addresses) & 15, held) for addresses, held in both)

    def run(self, sources: Addresses, targets: Addresses = ()) -> torch.Tensor:
        """Issue everything on the current stream. The sums, (N,) int64 on the device, once it has run."""
        return self._run(sources, targets, finite=False)[0]

    def run_checked(self, sources: Addresses, targets: Addresses = ()) -> torch.Tensor:
        """As `run`; (2, N) int64: the sums, and in the second row 0 where all that was summed is certainly finite.

        Integers are. Of a few rare dtypes it is not known, and they have 1.
        """
        return self._run(sources, targets, finite=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, sources: Addresses, targets: Addresses, *, finite: bool) -> torch.Tensor:
        out = self._blank.clone()
        from_, to = self._upload(True, sources), self._upload(False, targets)
        for batch in self._batches:
            how = {"copy": self._copy, "finite": finite, "read_back": self._read_back}
            batch.launch(from_, to, self._outer, out, self._exponents, **how)
        return out

    def _upload(self, is_source: bool, addresses: Addresses) -> torch.Tensor:
        held = self._addresses.get(is_source)
        wanted = _column(addresses if len(addresses) else (0,))
        if held is None or not torch.equal(held[0], wanted):
            held = wanted, wanted.to(self.device, copy=True)
            self._addresses[is_source] = held
        return held[1]


def reads_back(piece: Piece, sources: Sequence[int], targets: Sequence[int]) -> bool:
    """Whether a table can sum what this piece has written, behind the write."""
    return _kind(piece) == "run" and _whole_words(piece, sources, targets, copy=True)


def _exponents_of(
    pieces: Sequence[Piece], whole: WholePieces | None, num_outputs: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`exponents` of the kernels, (N,) int64, in each number of a word; and (2, N): no sums, and what is not known."""
    both = torch.zeros(2, num_outputs, dtype=torch.int64)
    if whole is not None:
        kinds = [exponent_of(dtype) for dtype in whole.dtypes]
        summed = whole.outputs >= 0
        both[:, whole.outputs[summed]] = _pairs(kinds)[:, whole.kinds[summed]]
    held = [piece for piece in pieces if piece.output >= 0]
    outputs = torch.tensor([piece.output for piece in held], dtype=torch.int64)
    both[:, outputs] = _pairs([exponent_of(piece.target_dtype) for piece in held])
    blank = torch.stack([torch.zeros_like(both[1]), both[1]])
    return both[0].to(device), blank.to(device)


def _pairs(values: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).reshape(-1, 2).t()


def reference(
    pieces: Iterable[Piece],
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    *,
    num_outputs: int = 0,
    copy: bool = True,
) -> list[int]:
    """What a table does, one piece after another: for tests. The allocations are uint8 tensors; sums modulo 2^64."""
    sums = [0] * num_outputs
    for piece in pieces:
        read = _view(sources[piece.source], piece.source_offset, piece.source_dtype)
        value = read.as_strided(piece.sizes, piece.source_strides, read.storage_offset())
        value = value.to(piece.target_dtype)
        if copy:
            write = _view(targets[piece.target], piece.target_offset, piece.target_dtype)
            write.as_strided(piece.sizes, piece.target_strides, write.storage_offset()).copy_(value)
        if piece.output >= 0:
            reach = sum((n - 1) * s for n, s in zip(piece.sizes, piece.place_strides, strict=True))
            num = piece.start + reach + 1 if value.numel() else 0
            whole = torch.zeros(num, dtype=piece.target_dtype)
            if num:
                whole.as_strided(piece.sizes, piece.place_strides, piece.start).copy_(value)
            sums[piece.output] += fp.reference(whole.view(torch.uint8))
    return [value & ((1 << 64) - 1) for value in sums]


def _view(memory: torch.Tensor, offset: int, dtype: torch.dtype) -> torch.Tensor:
    rest = memory[offset:]
    return rest[: len(rest) // dtype.itemsize * dtype.itemsize].view(dtype)


def _column(addresses: Addresses) -> torch.Tensor:
    if isinstance(addresses, torch.Tensor):
        return addresses
    numbers = [fp.signed(address) for address in addresses]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


@dataclass(frozen=True, slots=True)
class _Words:
    """Runs of whole words, contiguous at both ends: one launch."""

    tiles: torch.Tensor
    last_row: int
    aligned: bool

    def launch(
        self,
        sources: Any,
        targets: Any,
        outer: Any,
        out: Any,
        exponents: Any,
        *,
        copy: bool,
        finite: bool,
        read_back: bool,
    ) -> None:
        with launching_on(out):
            words_kernel[(len(self.tiles),)](
                self.tiles,
                sources,
                targets,
                fp.fine_keys(out.device),
                outer,
                out[0],
                exponents,
                out[1],
                COPY=copy,
                SUM=out.numel() > 0,
                FINITE=finite and out.numel() > 0,
                BACK=read_back,
                ALIGNED=16 if self.aligned else 8,
                ROWS=fp.TILE_ROWS,
                ROWS_AT_ONCE=ROWS_AT_ONCE,
                COLUMNS=WORD_COLUMNS,
                num_warps=4,
            )


@dataclass(frozen=True, slots=True)
class _Elements:
    """Pieces of one pair of dtypes, element by element: one launch."""

    tiles: torch.Tensor
    shapes: torch.Tensor
    last_row: int
    source: torch.dtype
    target: torch.dtype
    flat: bool

    aligned: bool

    def launch(
        self,
        sources: Any,
        targets: Any,
        outer: Any,
        out: Any,
        exponents: Any,
        *,
        copy: bool,
        finite: bool,
        read_back: bool,
    ) -> None:
        assert not read_back, "these are no runs of whole words"
        size, cast = self.target.itemsize, self.source != self.target
        kernel = flat_kernel if self.flat else strided_kernel
        with launching_on(out):
            kernel[(len(self.tiles),)](
                self.tiles,
                self.shapes,
                sources,
                targets,
                fp.fine_keys(out.device),
                outer,
                out[0],
                exponents,
                out[1],
                SOURCE=_triton_dtype(self.source, not cast),
                SOURCE_SIZE=self.source.itemsize,
                TARGET=_triton_dtype(self.target, not cast),
                BITS=_triton_dtype(self.target, True),
                SIZE=size,
                CAST=cast,
                COPY=copy,
                SUM=out.numel() > 0,
                FINITE=finite and out.numel() > 0,
                ALIGNED=self.aligned,
                BLOCK=fp.WIDE_ROW_BYTES // size if self.flat else BLOCK,
                ROWS=fp.TILE_ROWS,
                COLUMNS=ELEMENT_COLUMNS,
                SHAPE_COLUMNS=SHAPE_COLUMNS,
                num_warps=8 if self.flat else 4,
            )


_Batch = _Words | _Elements


def _triton_dtype(dtype: torch.dtype, as_bits: bool) -> Any:
    if as_bits:
        return {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[dtype.itemsize]
    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[dtype]


def _compile(
    pieces: Iterable[Piece],
    sources: Sequence[int],
    targets: Sequence[int],
    device: torch.device,
    *,
    copy: bool,
    more: Sequence[torch.Tensor],
) -> list[_Batch]:
    """`more`: runs of whole words, (R, 6)."""
    runs: list[tuple[int, ...]] = []
    strided: list[torch.Tensor] = []
    elements: defaultdict[tuple[torch.dtype, torch.dtype, bool, bool], list[Piece]] = defaultdict(
        list
    )
    for piece in pieces:
        if not math.prod(piece.sizes):
            continue
        kind = _kind(piece)
        if kind == "run" and _whole_words(piece, sources, targets, copy):
            runs.append(_run(piece))
        elif kind == "rows" and _whole_words(piece, sources, targets, copy):
            strided.append(_rows(piece))
        else:
            target = piece.target_dtype
            pair = (piece.source_dtype, target)
            if piece.source_dtype == target:  # any dtype of its size is moved alike
                same = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
                pair = (same[target.itemsize],) * 2
            flat = _is_flat(piece)
            wide = flat and _start(piece, sources, targets, copy) % 16 == 0
            elements[(*pair, flat, wide)].append(piece)
    batches: list[_Batch] = []
    table = torch.cat([torch.tensor(runs, dtype=torch.int64).reshape(-1, 6), *strided, *more])
    if len(table):
        batches += _word_batches(table, sources, targets, device, copy)
    batches += [_element_batch(held, *kind, device) for kind, held in elements.items()]
    return batches


def _kind(piece: Piece) -> str:
    """Whether it is one run of bytes, many long ones, or neither."""
    if piece.source_dtype != piece.target_dtype:
        return "elements"
    inner = piece.source_strides[-1] == piece.target_strides[-1] == 1
    if len(piece.sizes) == 1 and inner:
        summed = piece.output >= 0
        odd = (
            piece.place_strides[-1] != 1
            or piece.start * piece.target_dtype.itemsize % fp.WIDE_ROW_BYTES
        )
        return "elements" if summed and odd else "run"
    long = inner and piece.sizes[-1] * piece.target_dtype.itemsize >= _RUN_BYTES
    return "rows" if long and piece.output < 0 else "elements"


def _is_flat(piece: Piece) -> bool:
    """Contiguous at both ends, and its sum begins with the full tensor."""
    ones = (1,) * len(piece.sizes)
    strides = (piece.source_strides, piece.target_strides, piece.place_strides)
    return len(piece.sizes) == 1 and piece.start == 0 and all(s == ones for s in strides)


def _whole_words(piece: Piece, sources: Sequence[int], targets: Sequence[int], copy: bool) -> bool:
    """Every run of it starts on a word at both ends."""
    size = piece.target_dtype.itemsize
    strides = [stride * size for stride in piece.source_strides[:-1]]
    if copy:
        strides += [stride * size for stride in piece.target_strides[:-1]]
    at = _start(piece, sources, targets, copy)
    return not any(place % fp.WORD_BYTES for place in (at, *strides))


def _start(piece: Piece, sources: Sequence[int], targets: Sequence[int], copy: bool) -> int:
    """Both first addresses, or-ed: what divides it divides each."""
    at = sources[piece.source] + piece.source_offset
    return at | (targets[piece.target] + piece.target_offset if copy else 0)


def _run(piece: Piece) -> tuple[int, ...]:
    size = piece.target_dtype.itemsize
    return (
        piece.source,
        piece.source_offset,
        piece.target,
        piece.target_offset,
        piece.sizes[0] * size,
        piece.output
        if piece.output < 0
        else piece.output | (piece.start * size // fp.WIDE_ROW_BYTES) << 32,
    )


def _rows(piece: Piece) -> torch.Tensor:
    """A strided piece as runs, (R, 6)."""
    size = piece.target_dtype.itemsize
    outer = piece.sizes[:-1]
    grid = torch.cartesian_prod(*(torch.arange(n) for n in outer)).reshape(-1, len(outer))
    runs = torch.empty(len(grid), 6, dtype=torch.int64)
    runs[:, 0], runs[:, 2], runs[:, 5] = piece.source, piece.target, -1
    runs[:, 4] = piece.sizes[-1] * size
    for column, offset, strides in (
        (1, piece.source_offset, piece.source_strides),
        (3, piece.target_offset, piece.target_strides),
    ):
        runs[:, column] = offset + (grid * torch.tensor(strides[:-1]) * size).sum(1)
    return runs


def _word_batches(
    runs: torch.Tensor,
    sources: Sequence[int],
    targets: Sequence[int],
    device: torch.device,
    copy: bool,
) -> list[_Batch]:
    """Runs that allow 16-byte accesses, and the others: a launch each."""
    at = torch.tensor(sources or [0])[runs[:, 0]] + runs[:, 1]
    if copy:
        at |= torch.tensor(targets or [0])[runs[:, 2]] + runs[:, 3]
    aligned = at % 16 == 0
    batches: list[_Batch] = []
    for wide in (True, False):
        held = runs[aligned == wide]
        if len(held):
            tiles = _word_tiles(held)
            last = int((tiles[:, 5] + (tiles[:, 4] - 1) // fp.WIDE_ROW_BYTES).max())
            batches.append(_Words(tiles.to(device), last, wide))
    return batches


def _word_tiles(runs: torch.Tensor) -> torch.Tensor:
    """(T, 7): source, offset, target, offset, bytes, first wide row in the full tensor, output."""
    num_tiles = (runs[:, 4] + _TILE_BYTES - 1) // _TILE_BYTES
    run = torch.repeat_interleave(torch.arange(len(runs)), num_tiles)
    done = (torch.arange(len(run)) - (num_tiles.cumsum(0) - num_tiles)[run]) * _TILE_BYTES
    held = runs[run]
    output = held[:, 5]
    first_row = torch.where(output < 0, 0, output >> 32)
    return torch.stack(
        (
            held[:, 0],
            held[:, 1] + done,
            held[:, 2],
            held[:, 3] + done,
            (held[:, 4] - done).clamp(max=_TILE_BYTES),
            first_row + done // fp.WIDE_ROW_BYTES,
            torch.where(output < 0, -1, output & 0xFFFFFFFF),
        ),
        dim=1,
    )


def _element_batch(
    pieces: Sequence[Piece],
    source: torch.dtype,
    target: torch.dtype,
    flat: bool,
    aligned: bool,
    device: torch.device,
) -> _Batch:
    block = fp.WIDE_ROW_BYTES // target.itemsize if flat else BLOCK
    limit = block * fp.TILE_ROWS
    counts = torch.tensor([math.prod(piece.sizes) for piece in pieces], dtype=torch.int64)
    num_tiles = (counts + limit - 1) // limit
    piece = torch.repeat_interleave(torch.arange(len(pieces)), num_tiles)
    done = (torch.arange(len(piece)) - (num_tiles.cumsum(0) - num_tiles)[piece]) * limit
    outputs = torch.tensor([p.output for p in pieces], dtype=torch.int64)
    tiles = torch.stack(
        (piece, done, (counts[piece] - done).clamp(max=limit), outputs[piece]), dim=1
    )
    last = max(_last_byte(p) // fp.WIDE_ROW_BYTES for p in pieces)
    shapes = torch.tensor([_shape_row(p) for p in pieces], dtype=torch.int64)
    return _Elements(tiles.to(device), shapes.to(device), last, source, target, flat, aligned)


def _last_byte(piece: Piece) -> int:
    """Of the full tensor, as far as the piece reaches; 0 where nothing is summed."""
    if piece.output < 0:
        return 0
    reach = sum((n - 1) * s for n, s in zip(piece.sizes, piece.place_strides, strict=True))
    return (piece.start + reach + 1) * piece.target_dtype.itemsize - 1


def _shape_row(piece: Piece) -> list[int]:
    """The columns of `shapes`; missing outer dimensions have one element."""
    missing = MAX_DIMS - len(piece.sizes)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [fill] * missing + list(values)

    return [
        piece.source,
        piece.source_offset,
        piece.target,
        piece.target_offset,
        piece.start,
        *padded(piece.sizes, 1)[1:],
        *padded(piece.source_strides, 0),
        *padded(piece.target_strides, 0),
        *padded(piece.place_strides, 0),
    ]
