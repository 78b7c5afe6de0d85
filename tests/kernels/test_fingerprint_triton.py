"""The CUDA kernel computes the same bits, checked under Triton's interpreter.

The interpreter is chosen when triton is imported, so the check runs as a process of its own: this file, as a script.
"""

from __future__ import annotations

import pytest
from interpreted import told_by

CASES = {
    "one_word": [(0, 8, 0)],
    "part_of_a_word": [(0, 1, 0), (8, 7, 8), (16, 15, 0)],
    "rows": [(0, 256, 0), (256, 8192, 0), (8448, 8192, 8192), (16640, 512, 8192 - 256)],
    "odd_ends": [(0, 1001, 256), (1008, 8199, 8), (9216, 20_003, 24)],
    "many_tiles": [(8, 200_001, 8184), (200_016, 70_000, 0)],
    "empty": [(0, 0, 0), (0, 16, 0)],
    "far_into_the_tensor": [(0, 9000, 8192 * 70_000 + 16)],
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """The verdict on each case."""
    return told_by(__file__)


@pytest.mark.parametrize("case", [*CASES, "table_of_runs"])
def test_the_kernel_gives_the_bits_of_the_definition(
    case: str, interpreted: dict[str, str]
) -> None:
    assert interpreted[case] == "equal"


def main() -> None:
    import torch

    from rollout_kernels import fingerprint as fp
    from rollout_kernels.span_table import ByteSpan, SpanTable, TilePlan

    cpu = torch.device("cpu")
    buffer = torch.randint(
        0, 256, (300_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    for name, segments in CASES.items():
        offsets, sizes, starts = (torch.tensor(column) for column in zip(*segments, strict=True))
        tiles = fp.tile_table(
            first_words=offsets // 8,
            starts=starts,
            num_bytes=sizes,
            outputs=torch.arange(len(segments)),
        )
        out = torch.zeros(len(segments), dtype=torch.int64)
        outer = fp.outer_keys(int(tiles[:, 5].max()) + 1, cpu)
        fp.launch(buffer.view(torch.int64), tiles, outer, out)
        expected = [fp.reference(buffer[at : at + n], start) for at, n, start in segments]
        got = [fp.signed(value) & (2**64 - 1) for value in out.tolist()]
        print(f"{name}={'equal' if got == expected else f'got {got}, expected {expected}'}")
    starts = torch.arange(5) * 4096 + 256
    spans = [
        ByteSpan(offset=0, num_bytes=5 * 1024, output=1, run_starts=starts),
        ByteSpan(offset=5 * 1024, num_bytes=3333, output=0),
    ]
    out = torch.zeros(2, dtype=torch.int64)
    TilePlan.compile(spans, cpu).add(buffer.view(torch.int64), out)
    rows = SpanTable(spans, num_outputs=2, device=cpu).sums(buffer.view(torch.int64))
    print(f"table_of_runs={'equal' if torch.equal(out, rows) else f'got {out}, expected {rows}'}")


if __name__ == "__main__":
    main()
