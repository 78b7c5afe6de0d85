"""The kernels of `copy_table`: whole words, elements in a row, elements through strides. Tables say where.

Each copies, sums what it has read (`fingerprint` has the formula), or does both in one pass over the bytes. What is
summed can be looked at for NaN and infinities on the way: `exponents` has, for each output, the bits of a word that are
all set in a number that is not finite, and `suspects` becomes 1 where one was. The word is in registers; reading it is
what takes the time.
"""

from __future__ import annotations

from .launching import jit, tl

WORD_COLUMNS = 7
"""Of a tile of words: source, offset, target, offset, bytes, first wide row in the full tensor, output."""
ELEMENT_COLUMNS = 4
"""Of a tile of elements: row of `shapes`, first element, elements, output."""
SHAPE_COLUMNS = 20
"""Source, offset, target, offset, first place; inner three sizes; four strides each of source, target, places."""
BLOCK = 1024
"""Elements that a program of the strided kernel takes at once."""
ROWS_AT_ONCE = 4
"""Wide rows of words that a program has on their way at once."""


@jit
def words_kernel(  # type: ignore[no-untyped-def]
    tiles,
    sources,
    targets,
    fine,
    outer,
    out,
    exponents,
    suspects,
    COPY: tl.constexpr,
    SUM: tl.constexpr,
    FINITE: tl.constexpr,
    BACK: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """target[i] = source[i], out[n] += sum over i of word(i) * OUTER[i // 1024] * fine[i % 1024]   modulo 2^64

    One program per tile of at most `ROWS` wide rows. Whole tiles are read and written without masks, 16 bytes at once
    where `ALIGNED` allows, and `ROWS_AT_ONCE` rows are on their way at once: no load is moved before a store that may
    go to the same place. The last bytes of a run that fill no word go one by one.

    `BACK` sums what is in the target behind the write, not what was read: the second read comes out of the cache that
    all programs share, past each one's own, and costs no time beside the memory's.

    `FINITE`, for all numbers of a word at once: where an exponent lacks a bit, adding the exponent's own mask to what
    it lacks carries into the sign's place, and nowhere else.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    source = tl.load(sources + tl.load(tile)) + tl.load(tile + 1)
    target = tl.load(targets + tl.load(tile + 2)) + tl.load(tile + 3)
    num_bytes = tl.load(tile + 4)
    first_row = tl.load(tile + 5)
    n = tl.load(tile + 6)
    read = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), ALIGNED)
    write = tl.multiple_of(target.to(tl.pointer_type(tl.int64)), ALIGNED)
    column = tl.arange(0, 1024)
    acc = tl.zeros((1024,), tl.int64)
    extra = tl.full((), 0, tl.int64)
    wrong = tl.zeros((1024,), tl.int32)
    wrong_tail = tl.full((), 0, tl.int64)
    exponent = tl.full((), 0, tl.int64)
    if FINITE:
        exponent = tl.load(exponents + n, mask=n >= 0, other=0)
    sign = (exponent << 1) & ~exponent
    if num_bytes == ROWS * 8192:
        for first in tl.static_range(0, ROWS, ROWS_AT_ONCE):
            rows = first + tl.arange(0, ROWS_AT_ONCE)
            at = rows[:, None] * 1024 + column[None, :]
            words = tl.load(read + at)
            if COPY:
                tl.store(write + at, words)
            if BACK:
                tl.debug_barrier()
                words = tl.load(write + at, cache_modifier=".cg")
            if SUM:
                acc += tl.sum(words * tl.load(outer + first_row + rows)[:, None], axis=0)
            if FINITE:
                lacking = ~((~words & exponent) + exponent) & sign
                wrong += tl.sum((lacking != 0).to(tl.int32), axis=0)
    else:
        num_words = num_bytes // 8
        # Not unrolled: its registers would be taken from the whole tiles, which are nearly all.
        for r in range(((num_words + 1023) // 1024).to(tl.int32)):
            valid = r * 1024 + column < num_words
            word = tl.load(read + (r * 1024 + column), mask=valid, other=0)
            if COPY:
                tl.store(write + (r * 1024 + column), word, mask=valid)
            if BACK:
                tl.debug_barrier()
                word = tl.load(
                    write + (r * 1024 + column), mask=valid, other=0, cache_modifier=".cg"
                )
            if SUM:
                acc += word * tl.load(outer + first_row + r)
            if FINITE:
                lacking = ~((~word & exponent) + exponent) & sign
                wrong += (lacking != 0).to(tl.int32)
        rest = num_bytes - num_words * 8
        if rest > 0:
            byte = tl.arange(0, 8)
            here = num_words * 8 + byte
            last = tl.load(source.to(tl.pointer_type(tl.uint8)) + here, mask=byte < rest, other=0)
            if COPY:
                to = target.to(tl.pointer_type(tl.uint8)) + here
                tl.store(to, last, mask=byte < rest)
                if BACK:
                    tl.debug_barrier()
                    last = tl.load(to, mask=byte < rest, other=0, cache_modifier=".cg")
            if SUM:
                tail = tl.sum(last.to(tl.int64) << (byte * 8).to(tl.int64), axis=0)
                if FINITE:
                    wrong_tail = ~((~tail & exponent) + exponent) & sign
                tail *= tl.load(outer + first_row + num_words // 1024)
                extra += tail * tl.load(fine + num_words % 1024)
    if SUM:
        if n >= 0:
            tl.atomic_add(out + n, tl.sum(acc * tl.load(fine + column), axis=0) + extra)
            if FINITE:
                if (tl.sum(wrong, axis=0) > 0) | (wrong_tail != 0):
                    tl.store(suspects + n, 1)


@jit
def flat_kernel(  # type: ignore[no-untyped-def]
    tiles,
    shapes,
    sources,
    targets,
    fine,
    outer,
    out,
    exponents,
    suspects,
    SOURCE: tl.constexpr,
    SOURCE_SIZE: tl.constexpr,
    TARGET: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    CAST: tl.constexpr,
    COPY: tl.constexpr,
    SUM: tl.constexpr,
    FINITE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHAPE_COLUMNS: tl.constexpr,
):
    """target[e] = source[e] in the target's dtype; out[n] += bits(e) << 8 * (byte(e) % 8), times the key of its word

    Contiguous at both ends. Tiles are whole wide rows of the full tensor, whose `BLOCK` elements share `OUTER`: a
    multiplication per element, and once at the end `fine`.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    shape = shapes + tl.load(tile) * SHAPE_COLUMNS
    first = tl.load(tile + 1)
    num = tl.load(tile + 2)
    n = tl.load(tile + 3)
    source = tl.load(sources + tl.load(shape)) + tl.load(shape + 1) + first * SOURCE_SIZE
    target = tl.load(targets + tl.load(shape + 2)) + tl.load(shape + 3) + first * SIZE
    read = source.to(tl.pointer_type(SOURCE))
    write = target.to(tl.pointer_type(TARGET))
    if ALIGNED:
        read = tl.multiple_of(read, 16)
        write = tl.multiple_of(write, 16)
    column = tl.arange(0, BLOCK)
    shift = (column * SIZE % 8 * 8).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.int64)
    whole: tl.constexpr = (1 << (8 * SIZE)) - 1 if SIZE < 8 else -1
    wrong = tl.zeros((BLOCK,), tl.int32)
    exponent = tl.full((), 0, tl.int64)
    if FINITE:
        exponent = tl.load(exponents + n, mask=n >= 0, other=0) & whole
    if num == ROWS * BLOCK:
        for r in range(ROWS):
            value = tl.load(read + (r * BLOCK + column))
            if CAST:
                value = value.to(tl.float32).to(TARGET)
            if COPY:
                tl.store(write + (r * BLOCK + column), value)
            if SUM:
                bits = value.to(BITS, bitcast=True).to(tl.int64) & whole
                acc += (bits << shift) * tl.load(outer + first // BLOCK + r)
                if FINITE:
                    wrong |= ((bits & exponent) == exponent).to(tl.int32)
    else:
        for r in range(ROWS):
            valid = r * BLOCK + column < num
            value = tl.load(read + (r * BLOCK + column), mask=valid, other=0)
            if CAST:
                value = value.to(tl.float32).to(TARGET)
            if COPY:
                tl.store(write + (r * BLOCK + column), value, mask=valid)
            if SUM:
                bits = value.to(BITS, bitcast=True).to(tl.int64) & whole
                key = tl.load(outer + first // BLOCK + r, mask=r * BLOCK < num, other=0)
                acc += tl.where(valid, bits << shift, 0) * key
                if FINITE:
                    wrong |= ((bits & exponent) == exponent).to(tl.int32)
    if SUM:
        if n >= 0:
            acc *= tl.load(fine + column * SIZE // 8)
            tl.atomic_add(out + n, tl.sum(acc, axis=0))
            if FINITE:
                if (tl.sum(wrong, axis=0) > 0) & (exponent != 0):
                    tl.store(suspects + n, 1)


@jit
def strided_kernel(  # type: ignore[no-untyped-def]
    tiles,
    shapes,
    sources,
    targets,
    fine,
    outer,
    out,
    exponents,
    suspects,
    SOURCE: tl.constexpr,
    SOURCE_SIZE: tl.constexpr,
    TARGET: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    CAST: tl.constexpr,
    COPY: tl.constexpr,
    SUM: tl.constexpr,
    FINITE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHAPE_COLUMNS: tl.constexpr,
):
    """As `flat_kernel`, through up to four dimensions at each end, and in the full tensor whose sum it is."""
    tile = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    shape = shapes + tl.load(tile) * SHAPE_COLUMNS
    first = tl.load(tile + 1)
    end = first + tl.load(tile + 2)
    n = tl.load(tile + 3)
    source = tl.load(sources + tl.load(shape)) + tl.load(shape + 1)
    target = tl.load(targets + tl.load(shape + 2)) + tl.load(shape + 3)
    read = source.to(tl.pointer_type(SOURCE))
    write = target.to(tl.pointer_type(TARGET))
    column = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.int64)
    whole: tl.constexpr = (1 << (8 * SIZE)) - 1 if SIZE < 8 else -1
    wrong = tl.zeros((BLOCK,), tl.int32)
    exponent = tl.full((), 0, tl.int64)
    if FINITE:
        exponent = tl.load(exponents + n, mask=n >= 0, other=0) & whole
    for r in range(ROWS):
        e = first + r * BLOCK + column
        valid = e < end
        i3 = e % tl.load(shape + 7)
        rest = e // tl.load(shape + 7)
        i2 = rest % tl.load(shape + 6)
        rest = rest // tl.load(shape + 6)
        i1 = rest % tl.load(shape + 5)
        i0 = rest // tl.load(shape + 5)
        at = i0 * tl.load(shape + 8) + i1 * tl.load(shape + 9)
        at += i2 * tl.load(shape + 10) + i3 * tl.load(shape + 11)
        value = tl.load(read + at, mask=valid, other=0)
        if CAST:
            value = value.to(tl.float32).to(TARGET)
        if COPY:
            to = i0 * tl.load(shape + 12) + i1 * tl.load(shape + 13)
            to += i2 * tl.load(shape + 14) + i3 * tl.load(shape + 15)
            tl.store(write + to, value, mask=valid)
        if SUM:
            place = tl.load(shape + 4) + i0 * tl.load(shape + 16) + i1 * tl.load(shape + 17)
            place += i2 * tl.load(shape + 18) + i3 * tl.load(shape + 19)
            byte = place * SIZE
            word = byte // 8
            bits = value.to(BITS, bitcast=True).to(tl.int64) & whole
            key = tl.load(fine + word % 1024, mask=valid, other=0)
            key *= tl.load(outer + word // 1024, mask=valid, other=0)
            acc += tl.where(valid, bits << (byte % 8 * 8), 0) * key
            if FINITE:
                wrong |= ((bits & exponent) == exponent).to(tl.int32)
    if SUM:
        if n >= 0:
            tl.atomic_add(out + n, tl.sum(acc, axis=0))
            if FINITE:
                if (tl.sum(wrong, axis=0) > 0) & (exponent != 0):
                    tl.store(suspects + n, 1)
