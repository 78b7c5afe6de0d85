"""Kernels that are only compiled: on the thread that asks, side by side, and all of them before it goes on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from rollout_kernels import launching

pytest.importorskip("triton")


def test_a_kernel_runs_as_it_is_launched_but_where_only_compiling_was_asked_for() -> None:
    seen: list[tuple[Any, ...]] = []

    def run(*args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        seen.append((args, grid, warmup, options))

    launched = partial(launching._launch_or_compile, run)
    launched(1, grid=(2,), warmup=False, N=3)
    with ThreadPoolExecutor(1) as pool, launching.only_compiling(pool):
        launched(1, grid=(2,), warmup=False, N=3)
        launched(1, grid=(9,), warmup=False, N=3)  # the same kernel
        launched(1, grid=(2,), warmup=False, N=4)
        other = threading.Thread(target=launched, args=(4,), kwargs={"grid": (5,), "warmup": False})
        other.start()
        other.join()
    launched(6, grid=(7,), warmup=False)
    assert seen == [
        ((1,), (2,), False, {"N": 3}),
        ((1,), (2,), True, {"N": 3}),
        ((1,), (2,), True, {"N": 4}),
        ((4,), (5,), False, {}),  # another thread launches
        ((6,), (7,), False, {}),
    ]


def test_kernels_are_compiled_once_for_tensors_of_a_kind() -> None:
    memory = torch.zeros(64)
    kinds = [launching._kind(value) for value in (memory, memory[4:], memory[1:], memory.half())]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3
    assert launching._kind((memory, 3, None)) == (kinds[0], 3, None)
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    tiles = [descriptor.from_tensor(memory.view(4, 16), [2, n]) for n in (4, 4, 8)]
    assert len({launching._kind(tile) for tile in tiles}) == 2


def test_launches_compute_again_after_an_error() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        ThreadPoolExecutor(1) as pool,
        launching.only_compiling(pool),
    ):
        _ = 1 / 0
    assert launching._this_thread.compiled is None


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_compiled_and_nothing_is_written() -> None:
    from rollout_kernels.silu_mul import reference, silu_mul

    fused = torch.randn(3, 4096, device="cuda")
    out = torch.zeros(3, 2048, device="cuda")
    with ThreadPoolExecutor(2) as pool, launching.only_compiling(pool):
        for _ in range(3):
            silu_mul(fused, out)
    assert not out.any()
    silu_mul(fused, out)
    torch.testing.assert_close(out, reference(fused).to(out.dtype))
