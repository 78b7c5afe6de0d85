"""The fingerprint of bytes: every way to compute it agrees with the definition, and damage shows."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_kernels import fingerprint as fp
from rollout_kernels import span_table
from rollout_kernels.span_table import ByteSpan, SpanTable, part_sum

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def noise(num_bytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def table_values(spans: list[ByteSpan], buffer: torch.Tensor) -> list[int]:
    table = SpanTable(spans, num_outputs=len(spans), device=CPU)
    return [value & MASK for value in table.sums(buffer.view(torch.int64)).tolist()]


def whole_value(buffer: torch.Tensor) -> int:
    return table_values([ByteSpan(offset=0, num_bytes=len(buffer), output=0)], buffer)[0]


def splitmix(seed: int, n: int) -> int:
    """SplitMix64's output number `n` (from 0), from its published definition."""
    z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_every_key_is_the_product_of_three_odd_splitmix_outputs() -> None:
    seeds = 0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0
    for word in (0, 1, 31, 32, 1023, 1024, 5000, 40_000):
        parts = (word % 32, word // 32 % 32, word // 1024)
        key = 1
        for seed, n in zip(seeds, parts, strict=True):
            key = key * (splitmix(seed, n) | 1) & MASK
        one = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8)
        assert fp.reference(one, start=8 * word) == key
        assert key % 2 == 1


def test_the_value_of_known_bytes_never_changes() -> None:
    # Both ends of a wire compute it, perhaps with different releases.
    data = torch.arange(20_000, dtype=torch.int64).to(torch.uint8)
    assert fp.reference(data) == whole_value(data) == 1575603695521885552


@st.composite
def layouts(draw: st.DrawFn) -> list[ByteSpan]:
    """Spans one after another, with and without padding between them, starting anywhere rows allow."""
    spans = []
    offset = draw(st.integers(0, 5)) * 8
    for output in range(draw(st.integers(1, 12))):
        size = draw(st.one_of(st.integers(0, 700), st.sampled_from([256, 512, 8192, 16384, 9000])))
        start = draw(st.sampled_from([0, 256, 4096, 8192, 8448, 81920]))
        spans.append(ByteSpan(offset=offset, num_bytes=size, output=output, start=start))
        step = draw(st.sampled_from([8, 256]))
        offset = -(-(offset + size) // step) * step + draw(st.sampled_from([0, 0, 8, 2048]))
    return spans


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 2**31), st.sampled_from([8192, 1 << 14, 1 << 20]))
def test_a_table_gives_every_span_its_own_value_whatever_lies_between(
    spans: list[ByteSpan], seed: int, wide_bytes: int
) -> None:
    end = max(span.offset + span.num_bytes for span in spans)
    buffer = noise(-(-end // 8) * 8, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(span_table, "WIDE_BYTES", wide_bytes)
        values = table_values(spans, buffer)
    expected = [
        fp.reference(buffer[span.offset : span.offset + span.num_bytes], span.start)
        for span in spans
    ]
    assert values == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 400), st.integers(0, 7), st.integers(0, 2**31))
def test_the_exact_way_agrees_with_the_definition_at_any_byte(
    size: int, start: int, shift: int, seed: int
) -> None:
    data = noise(size + shift, seed)[shift:]
    value = fp.exact_sum(data, torch.tensor([start]), size)
    assert int(value) & MASK == fp.reference(data, start)


@pytest.mark.parametrize("shift", [1, 4, 8])
def test_the_exact_way_reads_words_only_where_memory_is_aligned(shift: int) -> None:
    data = noise(64 + shift)[shift:]
    assert int(fp.exact_sum(data, torch.tensor([64]), 64)) & MASK == fp.reference(data, 64)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_the_exact_way_reads_elements_of_any_size(dtype: torch.dtype) -> None:
    data = noise(16 * dtype.itemsize * 3).view(dtype)
    runs = torch.tensor([5, 100, 43]) * dtype.itemsize
    run_bytes = 16 * dtype.itemsize
    expected = sum(
        fp.reference(data[16 * i : 16 * i + 16].view(torch.uint8), int(start))
        for i, start in enumerate(runs)
    )
    assert int(fp.exact_sum(data, runs, run_bytes)) & MASK == expected & MASK


@pytest.mark.parametrize("start", [0, 256, 8192 - 256, 8192, 4096])
@pytest.mark.parametrize("size", [8192 * 3, 8192 * 3 + 256, 8192 * 4 - 5, 8192 * 2 + 999])
def test_a_large_run_is_wide_rows_and_what_is_left_before_and_after(
    start: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_table, "WIDE_BYTES", 8192)
    buffer = noise(512 + 8192 * 5)
    span = ByteSpan(offset=512, num_bytes=size, output=0, start=start)
    assert table_values([span], buffer) == [fp.reference(buffer[512 : 512 + size], start)]


def test_neighbours_of_whole_wide_rows_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_table, "WIDE_BYTES", 8192 * 4)
    buffer = noise(8192 * 9)
    sizes = [8192, 16384, 8192, 8192, 256, 8192, 8192 * 2 - 256]
    spans, offset = [], 0
    for output, size in enumerate(sizes):
        spans.append(ByteSpan(offset=offset, num_bytes=size, output=output))
        offset += size
    plan = span_table.RowPlan.compile(spans)
    # The first four at once in wide rows, the rest at once in narrow ones.
    assert [(rows, width) for _, rows, width, _ in plan.jobs] == [(5, 1024), (96, 32)]
    expected = [fp.reference(buffer[s.offset : s.offset + s.num_bytes]) for s in spans]
    assert table_values(spans, buffer) == expected


def test_many_runs_of_whole_rows_are_one_span() -> None:
    buffer = noise(512 * 7)
    starts = torch.tensor([0, 3, 4, 9, 40, 41, 8]) * 512
    span = ByteSpan(offset=0, num_bytes=len(buffer), output=0, run_starts=starts)
    assert span.fits_rows()
    expected = sum(
        fp.reference(buffer[512 * i : 512 * i + 512], int(s)) for i, s in enumerate(starts)
    )
    assert table_values([span], buffer) == [expected & MASK]


def test_large_buffers_have_the_same_value_on_one_thread_and_on_several() -> None:
    buffer = noise(20 << 20)
    threads = torch.get_num_threads()
    try:
        values = []
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            values.append(whole_value(buffer))
    finally:
        torch.set_num_threads(threads)
    exact = fp.exact_sum(buffer.view(torch.int64), torch.tensor([0]), len(buffer))
    assert values == [int(exact) & MASK] * 3


def test_a_buffer_that_is_too_short_is_an_error_on_every_thread() -> None:
    buffer = noise(20 << 20)
    table = SpanTable(
        [ByteSpan(offset=0, num_bytes=len(buffer), output=0)], num_outputs=1, device=CPU
    )
    with pytest.raises(RuntimeError):
        table.sums(buffer[: 10 << 20].view(torch.int64))


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_parts_that_start_anywhere_in_memory_are_copied_to_where_rows_can_read_them(
    offset: int,
) -> None:
    data = noise(10_007 + offset)[offset:]
    value = part_sum(data, torch.tensor([0]), len(data))
    assert int(value) & MASK == fp.reference(data)


def test_a_single_changed_bit_changes_the_value() -> None:
    buffer = noise(40_000)
    value = whole_value(buffer)
    rng = random.Random(0)
    for at in [0, 39_999, *(rng.randrange(40_000) for _ in range(60))]:
        for bit in (0, rng.randrange(8), 7):
            changed = buffer.clone()
            changed[at] ^= 1 << bit
            assert whole_value(changed) != value


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4999), st.integers(0, 4999), st.integers(0, 2**31))
def test_two_swapped_words_change_the_value(a: int, b: int, seed: int) -> None:
    words = noise(40_000, seed).view(torch.int64)
    swapped = words.clone()
    swapped[a], swapped[b] = words[b], words[a]
    same = torch.equal(words, swapped)
    assert (whole_value(words.view(torch.uint8)) == whole_value(swapped.view(torch.uint8))) == same


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([8, 64, 256, 264, 1000, 8192]), st.integers(1, 30), st.data(), st.booleans())
def test_a_row_that_moved_or_was_repeated_changes_the_value(
    row_bytes: int, rows: int, data: st.DataObject, rotate: bool
) -> None:
    buffer = noise(row_bytes * (rows + 1), seed=rows).view(rows + 1, row_bytes)
    a = data.draw(st.integers(0, rows))
    b = data.draw(st.integers(0, rows).filter(lambda row: row != a))
    changed = buffer.clone()
    if rotate:
        order = [row for row in range(rows + 1) if row != a]
        order.insert(b, a)
        changed = buffer[order]
    else:
        changed[b] = buffer[a]
    assert whole_value(buffer.flatten()) != whole_value(changed.contiguous().flatten())


def test_an_empty_table_is_all_zero() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    spans = [ByteSpan(offset=0, num_bytes=0, output=1)]
    for held in ([], spans):
        table = SpanTable(held, num_outputs=3, device=CPU)
        assert table.sums(empty).tolist() == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, -1], ids=["first GPU", "last GPU"])
def test_every_gpu_gives_the_bits_of_the_cpu_whatever_the_current_one(number: int) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1 if number else 0)
    spans, offset = [], 8
    for output, size in enumerate((1, 8, 255, 256, 8192, 9001, 200_001, 3_000_000)):
        start = 8192 * 70_000 * (output % 2) + 256 * output
        spans.append(ByteSpan(offset=offset, num_bytes=size, output=output, start=start))
        offset += -(-size // 8) * 8
    buffer = noise(offset)
    on_gpu = SpanTable(spans, num_outputs=len(spans), device=device)
    with torch.cuda.device(0):
        found = on_gpu.sums(buffer.to(device).view(torch.int64))
    assert [value & MASK for value in found.tolist()] == table_values(spans, buffer)
