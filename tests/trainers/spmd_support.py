"""A trainer's side without a trainer: modules with a checkpoint's names, cut in the ways that trainers cut them."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

Named = list[tuple[str, torch.Tensor]]
ROWWISE = ("o_proj.weight", "down_proj.weight")


def join(rank: int, world: int, store: str) -> None:
    """The default group, over gloo and a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )


def checkpoint(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def stepped(named: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """The same on every rank, another for every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in named.items()
    }


def tree(named: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module whose parameters have these names."""
    root = torch.nn.Module()
    for name, tensor in named.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(tensor.clone()))
    return root


def fsdp(named: dict[str, torch.Tensor], mesh: DeviceMesh) -> torch.nn.Module:
    """FSDP2: every layer, and what is left of the model, cut along dim 0."""
    root = tree(named)
    for layer in root.model.layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in root.parameters())
    return root


def tensor_parallel(named: dict[str, torch.Tensor], mesh: DeviceMesh) -> Named:
    """Column- and row-wise, norms as plain tensors."""
    return [
        (name, tensor)
        if tensor.dim() == 1
        else (name, distribute_tensor(tensor, mesh, [Shard(int(name.endswith(ROWWISE)))]))
        for name, tensor in named.items()
    ]


def fsdp_over_tensor_parallel(named: dict[str, torch.Tensor], mesh: DeviceMesh) -> torch.nn.Module:
    """Both, on a mesh (dp, tp): dimension 0 of a column-wise weight is cut twice."""
    root = tree(named)
    for name, tensor in tensor_parallel(named, mesh["tp"]):
        if not isinstance(tensor, DTensor):
            tensor = distribute_tensor(tensor, mesh["tp"], [Replicate()])
        *path, last = name.split(".")
        root.get_submodule(".".join(path)).register_parameter(last, torch.nn.Parameter(tensor))
    for layer in root.model.layers.children():
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(root, mesh=mesh["dp"])
    return root


def nested(named: dict[str, torch.Tensor], mesh: DeviceMesh) -> Named:
    """Matrices cut along both dimensions, one per mesh axis; vectors along one."""
    return [
        (name, distribute_tensor(tensor, mesh, [Replicate(), Shard(0)]))
        if tensor.dim() == 1
        else (name, distribute_tensor(tensor, mesh, [Shard(0), Shard(1)]))
        for name, tensor in named.items()
    ]


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """Class and text of what it raised."""
    try:
        result = call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", str(result)


def agree(value: Iterable[Any]) -> list[Any]:
    """That of all ranks; only tests may ship objects."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    assert all(other == found[0] for other in found), found
    return found[0]


def say(text: str) -> None:
    print(text, flush=True)
    sys.stdout.flush()
