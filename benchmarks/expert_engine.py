"""An engine that holds nothing but weights, in a process of its own: experts in stacked parameters, or dense ones.

Arguments: "experts" or "dense", layers, experts, width, inner width. Prints its address, and ends with its input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from weight_sync.layout.weight_map import Placement, WeightMap
from weight_sync.receiver.receiver import WeightReceiver
from weight_sync.receiver.service import WeightService
from weight_sync.wire.messages import WeightRequest
from weight_sync.wire.rpc import RpcServer


class IdleHost:
    """`WeightHost` of an engine that never steps: every moment is between two steps."""

    named: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def between_steps(
        self, action: Callable[[], Any], timeout_s: float, name: str | None = None
    ) -> Any:
        return action()

    def forgo(self, name: str) -> None:
        """Its actions run at once."""

    def unwritable(self) -> str | None:
        return None

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lend_kv_cache(self) -> None:
        """There is none."""

    def return_kv_cache(self) -> None:
        """There is none."""

    def weights_written(self, version: int, label: str | None, kv_policy: str | None) -> None:
        """Nothing is derived from them."""

    def label_changed(self, label: str) -> None:
        """Nobody asks for it."""

    def hold_outputs(self) -> None:
        """There are none."""

    def release_outputs(self, ok: bool) -> None:
        """There are none."""

    def weights_torn(self, reason: str) -> None:
        raise SystemExit(reason)


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
    receiver = WeightReceiver(make(layers, experts, width, inner, device), IdleHost())
    service = WeightService(receiver)
    server = RpcServer(service.handle, WeightRequest)
    server.start()
    print(server.address, flush=True)
    sys.stdin.read()
    server.close()
    service.close()


if __name__ == "__main__":
    main()
