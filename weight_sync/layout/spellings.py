"""Names by which trainers hold the same weights: modules and checkpoints of mixture-of-experts models spell them apart.

The canonical ones are those that checkpoints of most families have: `mlp.experts.N.gate_proj.weight` and so on.
transformers 5 holds all experts of a layer in `mlp.experts.gate_up_proj` (X, 2 I, E) and `mlp.experts.down_proj`
(X, E, I); Mixtral's checkpoints have `block_sparse_moe.experts.N.w1.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch

from .fused import Fused

_MIXTRAL = re.compile(r"(.*)\.block_sparse_moe\.(gate|experts\.\d+)(?:\.w([123]))?\.weight")
_STACKED = (".experts.gate_up_proj", ".experts.down_proj")
_MATRICES = {"1": ".gate_proj", "2": ".down_proj", "3": ".up_proj", None: ""}


def stacked_experts(name: str, shape: Sequence[int]) -> Fused | None:
    """What a tensor of all experts of a layer is made of, where `name` is of one."""
    if not name.endswith(_STACKED) or len(shape) != 3:
        return None
    prefix, _, kind = name.rpartition(".")
    num_experts, rows, columns = shape
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    if rows % len(kinds) or not num_experts:
        return None
    size = (rows // len(kinds), columns)
    return Fused.stacked(
        [
            Fused.joined({f"{prefix}.{expert}.{kind}.weight": size for kind in kinds})
            for expert in range(num_experts)
        ]
    )


def canonical(
    named: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors under their canonical names, stacked experts, where they are whole, as views of matrices."""
    for name, tensor in named:
        fused = None
        if name.endswith(_STACKED) and not hasattr(tensor, "full_tensor"):
            fused = stacked_experts(name, tensor.shape)
        if fused is None:
            yield canonical_name(name), tensor
            continue
        size = (tensor.shape[1] * tensor.shape[0] // len(fused.parts), tensor.shape[2])
        for i, part in enumerate(fused.parts):
            yield part, fused.view(tensor, i, size)


def canonical_name(name: str) -> str:
    """What one tensor that is not stacked is called."""
    found = _MIXTRAL.fullmatch(name) if ".block_sparse_moe." in name else None
    if found is None:
        return name
    return f"{found[1]}.mlp.{found[2]}{_MATRICES[found[3]]}.weight"
