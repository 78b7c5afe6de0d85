"""Checks of kernels that run under triton's interpreter, in a process of their own, and on a GPU in this one.

The interpreter is chosen when triton is imported. So a test file keeps its checks in a `Checks`, ends with
`CHECKS.main()` where it is run as a script, and takes its tests from `as_tests`: that runs the script, and calls the
checks with a CUDA device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import INTERPRETING

Check = Callable[..., None]


def search_interpreted(module: str, out: Path, *arguments: str) -> dict[str, Any]:
    """What a search of launches finds with little data, in the interpreter."""
    command = (sys.executable, "-m", f"rollout_benchmarks.{module}", "--tiny", "--out", str(out))
    done = subprocess.run(
        [*command, *arguments],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


class Checks(dict[str, Callable[[torch.device], None]]):
    """Named checks; each takes the device to run on and raises where something is wrong."""

    def add(self, *cases: dict[str, Any]) -> Callable[[Check], Check]:
        """Register a function, once for each set of keyword arguments (once without any)."""

        def register(function: Check) -> Check:
            for case in cases or ({},):
                words = [function.__name__, *(f"{key}={value}" for key, value in case.items())]

                def check(device: torch.device, case: dict[str, Any] = case) -> None:
                    function(device, **case)

                self["-".join(words).replace("torch.", "")] = check
            return function

        return register

    def as_tests(self, file: str) -> tuple[Any, Check, Check]:
        """A fixture `verdicts` of the file, and a test of each check under the interpreter and on a GPU."""

        @pytest.fixture(scope="module")
        def verdicts() -> dict[str, str]:
            """What each check says under the interpreter: "ok", or its traceback."""
            result: dict[str, str] = json.loads(run_interpreted(file).splitlines()[-1])
            return result

        @pytest.mark.parametrize("name", self)
        def under_the_interpreter(name: str, verdicts: dict[str, str]) -> None:
            assert verdicts[name] == "ok", verdicts[name]

        @pytest.mark.gpu
        @pytest.mark.parametrize("name", self)
        def on_the_gpu(name: str) -> None:
            self[name](torch.device("cuda"))

        return verdicts, under_the_interpreter, on_the_gpu

    def main(self) -> None:
        """Run all on the CPU, or those whose names hold an argument, and print the verdicts."""
        _round_bfloat16_to_nearest()
        verdicts = {}
        for name, check in self.items():
            if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
                continue
            began = time.perf_counter()
            try:
                check(torch.device("cpu"))
                verdicts[name] = "ok"
            except Exception:
                verdicts[name] = traceback.format_exc()
                print(name, verdicts[name], file=sys.stderr)
            print(f"{name}: {time.perf_counter() - began:.2f} s", file=sys.stderr)
        print(json.dumps(verdicts))


def run_interpreted(file: str) -> str:
    """What the script prints whose triton is the interpreter."""
    done = subprocess.run(
        [sys.executable, file],
        env={**os.environ, **INTERPRETING, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def told_by(file: str) -> dict[str, str]:
    """The lines `name=verdict` of such a script."""
    return dict(line.split("=", 1) for line in run_interpreted(file).splitlines() if "=" in line)


def _round_bfloat16_to_nearest() -> None:
    """The interpreter cuts the low half of a float32 off, where hardware rounds to nearest, ties to even."""
    from triton.runtime import interpreter

    convert: Callable[..., Any] = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        wide = torch.from_numpy(np.array(data, np.float32, copy=True))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert_float


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory whose contents would show in a result: NaN, or a large negative integer."""
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min + 7
    return torch.full(shape, value, dtype=dtype, device=device)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Euclidean norm of the difference over that of `want`, in float64; NaN where anything is."""
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=1e-300))
