"""An H200 that is not there: tensors without memory, and launches that stop where the compiler is done.

For processes of their own, which it changes for good.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction, MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

CUDA, META = torch.device("cuda", 0), torch.device("meta")
DEVICE = "NVIDIA H200"
MULTIPROCESSORS = 132


class Hopper(DriverBase):
    """A driver that knows what to compile for, and launches nothing."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _OnMeta(TorchFunctionMode):
    """What is asked for on CUDA has a shape and a dtype, and no memory; torch itself is told so, and nobody else."""

    def __init__(self) -> None:
        self.inside = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def moved(value: Any) -> Any:
            return "meta" if isinstance(value, torch.device) and value.type == "cuda" else value

        named = {name: moved(value) for name, value in (kwargs or {}).items()}
        outside, self.inside = self.inside, True
        try:
            return func(*map(moved, args), **named)
        finally:
            self.inside = outside


def _mock(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        mocked = object.__new__(TensorDescriptor)
        mocked.__dict__.update({**value.__dict__, "base": _mock(value.base)})
        return mocked
    if isinstance(value, tuple):
        return tuple(map(_mock, value))
    return MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value


def imagine_h200() -> dict[str, Any]:
    """From now on tensors can be made on CUDA, and launches compile; what they have compiled, by name and hash."""
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert all(0 < size < 2**31 for size in grid[:1]) and all(0 < n < 2**16 for n in grid[1:])
        options = {name: _mock(value) for name, value in options.items()}
        kernel = run(self, *map(_mock, args), grid=grid, warmup=True, **options)
        found[f"{kernel.name} {kernel.hash}"] = kernel
        return kernel

    mode = _OnMeta()
    facts = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    patches: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", compile_only),
        (torch.Tensor, "is_cuda", property(lambda self: not mode.inside)),
        (torch.Tensor, "device", property(lambda self: META if mode.inside else CUDA)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device", lambda device: nullcontext()),
        (torch.cuda, "get_device_name", lambda device=None: DEVICE),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "get_device_properties", lambda device=None: facts),
    ]
    for owner, name, value in patches:
        setattr(owner, name, value)
    triton.runtime.driver.set_active(Hopper())
    mode.__enter__()
    return found


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as the binary says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])
