"""Where the engine's time goes: its own functions timed from outside, for as long as they are looked at.

A phase's time is its own: what a timed function inside it takes is that one's. So the phases of a run add up to it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rollout.config import EngineConfig
from rollout.engine.loop.build import build_core
from rollout.engine.loop.core import EngineCore
from rollout.layers import linear, torch_step
from rollout.layers.attention import PagedAttention
from rollout.layers.norm import RMSNorm
from rollout.protocol.commands import Generate, Shutdown
from weight_sync.wire.local_call import LocalCall

REST = "forward: the rest"


class PhaseTimer:
    """Collects exclusive seconds and calls per phase; one thread."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.linear_flops = 0.0
        self.num_tokens = 0
        self._inner: list[float] = []
        self._undo: list[Callable[[], None]] = []

    def watch(
        self, owner: Any, name: str, phase: str, look: Callable[..., None] | None = None
    ) -> None:
        """Time `owner.name`, a method or a module's function; `look` sees its arguments before each call."""
        original = getattr(owner, name)
        own = name in vars(owner)
        inner, seconds, calls = self._inner, self.seconds, self.calls

        def timed(*args: Any, **kwargs: Any) -> Any:
            if look is not None:
                look(*args, **kwargs)
            inner.append(0.0)
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                seconds[phase] += took - inner.pop()
                calls[phase] += 1
                if inner:
                    inner[-1] += took

        setattr(owner, name, timed)
        self._undo.append(
            (lambda: setattr(owner, name, original)) if own else (lambda: delattr(owner, name))
        )

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def watched(core: EngineCore) -> Iterator[PhaseTimer]:
    """Time the parts of one engine loop."""
    timer = PhaseTimer()

    def count_flops(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> None:
        timer.linear_flops += 2.0 * x.shape[0] * weight.numel()

    def count_tokens(batch: Any, drawn: Any) -> None:
        timer.num_tokens += batch.num_tokens

    timer.watch(core, "_next_tick", "commands")
    timer.watch(core, "_carry_out", "commands")
    timer.watch(core, "step", "step: the rest")
    timer.watch(core.scheduler, "schedule", "schedule")
    timer.watch(core.scheduler, "complete", "schedule")
    timer.watch(core.runner, "forward", "prepare the batch", count_tokens)
    timer.watch(core.runner.model, "forward", REST)
    for module in core.runner.model.modules():
        if isinstance(module, linear.ColumnParallelLinear | linear.RowParallelLinear):
            timer.watch(module, "product", "forward: matrix products", count_flops)
    timer.watch(PagedAttention, "forward", "forward: attention, write and fold")
    timer.watch(PagedAttention, "_gather", "forward: attention, gather blocks")
    timer.watch(PagedAttention, "_decode", "forward: attention, kernel")
    timer.watch(PagedAttention, "_prefill", "forward: attention, kernel")
    timer.watch(RMSNorm, "forward", "forward: norms")
    timer.watch(torch_step, "rotate_", "forward: rotary")
    timer.watch(torch_step, "silu", "forward: activation")
    timer.watch(core.runner, "compute_logits", "logits")
    timer.watch(core.post._sampler, "launch", "sampling")
    timer.watch(core.post, "sample", "postprocess")
    timer.watch(core.post, "land", "postprocess")
    try:
        yield timer
    finally:
        timer.undo()


def profile_run(config: EngineConfig, command: Generate) -> dict[str, Any]:
    """Run one command on an engine loop on this thread; seconds, calls and shares of each phase."""
    core = build_core(config)
    call = LocalCall(command, time.monotonic() + config.request_timeout_s)
    call.future.add_done_callback(
        lambda _: core.submit(LocalCall(Shutdown(), time.monotonic() + 60))
    )
    with watched(core) as timer:
        start = time.perf_counter()
        core.submit(call)
        core.run()
        total = time.perf_counter() - start
    call.future.result(0)
    spent = sum(timer.seconds.values())
    phases = {
        phase: {"seconds": seconds, "share": seconds / total, "calls": timer.calls[phase]}
        for phase, seconds in sorted(timer.seconds.items(), key=lambda item: -item[1])
    }
    products = timer.seconds["forward: matrix products"]
    return {
        "seconds": total,
        "not_in_any_phase_s": total - spent,
        "steps": timer.calls["prepare the batch"],
        "computed_tokens": timer.num_tokens,
        "phases": phases,
        "matrix_products_flops": timer.linear_flops,
        "matrix_products_gflops_per_s": timer.linear_flops / products / 1e9,
        "best_gflops_per_s": best_gflops(core),
    }


def best_gflops(core: EngineCore) -> float:
    """What this machine reaches with a large matrix product by the same route: the floor of the forward."""
    dtype = core.runner.dtype
    x, weight = torch.ones(2048, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)
    best = 0.0
    with torch.inference_mode():
        for _ in range(8):
            start = time.perf_counter()
            linear.project(x, weight, None)
            best = max(best, 2.0 * x.shape[0] * weight.numel() / (time.perf_counter() - start))
    return best / 1e9
