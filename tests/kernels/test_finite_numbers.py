"""NaN and infinities are seen in the pass that copies and sums, in every dtype, and finite numbers never are.

Under Triton's interpreter, which is chosen when triton is imported: this file is also the script that runs there.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interpreted import told_by

from rollout_kernels.copy_pieces import make_piece
from rollout_kernels.copy_table import CopyTable

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (F32, BF16, F16, F64, E4M3, E5M2)
LENGTHS = (1, 5, 20_003)
"""Less than a word; a tail; whole wide rows, more than a tile of some dtypes, and a tail."""
WAYS = ("words", "not on words", "strided", "cast")


def cases() -> Iterator[tuple[str, torch.dtype]]:
    for dtype in DTYPES:
        for way in WAYS:
            if way != "cast" or dtype in (BF16, F16, F32):
                yield way, dtype


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """The verdict on each case."""
    return told_by(__file__)


@pytest.mark.parametrize(("way", "dtype"), list(cases()))
def test_under_the_interpreter(way: str, dtype: torch.dtype, interpreted: dict[str, str]) -> None:
    assert interpreted[f"{way} {dtype}"] == "seen"


@pytest.mark.gpu
@pytest.mark.parametrize(("way", "dtype"), list(cases()))
def test_on_a_gpu(way: str, dtype: torch.dtype) -> None:
    assert verdict(way, dtype, torch.device("cuda")) == "seen"


def test_integers_are_finite_and_a_rare_dtype_is_not_known() -> None:
    def blank(dtype: torch.dtype) -> list[list[int]]:
        piece = make_piece(
            shape=(8,),
            source_strides=(1,),
            target_strides=(1,),
            source_dtype=dtype,
            target_dtype=dtype,
            output=0,
        )
        assert piece is not None
        table = CopyTable(
            [piece], sources=[0], targets=[0], device=torch.device("cpu"), num_outputs=1
        )
        return [table._exponents.tolist(), table._blank[1].tolist()]

    assert blank(torch.int16) == [[0], [0]] and blank(torch.bool) == [[0], [0]]
    assert blank(torch.float8_e4m3fnuz) == [[0], [1]]
    assert blank(F64) == [[0x7FF0 << 48], [0]]


def numbers(dtype: torch.dtype, length: int) -> torch.Tensor:
    """Largest, least, denormal and ordinary numbers, both signs."""
    info = torch.finfo(dtype)
    few = [info.max, info.min, info.tiny, 0.0, -0.0, 1.0, -1.5]
    return torch.tensor(few, dtype=F64).to(dtype).repeat(length // 7 + 1)[:length]


def verdict(way: str, dtype: torch.dtype, device: torch.device) -> str:
    """Exactly the tensors with a number that is not finite are suspects, wherever in them it is."""
    source_dtype = {BF16: F32, F16: BF16, F32: F16}[dtype] if way == "cast" else dtype
    stride = 2 if way == "strided" else 1
    bad = ["nan"] if dtype is E4M3 else ["nan", "inf", "-inf"]
    tensors, wanted = [], []
    for turn, length in enumerate(LENGTHS):
        # Each value, and each place, in turn with another one: all pairs would be minutes of the interpreter.
        places = (0, length // 2, length - 1)
        values = [bad[(turn + i) % len(bad)] for i in range(3)]
        for value, at in ((None, 0), *zip(values, places, strict=True)):
            least = (
                source_dtype if torch.finfo(source_dtype).max < torch.finfo(dtype).max else dtype
            )
            tensor = numbers(least, length).to(F64).to(source_dtype)
            if way == "cast":  # the interpreter cuts where hardware rounds
                tensor = torch.where(tensor.abs() > 1e4, torch.ones_like(tensor), tensor)
            if value is not None:
                tensor[at] = float(value)
            spread = torch.zeros(length * stride + 16, dtype=source_dtype)
            spread[1 if way == "not on words" else 0 :][: length * stride : stride] = tensor
            tensors.append(spread.to(device))
            wanted.append(int(value is not None))
    pieces, first, sizes = [], 0, []
    for i, tensor in enumerate(tensors):
        length = (tensor.numel() - 16) // stride
        piece = make_piece(
            shape=(length,),
            source_strides=(stride,),
            target_strides=(1,),
            source_dtype=source_dtype,
            target_dtype=dtype,
            source=i,
            source_offset=source_dtype.itemsize if way == "not on words" else 0,
            target_offset=first,
            output=i,
        )
        assert piece is not None
        pieces.append(piece)
        sizes.append((first, length))
        first += -(-length * dtype.itemsize // 256) * 256
    target = torch.zeros(first, dtype=torch.uint8, device=device)
    sources, targets = [t.data_ptr() for t in tensors], [target.data_ptr()]
    table = CopyTable(
        pieces, sources=sources, targets=targets, device=device, num_outputs=len(pieces)
    )
    sums, found = table.run_checked(sources, targets).cpu()
    if not torch.equal(sums, table.run(sources, targets).cpu()):
        return "other sums"
    for (start, length), suspect in zip(sizes, wanted, strict=True):
        written = target[start : start + length * dtype.itemsize].view(dtype).double()
        if bool(written.isfinite().all()) == bool(suspect):
            return "the case itself is wrong"
    return "seen" if found.tolist() == wanted else f"{found.tolist()} instead of {wanted}"


def main() -> None:
    for way, dtype in cases():
        print(f"{way} {dtype}={verdict(way, dtype, torch.device('cpu'))}")


if __name__ == "__main__":
    main()
