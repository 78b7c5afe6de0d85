"""What GPUs do with tables, under Triton's interpreter: packing, parts of tensors, and models of many allocations.

The interpreter is chosen when triton is imported, so the check runs as a process of its own: this file, as a script.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from interpreted import told_by

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """The verdict on each case."""
    return told_by(__file__)


@pytest.mark.parametrize(
    "case",
    [
        "all of a model",
        "the same again at other addresses",
        "what is known to be laid out alike",
        "what was begun with",
        "fewer tensors than before",
        "other strides and dtypes",
        "what stands for its negative",
        "what is not finite",
        "sums of tensors where they are",
        "a plan's copies",
        "resident parts in many allocations",
    ],
)
def test_under_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    assert interpreted[case] == "equal"


def main() -> None:
    sys.path.insert(0, str(HERE))
    import numpy as np
    import torch
    from sync_support import toy_map, weights

    from rollout_kernels.span_table import SpanTable, TilePlan
    from weight_sync.layout.device_sums import PieceList, addresses_of
    from weight_sync.layout.fingerprints import ArenaFingerprints
    from weight_sync.layout.manifest import Manifest, TensorMeta
    from weight_sync.layout.tensor_sums import tensor_fingerprint, unsigned
    from weight_sync.plan import plan as plans
    from weight_sync.plan.copies import DeviceCopies
    from weight_sync.plan.plan import compile_plan
    from weight_sync.publisher import packer as packers

    def noise(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in tensors.items()
        }

    names = weights(0.0)
    manifest = Manifest(
        tensors=tuple(TensorMeta.of(name, tensor) for name, tensor in names.items()),
        bucket_bytes=1 << 20,
    )

    def aligned(num_bytes: int) -> torch.Tensor:
        spare = torch.zeros(num_bytes + 256, dtype=torch.uint8)
        return spare[-spare.data_ptr() % 256 :][:num_bytes]

    buffer = aligned(manifest.arena_bytes)
    fingerprints = ArenaFingerprints(manifest)

    packer = packers.DevicePacker(manifest, buffer, fingerprints)

    def packs(
        tensors: dict[str, torch.Tensor],
        layouts: object = None,
        by_torch: str | None = None,
        addresses: np.ndarray[Any, Any] | None = None,
    ) -> str:
        rows = [manifest.index[name] for name in tensors]
        found, suspects = packer.pack(
            np.array(rows), list(tensors.values()), layouts=layouts, addresses=addresses
        )
        sure = [
            row
            for row, (name, tensor) in zip(rows, tensors.items(), strict=True)
            if tensor.isfinite().all() and name != by_torch
        ]
        if suspects.tolist() != sorted(set(rows) - set(sure)):
            return f"suspects {suspects}"
        for row, (name, tensor) in zip(rows, tensors.items(), strict=True):
            if not torch.equal(manifest.view(buffer, row), tensor.to(manifest.tensors[row].dtype)):
                return f"{name} differs"
        expected = fingerprints.values(buffer, rows).numpy().view("uint64")
        return "equal" if (found == expected).all() else "other fingerprints"

    print(f"all of a model={packs(noise(names, 1))}")
    print(f"the same again at other addresses={packs(noise(names, 2))}")
    known = object()
    said = [packs(noise(names, seed), known) for seed in (6, 7)]
    moved = noise(names, 8)
    moved["norm.weight"] = torch.cat([moved["norm.weight"]] * 2)[7:]  # aligned otherwise
    said += [packs(moved, known), packs(noise(names, 9), known)]
    print(f"what is known to be laid out alike={said[0] if len({*said}) == 1 else said}")
    packers._LEAST_PART = 2

    def begun(
        tensors: dict[str, torch.Tensor], counts: Iterable[int], *, check_finite: bool = True
    ) -> np.ndarray[Any, Any]:
        addresses = addresses_of(list(tensors.values()))
        for num in counts:
            packer.pack_ahead(
                list(tensors.values()), addresses, num, known, check_finite=check_finite
            )
        return addresses

    known = object()
    tensors = [dict(reversed(noise(names, seed).items())) for seed in range(20, 30)]
    said = [packs(tensors[0], known, addresses=begun(tensors[0], [9]))]
    lengths = [len(packer._ahead)]
    for counts in ([9], [2, 5, 9], [4]):
        addresses = begun(tensors[1], counts)
        lengths.append(len(packer._ahead))
        said.append(packs(tensors[1], known, addresses=addresses))
    begun(tensors[2], [9])
    said.append(packs(tensors[3], known, addresses=addresses_of(list(tensors[3].values()))))
    said.append(packs(tensors[4], known, addresses=begun(tensors[4], [9], check_finite=False)))
    moved = {**tensors[5], "embed.weight": torch.cat([tensors[5]["embed.weight"]] * 2)[1:25]}
    moved["embed.weight"] = torch.cat([torch.zeros(3).bfloat16(), moved["embed.weight"].flatten()])[
        3:
    ].view(24, 16)
    said.append(packs(moved, known, addresses=begun(moved, [9])))
    begun(tensors[6], [9])
    packer.wait()
    lengths.append(len(packer._ahead))
    begun(tensors[6], [9])
    said.append(packs(tensors[7]))
    lengths.append(len(packer._ahead))
    said += [packs(tensors[8], known, addresses=begun(tensors[8], [9]))]
    ok = {*said} == {"equal"} and lengths == [0, 3, 3, 1, 0, 0]
    print(f"what was begun with={'equal' if ok else (said, lengths)}")
    print(f"fewer tensors than before={packs(dict(list(noise(names, 3).items())[2:4]))}")
    odd = noise(names, 4)
    odd["embed.weight"] = odd["embed.weight"].t().contiguous().t()
    odd["norm.weight"] = odd["norm.weight"].float().bfloat16().float()
    odd["layers.0.q.weight"] = torch.cat([odd["layers.0.q.weight"]] * 2, 1)[:, 16:]
    print(f"other strides and dtypes={packs(odd)}")
    negative = torch._neg_view(odd["layers.0.k.weight"])  # type: ignore[attr-defined]
    said = packs({**odd, "layers.0.k.weight": negative}, by_torch="layers.0.k.weight")
    print(f"what stands for its negative={said}")
    odd["embed.weight"][2, 3] = float("-inf")
    odd["layers.0.scale"] = torch.tensor(float("inf")).to(odd["layers.0.scale"].dtype)
    print(f"what is not finite={packs(odd)}")

    listed = PieceList()
    long = torch.randn(70_001, generator=torch.Generator().manual_seed(10)).bfloat16().float()
    read = [
        *noise(names, 11).values(),
        long,
        long[1:],
        long.bfloat16()[1:20],
        long[:600].view(20, 30).t(),
    ]
    read += [long[:90].view(torch.int8), long[:7].double(), long[::3], torch._neg_view(long)]  # type: ignore[attr-defined]
    dtypes = [tensor.dtype for tensor in read]
    dtypes[len(names)] = torch.bfloat16
    added = [
        tensor for tensor, dtype in zip(read, dtypes, strict=True) if listed.add(tensor, dtype)
    ]
    addresses = torch.from_numpy(addresses_of(added).view("int64"))
    sums = listed.table(addresses, (), torch.device("cpu"), copy=False).run(addresses).tolist()
    wanted = [
        tensor_fingerprint(tensor.to(dtype))
        for tensor, dtype in zip(read[:-1], dtypes, strict=False)
    ]
    ok = len(added) == len(read) - 1 and [unsigned(value) for value in sums] == wanted
    print(f"sums of tensors where they are={'equal' if ok else sums}")

    weight_map = toy_map()
    plan = compile_plan(manifest, weight_map)
    packs(noise(names, 5))
    batch = plan._decoder._all
    DeviceCopies(manifest, buffer, batch.sources, batch.targets, batch.strided).run(buffer)
    wrong = [
        name
        for i, name in enumerate(names)
        if not torch.equal(weight_map.read(name), manifest.view(buffer, i))
    ]
    print(f"a plan's copies={wrong or 'equal'}")

    sums = plan._resident
    expected = plan.resident_fingerprints()
    parts = [(words, table._spans[0]) for table in sums._tables for words in table._words]

    class OnTiles(SpanTable):
        def __init__(self, spans: object, *, num_outputs: int, device: torch.device) -> None:
            self.num_outputs, self.device = num_outputs, device
            self._plan = TilePlan.compile(spans, device)  # type: ignore[arg-type]

    from weight_sync.layout import fingerprints as module

    module.SpanTable = OnTiles  # type: ignore[misc]
    table = plans.ResidentTable(parts, len(names))
    found = table.sums(None)
    exact = plans.PartSums(sums._exact, num_outputs=len(names))
    found = found + exact.values()
    ok = torch.equal(found, expected) and not exact.left and len(parts) > 1
    wrong = [name for name, a, b in zip(names, found, expected, strict=True) if a != b]
    print(f"resident parts in many allocations={'equal' if ok else wrong}")


if __name__ == "__main__":
    main()
