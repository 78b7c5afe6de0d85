"""Fingerprints of many tensors in one buffer, in a number of operations that does not grow with the tensors.

A table is compiled once from where the bytes are and where they belong. On CUDA it is the tile table of one kernel
launch. On the CPU the buffer is read in rows, wide ones (8 KB) inside large tensors and narrow ones (256 bytes)
elsewhere, as matrix-vector products over a few threads; row sums times row keys are summed per tensor as differences
of one running sum, which is exact modulo 2^64. Bytes between tensors are read at most, never counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from . import fingerprint as fp

WIDE_BYTES = 1 << 20
"""Least bytes of a run that are worth a matrix-vector product of their own."""
_JOB_WORDS = 1 << 19
_THREADED_WORDS = 1 << 20
_MAX_GAP_WORDS = 128
_NARROW, _WIDE = fp.ROW_BYTES // fp.WORD_BYTES, fp.WIDE_ROW_BYTES // fp.WORD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteSpan:
    """Contiguous bytes of a buffer that belong to one tensor."""

    offset: int
    """First byte in the buffer, a multiple of 8."""
    num_bytes: int
    """Bytes; the last word that they touch lies inside the buffer."""
    output: int
    """Which of the results they add to."""
    start: int = 0
    """Byte of the full tensor at which the first one sits."""
    run_starts: torch.Tensor | None = None
    """Where more than one run of the full tensor follow each other in memory: the bytes at which they start (int64, on
    the CPU); all runs are equally long, and `start` is not read."""

    @property
    def run_bytes(self) -> int:
        """Bytes of one run."""
        return self.num_bytes if self.run_starts is None else self.num_bytes // len(self.run_starts)

    def fits_rows(self) -> bool:
        """Whether a table can hold it; else `fingerprint.exact_sum` does the work."""
        if self.offset % fp.WORD_BYTES:
            return False
        if self.run_starts is None:
            return self.start % fp.ROW_BYTES == 0
        return self.run_bytes % fp.ROW_BYTES == 0 and not bool(
            (self.run_starts % fp.ROW_BYTES).any()
        )


@dataclass(frozen=True, slots=True)
class _Columns:
    """Runs in columns, each (S,) int64: `words` in the buffer, `starts` in the tensor, `num_bytes`, `outputs`."""

    words: torch.Tensor
    starts: torch.Tensor
    num_bytes: torch.Tensor
    outputs: torch.Tensor

    def where(self, keep: torch.Tensor) -> _Columns:
        return _Columns(*(getattr(self, name)[keep] for name in self.__slots__))

    def __len__(self) -> int:
        return len(self.words)


class SpanTable:
    """The compiled fingerprints of `spans` of one buffer on `device`, as `num_outputs` sums."""

    def __init__(
        self, spans: Iterable[ByteSpan], *, num_outputs: int, device: torch.device
    ) -> None:
        self.num_outputs = num_outputs
        self.device = device
        self._plan: RowPlan | TilePlan = (
            RowPlan.compile(spans) if device.type == "cpu" else TilePlan.compile(spans, device)
        )

    @torch.inference_mode(False)  # it does not reach other threads, which then could not write
    @torch.no_grad()
    def sums(self, words: torch.Tensor) -> torch.Tensor:
        """The sum of each output over the buffer's 8-byte words (int64, 1-d); (N,) int64 on the same device."""
        out = torch.zeros(self.num_outputs, dtype=torch.int64, device=self.device)
        self._plan.add(words, out)
        return out


@torch.inference_mode(False)
@torch.no_grad()
def part_sum(part: torch.Tensor, run_starts: torch.Tensor, run_bytes: int) -> torch.Tensor:
    """The sum over `part`, any rectangular part of a tensor, whose runs start at `run_starts`; 0-d int64.

    `part` may be strided, and may start anywhere; the bytes are copied where rows need them aligned.
    """
    data = part.detach().resolve_conj().resolve_neg().contiguous().flatten()
    num_bytes = data.numel() * data.element_size()
    single = len(run_starts) == 1
    span = ByteSpan(
        offset=0,
        num_bytes=num_bytes,
        output=0,
        start=int(run_starts[0]) if single else 0,
        run_starts=None if single else run_starts,
    )
    if num_bytes == 0 or not span.fits_rows():
        return fp.exact_sum(data, run_starts, run_bytes)
    raw = data.view(torch.uint8)
    if num_bytes % fp.WORD_BYTES or raw.storage_offset() % fp.WORD_BYTES:
        padded = -(-num_bytes // fp.WORD_BYTES) * fp.WORD_BYTES
        raw = torch.zeros(padded, dtype=torch.uint8, device=data.device)
        raw[:num_bytes] = data.view(torch.uint8)
    return SpanTable([span], num_outputs=1, device=data.device).sums(raw.view(torch.int64))[0]


def _columns(spans: Iterable[ByteSpan]) -> _Columns:
    """All runs of `spans`, sorted by where they are in the buffer."""
    single: list[tuple[int, int, int, int]] = []
    parts: list[torch.Tensor] = []
    for span in spans:
        word = span.offset // fp.WORD_BYTES
        if span.run_starts is None:
            single.append((word, span.start, span.num_bytes, span.output))
        else:
            num, size = len(span.run_starts), span.run_bytes
            part = torch.empty(num, 4, dtype=torch.int64)
            part[:, 0] = word + torch.arange(num) * (size // fp.WORD_BYTES)
            part[:, 1] = span.run_starts
            part[:, 2], part[:, 3] = size, span.output
            parts.append(part)
    parts.append(torch.tensor(single, dtype=torch.int64).reshape(-1, 4))
    table = torch.cat(parts)
    table = table[table[:, 2] > 0]
    table = table[torch.argsort(table[:, 0], stable=True)]
    return _Columns(*(column.contiguous() for column in table.unbind(1)))


@dataclass(frozen=True, slots=True)
class TilePlan:
    """One launch of the CUDA kernel."""

    tiles: torch.Tensor
    outer: torch.Tensor
    even: bool

    @classmethod
    def compile(cls, spans: Iterable[ByteSpan], device: torch.device) -> TilePlan:
        """The plan of `spans`."""
        columns = _columns(spans)
        tiles = fp.tile_table(
            first_words=columns.words,
            starts=columns.starts,
            num_bytes=columns.num_bytes,
            outputs=columns.outputs,
        )
        last_row = int(tiles[:, 5].max()) if len(tiles) else 0
        even = not bool((tiles[:, 0] % 2).any())
        return cls(tiles=tiles.to(device), outer=fp.outer_keys(last_row + 1, device), even=even)

    def add(self, words: torch.Tensor, out: torch.Tensor) -> None:
        """Add every output's sum to `out`."""
        fp.launch(words, self.tiles, self.outer, out, even=self.even)


@dataclass(slots=True)
class RowPlan:
    """Rows of a buffer on the CPU: matrix-vector products, row keys, and which rows make up which output."""

    jobs: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Products: first word, rows, words per row, first row sum."""
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """A key per row sum; 0 for rows that hold padding alone."""
    firsts: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """First row sum of each run."""
    lasts: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """One past the last row sum of each run."""
    outputs: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """The output of each run."""
    tails: _Tails | None = None
    """What is left of each tensor after its last whole row."""
    num_words: int = 0
    """Words that the products read."""

    @classmethod
    def compile(cls, spans: Iterable[ByteSpan]) -> RowPlan:
        """The plan of `spans`."""
        columns = _columns(spans)
        wide, narrow = _split_wide(columns)
        whole = narrow.num_bytes // fp.ROW_BYTES
        tails = _Tails.compile(narrow)
        narrow, rows = narrow.where(whole > 0), whole[whole > 0]
        wide_rows = wide.num_bytes // fp.WIDE_ROW_BYTES
        firsts, wide_jobs, num_wide = _stretches(wide.words, wide_rows, width=_WIDE, first_sum=0)
        narrow_firsts, jobs, num_rows = _stretches(
            narrow.words, rows, width=_NARROW, first_sum=num_wide
        )
        jobs = wide_jobs + jobs
        keys = torch.zeros(num_rows, dtype=torch.int64)
        wide_index, wide_row = _expand(firsts, wide_rows, wide.starts // fp.WIDE_ROW_BYTES)
        if len(wide_row):
            outer = fp.outer_keys(int(wide_row.max()) + 1, torch.device("cpu"))
            keys[wide_index] = outer[wide_row]
        index, row = _expand(narrow_firsts, rows, narrow.starts // fp.ROW_BYTES)
        keys[index] = fp.row_keys(row)
        return cls(
            jobs=list(_small_jobs(jobs)),
            keys=keys,
            firsts=torch.cat([firsts, narrow_firsts]),
            lasts=torch.cat([firsts + wide_rows, narrow_firsts + rows]),
            outputs=torch.cat([wide.outputs, narrow.outputs]),
            tails=tails,
            num_words=sum(num * width for _, num, width, _ in jobs),
        )

    def add(self, words: torch.Tensor, out: torch.Tensor) -> None:
        """Add every output's sum to `out`."""
        if self.tails is not None:
            self.tails.add(words, out)
        if not self.jobs:
            return
        sums = torch.empty(len(self.keys), dtype=torch.int64)
        self._products(words, sums)
        running = torch.empty(len(sums) + 1, dtype=torch.int64)
        running[0] = 0
        torch.cumsum(sums, 0, out=running[1:])
        out.index_add_(0, self.outputs, running[self.lasts] - running[self.firsts])

    def _products(self, words: torch.Tensor, sums: torch.Tensor) -> None:
        """Row sums times their keys."""
        cpu = torch.device("cpu")
        keys = {_NARROW: fp.inner_keys(cpu), _WIDE: fp.fine_keys(cpu)}
        jobs: Iterator[tuple[int, int, int, int]] = iter(self.jobs)

        def work() -> None:
            for word, rows, width, first in jobs:  # shared: each thread takes the next one
                block = words[word : word + rows * width].view(rows, width)
                part = sums[first : first + rows]
                # Here and not all at once: torch would call all its threads together for that, and wait for them.
                torch.mv(block, keys[width], out=part).mul_(self.keys[first : first + rows])

        threads = min(torch.get_num_threads(), len(self.jobs))
        if threads == 1 or self.num_words < _THREADED_WORDS:
            work()
            return
        # An integer product runs on one thread and lets go of the interpreter lock.
        with ThreadPoolExecutor(threads - 1, thread_name_prefix="fingerprint") as pool:
            others = [pool.submit(work) for _ in range(threads - 1)]
            work()
            for other in others:
                other.result()


@dataclass(frozen=True, slots=True)
class _Tails:
    """The last, partial rows of runs: gathered, and masked to their own bytes."""

    index: torch.Tensor
    """Words of the buffer, (tails * 32,)."""
    mask: torch.Tensor
    """Bits that count, (tails, 32)."""
    keys: torch.Tensor
    outputs: torch.Tensor

    @classmethod
    def compile(cls, columns: _Columns) -> _Tails | None:
        num_bytes = columns.num_bytes % fp.ROW_BYTES
        columns = columns.where(num_bytes > 0)
        num_bytes = num_bytes[num_bytes > 0]
        if not len(columns):
            return None
        rows = columns.num_bytes // fp.ROW_BYTES
        column = torch.arange(_NARROW)
        valid = (num_bytes[:, None] - column * fp.WORD_BYTES).clamp(0, fp.WORD_BYTES)
        mask = torch.where(valid == fp.WORD_BYTES, -1, (1 << (8 * valid.clamp(max=7))) - 1)
        last = (num_bytes[:, None] - 1) // fp.WORD_BYTES
        words = (columns.words + rows * _NARROW)[:, None] + torch.minimum(column, last)
        keys = fp.row_keys(columns.starts // fp.ROW_BYTES + rows)
        return cls(index=words.flatten(), mask=mask, keys=keys, outputs=columns.outputs)

    def add(self, words: torch.Tensor, out: torch.Tensor) -> None:
        rows = words[self.index].view(-1, _NARROW) & self.mask
        out.index_add_(0, self.outputs, torch.mv(rows, fp.inner_keys(words.device)) * self.keys)


def _split_wide(columns: _Columns) -> tuple[_Columns, _Columns]:
    """What is read in wide rows, and what in narrow ones: two sets of runs, each in the order of the buffer.

    Wide: all of neighbours that are whole wide rows each and large together, and the middle of other large runs.
    """
    ends = columns.starts + columns.num_bytes
    first = -(-columns.starts // fp.WIDE_ROW_BYTES) * fp.WIDE_ROW_BYTES
    last = ends // fp.WIDE_ROW_BYTES * fp.WIDE_ROW_BYTES
    wide = (last - first >= WIDE_BYTES) | _large_groups(columns)

    def cut(at: torch.Tensor, to: torch.Tensor, keep: torch.Tensor) -> _Columns:
        words = columns.words + (at - columns.starts) // fp.WORD_BYTES
        return _Columns(words, at, to - at, columns.outputs).where(keep & (to > at))

    rest = [
        cut(columns.starts, ends, ~wide),
        cut(columns.starts, first, wide),
        cut(last, ends, wide),
    ]
    joined = _Columns(*(torch.cat([getattr(r, n) for r in rest]) for n in _Columns.__slots__))
    return cut(first, last, wide), joined.where(torch.argsort(joined.words, stable=True))


def _large_groups(columns: _Columns) -> torch.Tensor:
    """Which runs are whole wide rows, in a row of such neighbours of `WIDE_BYTES` together."""
    if not len(columns):
        return torch.zeros(0, dtype=torch.bool)
    whole = (columns.starts % fp.WIDE_ROW_BYTES == 0) & (columns.num_bytes % fp.WIDE_ROW_BYTES == 0)
    new = torch.ones(len(columns), dtype=torch.bool)
    adjoins = columns.words[1:] == (columns.words + columns.num_bytes // fp.WORD_BYTES)[:-1]
    new[1:] = ~(adjoins & whole[1:] & whole[:-1])
    group = new.cumsum(0) - 1
    size = torch.zeros(len(columns), dtype=torch.int64).index_add_(0, group, columns.num_bytes)
    return whole & (size[group] >= WIDE_BYTES)


def _stretches(
    words: torch.Tensor, rows: torch.Tensor, *, width: int, first_sum: int
) -> tuple[torch.Tensor, list[tuple[int, int, int, int]], int]:
    """Neighbouring runs as one product each: the first row sum of each run, the products, and the end of row sums."""
    if not len(words):
        return words, [], first_sum
    ends = words + rows * width
    gap = words[1:] - ends[:-1]
    new = torch.ones(len(words), dtype=torch.bool)
    new[1:] = (gap < 0) | (gap > _MAX_GAP_WORDS) | (gap % width != 0)
    stretch = new.cumsum(0) - 1
    heads = words[new]
    num_rows = (ends[torch.cat([new[1:], new[:1]])] - heads) // width
    last_sums = num_rows.cumsum(0) + first_sum
    first_sums = last_sums - num_rows
    firsts = first_sums[stretch] + (words - heads[stretch]) // width
    products = zip(heads.tolist(), num_rows.tolist(), first_sums.tolist(), strict=True)
    jobs = [(head, num, width, first) for head, num, first in products]
    return firsts, jobs, int(last_sums[-1])


def _expand(
    firsts: torch.Tensor, counts: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row: the index of its sum and its number in the tensor, for runs of `counts` rows."""
    run = torch.repeat_interleave(torch.arange(len(counts)), counts)
    step = torch.arange(len(run)) - (counts.cumsum(0) - counts)[run]
    return firsts[run] + step, values[run] + step


def _small_jobs(jobs: Sequence[tuple[int, int, int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """The same products in blocks of a few megabytes, so that threads share them evenly."""
    for word, rows, width, first in jobs:
        block = _JOB_WORDS // width
        for at in range(0, rows, block):
            yield word + at * width, min(block, rows - at), width, first + at
