"""A position-dependent 64-bit fingerprint of bytes, linear over shards: the definition, a reference, a CUDA kernel.

    fingerprint = sum over i of  word(i) * key(i)   modulo 2^64

`word(i)` is the little-endian 8-byte word `i` of the full tensor's bytes, zero-padded at the end, and `key(i)` an odd
64-bit number that depends on `i` alone:

    key(i) = INNER[i % 32] * MIDDLE[i // 32 % 32] * OUTER[i // 1024]   modulo 2^64

The factors are SplitMix64 outputs with their lowest bit set. Being linear, the sum over any split of a tensor's bytes
is the value of the whole; every key being odd, any change within one word changes the value. Keys of 32 words differ
only in `INNER`, so rows of 256 bytes are one matrix-vector product, and so are rows of 8 KB with `fine_keys`.

What it does not see: a word's highest bits enter the sum's highest bits alone. An even number of changes that are
confined to bit 63 of their words cancels, and changes confined to the top b bits cancel with probability 2^-b. It
tells wrong, stale, moved or damaged tensors from right ones; it is not a cryptographic hash.

Shapes: `W` words, `T` tiles, `N` tensors.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch

try:  # optional: only tensors on CUDA need it
    import triton
    import triton.language as tl
except ImportError:  # pragma: no cover
    triton = None

WORD_BYTES = 8
ROW_BYTES = 256
"""Bytes that share `MIDDLE` and `OUTER`."""
WIDE_ROW_BYTES = 8192
"""Bytes that share `OUTER`."""

_MASK = (1 << 64) - 1
_INNER_SEED = 0x243F6A8885A308D3
_MIDDLE_SEED = 0x13198A2E03707344
_OUTER_SEED = 0xA4093822299F31D0

TILE_ROWS = 8
"""Wide rows that one program of the kernel reads."""
TILE_COLUMNS = 6
"""Columns of a tile table; `segment_kernel` names them."""


def signed(value: int) -> int:
    """`value` modulo 2^64 as the int64 with the same bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _splitmix(seed: int, num: int) -> torch.Tensor:
    """The first `num` outputs of SplitMix64 from `seed`, lowest bit set, as int64 on the CPU."""

    def shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = torch.arange(1, num + 1, dtype=torch.int64, device="cpu")
    z = z * signed(0x9E3779B97F4A7C15) + signed(seed)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return (z ^ shifted(z, 31)) | 1


@lru_cache(maxsize=64)
def inner_keys(device: torch.device) -> torch.Tensor:
    """INNER, (32,) int64."""
    return _splitmix(_INNER_SEED, 32).to(device)


@lru_cache(maxsize=64)
def fine_keys(device: torch.device) -> torch.Tensor:
    """INNER[c % 32] * MIDDLE[c // 32] for every word `c` of a wide row, (1024,) int64."""
    keys = _splitmix(_MIDDLE_SEED, 32)[:, None] * _splitmix(_INNER_SEED, 32)
    return keys.flatten().to(device)


@lru_cache(maxsize=64)
def _outer_table(num: int, device: torch.device) -> torch.Tensor:
    return _splitmix(_OUTER_SEED, num).to(device)


def outer_keys(num: int, device: torch.device) -> torch.Tensor:
    """OUTER of at least the first `num` wide rows, int64; a table that is shared: do not write to it."""
    return _outer_table(max(1024, 1 << (num - 1).bit_length()), device)


def row_keys(rows: torch.Tensor) -> torch.Tensor:
    """MIDDLE * OUTER of each 256-byte row of a tensor (int64, as `rows`)."""
    device = rows.device
    middle = _splitmix(_MIDDLE_SEED, 32).to(device)
    last = int(rows.max()) if rows.numel() else 0
    return middle[rows % 32] * outer_keys(last // 32 + 1, device)[rows // 32]


def reference(data: torch.Tensor, start: int = 0) -> int:
    """The definition, word by word, in Python integers: `data` (uint8) sits at byte `start` of its tensor.

    For tests alone: it takes microseconds per word.
    """
    inner, middle = (_splitmix(seed, 32).tolist() for seed in (_INNER_SEED, _MIDDLE_SEED))
    raw = bytes(start % WORD_BYTES) + bytes(data.cpu().tolist())
    first = start // WORD_BYTES
    outer = _splitmix(_OUTER_SEED, (first + len(raw) // WORD_BYTES) // 1024 + 1).tolist()
    total = 0
    for at in range(0, len(raw), WORD_BYTES):
        i = first + at // WORD_BYTES
        key = inner[i % 32] * middle[i // 32 % 32] * outer[i // 1024]
        total += int.from_bytes(raw[at : at + WORD_BYTES], "little") * key
    return total & _MASK


def exact_sum(data: torch.Tensor, run_starts: torch.Tensor, run_bytes: int) -> torch.Tensor:
    """The sum over `data` (contiguous) cut into runs of `run_bytes` that start at the bytes `run_starts` (int64, on
    the CPU or the same device) of the full tensor. Any start that is a whole number of elements will do. 0-d int64.

    Every element contributes `bits << (8 * (byte % 8))` times its word's key: many passes and eight bytes of scratch
    per element, in blocks. For what rows cannot express; `SpanTable` is the fast way.
    """
    device = data.device
    total = torch.zeros((), dtype=torch.int64, device=device)
    if data.numel() == 0:
        return total
    starts = run_starts.to(device)
    unit = min(data.element_size(), WORD_BYTES)
    whole_words = run_bytes % WORD_BYTES == 0 and not bool((starts % WORD_BYTES).any())
    flat = data.flatten()
    if whole_words and flat.storage_offset() * data.element_size() % WORD_BYTES == 0:
        unit = WORD_BYTES
    units = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[unit])
    fine = fine_keys(device)
    last_word = (int(starts.max()) + run_bytes) // WORD_BYTES
    outer = outer_keys(last_word // 1024 + 1, device)
    block = 1 << 20
    for first in range(0, units.numel(), block):
        value = units[first : first + block].to(torch.int64)
        at = torch.arange(first, first + value.numel(), device=device) * unit
        byte = starts[at // run_bytes] + at % run_bytes
        if unit < WORD_BYTES:
            value = (value & ((1 << (8 * unit)) - 1)) << (8 * (byte % WORD_BYTES))
        word = byte // WORD_BYTES
        total += (value * fine[word % 1024] * outer[word // 1024]).sum()
    return total


if triton is not None:

    @triton.jit
    def segment_kernel(  # type: ignore[no-untyped-def]
        words,
        fine,
        outer,
        tiles,
        out,
        ALIGNED: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """out[n] += sum over the tile's words i of  word(i) * OUTER[i // 1024] * fine[i % 1024]   modulo 2^64

        One program per tile, and one pass over the bytes. Row by row `acc[c] += word * OUTER[row]`, and once at the
        end `sum(acc * fine)`: one 64-bit multiplication per word. Integer atomics commute, so the bits do not depend
        on the order of the programs. Tiles that are whole are read without masks, 16 bytes at once where `ALIGNED`.
        """
        tile = tiles + tl.program_id(0) * COLUMNS
        base = tl.load(tile)  # where in `words` word 0 of the tensor would be
        first_row = tl.load(tile + 1)
        first_word = tl.load(tile + 2)
        end_byte = tl.load(tile + 3)
        n = tl.load(tile + 4)
        last_row = tl.load(tile + 5)
        column = tl.arange(0, 1024)
        acc = tl.zeros((1024,), tl.int64)
        whole = (first_row * 1024 >= first_word) & ((first_row + ROWS) * 8192 <= end_byte)
        if whole:
            here = words + (base + first_row * 1024)
            if ALIGNED:
                here = tl.multiple_of(here, 16)
            for r in tl.static_range(ROWS):
                word = tl.load(here + (r * 1024 + column))
                acc += word * tl.load(outer + first_row + r)
        else:
            # Not unrolled: of the short runs of a rank's part there is a row or two in each tile.
            for r in range(tl.minimum(last_row - first_row + 1, ROWS).to(tl.int32)):
                row = first_row + r
                i = row * 1024 + column
                num_bytes = end_byte - i * 8
                valid = (i >= first_word) & (num_bytes > 0)
                word = tl.load(words + base + i, mask=valid, other=0)
                one = tl.full((1024,), 1, tl.int64)
                bits = tl.minimum(tl.maximum(num_bytes, 0), 7) * 8
                word = tl.where(num_bytes < 8, word & ((one << bits) - 1), word)
                acc += word * tl.load(outer + tl.minimum(row, last_row))
        tl.atomic_add(out + n, tl.sum(acc * tl.load(fine + column), axis=0))


def tile_table(
    *,
    first_words: torch.Tensor,
    starts: torch.Tensor,
    num_bytes: torch.Tensor,
    outputs: torch.Tensor,
) -> torch.Tensor:
    """The kernel's table, (T, 6) int64, for segments given in columns (int64, on the CPU).

    Segment s: `num_bytes[s]` bytes from word `first_words[s]` of the buffer on, which sit at byte `starts[s]` (a
    multiple of 8) of tensor `outputs[s]`. A tile is at most `TILE_ROWS` wide rows of one segment.
    """
    first = starts // WORD_BYTES
    end = starts + num_bytes
    first_row, last_row = first // 1024, (end - 1) // WIDE_ROW_BYTES
    num_tiles = torch.where(num_bytes > 0, (last_row - first_row) // TILE_ROWS + 1, 0)
    segment = torch.repeat_interleave(torch.arange(len(starts)), num_tiles)
    tile = torch.arange(len(segment)) - (num_tiles.cumsum(0) - num_tiles)[segment]
    columns = (
        (first_words - first)[segment],
        first_row[segment] + tile * TILE_ROWS,
        first[segment],
        end[segment],
        outputs[segment],
        last_row[segment],
    )
    return torch.stack(columns, dim=1)


def launch(
    words: torch.Tensor,
    tiles: torch.Tensor,
    outer: torch.Tensor,
    out: torch.Tensor,
    *,
    even: bool = False,
) -> None:
    """Add the sums of `tiles` over `words` (W,) int64 to `out` (N,) int64, in one launch; all on one device.

    `outer` holds the keys up to the last row of any tile. `even`: every tile's first column is even, so that rows start
    on 16 bytes where the buffer does.
    """
    if triton is None:
        raise RuntimeError(
            f"cannot fingerprint memory on {words.device}: got no triton, expected it on a machine "
            "with CUDA; install triton"
        )
    if tiles.shape[0] == 0:
        return
    kernel: Any = segment_kernel
    fine = fine_keys(words.device)
    # Triton launches on the current device, whatever the tensors' own. On the CPU, its interpreter runs this.
    with torch.cuda.device(words.device) if words.is_cuda else nullcontext():
        kernel[(tiles.shape[0],)](
            words,
            fine,
            outer,
            tiles,
            out,
            ALIGNED=even and words.data_ptr() % 16 == 0,
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
        )
