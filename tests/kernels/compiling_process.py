"""Kernels compiled ahead for a Hopper GPU that is not there; prints by which threads, and what there is at the end."""

from __future__ import annotations

import threading
from typing import Any

import torch
import triton
import triton.compiler as compiler
from imagined_hopper import Hopper
from test_compiling import double, launch

from rollout_kernels.compiling import compile_ahead

tl = triton.language


@triton.jit
def wrong(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """No kernel at all."""
    tl.store(x, nothing)  # noqa: F821


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    found: list[tuple[str, str]] = []
    compile_kernel = compiler.compile

    def compile_noted(source: Any, **options: Any) -> Any:
        found.append((threading.current_thread().name.partition("_")[0], source.fn.__name__))
        return compile_kernel(source, **options)

    compiler.compile = compile_noted
    with compile_ahead():
        launch()
        launch(torch.float16)
        launch()
    print(f"compiled by {found[0][0]}: {', '.join(name for _, name in found)}")
    kernels = double.device_caches[0][0].values()
    float32, float16 = (bool(kernel.asm["cubin"]) for kernel in kernels)
    print(f"cubin of float32: {float32}, of float16: {float16}")
    x = torch.empty(128)
    try:
        with compile_ahead():
            wrong[(2,)](x, x, 128, BLOCK=64)
    except Exception as error:
        print(f"refused: {type(error).__name__}")


if __name__ == "__main__":
    main()
