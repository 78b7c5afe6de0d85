"""Many copies and their fingerprints in a few launches: the kernels do what the reference does, bit for bit.

Triton's interpreter is chosen when triton is imported, so the check runs as a process of its own: this file, as a
script, which prints a verdict for each case.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreted import told_by

from rollout_kernels import copy_table as ct
from rollout_kernels import fingerprint as fp
from rollout_kernels.copy_pieces import Piece, make_piece

SEED = 3
MEMORY = 400_000
"""Bytes of each allocation of the cases."""


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def whole(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    at: int,
    to: int,
    output: int,
    source_strides: tuple[int, ...] | None = None,
    source_dtype: torch.dtype | None = None,
) -> Piece:
    piece = make_piece(
        shape=shape,
        source_strides=source_strides or strides_of(shape),
        target_strides=strides_of(shape),
        source_dtype=source_dtype or dtype,
        target_dtype=dtype,
        source_offset=at,
        target_offset=to,
        output=output,
    )
    assert piece is not None
    return piece


def part(
    shape: tuple[int, ...],
    source_strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    *,
    at: int = 0,
    to: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Piece:
    piece = make_piece(
        shape=shape,
        source_strides=source_strides,
        target_strides=target_strides,
        source_dtype=dtype,
        target_dtype=dtype,
        source_offset=at,
        target_offset=to,
    )
    assert piece is not None
    return piece


BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
CASES: dict[str, Callable[[], list[Piece]]] = {
    "packs_whole_tensors_of_any_length": lambda: [
        whole((13,), F32, at=0, to=256, output=0),
        whole((70_001,), BF16, at=512, to=512, output=1),
        whole((3, 5), torch.int8, at=150_000, to=150_016, output=2),
        whole((), F32, at=160_000, to=160_000, output=3),
        whole((0, 4), F32, at=160_000, to=160_000, output=4),
    ],
    "packs_sources_that_start_anywhere": lambda: [
        whole((9000,), BF16, at=8, to=256, output=0),
        whole((9001,), BF16, at=20_002, to=20_224, output=1),
        whole((9001,), torch.int8, at=40_001, to=40_192, output=2),
    ],
    "packs_with_a_cast": lambda: [
        whole((5000,), BF16, at=0, to=0, output=0, source_dtype=F32),
        whole((300, 10), F16, at=40_000, to=16_128, output=1, source_dtype=F32),
        whole((4099,), F32, at=60_000, to=30_208, output=2, source_dtype=BF16),
        whole((77,), F16, at=90_000, to=60_160, output=3, source_dtype=BF16),
    ],
    "packs_transposed_and_sliced_sources": lambda: [
        whole((60, 100), BF16, at=0, to=0, output=0, source_strides=(1, 60)),
        whole((40, 300), F32, at=20_000, to=12_032, output=1, source_strides=(350, 1)),
        whole((4, 5, 6), BF16, at=80_000, to=80_128, output=2, source_strides=(1, 24, 4)),
        whole((50,), F32, at=90_000, to=90_112, output=3, source_strides=(0,)),
        whole(
            (33, 64),
            BF16,
            at=100_000,
            to=100_096,
            output=4,
            source_dtype=F32,
            source_strides=(1, 33),
        ),
    ],
    "writes_slices_of_rows_and_of_columns": lambda: [
        part((64, 512), (1024, 1), (512, 1), at=1024, to=0),
        part((64, 512), (512, 1), (1024, 1), at=131_072, to=131_072),
        part((16, 7), (7, 1), (20, 1), at=263_002, to=263_040),
        part((20, 9), (1, 20), (9, 1), at=270_000, to=270_004),
        part((3, 4, 5, 2), (40, 10, 2, 1), (1, 3, 12, 60), at=280_000, to=280_000),
    ],
    "moves_eight_and_one_byte_elements": lambda: [
        whole((333,), torch.int64, at=8, to=1024, output=0),
        whole((10, 20), torch.float64, at=4096, to=8192, output=1, source_strides=(1, 10)),
        whole((10, 20), torch.uint8, at=16_384, to=16_640, output=2, source_strides=(1, 10)),
        whole((64, 3), torch.float8_e4m3fn, at=20_000, to=20_224, output=3, source_strides=(1, 64)),
    ],
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """The verdict on each case."""
    return told_by(__file__)


OTHERS = ("sums_a_part_where_it_sits", "sums_without_a_copy", "sums_what_it_reads_back")


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_the_kernels_do_what_the_reference_does(case: str, interpreted: dict[str, str]) -> None:
    assert interpreted[case] == "equal"


def test_what_is_no_run_of_whole_words_is_not_read_back() -> None:
    run = whole((13,), F32, at=0, to=256, output=0)
    assert ct.reads_back(run, [0], [8]) and not ct.reads_back(run, [4], [8])
    cast = CASES["packs_with_a_cast"]()[0]
    with pytest.raises(ValueError, match="no runs of whole words"):
        ct.CopyTable(
            [run, cast],
            sources=[0],
            targets=[0],
            device=torch.device("cpu"),
            num_outputs=1,
            read_back=True,
        )


def test_dimensions_that_follow_each_other_are_joined() -> None:
    piece = whole((4, 5, 6), F32, at=0, to=0, output=-1)
    assert piece.sizes == (120,)
    piece = part((4, 5, 6), (60, 6, 1), (30, 6, 1))
    assert piece.sizes == (4, 30) and piece.source_strides == (60, 1)


def test_what_a_table_cannot_do_is_said_before_it_is_compiled() -> None:
    shape = (2, 3, 2, 3, 2)
    inner_first = tuple(torch.empty(shape[::-1]).permute(4, 3, 2, 1, 0).stride())
    for strides, source, target in (
        (inner_first, F32, F32),
        (strides_of(shape), torch.float64, BF16),
        (strides_of(shape), torch.complex128, torch.complex128),
    ):
        assert (
            make_piece(
                shape=shape,
                source_strides=strides,
                target_strides=strides_of(shape),
                source_dtype=source,
                target_dtype=target,
            )
            is None
        )


def test_the_reference_gives_the_fingerprint_of_what_it_wrote() -> None:
    source = noise()
    target = torch.zeros(MEMORY, dtype=torch.uint8)
    pieces = CASES["packs_with_a_cast"]()
    sums = ct.reference(pieces, [source], [target], num_outputs=4)
    for piece, value in zip(pieces, sums, strict=True):
        size = torch.Size(piece.sizes).numel() * piece.target_dtype.itemsize
        at = piece.target_offset
        assert value == fp.reference(target[at : at + size])


def noise(*, exact: bool = False) -> torch.Tensor:
    """Bytes that are finite in every floating-point dtype: a NaN has many encodings.

    `exact`: float32 values that bfloat16 holds: the interpreter cuts where hardware rounds.
    """
    generator = torch.Generator().manual_seed(SEED)
    raw = torch.randint(0, 256, (MEMORY,), dtype=torch.uint8, generator=generator)
    raw[1::2] = raw[1::2] & 0x83 | 0x30
    if exact:
        raw[0::4] = raw[1::4] = 0
    return raw


def aligned(num_bytes: int) -> torch.Tensor:
    spare = torch.zeros(num_bytes + 256, dtype=torch.uint8)
    return spare[-spare.data_ptr() % 256 :][:num_bytes]


def main() -> None:
    cpu = torch.device("cpu")

    def verdict(
        pieces: list[Piece], *, num: int, copy: bool = True, read_back: bool = False
    ) -> str:
        source, target, expected = aligned(MEMORY), aligned(MEMORY), aligned(MEMORY)
        source.copy_(noise(exact=any(p.source_dtype != p.target_dtype for p in pieces)))
        target.fill_(7)
        expected.fill_(7)
        wanted = ct.reference(pieces, [source], [expected], num_outputs=num, copy=copy)
        sources, targets = [source.data_ptr()], [target.data_ptr()]
        table = ct.CopyTable(
            pieces,
            sources=sources,
            targets=targets,
            device=cpu,
            num_outputs=num,
            copy=copy,
            read_back=read_back,
        )
        found = [value & ((1 << 64) - 1) for value in table.run(sources, targets).tolist()]
        if not torch.equal(target, expected):
            return f"different bytes from {int((target != expected).nonzero()[0])} on"
        return "equal" if found == wanted else f"{found} instead of {wanted}"

    for name, make in CASES.items():
        pieces = make()
        num = max(piece.output for piece in pieces) + 1
        print(f"{name}={verdict(pieces, num=num)}")
    odd = make_piece(
        shape=(30, 50),
        source_strides=(1, 30),
        target_strides=(50, 1),
        source_dtype=BF16,
        target_dtype=BF16,
        output=0,
        start=100_003,
        place_strides=(200, 1),
    )
    assert odd is not None
    print(f"sums_a_part_where_it_sits={verdict([odd], num=1, copy=False)}")
    pieces = [
        whole((70_001,), BF16, at=512, to=0, output=1),
        whole((5000,), BF16, at=200_000, to=0, output=0, source_dtype=F32),
    ]
    print(f"sums_without_a_copy={verdict(pieces, num=2, copy=False)}")
    pieces = [
        whole((70_001,), BF16, at=512, to=1024, output=1),
        whole((37,), torch.int8, at=200_000, to=200_192, output=0),
        whole((16_384,), F32, at=220_008, to=220_160, output=2),
    ]
    print(f"sums_what_it_reads_back={verdict(pieces, num=3, read_back=True)}")


if __name__ == "__main__":
    main()
