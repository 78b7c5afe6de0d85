"""A process that holds many small tensors and receives updates: `python -m rollout_benchmarks.small_host NUM SIZE`.

No model family consists of 20,000 tensors, so there is no engine here: the same `WeightReceiver` and `WeightService`
that live in an engine, over parameters in one arena. Prints its address; ends with its standard input.
"""

from __future__ import annotations

import sys

import torch

from weight_sync.layout.manifest import Manifest, TensorMeta
from weight_sync.layout.weight_map import Placement, WeightMap

from .idle_host import serve


def tensor_name(i: int) -> str:
    """Name of tensor `i`, of a length that is usual in large models."""
    return f"model.layers.{i // 384}.mlp.experts.{i // 3 % 128}.part_{i % 3}.weight"


def small_map(num_tensors: int, size: int) -> WeightMap:
    """`num_tensors` bfloat16 tensors (size, size), side by side in one arena."""
    metas = tuple(
        TensorMeta(name=tensor_name(i), shape=(size, size), dtype=torch.bfloat16)
        for i in range(num_tensors)
    )
    manifest = Manifest(tensors=metas, bucket_bytes=512 << 20)
    views = manifest.views(torch.zeros(manifest.arena_bytes, dtype=torch.uint8))
    parameters = {meta.name: view for meta, view in zip(metas, views, strict=True)}
    return WeightMap([Placement.whole(name, view) for name, view in parameters.items()], parameters)


def main(arguments: list[str]) -> int:
    """Serve until standard input ends."""
    num_tensors, size = map(int, arguments)
    serve(small_map(num_tensors, size))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
