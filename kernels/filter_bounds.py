"""What top-k, top-p and min-p leave of a row: the search for its bounds, among gathered values or over the whole row.

`logit_filters` says what the bounds are. Both top-k's and top-p's is the largest value at which a sum over everything
from there up reaches a target: of 1 for each token (target k), or of weights. It is found by halving an interval in the
order of float32 numbers. Mostly the values that may matter were gathered, and one token is drawn from among them:

    the least column v for which  sum over u <= v of what is left  >  U(seed, position) * the whole of what is left

again by halving. Gathered values lie in no particular order, so their weights are added as integers, in units of 2^-44
of the largest: such sums have one result in any order. Where too many may matter, halvings over the whole row come
first, chunk by chunk in a fixed order, and the result is a bound and the chunks' sums of what is left, from which
`sampling` draws.

R rows, V vocabulary, C chunks.
"""

from __future__ import annotations

from .launching import jit, tl
from .logit_edits import edit, is_edited
from .logit_stats import row_totals
from .random_numbers import uniform


@jit
def is_filtered(row, V, takes_largest, top_k, top_p, min_p):  # type: ignore[no-untyped-def]
    """Some filter of this row may leave tokens out."""
    k = tl.load(top_k + row)
    some = ((k > 0) & (k < V)) | (tl.load(top_p + row) < 1) | (tl.load(min_p + row) > 0)
    return some & (takes_largest == 0)


@jit
def order(z):  # type: ignore[no-untyped-def]
    """int32 numbers in the order of float32 z, which is not NaN; both zeros are one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def value(place):  # type: ignore[no-untyped-def]
    """The float32 at an int64 place in the order."""
    bits = tl.where(place < 0, place ^ 0x7FFFFFFF, place).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


# Among gathered values ------------------------------------------------------------------------------------------------


@jit
def _largest_reaching(places, measure, above, target, low, high):  # type: ignore[no-untyped-def]
    """The largest place in [low, high) from which up `measure` (integers) and `above` (float64) add up to `target`;
    from `low` up they do."""
    while high - low > 1:
        middle = (low + high) >> 1
        reach = tl.sum(tl.where(places >= middle.to(tl.int32), measure, 0), 0)
        reached = above + reach.to(tl.float64) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@jit
def _draw_listed(  # type: ignore[no-untyped-def]
    values,
    columns,
    num,
    least,
    total,
    peak,
    factor,
    k,
    p,
    least_weight,
    number,
    V,
    SIZE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The token that the number in [0, 1) draws from what filters leave of the `num` gathered values, which are all
    from `least` up; and the bound. `total` is the weight of the whole row."""
    index = tl.arange(0, SIZE)
    there = index < num
    z = tl.load(values + index, mask=there, other=float("-inf"))
    column = tl.load(columns + index, mask=there, other=0x7FFFFFFF)
    places = order(z)
    weight = tl.exp2((z - peak) * factor)
    units = tl.where(there, weight * UNITS, 0.0).to(tl.int64)
    first, end = order(least).to(tl.int64), order(peak).to(tl.int64) + 1
    bound = first
    mass = total * UNITS
    if (k > 0) & (k < V):
        if num >= k:
            ones = there.to(tl.int32)
            bound = _largest_reaching(places, ones, 0.0, k.to(tl.float64), first, end)
            larger = places > bound.to(tl.int32)
            equal = tl.sum(tl.where(places == bound.to(tl.int32), units, 0), 0)
            num_equal = tl.sum((places == bound.to(tl.int32)).to(tl.int32), 0)
            missing = k - tl.sum(larger.to(tl.int32), 0)
            mass = tl.sum(tl.where(larger, units, 0), 0).to(tl.float64)
            mass += (equal // num_equal * missing).to(tl.float64)
        else:  # no more than these can be drawn
            mass = tl.sum(units, 0).to(tl.float64)
    if p < 1:
        target = p.to(tl.float64) * mass
        if tl.sum(tl.where(places >= bound.to(tl.int32), units, 0), 0).to(tl.float64) >= target:
            bound = _largest_reaching(places, units, 0.0, target, bound, end)
    left = there & (places >= bound.to(tl.int32)) & (weight >= least_weight)
    units = tl.where(left, units, 0)
    whole = tl.sum(units, 0)
    goal = tl.minimum((number * whole.to(tl.float64)).to(tl.int64), whole - 1)
    before = -1
    token = V - 1
    while token - before > 1:
        middle = (before + token) >> 1
        beyond = tl.sum(tl.where(column <= middle, units, 0), 0) > goal
        token = tl.where(beyond, middle, token)
        before = tl.where(beyond, before, middle)
    return token, value(bound)


# Over the whole row ---------------------------------------------------------------------------------------------------


@jit
def _load_tile(  # type: ignore[no-untyped-def]
    tile,
    least,
    source,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Edited logits (CHUNKS, CHUNK) of a tile's chunks whose maxima are not below `least`, elsewhere -inf; maxima."""
    x, chunk_maxima, num_chunks, row, position, edited, V, edits = source
    chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
    m = tl.load(chunk_maxima + chunk, mask=chunk < num_chunks, other=float("-inf"))
    column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    wanted = (column < V) & (m >= least)[:, None]
    z = tl.load(x + column, mask=wanted, other=float("-inf")).to(tl.float32)
    if EDITS:
        if edited:
            first = tile * CHUNKS * CHUNK
            end = first + CHUNKS * CHUNK
            z = edit(z, column, first, end, row, position, V, edits, B, E)
            z = tl.where(wanted, z, float("-inf"))
    return z, m


@jit
def _gather(  # type: ignore[no-untyped-def]
    pivot,
    high,
    listed,
    peak,
    factor,
    source,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Number and mass (float64) of the values whose places are in [pivot, high); the first CAPACITY go to `listed`."""
    least = value(pivot)
    num = 0
    mass = tl.zeros((), tl.float64)
    tl.debug_barrier()  # all have read what an earlier pass listed
    for tile in range(tl.cdiv(source[2], CHUNKS)):
        z, m = _load_tile(tile, least, source, B, E, EDITS, CHUNK, CHUNKS)
        if tl.max(m, 0) >= least:
            places = order(z)
            taken = (places >= pivot.to(tl.int32)) & (places < high.to(tl.int32))
            ones = taken.to(tl.int32)
            of_chunk = tl.sum(ones, 1)
            before = num + tl.cumsum(of_chunk, 0) - of_chunk
            at = before[:, None] + tl.cumsum(ones, 1) - 1
            tl.store(listed + at, z, mask=taken & (at < CAPACITY))
            w = tl.where(taken, tl.exp2((z - peak) * factor) * UNITS, 0.0)
            num += tl.sum(of_chunk, 0)
            mass += tl.sum(tl.sum(w.to(tl.float64), 1), 0)
    tl.debug_barrier()  # all is listed
    return num, mass


@jit
def _next_pivot(low, high, heat, step):  # type: ignore[no-untyped-def]
    """A place in (low, high): halfway between values at first, then between places, which always ends."""
    middle = 0.5 * (value(low) + value(high))
    # From a `low` that is only the least float32 there is, values are far away: go down from the other end.
    downwards = value(high) - heat * tl.exp2(step.to(tl.float32))
    middle = order(tl.where(value(low) < -3e38, downwards, middle)).to(tl.int64)
    halved = (step < 12) & (middle > low) & (middle < high)
    return tl.where(halved, middle, (low + high) >> 1)


@jit
def _search_row(  # type: ignore[no-untyped-def]
    by_count,
    target,
    least,
    listed,
    peak,
    heat,
    source,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    UNITS: tl.constexpr,
):
    """The largest value, at least `least`, from which up there are `target` values, or is the mass `target`; and, for a
    number, the mass of the `target` largest."""
    factor = 1.4426950408889634 / heat
    # The place is in [low, high). `inside` is how many values are there at most, and above_num and above_mass what lies
    # from `high` up.
    low, high = order(least).to(tl.int64), order(peak).to(tl.int64) + 1
    inside = source[6]
    above_num = 0
    above_mass = tl.zeros((), tl.float64)
    step = 1
    pivot = _next_pivot(low, high, heat, step)
    searching = True
    while searching:
        num, mass = _gather(
            pivot, high, listed, peak, factor, source, B, E, EDITS, CHUNK, CHUNKS, CAPACITY, UNITS
        )
        reach = tl.where(by_count, (above_num + num).to(tl.float64), above_mass + mass)
        reached = (pivot == low) | (reach >= target)
        low, high = tl.where(reached, pivot, low), tl.where(reached, high, pivot)
        inside = tl.where(reached, num, inside - num)
        above_num += tl.where(reached, 0, num)
        above_mass += tl.where(reached, 0.0, mass)
        fits = inside <= CAPACITY
        # What was listed last is what lies inside if the pivot was low enough; else the list must be made again.
        searching = tl.where(fits, reached == 0, high - low > 1)
        step += 1
        pivot = tl.where(fits, low, _next_pivot(low, high, heat, step))
    # Without a list all that lies inside is equal, and nothing is left to be found.
    num = tl.where(inside <= CAPACITY, inside, 0)
    index = tl.arange(0, CAPACITY)
    there = index < num
    z = tl.load(listed + index, mask=there, other=float("-inf"))
    places = order(z)
    units = tl.where(there, tl.exp2((z - peak) * factor) * UNITS, 0.0).to(tl.int64)
    measure = tl.where(by_count, there.to(tl.int64), units)
    above = tl.where(by_count, above_num * tl.full((), 1.0, tl.float64), above_mass)
    low = _largest_reaching(places, measure, above, target, low, high)
    larger = places > low.to(tl.int32)
    num_larger = above_num + tl.sum(larger.to(tl.int32), 0)
    equal = (tl.exp2((value(low) - peak) * factor) * UNITS).to(tl.int64)
    mass = above_mass + tl.sum(tl.where(larger, units, 0), 0).to(tl.float64)
    return value(low), mass + (target - num_larger) * equal.to(tl.float64)


@jit
def _sum_left(  # type: ignore[no-untyped-def]
    bound,
    least_weight,
    peak,
    factor,
    kept_sums,
    source,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Store the chunks' sums of what is left."""
    num_chunks = source[2]
    for tile in range(tl.cdiv(num_chunks, CHUNKS)):
        z, m = _load_tile(tile, bound, source, B, E, EDITS, CHUNK, CHUNKS)
        base = tl.where(m == float("-inf"), 0.0, m)
        left = (z >= bound) & (tl.exp2((z - peak) * factor) >= least_weight)
        kept = tl.sum(tl.where(left, tl.exp2((z - base[:, None]) * factor), 0.0), 1)
        chunk = tile * CHUNKS + tl.arange(0, CHUNKS)
        tl.store(kept_sums + chunk, kept, mask=chunk < num_chunks)


@jit
def bounds_kernel(  # type: ignore[no-untyped-def]
    logits,
    logit_rows,
    seeds,
    positions,
    temperature,
    greedy,
    stride,
    V,
    maxima,
    sums,
    plane,
    num_chunks,
    edits,
    top_k,
    top_p,
    min_p,
    least,
    num_listed,
    values,
    columns,
    bounds,
    chosen,
    B: tl.constexpr,
    E: tl.constexpr,
    EDITS: tl.constexpr,
    FILTERS: tl.constexpr,
    INDEXED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM: tl.constexpr,
    SMALL: tl.constexpr,
    CAPACITY: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One row, if it is filtered: a token drawn from the list, or a bound and the chunks' sums."""
    row = tl.program_id(0)
    if is_filtered(row, V, tl.load(greedy + row) != 0, top_k, top_p, min_p):
        x_row = row.to(tl.int64)
        if INDEXED:
            x_row = tl.load(logit_rows + row).to(tl.int64)
        position = tl.load(positions + row)
        start = row.to(tl.int64) * num_chunks
        edited = False
        if EDITS:
            edited = is_edited(row, position, edits)
            if edited:
                start += plane
        heat = tl.load(temperature + row)
        factor = 1.4426950408889634 / heat
        chunk_maxima = maxima + start
        _, peak, _, weights = row_totals(chunk_maxima, sums + start, num_chunks, factor, NUM)
        total = tl.sum(weights, 0)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        least_weight = tl.load(min_p + row)
        token = -1
        bound = float("-inf")
        if total > 0:
            num = tl.load(num_listed + row)
            floor = tl.load(least + row)
            number = uniform(tl.load(seeds + row), position)
            listed = row.to(tl.int64) * CAPACITY
            # Whether all of the k largest are in the list is sure only where their number is small.
            if (num <= CAPACITY) & ((k <= num_chunks) | (num >= k) | (k >= V)):
                if num <= SMALL:
                    token, bound = _draw_listed(
                        values + listed,
                        columns + listed,
                        num,
                        floor,
                        total,
                        peak,
                        factor,
                        k,
                        p,
                        least_weight,
                        number,
                        V,
                        SMALL,
                        UNITS,
                    )
                else:
                    token, bound = _draw_listed(
                        values + listed,
                        columns + listed,
                        num,
                        floor,
                        total,
                        peak,
                        factor,
                        k,
                        p,
                        least_weight,
                        number,
                        V,
                        CAPACITY,
                        UNITS,
                    )
            else:
                x = logits + x_row * stride
                source = (x, chunk_maxima, num_chunks, row, position, edited, V, edits)
                # With a small k, or none, what was listed goes down to where the bound cannot be below.
                sure = (k <= num_chunks) | (k >= V)
                bottom = tl.where(sure, floor, -3.4028234663852886e38)
                mass = total * UNITS
                for phase in range(2):
                    by_count = phase == 0
                    if tl.where(by_count, (k > 0) & (k < V), p < 1):
                        target = tl.where(by_count, k.to(tl.float64), p.to(tl.float64) * mass)
                        bound, mass = _search_row(
                            by_count,
                            target,
                            tl.maximum(bound, bottom),
                            values + listed,
                            peak,
                            heat,
                            source,
                            B,
                            E,
                            EDITS,
                            CHUNK,
                            CHUNKS,
                            CAPACITY,
                            UNITS,
                        )
                kept_sums = sums + 2 * plane + row.to(tl.int64) * num_chunks
                _sum_left(
                    bound,
                    least_weight,
                    peak,
                    factor,
                    kept_sums,
                    source,
                    B,
                    E,
                    EDITS,
                    CHUNK,
                    CHUNKS,
                )
        tl.store(bounds + row, bound)
        tl.store(chosen + row, token)
