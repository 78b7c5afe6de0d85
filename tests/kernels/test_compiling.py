"""Kernels that are compiled before a step needs them: by other threads, once each, and nothing is launched."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout_kernels.compiling import _Compilers, compile_ahead

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def double(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = 2 x."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, at < size), at < size)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Any, int]]:
    """What comes to triton: whether it is compiled only, the first argument's dtype, and BLOCK."""
    found: list[tuple[bool, Any, int]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((warmup, args[0].dtype, options["BLOCK"]))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    return found


def launch(dtype: torch.dtype = torch.float32, block: int = 64) -> None:
    x = torch.empty(128, dtype=dtype)
    double[(2,)](x, torch.empty_like(x), len(x), BLOCK=block)


def test_what_is_launched_alike_is_compiled_once(launches: list[Any]) -> None:
    with compile_ahead():
        for _ in range(3):
            launch()
        launch(torch.float16)
        launch(block=128)
    kinds = [(True, torch.float32, 64), (True, torch.float16, 64), (True, torch.float32, 128)]
    assert launches == kinds
    launch()
    assert launches[3:] == [(False, torch.float32, 64)]


def test_launches_of_other_threads_are_launches(launches: list[Any]) -> None:
    with compile_ahead():
        other = threading.Thread(target=launch)
        other.start()
        other.join()
    assert launches == [(False, torch.float32, 64)]


def test_two_that_compile_ahead_leave_launches_as_they_were(launches: list[Any]) -> None:
    inside, leave = threading.Event(), threading.Event()

    def second() -> None:
        with compile_ahead():
            inside.set()
            leave.wait(30)

    other = threading.Thread(target=second)
    with compile_ahead():
        other.start()
        inside.wait(0.2)  # in vain, while it waits for its turn
    assert inside.wait(30)
    leave.set()
    other.join()
    launch()
    assert launches == [(False, torch.float32, 64)]


def test_a_kernel_is_loaded_where_its_launch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the process was before: an engine may be on another GPU than the current one."""
    here, loaded = threading.local(), []

    @contextmanager
    def on(device: int) -> Iterator[None]:
        before, here.device = current(), device
        yield
        here.device = before

    def current() -> int:
        return getattr(here, "device", 0)

    class Kernel:
        @property
        def run(self) -> None:
            loaded.append(current())

    for name, stand_in in (("is_available", lambda: True), ("current_device", current)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "device", on)
    with _Compilers() as pool:
        with on(1):
            pool.submit(Kernel).result(30)
        pool.submit(Kernel).result(30)
    assert loaded == [1, 0]


def test_what_fails_inside_leaves_launches_as_they_were(launches: list[Any]) -> None:
    with pytest.raises(ZeroDivisionError), compile_ahead():
        raise ZeroDivisionError
    launch()
    assert launches == [(False, torch.float32, 64)]


def test_kernels_are_compiled_for_the_device_at_the_end() -> None:
    """In a process whose driver compiles for a Hopper GPU and cannot launch."""
    script = Path(__file__).with_name("compiling_process.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == [
        "compiled by compile: double, double",
        "cubin of float32: True, of float16: True",
        "refused: CompilationError",
    ]
