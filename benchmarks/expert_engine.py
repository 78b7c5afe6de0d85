"""An engine that holds nothing but weights, in a process of its own: experts in stacked parameters, or dense ones.

Arguments: "experts" or "dense", layers, experts, width, inner width. Prints its address, and ends with its input.
"""

from __future__ import annotations

import sys

import torch

from weight_sync.layout.weight_map import Placement, WeightMap

from .idle_host import serve


def expert_shapes(layers: int, experts: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The names under which checkpoints have experts."""
    return {
        f"model.layers.{layer}.mlp.experts.{e}.{part}.weight": shape
        for layer in range(layers)
        for e in range(experts)
        for part, shape in (
            ("gate_proj", (inner, width)),
            ("up_proj", (inner, width)),
            ("down_proj", (width, inner)),
        )
    }


def dense_shapes(layers: int, experts: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The same bytes in three tensors a layer."""
    return {
        f"model.layers.{layer}.{part}.weight": (experts * inner, width)
        for layer in range(layers)
        for part in ("gate_proj", "up_proj", "down_proj")
    }


def expert_map(layers: int, experts: int, width: int, inner: int, device: str) -> WeightMap:
    """Experts stacked, gate and up joined: (experts, 2 inner, width) and (experts, width, inner)."""
    parameters: dict[str, torch.Tensor] = {}
    placements: list[Placement] = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        both = torch.zeros(experts, 2 * inner, width, dtype=torch.bfloat16, device=device)
        down = torch.zeros(experts, width, inner, dtype=torch.bfloat16, device=device)
        parameters |= {f"{prefix}.gate_up_proj": both, f"{prefix}.down_proj": down}
        for e in range(experts):
            placements += [
                Placement.whole(f"{prefix}.{e}.gate_proj.weight", both[e, :inner]),
                Placement.whole(f"{prefix}.{e}.up_proj.weight", both[e, inner:]),
                Placement.whole(f"{prefix}.{e}.down_proj.weight", down[e]),
            ]
    return WeightMap(placements, parameters)


def dense_map(layers: int, experts: int, width: int, inner: int, device: str) -> WeightMap:
    """A parameter for each tensor."""
    parameters = {
        name: torch.zeros(shape, dtype=torch.bfloat16, device=device)
        for name, shape in dense_shapes(layers, experts, width, inner).items()
    }
    return WeightMap([Placement.whole(n, p) for n, p in parameters.items()], parameters)


def main() -> None:
    """Serve until the standard input ends."""
    kind, *sizes = sys.argv[1:]
    layers, experts, width, inner = map(int, sizes)
    make = {"experts": expert_map, "dense": dense_map}[kind]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    serve(make(layers, experts, width, inner, device))


if __name__ == "__main__":
    main()
