"""A CPU for verl's trainer, which knows accelerators alone; what Ray calls a GPU is logical here.

verl loads it from outside, in every process:

    export VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_on_cpu VERL_ENGINE_DEVICE=cuda PYTHONPATH=examples
    python -m verl.trainer.main_ppo actor_rollout_ref.rollout.name=rollout_sync trainer.device=cpu \\
        ray_kwargs.ray_init.num_cpus=32 +ray_kwargs.ray_init.num_gpus=4 \\
        +actor_rollout_ref.model.override_config.attn_implementation=sdpa \\
        actor_rollout_ref.model.use_remove_padding=False actor_rollout_ref.actor.strategy=fsdp2 ...

`tests/trainers/verl/test_trainer.py` has the whole command. It is for tests and for trying things out.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _device_module() -> types.ModuleType:
    """What verl calls on `torch.cuda`: `torch.cpu`, with memory calls that count nothing."""
    module = types.ModuleType("cpu_device")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu)})
    counts = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    module.__dict__.update({name: lambda *_: 0 for name in counts})
    nothing = ("empty_cache", "reset_peak_memory_stats", "ipc_collect")
    module.__dict__.update({name: lambda *_: None for name in nothing})
    module.__dict__.update(
        mem_get_info=lambda *_: (16 << 30, 16 << 30),
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        current_device=lambda: "cpu",
        get_device_name=lambda *_: "cpu",
    )
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """verl's interface of a platform, for a machine without accelerators."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


_init_process_group = torch.distributed.init_process_group


@functools.wraps(_init_process_group)
def _init_with_one_backend(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
    """verl names one backend for the CPU and one for the device, which are the same here."""
    backend = "gloo" if backend == "cpu:gloo,cpu:gloo" else backend
    return _init_process_group(backend, *args, **kwargs)


torch.distributed.init_process_group = _init_with_one_backend
